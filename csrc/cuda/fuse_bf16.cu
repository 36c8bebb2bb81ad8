// fuse_kv in bfloat16.
#include "fuse_kernels.cuh"

C2C_FUSE_KERNELS(bf16, __nv_bfloat16)
