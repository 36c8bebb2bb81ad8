// Kernels for x86-64 with AVX2, FMA and F16C.
#include "kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define C2C_AVX2
#define C2C_NAMESPACE c2c_avx2
#define C2C_ISA_NAME "avx2"
#define LANES 8
#include "kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
