// fuse_kv in bfloat16: the tile that takes a block of 144 KiB of shared memory.
#include "fuse_kernels.cuh"

C2C_LARGE_FUSE_KERNEL(bf16, __nv_bfloat16)
