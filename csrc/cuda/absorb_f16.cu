// Decode beside absorbed segments in float16.
#include "absorb_kernels.cuh"

ABSORB_KERNELS(f16, __half)
