// Combine beside absorbed segments: a block merges the states of all rows of a KV head, so that the value projector is
// read once. Runs in receiver space are summed exactly as combine_row does; what an absorbed segment has left is summed
// over its splits in their order, normalised, and multiplied by the projector in two 16-bit parts.
#pragma once

#include "absorb_fold.cuh"
#include "combine.cuh"

namespace c2c {

// Shared memory: results of all rows, then raw sums of 16 rows.
struct CombineShared {
  float *results;  // [rows, result_pitch], zeros beyond value_dim
  float *raw;      // [16, width + COMBINE_PITCH_PAD]
  float *shares;   // [rows, MAX_RUNS]
  float2 *totals;  // [rows]: max and divisor

  __device__ __forceinline__ CombineShared(float *shared, int rows, int result_pitch) {
    totals = reinterpret_cast<float2 *>(shared);
    shares = shared + 2 * (rows + rows % 2);
    results = shares + (rows * MAX_RUNS + 3) / 4 * 4;
    raw = results + rows * result_pitch;
  }
};

// Rows `team`, team + 2, ... of the KV head: runs in receiver space, normalised, and shares of all. Four warps a team.
__device__ __forceinline__ void combine_direct(const AbsorbDecode &a, const CombineShared &shared, int64_t first_row,
                                               int rows) {
  __shared__ float sums[2][COMBINE_WARPS][LARGEST_DIM];
  const Decode &d = a.decode;
  const Attention &p = d.attention;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % COMBINE_WARPS;
  const int team = threadIdx.x / COMBINE_THREADS, thread = threadIdx.x % COMBINE_THREADS;
  for (int within = team; within < rows; within += 2) {
    CombinedRow row(d, first_row + within);
    float *const shares = shared.shares + within * MAX_RUNS;
    float acc[LARGEST_DIM / WARP] = {};
    for (int number = 0; number < p.runs; ++number) {
      const int first = d.first_split[number], count = d.first_split[number + 1] - first;
      if (warp == number % COMBINE_WARPS) {
        const float share = row.share(first, count);
        if (lane == 0) shares[number] = share;
      }
      if (a.absorption.place[number] < 0) row.add_sums(p, first, count, warp, acc);
    }
#pragma unroll
    for (int j = 0; j < LARGEST_DIM / WARP; ++j)
      if (j * WARP + lane < p.value_dim) sums[team][warp][j * WARP + lane] = acc[j];
    barrier_sync(1 + team, COMBINE_THREADS);
    row.add_up(p, shares);
    const float divisor = row.total.divisor();
    for (int dim = thread; dim < a.result_pitch; dim += COMBINE_THREADS) {
      float x = 0.0f;
      for (int w = 0; dim < p.value_dim && w < COMBINE_WARPS; ++w) x += sums[team][w][dim];
      shared.results[within * a.result_pitch + dim] = x / divisor;
    }
    if (thread == 0) shared.totals[within] = make_float2(row.total.max, divisor);
    row.store_shares(p, thread, shares);
    barrier_sync(1 + team, COMBINE_THREADS);
  }
}

// Raw sums of rows first .. + 15 of the KV head over all splits, normalised; zeros beyond them. A thread sums eight
// columns; each of the lanes that have the same row looks up a split's state.
__device__ __forceinline__ void sum_raw(const AbsorbDecode &a, const Absorbed &s, const CombineShared &shared,
                                        int64_t first_row, int first, int rows) {
  const Decode &d = a.decode;
  const int width = s.value.width, eights = width / 8, lanes = min(eights, WARP);
  const int64_t between = scale_place(d.attention, s, 0, 1, 0);
  for (int at = threadIdx.x; at < COMBINE_ROWS * eights; at += ABSORB_COMBINE_THREADS) {
    const int within = at / eights, eight = at % eights, number = min(first + within, rows - 1);
    const int64_t row = first_row + number;
    const float2 *const states = d.states + row * d.splits + d.first_split[s.number];
    const __half *const sums = static_cast<const __half *>(s.sums) + row * s.splits * width + eight * 8;
    const float *const scales = s.scales + scale_place(d.attention, s, row, 0, eight * 8 / (width / ABSORB_WARPS));
    SoftmaxState total;
    total.max = shared.totals[number].x;
    float x[8] = {};
    for (int start = 0; start < s.splits; start += lanes) {
      const int mine = start + threadIdx.x % lanes;
      float factors = 0.0f;
      if (first + within < rows && mine < s.splits) {
        const float2 state = states[mine];
        factors = state.y == 0.0f ? 0.0f : total.weight(state.x) / shared.totals[number].y;
      }
      const int count = min(lanes, s.splits - start);
#pragma unroll 4
      for (int i = 0; i < count; ++i) {
        float factor = __shfl_sync(~0u, factors, i, lanes);
        if (factor != 0.0f) {
          factor *= scales[(start + i) * between];
          const uint4 words = *reinterpret_cast<const uint4 *>(sums + static_cast<int64_t>(start + i) * width);
          const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
          for (int pair = 0; pair < 4; ++pair) {
            const float2 both = unpack<__half>(pairs[pair]);
            x[2 * pair] += both.x * factor;
            x[2 * pair + 1] += both.y * factor;
          }
        }
      }
    }
    // Of eight neighbours four write their first half, four their second: all banks.
    float4 *const to = reinterpret_cast<float4 *>(shared.raw + within * (width + COMBINE_PITCH_PAD) + eight * 8);
    const int swapped = eight / 4 % 2;
    const float4 low = make_float4(x[0], x[1], x[2], x[3]), high = make_float4(x[4], x[5], x[6], x[7]);
    to[swapped] = swapped ? high : low;
    to[1 - swapped] = swapped ? low : high;
  }
}

// Two 16-bit parts of pairs of numbers.
template <typename T>
__device__ __forceinline__ void in_parts(float x, float y, uint32_t &high, uint32_t &low) {
  high = pack<T>(x, y);
  const float2 rounded = unpack<T>(high);
  low = pack<T>(x - rounded.x, y - rounded.y);
}

// acc[t] += raw sums of 16 rows times the projector's rows dim + 8 t .. + 7.
template <typename T, int TILES>
__device__ __forceinline__ void project_raw(const Attention &p, const AbsorbedSide &side, int kv_head, const float *raw,
                                            const int (&dims)[TILES], float (&acc)[TILES][4]) {
  const int lane = threadIdx.x % WARP;
  const char *const weights = static_cast<const char *>(side.proj) + 2 * kv_head * side.proj_h;
  const float *const rows = raw + lane / 4 * (side.width + COMBINE_PITCH_PAD) + lane % 4 * 8;
#pragma unroll 2
  for (int column = 0; column < side.width; column += 32) {
    const RawColumns columns(side, column + lane % 4 * 8);
    uint4 b[TILES];
#pragma unroll
    for (int t = 0; t < TILES; ++t)
      b[t] = dims[t] + lane / 4 < p.value_dim
                 ? load_eight_bits(weights, (dims[t] + lane / 4) * side.proj_d + columns.at, columns.count,
                                   side.proj_vectorised)
                 : make_uint4(0, 0, 0, 0);
    uint32_t high[2][4], low[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const float4 x =
            *reinterpret_cast<const float4 *>(rows + half * 8 * (side.width + COMBINE_PITCH_PAD) + column + 4 * step);
        in_parts<T>(x.x, x.y, high[step][half], low[step][half]);
        in_parts<T>(x.z, x.w, high[step][2 + half], low[step][2 + half]);
      }
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      mma_16816<T>(acc[t], high[0], b[t].x, b[t].y);
      mma_16816<T>(acc[t], high[1], b[t].z, b[t].w);
      mma_16816<T>(acc[t], low[0], b[t].x, b[t].y);
      mma_16816<T>(acc[t], low[1], b[t].z, b[t].w);
    }
  }
}

