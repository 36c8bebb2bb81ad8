// Who folds which piece of the queries, and when it is done, without a launch in between.
//
// Each piece has a mark, in which a block that takes it on leaves the call's own number (even) and, once it has folded,
// that number + 1. With anything else in its mark a piece is free. Blocks of raw tokens take on what they find free
// before they wait, so they wait only for blocks that run and wait for nobody: nothing can block, in whatever order a
// device starts blocks. Combine clears the marks for the next run of a CUDA graph.
#pragma once

#include "absorb.h"
#include "common.cuh"

namespace c2c {

__device__ __forceinline__ bool is_free(uint64_t mark, uint64_t call) { return mark != call && mark != call + 1; }

// Whether the piece of that mark was free and is now this block's. All threads call it.
__device__ __forceinline__ bool taken_on(uint64_t *mark, uint64_t call) {
  bool mine = false;
  if (threadIdx.x == 0) {
    const uint64_t found = load_acquire(mark);
    mine = is_free(found, call) && compare_and_swap(mark, found, call) == found;
  }
  return __syncthreads_or(mine);
}

// After all threads have stored what they fold.
__device__ __forceinline__ void tell_folded(uint64_t *mark, uint64_t call) {
  __syncthreads();
  if (threadIdx.x == 0) store_release(mark, call + 1);
}

__device__ __forceinline__ bool all_folded(const uint64_t *marks, int count, uint64_t call) {
  bool missing = false;
  for (int i = threadIdx.x; i < count; i += blockDim.x) missing = missing || load_acquire(marks + i) != call + 1;
  return !__syncthreads_or(missing);
}

__device__ __forceinline__ bool any_free(const uint64_t *marks, int count, uint64_t call) {
  bool found = false;
  for (int i = threadIdx.x; i < count; i += blockDim.x) found = found || is_free(load_acquire(marks + i), call);
  return __syncthreads_or(found);
}

__device__ __forceinline__ void wait_until_folded(const uint64_t *marks, int count, uint64_t call) {
  for (int i = threadIdx.x; i < count; i += blockDim.x)
    while (load_acquire(marks + i) != call + 1) {
    }
  __syncthreads();
}

}  // namespace c2c
