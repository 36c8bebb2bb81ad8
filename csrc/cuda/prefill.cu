// `merged_attention` for many queries: one launch over all runs. See prefill.cuh.

#include "prefill.cuh"

#include <algorithm>

#include "kernels.h"

#define PREFILL_KERNEL(name, T, DIM, LARGE) \
  extern "C" __global__ void __launch_bounds__(c2c::PrefillTile<DIM, LARGE>::THREADS, 1) \
      c2c_prefill_##name##_##DIM(const __grid_constant__ c2c::Attention p) { \
    c2c::prefill<T, c2c::PrefillTile<DIM, LARGE>>(p); \
  }
PREFILL_KERNEL(f16, __half, 64, true)
PREFILL_KERNEL(f16, __half, 128, true)
PREFILL_KERNEL(f16, __half, 256, true)
PREFILL_KERNEL(bf16, __nv_bfloat16, 64, true)
PREFILL_KERNEL(bf16, __nv_bfloat16, 128, true)
PREFILL_KERNEL(bf16, __nv_bfloat16, 256, true)
PREFILL_KERNEL(small_f16, __half, 64, false)
PREFILL_KERNEL(small_f16, __half, 128, false)
PREFILL_KERNEL(small_f16, __half, 256, false)
PREFILL_KERNEL(small_bf16, __nv_bfloat16, 64, false)
PREFILL_KERNEL(small_bf16, __nv_bfloat16, 128, false)
PREFILL_KERNEL(small_bf16, __nv_bfloat16, 256, false)

namespace c2c {

namespace {

struct Variant {
  int dim, rows, threads, shared;
  int8_t dtype;
  bool large;
  const void *kernel;
  const char *name;
};

#define VARIANT(name, dtype, DIM, LARGE) \
  {DIM, \
   PrefillTile<DIM, LARGE>::ROWS, \
   PrefillTile<DIM, LARGE>::THREADS, \
   PrefillTile<DIM, LARGE>::SHARED, \
   dtype, \
   LARGE, \
   reinterpret_cast<const void *>(&c2c_prefill_##name##_##DIM), \
   "c2c_prefill_" #name "_" #DIM}
const Variant VARIANTS[] = {
    VARIANT(f16, C2C_F16, 64, true),           VARIANT(f16, C2C_F16, 128, true),
    VARIANT(f16, C2C_F16, 256, true),          VARIANT(bf16, C2C_BF16, 64, true),
    VARIANT(bf16, C2C_BF16, 128, true),        VARIANT(bf16, C2C_BF16, 256, true),
    VARIANT(small_f16, C2C_F16, 64, false),    VARIANT(small_f16, C2C_F16, 128, false),
    VARIANT(small_f16, C2C_F16, 256, false),   VARIANT(small_bf16, C2C_BF16, 64, false),
    VARIANT(small_bf16, C2C_BF16, 128, false), VARIANT(small_bf16, C2C_BF16, 256, false),
};

}  // namespace

c2c_status_code launch_prefill(const Attention &p, int capability, Executor run, void *context) {
  if (capability == 90) return launch_prefill_wgmma(p, run, context);
  const int dim = std::max(p.head_dim, p.value_dim);
  for (const Variant &v : VARIANTS) {
    if (v.dtype != p.dtype || v.dim < dim || v.large != has_large_blocks(capability)) continue;
    const int64_t rows = int64_t{p.q_len} * p.group, tiles = (rows + v.rows - 1) / v.rows;
    const int64_t blocks = tiles * p.batch * p.kv_heads;
    if (rows > INT32_MAX - v.rows || blocks > INT32_MAX) return C2C_UNSUPPORTED;
    if (!blocks) return C2C_OK;
    return run({v.kernel, v.name, static_cast<uint32_t>(blocks), static_cast<uint32_t>(v.threads),
                static_cast<uint32_t>(v.shared), &p, sizeof p},
               context);
  }
  return C2C_UNSUPPORTED;
}

}  // namespace c2c
