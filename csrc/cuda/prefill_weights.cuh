// From scores to weights in prefill.
//
// The running maximum lags behind: exponentials of a tile are formed with the maximum of the tiles before, their sums
// come from the tensor cores (a product with ones), and only where a sum exceeds MAX_TILE_SUM are the tile's maximum
// taken and the accumulators rescaled. A row decides by its own scores alone, so a run that is empty or closed changes
// no bit of it.
#pragma once

#include "prefill_finish.cuh"

namespace c2c {

constexpr float FAR = 4194304.0f;  // 2^22: numbers from here on lie 1/2 or more apart

// Whether a maximum, which was rounded as a product of score and factor, is a quarter or more off.
__device__ __forceinline__ bool far(float minus_max) { return fabsf(minus_max) >= FAR && fabsf(minus_max) < INF; }

// An exponent of 2. `rounded`: its product is rounded as that of the maximum was, whose score so gives 0.
__device__ __forceinline__ float exponent(float z, float factor, float minus_max, bool rounded) {
  return rounded ? __fadd_rn(__fmul_rn(z, factor), minus_max) : fmaf(z, factor, minus_max);
}

// What the exponentials of a tile are: operands of the next product, and their sums as they are rounded there, in all
// lanes of a row.
template <typename Tile>
struct PrefillWeights {
  uint32_t words[Tile::MT][Tile::NT / 2][4];
  float sums[Tile::MT][2];

  // Becomes what `other` is, in registers of its own.
  __device__ __forceinline__ void take(const PrefillWeights &other) {
#pragma unroll
    for (int i = 0; i < Tile::MT * Tile::NT * 2; ++i) {
      uint32_t &word = words[i / (2 * Tile::NT)][i / 4 % (Tile::NT / 2)][i % 4];
      asm volatile("mov.b32 %0, %1;"
                   : "=r"(word)
                   : "r"(other.words[i / (2 * Tile::NT)][i / 4 % (Tile::NT / 2)][i % 4]));
    }
  }
};

// Weights 2^(z factor - max) of 16 rows.
template <typename T, typename Tile>
__device__ __forceinline__ void form_words(PrefillWeights<Tile> &weights, int m, const PrefillScores<Tile> &scores,
                                           float factor, const float (&minus_max)[2], const bool (&rounded)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int n = 0; n < Tile::NT; ++n) {
      const float *const z = &scores.z[m][n][2 * half];
      weights.words[m][n / 2][n % 2 * 2 + half] =
          pack<T>(exp2_approx(exponent(z[0], factor, minus_max[half], rounded[half])),
                  exp2_approx(exponent(z[1], factor, minus_max[half], rounded[half])));
    }
}

// Adds the words of 16 rows and a part's tokens up, in the columns for which this lane's `ones` are such.
template <typename T, typename Tile>
__device__ __forceinline__ void add_words(float (&total)[4], const uint32_t (*words)[4], uint32_t ones) {
#pragma unroll
  for (int k = 0; k < Tile::PART / 16; ++k) mma_16816<T>(total, words[k], ones, ones);
}

// Both, of a part.
template <typename T, typename Tile>
__device__ __forceinline__ void exponentiate(PrefillWeights<Tile> &weights, int m, const PrefillScores<Tile> &scores,
                                             float factor, const float (&minus_max)[2], const bool (&rounded)[2]) {
  form_words<T, Tile>(weights, m, scores, factor, minus_max, rounded);
  float total[4] = {};
  add_words<T, Tile>(total, weights.words[m], pair_of_ones<T>());
  weights.sums[m][0] = total[0];
  weights.sums[m][1] = total[2];
}

// Whether a row takes the tile's maximum: its sums are too large or not numbers, or it is far.
__device__ __forceinline__ bool rises(float sum, float minus_max) { return !(sum <= MAX_TILE_SUM) || far(minus_max); }

// Takes the tile's maximum into rows that rise. `used`: what to subtract from scores.
template <typename Tile>
__device__ __forceinline__ void raise_maximum(PrefillState<Tile> &state, int m, float (&used)[2],
                                              const PrefillWeights<Tile> &weights, const PrefillScores<Tile> &scores,
                                              float factor) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float highest = -INF;
#pragma unroll
    for (int n = 0; n < Tile::NT; ++n)
      highest = fmaxf(highest, fmaxf(scores.z[m][n][2 * half], scores.z[m][n][2 * half + 1]));
    highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, 1));
    highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, 2));
    float &minus_max = state.minus_max[m][half];
    const float before = minus_max;
    if (rises(weights.sums[m][half], before)) minus_max = fminf(before, __fmul_rn(-highest, factor));
    used[half] = minus_max == INF ? 0.0f : minus_max;
    if (far(minus_max)) state.most = -1.0f;
    const float kept = exp2_approx(used[half] - before);  // 1 where the maximum stays, 0 where there was none
    state.sum[m][half] *= kept;
    state.exact[m][half] *= kept;
#pragma unroll
    for (int d = 0; d < Tile::DT; ++d) {
      state.out[m][d][2 * half] *= kept;
      state.out[m][d][2 * half + 1] *= kept;
    }
  }
}

// Weights of a tile by the maximum of the tiles before, or by its own where a row's rises.
template <typename T, typename Tile>
__device__ __forceinline__ void weigh(PrefillWeights<Tile> &weights, PrefillState<Tile> &state,
                                      const PrefillScores<Tile> &scores, float factor) {
  bool high = false;
#pragma unroll
  for (int m = 0; m < Tile::MT; ++m)
    exponentiate<T, Tile>(weights, m, scores, factor, state.minus_max[m], {false, false});
#pragma unroll
  for (int r = 0; r < Tile::LANE_ROWS; ++r) {
    const float sum = weights.sums[r / 2][r % 2];  // at head dims up to 64 sm_90 has no register left for `most`
    high = high || (Tile::DIM > 64 ? !(sum <= state.most) : rises(sum, state.minus_max[r / 2][r % 2]));
  }
  state.risen = __any_sync(0xffffffff, high);
  if (state.risen) {
    Tile::settle(state.out);
    state.most = MAX_TILE_SUM;
#pragma unroll
    for (int m = 0; m < Tile::MT; ++m) {
      float used[2];
      raise_maximum(state, m, used, weights, scores, factor);
      exponentiate<T, Tile>(weights, m, scores, factor, used, {far(used[0]), far(used[1])});
    }
  }
#pragma unroll
  for (int r = 0; r < Tile::LANE_ROWS; ++r) state.sum[r / 2][r % 2] += weights.sums[r / 2][r % 2];
}

// Adds this lane's part of the sums of unrounded weights, once rows have taken the maximum that they keep.
template <typename Tile>
__device__ __forceinline__ void add_exact(PrefillState<Tile> &state, const PrefillScores<Tile> &scores, float factor) {
#pragma unroll
  for (int r = 0; r < Tile::LANE_ROWS; ++r) {
    const float minus_max = state.minus_max[r / 2][r % 2], used = minus_max == INF ? 0.0f : minus_max;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < Tile::NT; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        sum += exp2_approx(exponent(scores.z[r / 2][n][r % 2 * 2 + j], factor, used, far(used)));
    state.exact[r / 2][r % 2] += sum;
  }
}

}  // namespace c2c
