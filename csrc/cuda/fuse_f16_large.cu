// fuse_kv in float16: the tile that takes a block of 144 KiB of shared memory.
#include "fuse_kernels.cuh"

C2C_LARGE_FUSE_KERNEL(f16, __half)
