// Kernels for whatever the compiler targets by itself, with vectors of four floats.
#include "kernels.h"

#if !defined(__aarch64__)
#define C2C_NAMESPACE c2c_baseline
#define C2C_ISA_NAME "baseline"
#define LANES 4
#include "kernels.inl"
#endif
