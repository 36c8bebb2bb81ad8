// What becomes of a block's sums in prefill: lse, mass and rows of out.
#pragma once

#include "prefill_scores.cuh"

namespace c2c {

constexpr float MAX_TILE_SUM = 16384.0f;  // of weights that were formed with an older maximum: float16 holds them

// A lane's rows are the warp's first + lane / 4 + 8 r.
template <typename Tile>
struct PrefillState {
  float out[Tile::MT][Tile::DT][4] = {};
  float minus_max[Tile::MT][2];   // +inf while nothing has been seen: then exponentials are inf or NaN
  float sum[Tile::MT][2] = {};    // of the weights as they are multiplied, rounded to 16 bits
  float exact[Tile::MT][2] = {};  // of unrounded weights, for lse and mass: this lane's part of this run's
  float most = MAX_TILE_SUM;      // of the lane's rows; -1 where one is far, so that it is looked at in every tile
  bool risen = true;              // in the last part, by a row of the warp: it is far, or the next may rise as well

  __device__ __forceinline__ PrefillState() {
#pragma unroll
    for (int r = 0; r < Tile::LANE_ROWS; ++r) minus_max[r / 2][r % 2] = INF;
  }

  // What usual tiles leave as it was, said anew, so that no registers hold it meanwhile.
  __device__ __forceinline__ void kept_usual() {
    risen = false;
    asm volatile("mov.f32 %0, %1;" : "=f"(most) : "f"(MAX_TILE_SUM));
#pragma unroll
    for (int r = 0; r < Tile::LANE_ROWS; ++r) asm volatile("mov.f32 %0, 0f00000000;" : "=f"(exact[r / 2][r % 2]));
  }
};

// Where a row's number of a float32 output is.
__device__ __forceinline__ float *written(const Strided &tensor, const Attention &p, const PrefillPlace &place,
                                          int row) {
  return static_cast<float *>(const_cast<void *>(tensor.data)) + place.batch * tensor.b +
         place.head(p, row) * tensor.h + row / p.group * tensor.n;
}

// log2 (2^a + 2^b); adding -inf changes nothing, bit for bit.
__device__ __forceinline__ float add_logs(float a, float b) {
  const float high = fmaxf(a, b), low = fminf(a, b);
  return low == -INF ? high : high + log2f(1.0f + exp2f(low - high));
}

// The row that a lane looks after: row r of its four lanes where lane % 4 = r; -1 where there is none.
template <typename Tile>
__device__ __forceinline__ int row_taken(const PrefillPlace &place) {
  const int r = thread() % 4, row = place.warp_row<Tile>() + thread_in<WARP>() / 4 + 8 * r;
  return r < Tile::LANE_ROWS && row < place.rows ? row : -1;
}

// A run is done: the logarithm of its exact sums goes where mass will be, and into that of all runs where lse will be.
template <typename Tile>
__device__ __forceinline__ void finish_run(const Attention &p, int number, const PrefillPlace &place,
                                           PrefillState<Tile> &state) {
  float log = -INF;
#pragma unroll
  for (int r = 0; r < Tile::LANE_ROWS; ++r) {
    float sum = state.exact[r / 2][r % 2];
    sum += __shfl_xor_sync(0xffffffff, sum, 1);
    sum += __shfl_xor_sync(0xffffffff, sum, 2);
    state.exact[r / 2][r % 2] = 0.0f;
    if (thread() % 4 == r && sum != 0.0f) log = log2_approx(sum) - state.minus_max[r / 2][r % 2];
  }
  const int row = row_taken<Tile>(place);
  if (row < 0) return;
  if (p.mass.data) written(p.mass, p, place, row)[number] = log;
  if (p.lse.data) {
    float *const lse = written(p.lse, p, place, row);
    *lse = number ? add_logs(*lse, log) : log;
  }
}

// lse in natural logarithms, and every run's share of it; a sink is part of it.
__device__ __forceinline__ void finish_logs(const Attention &p, const PrefillPlace &place, int row) {
  float *const lse = p.lse.data ? written(p.lse, p, place, row) : nullptr;
  float *const mass = p.mass.data ? written(p.mass, p, place, row) : nullptr;
  float total = p.sinks ? load_float(p.sinks, place.head(p, row) * p.sinks_stride, p.sinks_type) * LOG2E : -INF;
  if (lse) {
    total = add_logs(*lse, total);
    *lse = total * LN2;
  }
#pragma unroll 1
  for (int run = 0; !lse && run < p.runs; ++run) total = add_logs(total, mass[run]);
#pragma unroll 1
  for (int run = 0; mass && run < p.runs; ++run) mass[run] = total == -INF ? 0.0f : exp2f(mass[run] - total);
}

// Lets the sink in and divides.
template <typename Tile>
__device__ __forceinline__ void finish_rows(const Attention &p, const PrefillPlace &place, PrefillState<Tile> &state) {
#pragma unroll
  for (int r = 0; r < Tile::LANE_ROWS; ++r) {
    float sum = state.sum[r / 2][r % 2], kept = 1.0f;
    if (p.sinks) {
      const int head = place.head(p, place.lane_row<Tile>(r));
      const float sink = load_float(p.sinks, head * p.sinks_stride, p.sinks_type) * LOG2E;
      const float top = fmaxf(-state.minus_max[r / 2][r % 2], sink);
      if (top > -INF) {
        kept = exp2_approx(-state.minus_max[r / 2][r % 2] - top);
        sum = sum * kept + exp2_approx(sink - top);
      }
    }
    const float factor = sum == 0.0f ? 0.0f : kept / sum;
#pragma unroll
    for (int d = 0; d < Tile::DT; ++d) {
      state.out[r / 2][d][r % 2 * 2] *= factor;
      state.out[r / 2][d][r % 2 * 2 + 1] *= factor;
    }
  }
  const int row = row_taken<Tile>(place);
  if ((p.lse.data || p.mass.data) && row >= 0) finish_logs(p, place, row);
}

// `count` of two numbers side by side.
static __device__ __noinline__ void store_two(void *to, int64_t at, int type, float x, float y, int count) {
  if (count > 0) store_float(to, at, type, x);
  if (count > 1) store_float(to, at + 1, type, y);
}

// Rows of out in another dtype than the query's.
template <typename Tile>
__device__ __forceinline__ void store_numbers(const Attention &p, const PrefillPlace &place,
                                              const PrefillState<Tile> &state) {
#pragma unroll
  for (int r = 0; r < Tile::LANE_ROWS; ++r) {
    const int row = place.lane_row<Tile>(r), dim = thread() % 4 * 2;
    const bool inside = place.warp_row<Tile>() + thread_in<WARP>() / 4 + 8 * r < place.rows;
    const int64_t at = place.batch * p.out.b + place.head(p, row) * p.out.h + row / p.group * p.out.n + dim;
    const int left = inside ? p.value_dim - dim : 0;
#pragma unroll
    for (int d = 0; d < Tile::DT; ++d) {
      const float (&x)[4] = state.out[r / 2][d];
      store_two(const_cast<void *>(p.out.data), at + 8 * d, p.out_type, x[r % 2 * 2], x[r % 2 * 2 + 1], left - 8 * d);
    }
  }
}

// Rows of out, by way of the shared memory of the warp's own queries among `rows`: written 16 bytes at a time where
// they can be.
template <typename T, typename Tile>
__device__ __forceinline__ void store_rows(const Attention &p, const PrefillPlace &place,
                                           const PrefillState<Tile> &state, unsigned char *rows) {
  const int lane = thread_in<WARP>(), first = thread_by<WARP>() * Tile::M;
  if (p.out_type != p.dtype) return store_numbers(p, place, state);
  __syncwarp();
#pragma unroll
  for (int r = 0; r < Tile::LANE_ROWS; ++r)
#pragma unroll
    for (int d = 0; d < Tile::DT; ++d) {
      const int row = lane / 4 + 8 * r;
      const float (&x)[4] = state.out[r / 2][d];
      *reinterpret_cast<uint32_t *>(rows + Tile::query_at(first + row, d) + lane % 4 * 4) =
          pack<T>(x[r % 2 * 2], x[r % 2 * 2 + 1]);
    }
  __syncwarp();
  T *const out = static_cast<T *>(const_cast<void *>(p.out.data)) + place.batch * p.out.b;
  const bool vectorised = !((reinterpret_cast<uintptr_t>(out) | 2 * (p.out.h | p.out.n)) & 15) && p.value_dim % 8 == 0;
#pragma unroll 1
  for (int i = lane; i < Tile::M * Tile::CHUNKS; i += WARP) {
    const int number = i / Tile::CHUNKS, chunk = i % Tile::CHUNKS, row = place.warp_row<Tile>() + number;
    if (row >= place.rows || chunk * 8 >= p.value_dim) continue;
    T *const to = out + place.head(p, row) * p.out.h + row / p.group * p.out.n + chunk * 8;
    const unsigned char *const from = rows + Tile::query_at(first + number, chunk);
    if (vectorised)
      *reinterpret_cast<uint4 *>(to) = *reinterpret_cast<const uint4 *>(from);
    else
#pragma unroll 1
      for (int d = 0; d < 8 && chunk * 8 + d < p.value_dim; ++d) to[d] = reinterpret_cast<const T *>(from)[d];
  }
}

}  // namespace c2c
