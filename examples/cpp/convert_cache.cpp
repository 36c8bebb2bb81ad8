// What a store of KV caches would call: one layer of a sharer's cache, as int8 with scales, becomes a slice of a
// receiver's cache in bfloat16. Keys leave the sharer's rotary positions and take the receiver's. `make run`
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>
#include <random>
#include <vector>

#include "c2c.h"
#ifdef C2C_WITH_CUDA
#include <cuda_runtime.h>
#endif

namespace {

constexpr int TOKENS = 77, HEADS = 2, DIM = 32;        // the sharer's
constexpr int KV_HEADS = 3, HEAD_DIM = 64, ROOM = 96;  // the receiver's, and how many tokens its cache has room for
constexpr int START = 9;                               // where the converted tokens go
constexpr int WIDTH = HEADS * DIM;
constexpr uint16_t UNTOUCHED = 0x7fc0;  // NaN in bfloat16

#ifdef C2C_WITH_CUDA
// Memory that both the host and the device reach.
template <typename T>
struct Managed {
  using value_type = T;
  Managed() = default;
  template <typename U>
  Managed(const Managed<U> &) {}
  T *allocate(size_t n) {
    void *memory = nullptr;
    if (cudaMallocManaged(&memory, n * sizeof(T)) != cudaSuccess) throw std::bad_alloc();
    return static_cast<T *>(memory);
  }
  void deallocate(T *memory, size_t) { cudaFree(memory); }
  bool operator==(const Managed &) const { return true; }
  bool operator!=(const Managed &) const { return false; }
};
template <typename T>
using Numbers = std::vector<T, Managed<T>>;
#else
template <typename T>
using Numbers = std::vector<T>;
#endif

float from_bfloat16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

uint16_t to_bfloat16(float x) {  // to nearest, ties to even; x is finite
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

c2c_tensor tensor(void *data, int32_t dtype, int64_t a, int64_t b, int64_t c, int64_t d = 0) {  // strides in elements
  return {data, {a, b, c, d}, dtype};
}

// cos and sin of positions first, first + 1, ... for `dim` dimensions, the two halves alike.
void rotary(Numbers<float> &cos, Numbers<float> &sin, int first, int dim) {
  for (int t = 0; t < TOKENS; ++t)
    for (int d = 0; d < dim; ++d) {
      const double angle = (first + t) * std::pow(10000.0, -2.0 * (d % (dim / 2)) / dim);
      cos.push_back(static_cast<float>(std::cos(angle)));
      sin.push_back(static_cast<float>(std::sin(angle)));
    }
}

struct Cache {
  Numbers<int8_t> key = Numbers<int8_t>(HEADS * TOKENS * DIM), value = key;
  Numbers<float> key_scale = Numbers<float>(HEADS * TOKENS), value_scale = key_scale;
  Numbers<uint16_t> key_proj = Numbers<uint16_t>(KV_HEADS * HEAD_DIM * WIDTH), value_proj = key_proj;
  Numbers<float> remove_cos, remove_sin, apply_cos, apply_sin;
  Numbers<uint16_t> key_out = Numbers<uint16_t>(KV_HEADS * ROOM * HEAD_DIM, UNTOUCHED), value_out = key_out;
};

c2c_project_params parameters(Cache &c) {
  c2c_project_params p{};
  c2c_segment &s = p.segment;
  s.key = tensor(c.key.data(), C2C_I8, 0, TOKENS * DIM, DIM, 1);
  s.value = tensor(c.value.data(), C2C_I8, 0, TOKENS * DIM, DIM, 1);
  s.key_scale = tensor(c.key_scale.data(), C2C_F32, 0, TOKENS, 1);
  s.value_scale = tensor(c.value_scale.data(), C2C_F32, 0, TOKENS, 1);
  s.key_proj = tensor(c.key_proj.data(), C2C_BF16, HEAD_DIM * WIDTH, WIDTH, 1);
  s.value_proj = tensor(c.value_proj.data(), C2C_BF16, HEAD_DIM * WIDTH, WIDTH, 1);
  s.heads = HEADS, s.key_dim = s.value_dim = DIM, s.len = s.raw_len = TOKENS;
  p.remove_cos = tensor(c.remove_cos.data(), C2C_F32, 0, DIM, 1);
  p.remove_sin = tensor(c.remove_sin.data(), C2C_F32, 0, DIM, 1);
  p.apply_cos = tensor(c.apply_cos.data(), C2C_F32, 0, HEAD_DIM, 1);
  p.apply_sin = tensor(c.apply_sin.data(), C2C_F32, 0, HEAD_DIM, 1);
  p.key_out = tensor(c.key_out.data() + START * HEAD_DIM, C2C_BF16, 0, ROOM * HEAD_DIM, HEAD_DIM, 1);
  p.value_out = tensor(c.value_out.data() + START * HEAD_DIM, C2C_BF16, 0, ROOM * HEAD_DIM, HEAD_DIM, 1);
  p.batch = 1, p.kv_heads = KV_HEADS, p.head_dim = p.out_dim = HEAD_DIM, p.remove_dim = DIM, p.apply_dim = HEAD_DIM;
  return p;
}

// Dimension d of x turned by (cos, sin); sign -1 turns back.
double turned(const double *x, const float *cos, const float *sin, int d, int dim, int sign) {
  const int half = dim / 2;
  return x[d] * cos[d] + sign * sin[d] * (d < half ? -x[d + half] : x[d - half]);
}

// The largest difference from the formula, key_out = rotate(W unrotate(x)) and value_out = W y, relative to the largest
// number.
double largest_error(const Cache &c) {
  double worst = 0, largest = 0;
  for (int t = 0; t < TOKENS; ++t) {
    double key[WIDTH], raw[WIDTH], value[WIDTH];
    for (int i = 0; i < WIDTH; ++i) {
      const int at = i / DIM * TOKENS + t;
      raw[i] = c.key[at * DIM + i % DIM] * static_cast<double>(c.key_scale[at]);
      value[i] = c.value[at * DIM + i % DIM] * static_cast<double>(c.value_scale[at]);
    }
    for (int i = 0; i < WIDTH; ++i)
      key[i] = turned(raw + i / DIM * DIM, &c.remove_cos[t * DIM], &c.remove_sin[t * DIM], i % DIM, DIM, -1);
    for (int h = 0; h < KV_HEADS; ++h) {
      double projected[HEAD_DIM] = {}, values[HEAD_DIM] = {};
      for (int d = 0; d < HEAD_DIM; ++d)
        for (int i = 0; i < WIDTH; ++i) {
          const int at = (h * HEAD_DIM + d) * WIDTH + i;
          projected[d] += static_cast<double>(from_bfloat16(c.key_proj[at])) * key[i];
          values[d] += static_cast<double>(from_bfloat16(c.value_proj[at])) * value[i];
        }
      for (int d = 0; d < HEAD_DIM; ++d) {
        const int at = (h * ROOM + START + t) * HEAD_DIM + d;
        const float *cos = &c.apply_cos[t * HEAD_DIM], *sin = &c.apply_sin[t * HEAD_DIM];
        const double wanted = turned(projected, cos, sin, d, HEAD_DIM, 1);
        largest = std::max({largest, std::abs(wanted), std::abs(values[d])});
        worst = std::max({worst, std::abs(wanted - from_bfloat16(c.key_out[at])),
                          std::abs(values[d] - from_bfloat16(c.value_out[at]))});
      }
    }
  }
  return worst / largest;
}

// Whether nothing was written beside the slice.
bool rest_is_untouched(const Numbers<uint16_t> &out) {
  for (int at = 0; at < KV_HEADS * ROOM * HEAD_DIM; ++at) {
    const int t = at / HEAD_DIM % ROOM;
    if ((t < START || t >= START + TOKENS) && out[at] != UNTOUCHED) return false;
  }
  return true;
}

c2c_status convert(const c2c_project_params &params) {
#ifdef C2C_WITH_CUDA
  Numbers<char> workspace(std::max<int64_t>(1, c2c_project_kv_workspace_cuda(&params)));
  const c2c_status status = c2c_project_kv_cuda(&params, workspace.data(), nullptr);
  if (status.code == C2C_OK && cudaDeviceSynchronize() != cudaSuccess) return {C2C_CUDA_ERROR, -1};
  return status;
#else
  return c2c_project_kv_cpu(&params);
#endif
}

}  // namespace

int main() {
#ifdef C2C_WITH_CUDA
  const char *device = "cuda";
  if (*c2c_cuda_unavailable()) return std::fprintf(stderr, "%s\n", c2c_cuda_unavailable()), 1;
#else
  const char *device = c2c_cpu_isa();
#endif
  Cache cache;
  std::mt19937 random(7);
  std::uniform_real_distribution<float> number(-0.5f, 0.5f);
  for (auto *codes : {&cache.key, &cache.value})
    for (int8_t &x : *codes) x = static_cast<int8_t>(std::lround(254 * number(random)));
  for (auto *scales : {&cache.key_scale, &cache.value_scale})
    for (float &x : *scales) x = 0.01f + 0.01f * std::abs(number(random));
  for (auto *weights : {&cache.key_proj, &cache.value_proj})
    for (uint16_t &x : *weights) x = to_bfloat16(number(random));
  rotary(cache.remove_cos, cache.remove_sin, 0, DIM);
  rotary(cache.apply_cos, cache.apply_sin, START, HEAD_DIM);
  const c2c_status status = convert(parameters(cache));
  if (status.code != C2C_OK) return std::fprintf(stderr, "%s\n", c2c_status_text(status.code)), 1;
  const double error = largest_error(cache);
  const bool untouched = rest_is_untouched(cache.key_out) && rest_is_untouched(cache.value_out);
  std::printf("%s: %d tokens converted, largest error %.1e of the largest number, rest %s\n", device, TOKENS, error,
              untouched ? "untouched" : "OVERWRITTEN");
  return !(error < 1.0 / 128 &&
           untouched);  // 2^-8 is bfloat16's rounding; products of its numbers are summed in float32
}
