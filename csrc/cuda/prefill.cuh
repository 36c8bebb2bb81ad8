// merged_attention for many queries: one pass over the own cache and every segment, all of them in receiver space.
//
// A block of 8 warps takes WARPS * M rows of one KV head (row = query * group + head in the group) and walks over tiles
// of N tokens, run after run. Keys and values come in two stages of cp.async; queries stay in shared memory. A warp
// skips tiles that none of its rows sees. Scores live in registers only.
#pragma once

#include "prefill_copies.cuh"
#include "prefill_weights.cuh"

namespace c2c {

// Rows of keys or values on their way into stages: thread t copies chunk t % CHUNKS of rows t / CHUNKS + PASS_ROWS i.
template <typename T, typename Tile>
struct TokenCopy {
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

// scores = q k^T for the warp's M rows and the tile's N tokens. `queries`, `keys`: of the first step, for this lane;
// another step's chunk of queries is swizzled to where its number differs within 128 bytes.
template <typename T, typename Tile>
__device__ __forceinline__ void multiply_keys(PrefillScores<Tile> &scores, uint32_t queries, uint32_t keys) {
  scores.clear();
#pragma unroll
  for (int k = 0; k < Tile::DIM / 16; ++k) {
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

// One tile of tokens: scores, weights and the product with values. `keys`, `values`: of their first step, for this
// lane.
template <typename T, typename Tile>
__device__ __forceinline__ void attend_tile(const Attention &p, const PrefillRun &run, const PrefillPlace &place,
                                            PrefillState<Tile> &state, uint32_t queries, uint32_t keys, int first,
                                            bool plain) {
  PrefillScores<Tile> scores;
  multiply_keys<T, Tile>(scores, queries, keys);
  if (!plain) finish_scores(p, run, place, scores, first);
  PrefillWeights<Tile> weights;
  weigh<T, Tile>(weights, state, scores, run.factor);
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
template <typename T, typename Tile>
__device__ __forceinline__ void copy_tile(const Attention &p, const PrefillRun &run, TokenCopy<T, Tile> &keys,
                                          TokenCopy<T, Tile> &values, const PrefillPlace &place, uint32_t to,
                                          int first) {
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
    convert_tile<T, Tile>(p, run, place, to, first);
  }
}

// All tiles of one run.
template <typename T, typename Tile>
__device__ __forceinline__ void attend_run(const Attention &p, int number, PrefillNotes &notes,
                                           PrefillState<Tile> &state, uint32_t shared) {
  const PrefillPlace &place = notes.place;
  PrefillRun &run = notes.run;
  __syncthreads();  // everyone is done with the run before
  run.set<Tile>(p, number, place);
  __syncthreads();
  const int lane = thread_in<WARP>();
  TokenCopy<T, Tile> keys(p.run[number].key, place, run.first), values(p.run[number].value, place, run.first);
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
      attend_tile<T, Tile>(p, run, place, state, Tile::DIM > 64 ? queries : find_queries(), work, tile,
                           tile >= sight.plain_from && next <= sight.plain_to);
    to += flip;
    work -= flip;
    flip = -flip;
  }
  if (run.exact) finish_run(p, run.number, place, state);
}

template <typename T, typename Tile>
__device__ __forceinline__ void prefill(const Attention &p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  PrefillNotes &notes = *reinterpret_cast<PrefillNotes *>(shared + Tile::ROWS * Tile::QUERY_ROW + 2 * Tile::STAGE);
  PrefillPlace &place = notes.place;
  if (thread() == 0) place.set<Tile>(p);
  for (int i = thread() * 16; i < 2 * Tile::STAGE; i += Tile::THREADS * 16)
    *reinterpret_cast<uint4 *>(shared + Tile::ROWS * Tile::QUERY_ROW + i) = uint4{0, 0, 0, 0};
  __syncthreads();
  copy_queries<T, Tile>(p, place, shared_address(shared));
  cp_async_commit();
  PrefillState<Tile> state;
#pragma unroll 1
  for (int number = 0; number < p.runs; number = notes.run.number + 1)
    attend_run<T, Tile>(p, number, notes, state, shared_address(shared));
  cp_async_wait<0>();
  __syncthreads();
  finish_rows(p, place, state);
  store_rows<T, Tile>(p, place, state, shared);
}

}  // namespace c2c
