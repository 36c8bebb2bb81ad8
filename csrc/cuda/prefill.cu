// `merged_attention` for many queries: one launch over all runs. See prefill.cuh.

#include "prefill.cuh"

#include <algorithm>

#include "kernels.h"

// X(name, type, dtype, largest head dim, whether a block may have 163 KiB) of every kernel; head dims rise.
#define OF_ALL_DIMS(X, name, T, dtype, LARGE) \
  X(name, T, dtype, 64, LARGE) \
  X(name, T, dtype, 128, LARGE) \
  X(name, T, dtype, 256, LARGE)
#define OF_ALL_KERNELS(X) \
  OF_ALL_DIMS(X, f16, __half, C2C_F16, true) \
  OF_ALL_DIMS(X, bf16, __nv_bfloat16, C2C_BF16, true) \
  OF_ALL_DIMS(X, small_f16, __half, C2C_F16, false) \
  OF_ALL_DIMS(X, small_bf16, __nv_bfloat16, C2C_BF16, false)

#define KERNEL(name, T, dtype, DIM, LARGE) \
  extern "C" __global__ void __launch_bounds__(c2c::PrefillTile<DIM, LARGE>::THREADS, 1) \
      c2c_prefill_##name##_##DIM(const __grid_constant__ c2c::Attention p) { \
    c2c::prefill<T, c2c::PrefillTile<DIM, LARGE>>(p); \
  }
OF_ALL_KERNELS(KERNEL)

namespace c2c {

namespace {

struct Variant {
  int dim, rows, threads, shared;
  int8_t dtype;
  bool large;
  const void *kernel;
  const char *name;
};

#define VARIANT(name, T, dtype, DIM, LARGE) \
  {DIM, \
   PrefillTile<DIM, LARGE>::ROWS, \
   PrefillTile<DIM, LARGE>::THREADS, \
   PrefillTile<DIM, LARGE>::SHARED, \
   dtype, \
   LARGE, \
   reinterpret_cast<const void *>(&c2c_prefill_##name##_##DIM), \
   "c2c_prefill_" #name "_" #DIM},
const Variant VARIANTS[] = {OF_ALL_KERNELS(VARIANT)};

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
