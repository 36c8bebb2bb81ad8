// Decode beside absorbed segments in bfloat16.
#include "absorb_kernels.cuh"

ABSORB_KERNELS(bf16, __nv_bfloat16)
