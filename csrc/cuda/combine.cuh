// Combine: one block merges the states that the splits of one row have left, in the order of the tokens.
#pragma once

#include "common.cuh"
#include "decode.h"
#include "kernels.h"

namespace c2c {

constexpr int COMBINE_WARPS = COMBINE_THREADS / WARP;

__device__ __forceinline__ float warp_max(float x) {
  for (int step = WARP / 2; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
  for (int step = WARP / 2; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// Which warp or lane takes a split depends on its number within its run alone: splits that are empty change no bit.
__device__ __forceinline__ void combine_row(const Decode &d) {
  __shared__ float sums[COMBINE_WARPS][LARGEST_DIM];
  __shared__ float shares[MAX_RUNS];
  const Attention &p = d.attention;
  const int64_t row = blockIdx.x;
  const int rows = p.q_len * p.group, within = static_cast<int>(row % rows);
  const int head = static_cast<int>(row / rows % p.kv_heads) * p.group + within % p.group, query = within / p.group;
  const int64_t batch = row / rows / p.kv_heads;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const float2 *const states = d.states + row * d.splits;
  SoftmaxState total;
  for (int split = lane; split < d.splits; split += WARP) total.max = fmaxf(total.max, states[split].x);
  total.max = warp_max(total.max);
  if (p.sinks) total.max = fmaxf(total.max, load_float(p.sinks, head * p.sinks_stride, p.sinks_type) * LOG2E);
  float acc[LARGEST_DIM / WARP] = {};
  for (int number = 0; number < p.runs; ++number) {
    const int first = d.first_split[number], count = d.first_split[number + 1] - first;
    if (warp == 0) {
      float share = 0.0f;
      for (int i = lane; i < count; i += WARP) share += states[first + i].y * total.weight(states[first + i].x);
      share = warp_sum(share);
      if (lane == 0) shares[number] = share;
    }
    for (int i = warp; i < count; i += COMBINE_WARPS) {
      const float2 state = states[first + i];
      if (state.y == 0.0f) continue;
      const float factor = total.weight(state.x);
      const float *const found = d.sums + (row * d.splits + first + i) * p.value_dim;
#pragma unroll
      for (int j = 0; j < LARGEST_DIM / WARP; ++j)
        if (j * WARP + lane < p.value_dim) acc[j] += found[j * WARP + lane] * factor;
    }
  }
#pragma unroll
  for (int j = 0; j < LARGEST_DIM / WARP; ++j)
    if (j * WARP + lane < p.value_dim) sums[warp][j * WARP + lane] = acc[j];
  __syncthreads();
  for (int number = 0; number < p.runs; ++number) total.sum += shares[number];
  if (p.sinks) total.sum += total.weight(load_float(p.sinks, head * p.sinks_stride, p.sinks_type) * LOG2E);
  const float divisor = total.divisor();
  for (int dim = threadIdx.x; dim < p.value_dim; dim += COMBINE_THREADS) {
    float x = 0.0f;
    for (int w = 0; w < COMBINE_WARPS; ++w) x += sums[w][dim];
    store_float(const_cast<void *>(p.out.data), batch * p.out.b + head * p.out.h + query * p.out.n + dim, p.out_type,
                x / divisor);
  }
  if (threadIdx.x == 0 && p.lse.data)
    store_float(const_cast<void *>(p.lse.data), batch * p.lse.b + head * p.lse.h + query * p.lse.n, C2C_F32,
                total.finish());
  if (threadIdx.x < p.runs && p.mass.data)
    store_float(const_cast<void *>(p.mass.data), batch * p.mass.b + head * p.mass.h + query * p.mass.n + threadIdx.x,
                C2C_F32, shares[threadIdx.x] / divisor);
}

}  // namespace c2c
