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

// f(score, half, i) for every score of a lane: of its row lane / 4 + 8 half and the i-th of its tokens.
template <typename F>
__device__ __forceinline__ void each_score(float (&scores)[2][4], F f) {
#pragma unroll
  for (int i = 0; i < 8; ++i) f(scores[i / 4][i % 4], i % 4 / 2, i / 4 * 2 + i % 2);
}

// each[half][i] = number `place(half, i)` of any floating dtype. All are loaded before any is used.
template <typename F>
__device__ __forceinline__ void load_for_scores(float (&each)[2][4], const void *data, int type, F place) {
  with_floats(data, type, [&](const auto *numbers) {
#pragma unroll
    for (int k = 0; k < 8; ++k) each[k / 4][k % 4] = static_cast<float>(numbers[place(k / 4, k % 4)]);
  });
}

// Capped, in base 2: cap(scale * product) * log2 e. `key_scales`: of this lane's tokens.
__device__ __forceinline__ void scale_scores(const Attention &p, float (&scores)[2][4], const float (&key_scales)[4]) {
  if (p.softcap == 0.0f) {
    const float factor = p.scale * LOG2E;
    each_score(scores, [&](float &z, int, int i) { z = z * key_scales[i] * factor; });
  } else {
    const float inner = 2.0f * LOG2E * p.scale / p.softcap, outer = p.softcap * LOG2E;
    each_score(scores, [&](float &z, int, int i) { z = capped(z * key_scales[i], inner, outer); });
  }
}

// Adds log2 of the gates of rows and this lane's tokens.
__device__ __forceinline__ void gate_scores(const Work &w, const Row (&rows)[2], const int (&tokens)[4],
                                            float (&scores)[2][4]) {
  const Strided &gates = w.run.gate;
  float each[2][4];
  load_for_scores(each, gates.data, w.run.gate_type,
                  [&](int half, int i) { return w.batch * gates.b + rows[half].head * gates.h + tokens[i] * gates.n; });
  each_score(scores, [&](float &z, int half, int i) { z += log_gate(each[half][i]); });
}

// Own tokens under the attention mask.
__device__ __forceinline__ void mask_scores(const Attention &p, const Work &w, const Row (&rows)[2],
                                            const int (&tokens)[4], float (&scores)[2][4]) {
  const auto place = [&](int half, int i) {
    return w.batch * p.mask.b + rows[half].head * p.mask.h + rows[half].query * p.mask.n + tokens[i] * p.mask_token;
  };
  if (p.mask_type == C2C_BOOL) {
    each_score(scores, [&](float &z, int half, int i) {
      z = static_cast<const uint8_t *>(p.mask.data)[place(half, i)] ? z : -INF;
    });
  } else {
    float each[2][4];
    load_for_scores(each, p.mask.data, p.mask_type, place);
    each_score(scores, [&](float &z, int half, int i) { z += additive(each[half][i]); });
  }
}

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
  int tokens[4];  // the last one in the place of those that are not there, and are hidden
  float key_scales[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int within = 2 * (lane % 4) + i % 2 + i / 2 * 8;
    tokens[i] = min(first + within, w.last - 1);
    key_scales[i] = __shfl_sync(~0u, mine.key_scale, within);
    value_scales[i] = __shfl_sync(~0u, mine.value_scale, within);
  }
  scale_scores(p, scores, key_scales);
  if (w.run.gate.data) gate_scores(w, rows, tokens, scores);
  if (!w.number && p.mask.data) mask_scores(p, w, rows, tokens, scores);
  if (w.run.placed) {
    const bool causal = w.number ? w.run.causal : p.is_causal;
    const int64_t window = w.number ? p.segment_window : p.window;
    int64_t places[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) places[i] = __shfl_sync(~0u, static_cast<long long>(mine.place), tokens[i] - first);
    each_score(scores, [&](float &z, int half, int i) {
      if (!in_sight(rows[half].place, places[i], causal, window)) z = -INF;
    });
  }
  each_score(scores, [&](float &z, int half, int i) {
    if (!rows[half].inside || first + 2 * (lane % 4) + i % 2 + i / 2 * 8 >= w.last) z = -INF;
  });
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
