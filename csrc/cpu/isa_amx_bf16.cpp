// Kernels for x86-64 with AVX-512 F, BW, DQ, VL and BF16 and with AMX: bfloat16 is multiplied by matrix tiles.
#include "kernels.h"

#if defined(C2C_HAS_AMX)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c,prefer-vector-width=512")
#endif

#define C2C_AVX512
#define C2C_AMX
#define C2C_MATRIX_TILES
#define C2C_NAMESPACE c2c_amx_bf16
#define C2C_ISA_NAME "amx_bf16"
#define LANES 16
#include "kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
