// What every kernel shares: loads of single numbers, the softmax state, logits and what a row sees of a run.
#pragma once

#include "c2c.h"
#include "params.h"
#include "ptx.cuh"

namespace c2c {

constexpr float INF = __builtin_huge_valf();
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
constexpr float LOWEST = -1.7014118346046923e38f;  // -2^127, of finite masks in base 2: as lse and back it is exact
constexpr int WARP = 32;

// One number of any floating dtype as float32.
__device__ __forceinline__ float load_float(const void *data, int64_t at, int type) {
  if (type == C2C_F32) return static_cast<const float *>(data)[at];
  if (type == C2C_BF16) return __bfloat162float(static_cast<const __nv_bfloat16 *>(data)[at]);
  return __half2float(static_cast<const __half *>(data)[at]);
}

// f with a pointer to the type that a tensor of floats has.
template <typename F>
__device__ __forceinline__ void with_floats(const void *data, int type, F f) {
  if (type == C2C_F32)
    f(static_cast<const float *>(data));
  else if (type == C2C_BF16)
    f(static_cast<const __nv_bfloat16 *>(data));
  else
    f(static_cast<const __half *>(data));
}

__device__ __forceinline__ int64_t load_integer(const void *data, int64_t at, int type) {
  return type == C2C_I32 ? static_cast<const int32_t *>(data)[at] : static_cast<const int64_t *>(data)[at];
}

__device__ __forceinline__ void store_float(void *data, int64_t at, int type, float x) {
  if (type == C2C_F32)
    static_cast<float *>(data)[at] = x;
  else if (type == C2C_BF16)
    static_cast<__nv_bfloat16 *>(data)[at] = __float2bfloat16_rn(x);
  else
    static_cast<__half *>(data)[at] = __float2half_rn(x);
}

// A float8_e4m3fn code. Its low 7 bits, moved up by 7, are a float16 with the same mantissa and an exponent 8 less.
__device__ __forceinline__ float from_e4m3(uint32_t code) {
  if ((code & 0x7f) == 0x7f) return __int_as_float(0x7fffffff);
  const float size = __half2float(__ushort_as_half(static_cast<unsigned short>((code & 0x7f) << 7))) * 256.0f;
  return code & 0x80 ? -size : size;
}

// Valid tokens of a batch row, never outside the tensor: values are not checked on a device.
__device__ __forceinline__ int valid_tokens(const Strided &lengths, int type, int batch, int len) {
  if (!lengths.data) return len;
  const int64_t length = load_integer(lengths.data, batch * lengths.b, type);
  return static_cast<int>(length < 0 ? 0 : length > len ? len : length);
}

__device__ __forceinline__ int valid_tokens(const Run &run, int batch) {
  return valid_tokens(run.lengths, run.lengths_type, batch, run.len);
}

// The state of a running softmax in base 2: max of the logits seen, sum of exp2(logit - max).
//
// Empty case: before any visible token max = -inf and sum = 0. A tile or state with max = -inf changes nothing, bit
// for bit: its weights are 0, and the factor on what was there is exp2(0) = 1. A state that is still empty at the end
// finishes as lse = -inf with divisor 1, never NaN.
struct SoftmaxState {
  float max = -INF;
  float sum = 0.0f;

  // What is subtracted from logits: 0 where nothing has been seen.
  __device__ __forceinline__ float base() const { return max == -INF ? 0.0f : max; }

  // Takes in a tile's maximum; returns the factor for everything accumulated so far.
  __device__ __forceinline__ float update(float tile_max) {
    const float old = max;
    max = fmaxf(max, tile_max);
    const float factor = exp2_approx(old - base());
    sum *= factor;
    return factor;
  }

  // Takes in another state. Returns the factor for what this one has accumulated; the other's is `weight(other.max)`.
  __device__ __forceinline__ float merge(const SoftmaxState &other) {
    const float factor = update(other.max);
    sum += other.sum * weight(other.max);
    return factor;
  }

  // Factor of sums that were kept relative to another maximum, at most this one's.
  __device__ __forceinline__ float weight(float other_max) const { return exp2_approx(other_max - base()); }

  __device__ __forceinline__ float divisor() const { return sum == 0.0f ? 1.0f : sum; }