// Adds what an absorbed segment gives rows first .. + 15 to the results. A warp takes every eighth tile of 8 dims.
template <typename T>
__device__ __forceinline__ void add_absorbed(const AbsorbDecode &a, const Absorbed &s, const CombineShared &shared,
                                             int kv_head, int first, int rows) {
  constexpr int WARPS = ABSORB_COMBINE_THREADS / WARP, TILES = LARGEST_DIM / 8 / WARPS / 2;
  const Attention &p = a.decode.attention;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll 1
  for (int start = warp * 8; start < p.value_dim; start += TILES * WARPS * 8) {
    int dims[TILES];
    float acc[TILES][4] = {};
#pragma unroll
    for (int t = 0; t < TILES; ++t) dims[t] = start + t * WARPS * 8;
    project_raw<T, TILES>(p, s.value, kv_head, shared.raw, dims, acc);
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first + lane / 4 + half * 8, dim = dims[t] + lane % 4 * 2;
        if (row >= rows || dim >= p.value_dim) continue;
        const float share = shared.shares[row * MAX_RUNS + s.number];
        if (share == 0.0f) continue;  // nothing of it was read
        float2 *const result = reinterpret_cast<float2 *>(shared.results + row * a.result_pitch + dim);
        float2 x = make_float2(acc[t][2 * half], acc[t][2 * half + 1]);
        if (s.value.bias) {
          const int64_t bias = kv_head * s.value.bias_h + dim;
          const float part = share / shared.totals[row].y;
          x.x += load_float(s.value.bias, bias, s.value.bias_type) * part;
          if (dim + 1 < p.value_dim) x.y += load_float(s.value.bias, bias + 1, s.value.bias_type) * part;
        }
        const float2 before = *result;
        *result = make_float2(before.x + x.x, before.y + x.y);
      }
  }
}

// Grid: batch x KV heads.
template <typename T>
__device__ __forceinline__ void absorb_combine(const AbsorbDecode &a) {
  extern __shared__ __align__(128) char bytes[];
  const Decode &d = a.decode;
  const Attention &p = d.attention;
  const int kv_head = blockIdx.x % p.kv_heads, batch = blockIdx.x / p.kv_heads, rows = p.q_len * p.group;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * rows;
  const CombineShared shared(reinterpret_cast<float *>(bytes), rows, a.result_pitch);
  combine_direct(a, shared, first_row, rows);
  __syncthreads();
  for (int i = 0; i < a.absorption.count; ++i) {
    const Absorbed &s = a.absorption.segment[i];
    const int pieces = s.pieces / p.kv_heads;
    uint64_t *const marks = s.marks + static_cast<int64_t>(batch) * s.pieces + kv_head * pieces;
    for (int piece = threadIdx.x; piece < pieces; piece += blockDim.x) marks[piece] = 0;
    for (int first = 0; first < rows; first += COMBINE_ROWS) {
      sum_raw(a, s, shared, first_row, first, rows);
      __syncthreads();
      add_absorbed<T>(a, s, shared, kv_head, first, rows);
      __syncthreads();
    }
  }
  for (int at = threadIdx.x; at < rows * p.value_dim; at += blockDim.x) {
    const int within = at / p.value_dim, head = kv_head * p.group + within % p.group;
    store_float(const_cast<void *>(p.out.data),
                batch * p.out.b + head * p.out.h + within / p.group * p.out.n + at % p.value_dim, p.out_type,
                shared.results[within * a.result_pitch + at % p.value_dim]);
  }
}

}  // namespace c2c
