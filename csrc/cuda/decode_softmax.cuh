// Decode's softmax over a chunk of 16 tokens: from raw products to weights, in registers.
#pragma once

#include "common.cuh"

namespace c2c {

constexpr int ROWS = 16;   // of a tile: the M of mma.m16n8k16
constexpr int CHUNK = 16;  // tokens taken at once: the K of the second product

// What a block works on.
struct Work {
  const Run &run;
  int number, batch, kv_head, first_row, split_first, first, last;
  bool plain;  // logits are the scaled products: no row misses a token, no gate, scale, mask or cap
};

// Logits in the place of products of 16 rows and tokens first .. + 15; scores[0] is of tokens 0..7, [1] of 8..15.
// `value_scales`: of this lane's tokens 2c, 2c + 1, 2c + 8, 2c + 9, left alone where there are none.
__device__ __forceinline__ void find_logits(const Attention &p, const Work &w, const Row (&rows)[2], int first,
                                            float (&scores)[2][4], float (&value_scales)[4]) {
  if (w.plain && first + CHUNK <= w.last) {
#pragma unroll
    for (int i = 0; i < 8; ++i) scores[i / 4][i % 4] *= p.scale * LOG2E;
    return;
  }
  const int lane = threadIdx.x % WARP;
  // A lane asks about one token, so that neighbours' numbers are read at once, and tells those that have its column.
  const Column mine = column_of(w.run, w.batch, w.kv_head, first + lane % CHUNK, w.last);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int within = 2 * (lane % 4) + i % 2 + i / 2 * 8, token = first + within;
    const Column column{w.run.placed ? __shfl_sync(~0u, static_cast<long long>(mine.place), within) : token,
                        __shfl_sync(~0u, mine.key_scale, within), __shfl_sync(~0u, mine.value_scale, within),
                        token < w.last};
    value_scales[i] = column.value_scale;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float &each = scores[i / 2][2 * half + i % 2];
      each = logit_of(p, w.run, w.number, w.batch, rows[half], column, token, each);
    }
  }
}

// Weights in the place of logits, taken into the states of rows lane / 4 and + 8; `factor` is for what those rows have
// summed so far.
__device__ __forceinline__ void find_weights(SoftmaxState (&state)[2], float (&scores)[2][4], float (&factor)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float highest =
        fmaxf(fmaxf(scores[0][2 * half], scores[0][2 * half + 1]), fmaxf(scores[1][2 * half], scores[1][2 * half + 1]));
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
    factor[half] = state[half].update(highest);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      scores[i][j] = state[j / 2].weight(scores[i][j]);
      state[j / 2].sum += scores[i][j];
    }
}

// Sums of rows lane / 4 and + 8, where a maximum has risen.
template <int N>
__device__ __forceinline__ void rescale(float (&sums)[N][4], const float (&factor)[2]) {
  if (__any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f))
    for (float (&sum)[4] : sums)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] *= factor[i / 2];
}

}  // namespace c2c