  // ln of the sum of exp(logit), natural.
  __device__ __forceinline__ float finish() const { return sum == 0.0f ? -INF : (max + log2f(sum)) * LN2; }
};

// A score in base 2: softcap * tanh(z / softcap) with tanh x = 1 - 2 / (1 + e^2x), or x - x^3 / 3 where x is so small
// that the former would lose z. `inner` and `outer`: before and behind tanh; inner takes z to 2 log2(e) x.
__device__ __forceinline__ float capped(float z, float inner, float outer) {
  constexpr float HALF_LN2 = LN2 / 2;
  const float twice = z * inner, x = twice * HALF_LN2,
              high = outer - __fdividef(2.0f * outer, 1.0f + exp2_approx(twice));
  return fabsf(x) < 0.02f ? outer * fmaf(x * x, x * (-1.0f / 3), x) : high;
}

// What a number of an additive mask adds in base 2, finite where the number is: finfo.min hides nothing from a row that
// has nothing else to see.
__device__ __forceinline__ float additive(float mask) {
  const float product = mask * LOG2E;
  return mask > -INF ? fmaxf(product, LOWEST) : product;
}

// log2 of a gate; one that is not above 0 closes its token.
__device__ __forceinline__ float log_gate(float gate) { return log2_approx(fmaxf(gate, 0.0f)); }  // NaN: 0

// A row of a tile: one query of one query head.
struct Row {
  int query, head;
  int64_t place;  // position compared with the run's tokens: an index for the own cache, else a position
  bool inside;
};

// Row number `row` of a KV head: query * group + head within the group, so that tokens are read once for all of them.
__device__ __forceinline__ Row row_of(const Attention &p, int number, int batch, int kv_head, int row, int own_end) {
  Row r;
  r.inside = row < p.q_len * p.group;
  r.query = r.inside ? row / p.group : 0;
  r.head = kv_head * p.group + (r.inside ? row % p.group : 0);
  r.place = own_end - p.q_len + r.query;
  if (number && p.query_positions.data && r.inside)
    r.place = load_integer(p.query_positions.data, batch * p.query_positions.b + r.query * p.query_positions.n,
                           p.query_positions_type);
  return r;
}

// A token of a run, as all rows see it.
struct Column {
  int64_t place;      // compared with Row.place, where run.placed
  float key_scale;    // factor of products
  float value_scale;  // factor of weights
  bool inside;        // below the batch row's length
};

// Where a token lies in key and value; -1 outside of them, where nothing is read and zeros count.
__device__ __forceinline__ int stored_token(const Run &run, int batch, int token) {
  if (!run.index.data) return token;
  const int64_t at = load_integer(run.index.data, batch * run.index.b + token * run.index.n, run.index_type);
  return at >= 0 && at < run.stored ? static_cast<int>(at) : -1;
}

__device__ __forceinline__ float scale_of(const Strided &scale, int type, int batch, int kv_head, int stored) {
  if (!scale.data) return 1.0f;
  if (stored < 0) return 0.0f;
  return load_float(scale.data, batch * scale.b + kv_head * scale.h + stored * scale.n, type);
}

__device__ __forceinline__ Column column_of(const Run &run, int batch, int kv_head, int token, int end) {
  Column c{token, 1.0f, 1.0f, token < end};
  if (!c.inside) return c;
  if (run.positions.data)
    c.place = load_integer(run.positions.data, batch * run.positions.b + token * run.positions.n, run.positions_type);
  if (run.key_scale.data || run.value_scale.data) {
    const int stored = stored_token(run, batch, token);
    c.key_scale = scale_of(run.key_scale, run.key_scale_type, batch, kv_head, stored);
    c.value_scale = scale_of(run.value_scale, run.value_scale_type, batch, kv_head, stored);
  }
  return c;
}

// Whether a row's place lets it see a token's.
__device__ __forceinline__ bool in_sight(int64_t row_place, int64_t place, bool causal, int64_t window) {
  return (!causal || place <= row_place) && (!window || place > row_place - window);
}

// NARROW: numbers below 6e-8 are lost, so that a weight times a scale is not rounded to T.
template <typename T>
struct Precision {
  static constexpr bool NARROW = false;
};
template <>
struct Precision<__half> {
  static constexpr bool NARROW = true;
};

// The 16-byte chunk of a row of shared memory in which logical chunk `chunk` lies: rows of 128 bytes or more, read
// eight at a time by ldmatrix, touch all banks.
__device__ __forceinline__ int swizzled(int row, int chunk) { return chunk ^ (row & 7); }

}  // namespace c2c
