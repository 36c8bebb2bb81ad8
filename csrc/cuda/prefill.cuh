// merged_attention for many queries: one pass over the own cache and every segment, all of them in receiver space.
//
// A block of 8 warps takes WARPS * M rows of one KV head (row = query * group + head in the group) and walks over tiles
// of N tokens, run after run. Keys and values come in two stages of cp.async; queries stay in shared memory. A warp
// skips tiles that none of its rows sees. Scores live in registers only.
//
// The running maximum lags behind: exponentials of a tile are formed with the maximum of the tiles before, their sums
// come from the tensor cores (a product with ones), and only where a sum exceeds MAX_TILE_SUM are the tile's maximum
// taken and the accumulators rescaled. A row decides by its own scores alone, so a run that is empty or closed changes
// no bit of it.
#pragma once

#include "prefill_finish.cuh"
#include "stored_rows.cuh"

namespace c2c {

constexpr float FAR = 4194304.0f;  // 2^22: numbers from here on lie 1/2 or more apart

// Rows of keys or values on their way into stages: thread t copies chunk t % CHUNKS of rows t / CHUNKS + PASS_ROWS i.
template <typename T, int DIM>
struct TokenCopy {
  using Tile = PrefillTile<DIM>;
  const T *from;  // this thread's chunk, PASS_ROWS further with every pass

  __device__ __forceinline__ TokenCopy(const Strided &rows, const PrefillPlace &place, int first) {
    const int chunk = thread_in<Tile::CHUNKS>(), row = thread_by<Tile::CHUNKS>();
    from = static_cast<const T *>(rows.data) + place.batch * rows.b + place.kv_head * rows.h + (first + row) * rows.n +
           chunk * 8;
  }

  // The next tile, all of it.
  __device__ __forceinline__ void whole(uint32_t shared, int step) {
#pragma unroll
    for (int i = 0; i < Tile::N; i += Tile::PASS_ROWS, from += step) cp_async_16(shared + i * Tile::TOKEN_ROW, from);
  }

  // The next tile, `left` tokens of which, counted from this thread's first row, are there; zeros for others. `step`:
  // of a pass.
  __device__ __forceinline__ void next(uint32_t shared, int left, int64_t step) {
#pragma unroll
    for (int i = 0; i < Tile::N; i += Tile::PASS_ROWS, from += step)
      cp_async_16(shared + i * Tile::TOKEN_ROW, from, i < left);
  }
};

// The tile of tokens from `first` on of a run whose rows cannot be copied as they are.
template <typename T, int DIM>
__device__ __forceinline__ void convert_tile(const Attention &p, const PrefillRun &run, const PrefillPlace &place,
                                             uint32_t to, int first) {
  using Tile = PrefillTile<DIM>;
  const Run &source = p.run[run.number];
  const int at = thread_in<Tile::CHUNKS>() * 8, row = thread_by<Tile::CHUNKS>();
#pragma unroll 1
  for (int i = 0; i < 2 * Tile::N; i += Tile::PASS_ROWS) {
    const bool is_key = i < Tile::N;
    const Strided &rows = is_key ? source.key : source.value, &scales = is_key ? source.key_scale : source.value_scale;
    const int token = first + row + i - (is_key ? 0 : Tile::N);
    const int stored = token < run.end ? stored_token(source, place.batch, token) : -1;
    const float scale =
        scale_of(scales, is_key ? source.key_scale_type : source.value_scale_type, place.batch, place.kv_head, stored);
    float x[8] = {};
    if (stored >= 0)
      load_eight(x, rows.data, place.batch * rows.b + place.kv_head * rows.h + stored * rows.n,
                 is_key ? source.key_type : source.value_type, at, is_key ? p.head_dim : p.value_dim,
                 source.vectorised);
    uint32_t words[4];
    pack_eight<T>(words, x, scale);
    store_shared_16(to + i * Tile::TOKEN_ROW, words);
  }
}

template <typename T, int DIM>
__device__ __forceinline__ void copy_queries(const Attention &p, const PrefillPlace &place, uint32_t shared) {
  using Tile = PrefillTile<DIM>;
  const int chunk = thread_in<Tile::CHUNKS>();
  const T *query = static_cast<const T *>(p.query.data) + place.batch * p.query.b + chunk * 8;
#pragma unroll 1
  for (int i = thread_by<Tile::CHUNKS>(); i < Tile::ROWS; i += Tile::PASS_ROWS) {
    const bool inside = place.block_row + i < place.rows;
    const int row = inside ? place.block_row + i : 0;
    const T *from = query + place.head(p, row) * p.query.h + row / p.group * p.query.n;
    const int count = inside ? p.head_dim - chunk * 8 : 0;
    const uint32_t to = shared + i * Tile::QUERY_ROW + swizzled(i, chunk) * 16;
    if (p.query_vectorised) {
      cp_async_16(to, count > 0 ? from : query, count > 0);
    } else {
      float x[8];
      uint32_t words[4];
      load_eight(x, from, 0, p.dtype, 0, count, false);
      pack_eight<T>(words, x, 1.0f);
      store_shared_16(to, words);
    }
  }
}

// scores = q k^T for the warp's M rows and the tile's N tokens. `queries`, `keys`: of the first step, for this lane;
// another step's chunk of queries is swizzled to where its number differs within 128 bytes.
template <typename T, int DIM>
__device__ __forceinline__ void multiply_keys(PrefillScores<DIM> &scores, uint32_t queries, uint32_t keys) {
  using Tile = PrefillTile<DIM>;
#pragma unroll
  for (int k = 0; k < DIM / 16; ++k) {
    uint32_t q[Tile::MT][4];
#pragma unroll
    for (int m = 0; m < Tile::MT; ++m)
      ldmatrix_x4(q[m], (queries ^ k % 4 * 32) + k / 4 * 128 + m * 16 * Tile::QUERY_ROW);
#pragma unroll
    for (int n = 0; n < Tile::NT; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, keys + n * 8 * Tile::TOKEN_ROW + k * 32);
#pragma unroll
      for (int m = 0; m < Tile::MT; ++m) {
        mma_16816<T>(scores.z[m][n], q[m], b[0], b[1]);
        mma_16816<T>(scores.z[m][n + 1], q[m], b[2], b[3]);
      }
    }
  }
}

