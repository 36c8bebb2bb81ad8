// `merged_attention` for many queries on sm_90a, whose instructions no other architecture has. See prefill_wgmma.cuh.

#include "prefill_wgmma.cuh"

#include <algorithm>

#include "kernels.h"

#if defined(C2C_SM_90A) && defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "C2C_SM_90A is for compilations for sm_90a alone: these kernels would be empty"
#endif
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define PREFILL(T, DIM) c2c::prefill_wgmma<T, c2c::WgmmaTile<DIM>>(p);
#else
#define PREFILL(T, DIM)  // never launched: see wgmma_is_built
#endif
#define PREFILL_KERNEL(name, T, DIM) \
  extern "C" __global__ void __launch_bounds__(c2c::WgmmaTile<DIM>::THREADS + c2c::PRODUCERS, 1) \
      c2c_prefill_wgmma_##name##_##DIM(const __grid_constant__ c2c::MappedAttention p) { \
    PREFILL(T, DIM) \
  }
PREFILL_KERNEL(f16, __half, 64)
PREFILL_KERNEL(f16, __half, 128)
PREFILL_KERNEL(f16, __half, 256)
PREFILL_KERNEL(bf16, __nv_bfloat16, 64)
PREFILL_KERNEL(bf16, __nv_bfloat16, 128)
PREFILL_KERNEL(bf16, __nv_bfloat16, 256)

namespace c2c {

namespace {

struct Variant {
  int dim, rows, tokens, threads, shared;
  int8_t dtype;
  const void *kernel;
  const char *name;
};

#define VARIANT(name, dtype, DIM) \
  {DIM, \
   WgmmaTile<DIM>::ROWS, \
   WgmmaTile<DIM>::N, \
   WgmmaTile<DIM>::THREADS + PRODUCERS, \
   WgmmaTile<DIM>::SHARED, \
   dtype, \
   reinterpret_cast<const void *>(&c2c_prefill_wgmma_##name##_##DIM), \
   "c2c_prefill_wgmma_" #name "_" #DIM}
const Variant VARIANTS[] = {VARIANT(f16, C2C_F16, 64),   VARIANT(f16, C2C_F16, 128),   VARIANT(f16, C2C_F16, 256),
                            VARIANT(bf16, C2C_BF16, 64), VARIANT(bf16, C2C_BF16, 128), VARIANT(bf16, C2C_BF16, 256)};

// Keys or values as a map sees them. One that is broadcast over heads or batch has one of them, as strides of a map are
// not 0.
TileMap map_of(const Strided &t, int64_t dim, int64_t len, const Attention &p, int tokens) {
  const int64_t row = t.n * 2, head = t.h ? t.h * 2 : row, batch = t.b ? t.b * 2 : row;
  return {t.data, {dim, len, t.h ? p.kv_heads : 1, t.b ? p.batch : 1}, {row, head, batch}, tokens};
}

// Whether tiles of a run can be copied as they are stored, as far as maps go: 16-byte rows, strides below 2^40 bytes.
bool has_maps(const Run &run, int dtype) {
  if (!run.len || !run.vectorised || run.key_type != dtype || run.value_type != dtype) return false;
  if (run.index.data || run.key_scale.data || run.value_scale.data || !run.key.n || !run.value.n) return false;
  for (const Strided *t : {&run.key, &run.value})
    for (int64_t stride : {t->b, t->h, t->n})
      if (stride < 0 || stride >= int64_t{1} << 39) return false;
  return true;
}

}  // namespace

bool wgmma_is_built() {
#ifdef C2C_SM_90A
  return true;
#else
  return false;
#endif
}

c2c_status_code launch_prefill_wgmma(const Attention &p, Executor run, void *context) {
  const int dim = std::max(p.head_dim, p.value_dim);
  for (const Variant &v : VARIANTS) {
    if (v.dtype != p.dtype || v.dim < dim) continue;
    const int64_t rows = int64_t{p.q_len} * p.group, tiles = (rows + v.rows - 1) / v.rows;
    const int64_t blocks = tiles * p.batch * p.kv_heads;
    if (rows > INT32_MAX - v.rows || blocks > INT32_MAX) return C2C_UNSUPPORTED;
    if (!blocks) return C2C_OK;
    MappedAttention mapped{};
    TileMap maps[2 * MAX_RUNS] = {};
    mapped.attention = p;
    for (int number = 0; number < p.runs; ++number) {
      const Run &tokens = p.run[number];
      if (!has_maps(tokens, p.dtype)) continue;
      mapped.mapped[number] = 1;
      maps[2 * number] = map_of(tokens.key, p.head_dim, tokens.len, p, v.tokens);
      maps[2 * number + 1] = map_of(tokens.value, p.value_dim, tokens.len, p, v.tokens);
    }
    return run({v.kernel, v.name, static_cast<uint32_t>(blocks), static_cast<uint32_t>(v.threads),
                static_cast<uint32_t>(v.shared), &mapped, sizeof mapped, maps, 2 * p.runs,
                offsetof(MappedAttention, maps), offsetof(MappedAttention, mapped)},
               context);
  }
  return C2C_UNSUPPORTED;
}

}  // namespace c2c
