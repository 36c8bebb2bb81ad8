// fuse_kv in float16.
#include "fuse_kernels.cuh"

C2C_FUSE_KERNELS(f16, __half)
