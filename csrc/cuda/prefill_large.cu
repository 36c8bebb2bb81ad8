// Prefill where a block may have 163 KiB of shared memory.
#include "prefill_kernels.cuh"

PREFILL_KERNELS(prefill_large, f16, bf16, true)