// Whether a maximum, which was rounded as a product of score and factor, is a quarter or more off.
__device__ __forceinline__ bool far(float minus_max) { return fabsf(minus_max) >= FAR && fabsf(minus_max) < INF; }

// An exponent of 2. `rounded`: its product is rounded as that of the maximum was, whose score so gives 0.
__device__ __forceinline__ float exponent(float z, float factor, float minus_max, bool rounded) {
  return rounded ? __fadd_rn(__fmul_rn(z, factor), minus_max) : fmaf(z, factor, minus_max);
}

// What the exponentials of a tile are: operands of the next product, and their sums as they are rounded there, in all
// lanes of a row.
template <int DIM>
struct PrefillWeights {
  using Tile = PrefillTile<DIM>;
  uint32_t words[Tile::MT][Tile::NT / 2][4];
  float sums[Tile::MT][2];
};

// Weights 2^(z factor - max) of 16 rows.
template <typename T, int DIM>
__device__ __forceinline__ void exponentiate(PrefillWeights<DIM> &weights, int m, const PrefillScores<DIM> &scores,
                                             float factor, const float (&minus_max)[2], const bool (&rounded)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int n = 0; n < PrefillTile<DIM>::NT; ++n) {
      const float *const z = &scores.z[m][n][2 * half];
      weights.words[m][n / 2][n % 2 * 2 + half] =
          pack<T>(exp2_approx(exponent(z[0], factor, minus_max[half], rounded[half])),
                  exp2_approx(exponent(z[1], factor, minus_max[half], rounded[half])));
    }
  const uint32_t ones = pack<T>(1.0f, 1.0f);
  float total[4] = {};
#pragma unroll
  for (int k = 0; k < PrefillTile<DIM>::NT / 2; ++k) mma_16816<T>(total, weights.words[m][k], ones, ones);
  weights.sums[m][0] = total[0];
  weights.sums[m][1] = total[2];
}

// Whether a row takes the tile's maximum: its sums are too large or not numbers, or it is far.
__device__ __forceinline__ bool rises(float sum, float minus_max) { return !(sum <= MAX_TILE_SUM) || far(minus_max); }

// Takes the tile's maximum into rows that rise. `used`: what to subtract from scores.
template <int DIM>
__device__ __forceinline__ void raise_maximum(PrefillState<DIM> &state, int m, float (&used)[2],
                                              const PrefillWeights<DIM> &weights, const PrefillScores<DIM> &scores,
                                              float factor) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float highest = -INF;
#pragma unroll
    for (int n = 0; n < PrefillTile<DIM>::NT; ++n)
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
    for (int d = 0; d < PrefillTile<DIM>::DT; ++d) {
      state.out[m][d][2 * half] *= kept;
      state.out[m][d][2 * half + 1] *= kept;
    }
  }
}

