// Kernels for 64-bit Arm, with vectors of four floats.
#include "kernels.h"

#if defined(__aarch64__)
#define C2C_NAMESPACE c2c_neon
#define C2C_ISA_NAME "neon"
#define LANES 4
#include "kernels.inl"
#endif
