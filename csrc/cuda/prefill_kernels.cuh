// The kernels of prefill for one size of blocks. See prefill.cuh.
#pragma once

#include "prefill.cuh"
#include "prefill.h"

// X(name, type, dtype, largest head dim, whether a block may have 163 KiB) of every kernel.
#define PREFILL_DIMS(X, name, T, dtype, LARGE) \
  X(name, T, dtype, 64, LARGE) \
  X(name, T, dtype, 128, LARGE) \
  X(name, T, dtype, 256, LARGE)
#define PREFILL_KERNEL(name, T, dtype, DIM, LARGE) \
  extern "C" __global__ void __launch_bounds__(c2c::PrefillTile<DIM, LARGE>::THREADS, 1) \
      c2c_prefill_##name##_##DIM(const __grid_constant__ c2c::Attention p) { \
    c2c::prefill<T, c2c::PrefillTile<DIM, LARGE>>(p); \
  }
#define PREFILL_VARIANT(name, T, dtype, DIM, LARGE) \
  {DIM, \
   c2c::PrefillTile<DIM, LARGE>::ROWS, \
   c2c::PrefillTile<DIM, LARGE>::THREADS, \
   c2c::PrefillTile<DIM, LARGE>::SHARED, \
   dtype, \
   reinterpret_cast<const void *>(&c2c_prefill_##name##_##DIM), \
   "c2c_prefill_" #name "_" #DIM},
// `list` of the kernels named after f16 and bf16.
#define PREFILL_KERNELS(list, f16, bf16, LARGE) \
  PREFILL_DIMS(PREFILL_KERNEL, f16, __half, C2C_F16, LARGE) \
  PREFILL_DIMS(PREFILL_KERNEL, bf16, __nv_bfloat16, C2C_BF16, LARGE) \
  const c2c::PrefillVariant c2c::list[] = {PREFILL_DIMS(PREFILL_VARIANT, f16, __half, C2C_F16, LARGE) \
                                               PREFILL_DIMS(PREFILL_VARIANT, bf16, __nv_bfloat16, C2C_BF16, LARGE)};