// Weights of a tile by the maximum of the tiles before, or by its own where a row's rises.
template <typename T, int DIM>
__device__ __forceinline__ void weigh(PrefillWeights<DIM> &weights, PrefillState<DIM> &state,
                                      const PrefillScores<DIM> &scores, float factor) {
  using Tile = PrefillTile<DIM>;
  bool high = false;
#pragma unroll
  for (int m = 0; m < Tile::MT; ++m)
    exponentiate<T, DIM>(weights, m, scores, factor, state.minus_max[m], {false, false});
#pragma unroll
  for (int r = 0; r < Tile::LANE_ROWS; ++r) {
    const float sum = weights.sums[r / 2][r % 2];  // at head dims up to 64 sm_90 has no register left for `most`
    high = high || (DIM > 64 ? !(sum <= state.most) : rises(sum, state.minus_max[r / 2][r % 2]));
  }
  if (__any_sync(0xffffffff, high)) {
    state.most = MAX_TILE_SUM;
#pragma unroll
    for (int m = 0; m < Tile::MT; ++m) {
      float used[2];
      raise_maximum(state, m, used, weights, scores, factor);
      exponentiate<T, DIM>(weights, m, scores, factor, used, {far(used[0]), far(used[1])});
    }
  }
#pragma unroll
  for (int r = 0; r < Tile::LANE_ROWS; ++r) state.sum[r / 2][r % 2] += weights.sums[r / 2][r % 2];
}

// Adds this lane's part of the sums of unrounded weights, once rows have taken the maximum that they keep.
template <int DIM>
__device__ __forceinline__ void add_exact(PrefillState<DIM> &state, const PrefillScores<DIM> &scores, float factor) {
#pragma unroll
  for (int r = 0; r < PrefillTile<DIM>::LANE_ROWS; ++r) {
    const float minus_max = state.minus_max[r / 2][r % 2], used = minus_max == INF ? 0.0f : minus_max;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < PrefillTile<DIM>::NT; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        sum += exp2_approx(exponent(scores.z[r / 2][n][r % 2 * 2 + j], factor, used, far(used)));
    state.exact[r / 2][r % 2] += sum;
  }
}

// One tile of tokens: scores, weights and the product with values. `keys`, `values`: of their first step, for this
// lane.
template <typename T, int DIM>
__device__ __forceinline__ void attend_tile(const Attention &p, const PrefillRun &run, const PrefillPlace &place,
                                            PrefillState<DIM> &state, uint32_t queries, uint32_t keys, int first,
                                            bool plain) {
  using Tile = PrefillTile<DIM>;
  PrefillScores<DIM> scores;
  multiply_keys<T, DIM>(scores, queries, keys);
  if (!plain) finish_scores(p, run, place, scores, first);
  PrefillWeights<DIM> weights;
  weigh<T, DIM>(weights, state, scores, run.factor);
  if (run.exact) add_exact(state, scores, run.factor);
  // Values lie behind the keys; lanes 8 to 15 and 16 to 23 have changed places.
  const int lane = thread_in<WARP>();
  const uint32_t values =
      keys + Tile::STAGE / 2 + ((lane / 8 & 1) - lane / 16) * static_cast<uint32_t>(8 * Tile::TOKEN_ROW - 16);
#pragma unroll
  for (int k = 0; k < Tile::NT / 2; ++k)
#pragma unroll
    for (int d = 0; d < Tile::DT; d += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, values + k * 16 * Tile::TOKEN_ROW + d * 16);
#pragma unroll
      for (int m = 0; m < Tile::MT; ++m) {
        mma_16816<T>(state.out[m][d], weights.words[m][k], b[0], b[1]);
        mma_16816<T>(state.out[m][d + 1], weights.words[m][k], b[2], b[3]);
      }
    }
}

// Copies the tile of tokens from `first` on, where it is one of the run.
template <typename T, int DIM>
__device__ __forceinline__ void copy_tile(const Attention &p, const PrefillRun &run, TokenCopy<T, DIM> &keys,
                                          TokenCopy<T, DIM> &values, const PrefillPlace &place, uint32_t to,
                                          int first) {
  using Tile = PrefillTile<DIM>;
  if (first < run.whole) {  // the usual tile; nothing before this is asked
    keys.whole(to, run.key_step);
    values.whole(to + Tile::STAGE / 2, run.value_step);
    cp_async_commit();
  } else if (first >= run.stop - Tile::N) {
    return;
  } else if (run.vectorised) {
    const Run &source = p.run[run.number];
    const int left = run.end - first - thread_by<Tile::CHUNKS>(), chunk = thread_in<Tile::CHUNKS>();
    keys.next(to, chunk * 8 < p.head_dim ? left : 0, source.key.n * Tile::PASS_ROWS);
    values.next(to + Tile::STAGE / 2, chunk * 8 < p.value_dim ? left : 0, source.value.n * Tile::PASS_ROWS);
    cp_async_commit();
  } else {
    convert_tile<T, DIM>(p, run, place, to, first);
  }
}

