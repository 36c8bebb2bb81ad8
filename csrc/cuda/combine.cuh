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

// A row of the states: its place in the results, what its splits have left, and its maximum.
struct CombinedRow {
  int64_t batch;
  int head, query;
  const float2 *states;
  const float *sums;
  SoftmaxState total;

  // Its maximum, by a warp.
  __device__ __forceinline__ CombinedRow(const Decode &d, int64_t row) {
    const Attention &p = d.attention;
    const int rows = p.q_len * p.group, within = static_cast<int>(row % rows), lane = threadIdx.x % WARP;
    head = static_cast<int>(row / rows % p.kv_heads) * p.group + within % p.group;
    query = within / p.group;
    batch = row / rows / p.kv_heads;
    states = d.states + row * d.splits;
    sums = d.sums + row * d.splits * p.value_dim;
    for (int split = lane; split < d.splits; split += WARP) total.max = fmaxf(total.max, states[split].x);
    total.max = warp_max(total.max);
    if (p.sinks) total.max = fmaxf(total.max, sink(p));
  }

  __device__ __forceinline__ float sink(const Attention &p) const {
    return load_float(p.sinks, head * p.sinks_stride, p.sinks_type) * LOG2E;
  }

  // What `count` splits from `first` on hold of the normaliser, by a warp.
  __device__ __forceinline__ float share(int first, int count) const {
    float found = 0.0f;
    for (int i = threadIdx.x % WARP; i < count; i += WARP)
      found += states[first + i].y * total.weight(states[first + i].x);
    return warp_sum(found);
  }

  // The sum over all runs and the sink.
  __device__ __forceinline__ void add_up(const Attention &p, const float *shares) {
    for (int number = 0; number < p.runs; ++number) total.sum += shares[number];
    if (p.sinks) total.sum += total.weight(sink(p));
  }

  // Adds the sums of those splits that warp `warp` of COMBINE_WARPS takes.
  __device__ __forceinline__ void add_sums(const Attention &p, int first, int count, int warp,
                                           float (&acc)[LARGEST_DIM / WARP]) const {
    const int lane = threadIdx.x % WARP;
    for (int i = warp; i < count; i += COMBINE_WARPS) {
      const float2 state = states[first + i];
      if (state.y == 0.0f) continue;
      const float factor = total.weight(state.x);
      const float *const found = sums + static_cast<int64_t>(first + i) * p.value_dim;
#pragma unroll
      for (int j = 0; j < LARGEST_DIM / WARP; ++j)
        if (j * WARP + lane < p.value_dim) acc[j] += found[j * WARP + lane] * factor;
    }
  }

  __device__ __forceinline__ void store(const Attention &p, int dim, float x) const {
    store_float(const_cast<void *>(p.out.data), batch * p.out.b + head * p.out.h + query * p.out.n + dim, p.out_type,
                x);
  }

  // lse and mass, by threads `thread` = 0, 1, ...
  __device__ __forceinline__ void store_shares(const Attention &p, int thread, const float *shares) const {
    if (thread == 0 && p.lse.data)
      store_float(const_cast<void *>(p.lse.data), batch * p.lse.b + head * p.lse.h + query * p.lse.n, C2C_F32,
                  total.finish());
    if (thread < p.runs && p.mass.data)
      store_float(const_cast<void *>(p.mass.data), batch * p.mass.b + head * p.mass.h + query * p.mass.n + thread,
                  C2C_F32, shares[thread] / total.divisor());
  }
};

// Which warp or lane takes a split depends on its number within its run alone: splits that are empty change no bit.
__device__ __forceinline__ void combine_row(const Decode &d) {
  __shared__ float sums[COMBINE_WARPS][LARGEST_DIM];
  __shared__ float shares[MAX_RUNS];
  const Attention &p = d.attention;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  CombinedRow row(d, blockIdx.x);
  float acc[LARGEST_DIM / WARP] = {};
  for (int number = 0; number < p.runs; ++number) {
    const int first = d.first_split[number], count = d.first_split[number + 1] - first;
    if (warp == 0) {
      const float share = row.share(first, count);
      if (lane == 0) shares[number] = share;
    }
    row.add_sums(p, first, count, warp, acc);
  }
#pragma unroll
  for (int j = 0; j < LARGEST_DIM / WARP; ++j)
    if (j * WARP + lane < p.value_dim) sums[warp][j * WARP + lane] = acc[j];
  __syncthreads();
  row.add_up(p, shares);
  const float divisor = row.total.divisor();
  for (int dim = threadIdx.x; dim < p.value_dim; dim += COMBINE_THREADS) {
    float x = 0.0f;
    for (int w = 0; w < COMBINE_WARPS; ++w) x += sums[w][dim];
    row.store(p, dim, x / divisor);
  }
  row.store_shares(p, threadIdx.x, shares);
}

}  // namespace c2c
