// Prefill where a block has 99 KiB of shared memory.
#include "prefill_kernels.cuh"

PREFILL_KERNELS(prefill_small, small_f16, small_bf16, false)