// All tiles of one run.
template <typename T, int DIM>
__device__ __forceinline__ void attend_run(const Attention &p, int number, PrefillNotes &notes,
                                           PrefillState<DIM> &state, uint32_t shared) {
  using Tile = PrefillTile<DIM>;
  const PrefillPlace &place = notes.place;
  PrefillRun &run = notes.run;
  __syncthreads();  // everyone is done with the run before
  run.set<Tile>(p, number, place);
  __syncthreads();
  const int lane = thread_in<WARP>();
  TokenCopy<T, DIM> keys(p.run[number].key, place, run.first), values(p.run[number].value, place, run.first);
  const auto find_queries = [&] {
    const int lane = thread_in<WARP>();
    return shared + (thread_by<WARP>() * Tile::M + lane % 16) * Tile::QUERY_ROW + swizzled(lane, lane / 16) * 16;
  };
  const uint32_t queries = find_queries();
  const uint32_t stages = shared + Tile::ROWS * Tile::QUERY_ROW;
  // The stage worked on: its keys and values for this lane.
  uint32_t work = stages + Tile::STAGE + ((lane & 7) + lane / 16 * 8) * Tile::TOKEN_ROW + (lane / 8 & 1) * 16;
  uint32_t to = stages + thread_by<Tile::CHUNKS>() * Tile::TOKEN_ROW + thread_in<Tile::CHUNKS>() * 16;
  int flip = Tile::STAGE;
  // Tile `next` is on its way while the one before, which in the first round is none that a row sees, is worked on.
#pragma unroll 1
  for (int next = run.first; next < run.stop; next += Tile::N) {
    cp_async_wait<0>();
    __syncthreads();
    copy_tile(p, run, keys, values, place, to, next);
    const Sight sight = run.sight[thread_by<WARP>()];
    const int tile = next - Tile::N;
    if (tile < sight.any_to && next > sight.any_from)
      attend_tile<T, DIM>(p, run, place, state, DIM > 64 ? queries : find_queries(), work, tile,
                          tile >= sight.plain_from && next <= sight.plain_to);
    to += flip;
    work -= flip;
    flip = -flip;
  }
  if (run.exact) finish_run(p, run.number, place, state);
}

template <typename T, int DIM>
__device__ __forceinline__ void prefill(const Attention &p) {
  using Tile = PrefillTile<DIM>;
  extern __shared__ __align__(1024) unsigned char shared[];
  PrefillNotes &notes = *reinterpret_cast<PrefillNotes *>(shared + Tile::ROWS * Tile::QUERY_ROW + 2 * Tile::STAGE);
  PrefillPlace &place = notes.place;
  if (thread() == 0) {
    const int rows = p.q_len * p.group, tiles = (rows + Tile::ROWS - 1) / Tile::ROWS, pairs = p.kv_heads * p.batch;
    const int pair = static_cast<int>(blockIdx.x) % pairs;
    place.batch = pair / p.kv_heads;
    place.kv_head = pair % p.kv_heads;
    place.own_end = valid_tokens(p.run[0], place.batch);
    place.rows = rows;
    place.block_row = (tiles - 1 - static_cast<int>(blockIdx.x) / pairs) * Tile::ROWS;  // most tokens to see first
  }
  for (int i = thread() * 16; i < 2 * Tile::STAGE; i += Tile::THREADS * 16)
    *reinterpret_cast<uint4 *>(shared + Tile::ROWS * Tile::QUERY_ROW + i) = uint4{0, 0, 0, 0};
  __syncthreads();
  copy_queries<T, DIM>(p, place, shared_address(shared));
  cp_async_commit();
  PrefillState<DIM> state;
#pragma unroll 1
  for (int number = 0; number < p.runs; number = notes.run.number + 1)
    attend_run<T, DIM>(p, number, notes, state, shared_address(shared));
  cp_async_wait<0>();
  __syncthreads();
  finish_rows(p, place, state);
  store_rows<T, DIM>(p, place, state, shared + thread_by<WARP>() * Tile::M * Tile::QUERY_ROW);
}

}  // namespace c2c
