// merged_attention for many queries: one pass over the own cache and every segment, all of them in receiver space.
//
// A block of 8 warps takes WARPS * M rows of one KV head (row = query * group + head in the group) and walks over tiles
// of N tokens, run after run. Keys and values come in two stages of cp.async; queries stay in shared memory. A warp
// skips tiles that none of its rows sees. Scores live in registers only.
#pragma once

#include <type_traits>

#include "prefill_copies.cuh"
#include "prefill_weights.cuh"

namespace c2c {

// Rows of keys or values on their way into stages: thread t copies chunk t % CHUNKS of rows t / CHUNKS + PASS_ROWS i.
template <typename T, typename Tile>
struct TokenCopy {
  const T *from;  // this thread's chunk, PASS_ROWS further with every pass

  __device__ __forceinline__ TokenCopy(const PrefillRows &rows, int first) {
    const int chunk = thread_in<Tile::CHUNKS>(), row = thread_by<Tile::CHUNKS>();
    from = static_cast<const T *>(rows.data) + (first + row) * rows.step + chunk * 8;
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

// The warp's queries in shared memory.
template <typename Tile>
struct SharedQueries {
  uint32_t first;  // of the first step, for this lane

  __device__ __forceinline__ SharedQueries(uint32_t shared) {
    const int lane = thread_in<WARP>();
    first = shared + (thread_by<WARP>() * Tile::M + lane % 16) * Tile::QUERY_ROW + swizzled(lane, lane / 16) * 16;
  }

  // Of step k. A chunk is swizzled to where its number differs within 128 bytes.
  __device__ __forceinline__ void load(uint32_t (&q)[Tile::MT][4], int k) const {
#pragma unroll
    for (int m = 0; m < Tile::MT; ++m) ldmatrix_x4(q[m], (first ^ k % 4 * 32) + k / 4 * 128 + m * 16 * Tile::QUERY_ROW);
  }
};

// Some of them in registers, those of the first HELD steps.
template <typename Tile>
struct HeldQueries {
  const SharedQueries<Tile> &others;
  uint32_t words[Tile::HELD][Tile::MT][4];

  __device__ __forceinline__ HeldQueries(const SharedQueries<Tile> &queries) : others(queries) {
#pragma unroll
    for (int k = 0; k < Tile::HELD; ++k) queries.load(words[k], k);
  }

  __device__ __forceinline__ void load(uint32_t (&q)[Tile::MT][4], int k) const {
    if (k >= Tile::HELD) return others.load(q, k);
#pragma unroll
    for (int i = 0; i < Tile::MT * 4; ++i) q[i / 4][i % 4] = words[k][i / 4][i % 4];
  }
};

// scores = q k^T for the warp's M rows and a part's tokens. `keys`: of the first step, for this lane.
template <typename T, typename Tile, typename Queries>
__device__ __forceinline__ void multiply_keys(PrefillScores<Tile> &scores, const Queries &queries, uint32_t keys) {
  scores.clear();
#pragma unroll
  for (int k = 0; k < Tile::DIM / 16; ++k) {
    uint32_t q[Tile::MT][4];
    queries.load(q, k);
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

// From a lane's keys to its values, which lie behind them; lanes 8 to 15 and 16 to 23 have changed places.
template <typename Tile>
__device__ __forceinline__ uint32_t from_keys_to_values() {
  const int lane = thread_in<WARP>();
  return Tile::STAGE / 2 + ((lane / 8 & 1) - lane / 16) * static_cast<uint32_t>(8 * Tile::TOKEN_ROW - 16);
}

// out += weights v. `values`: of the first step, for this lane.
template <typename T, typename Tile, typename State>
__device__ __forceinline__ void multiply_values(State &state, const PrefillWeights<Tile> &weights, uint32_t values) {
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

// A part of a tile: scores, weights and the product with values. `keys`: of its first step, for this lane.
template <typename T, typename Tile>
__device__ __forceinline__ void attend_part(const Attention &p, const PrefillRun &run, const PrefillPlace &place,
                                            PrefillState<Tile> &state, const SharedQueries<Tile> &queries,
                                            uint32_t keys, int first, bool plain) {
  PrefillScores<Tile> scores;
  multiply_keys<T>(scores, queries, keys);
  if (!plain) finish_scores(p, run, place, scores, first);
  PrefillWeights<Tile> weights;
  weigh<T, Tile>(weights, state, scores, run.factor);
  if (run.exact) add_exact(state, scores, run.factor);
  multiply_values<T>(state, weights, keys + from_keys_to_values<Tile>());
}

// The parts of a tile, from the one at `done` on, that some row of the warp sees.
template <typename T, typename Tile>
__device__ __forceinline__ void attend_parts(const Attention &p, const PrefillRun &run, const PrefillPlace &place,
                                             PrefillState<Tile> &state, const SharedQueries<Tile> &queries,
                                             uint32_t keys, int tile, int done) {
#pragma unroll 1
  for (int part = done; part < Tile::N; part += Tile::PART) {
    const Sight sight = run.sight[thread_by<WARP>()];
    const int from = tile + part, to = from + Tile::PART;
    if (from < sight.any_to && to > sight.any_from)
      attend_part<T, Tile>(p, run, place, state, queries, keys + part * Tile::TOKEN_ROW, from,
                           from >= sight.plain_from && to <= sight.plain_to);
  }
}

// As many tokens as registers hold scores of, as one part.
template <typename Tile>
struct AtOnce : Tile {
  static constexpr int PART = Tile::USUAL, NT = PART / 8;
};

// Weights of a usual tile's tokens, which all rows of the warp see without masks, and the sums of each part's. Scores
// become weights where they lie, so that those of two parts are there at once, and queries are loaded once for both.
template <typename T, typename Tile>
struct UsualWeights {
  static constexpr int PARTS = Tile::USUAL / Tile::PART;
  PrefillWeights<AtOnce<Tile>> weights;
  // Of each part and 16 rows. Where a warp has no more rows, two parts' share the columns of a product with ones, and
  // registers; one that is no number makes the other so too.
  static constexpr int SHARING = Tile::MT == 1 ? PARTS : 1;
  float sums[PARTS * Tile::MT / SHARING][4] = {};

  // The ones of the first part, or of the only one: of even columns where two share them.
  static __device__ __forceinline__ uint32_t find_ones() { return SHARING > 1 && thread() & 4 ? 0 : pair_of_ones<T>(); }

  // Of the lane's row r.
  __device__ __forceinline__ float sum(int part, int r) const {
    return sums[(part * Tile::MT + r / 2) / SHARING][r % 2 * 2 + part % SHARING];
  }

  // Returns whether that is all: false where a row may have to take another maximum.
  template <typename Queries>
  __device__ __forceinline__ bool form(const PrefillState<Tile> &state, const Queries &queries, uint32_t keys,
                                       float factor, uint32_t first_ones) {
    PrefillScores<AtOnce<Tile>> scores;
    multiply_keys<T>(scores, queries, keys);
    bool high = false;
#pragma unroll
    for (int m = 0; m < Tile::MT; ++m) {
      form_words<T>(weights, m, scores, factor, state.minus_max[m], {false, false});
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        const uint32_t ones = part % SHARING ? first_ones ^ pair_of_ones<T>() : first_ones;
        add_words<T, Tile>(sums[(part * Tile::MT + m) / SHARING], weights.words[m] + part * Tile::PART / 16, ones);
        high = high || !(sum(part, 2 * m) <= MAX_TILE_SUM) || !(sum(part, 2 * m + 1) <= MAX_TILE_SUM);
      }
    }
    return !__any_sync(0xffffffff, high);
  }

  // The same bits as the parts one after another.
  __device__ __forceinline__ void multiply(PrefillState<Tile> &state, uint32_t values) const {
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
#pragma unroll
      for (int r = 0; r < Tile::LANE_ROWS; ++r) state.sum[r / 2][r % 2] += sum(part, r);
    multiply_values<T>(state, weights, values);
  }
};

// The tile copied last is there, and all warps are done with the one before. Warps come here from different places.
template <typename Tile>
__device__ __forceinline__ void receive() {
  cp_async_wait<0>();
  barrier_sync(0, Tile::THREADS);
}

// The whole tile that `keys` and `values` have come to.
template <typename T, typename Tile>
__device__ __forceinline__ void copy_whole(const PrefillRun &run, TokenCopy<T, Tile> &keys, TokenCopy<T, Tile> &values,
                                           uint32_t to) {
  const int key_step = run.key_step, value_step = run.value_step;
  keys.whole(to, key_step);
  values.whole(to + Tile::STAGE / 2, value_step);
  cp_async_commit();
}

// Copies the tile of tokens from `first` on, where it is one of the run.
template <typename T, typename Tile>
__device__ __forceinline__ void copy_tile(const Attention &p, const PrefillRun &run, const PrefillPlace &place,
                                          uint32_t to, int first) {
  if (first >= run.stop - Tile::N) return;
  if (!run.vectorised) return convert_tile<T, Tile>(p, run, place, to, first);
  TokenCopy<T, Tile> keys(run.keys, first), values(run.values, first);
  if (first < run.whole) return copy_whole(run, keys, values, to);
  const int left = run.end - first - thread_by<Tile::CHUNKS>(), chunk = thread_in<Tile::CHUNKS>();
  keys.next(to, chunk * 8 < p.head_dim ? left : 0, run.keys.step * Tile::PASS_ROWS);
  values.next(to + Tile::STAGE / 2, chunk * 8 < p.value_dim ? left : 0, run.values.step * Tile::PASS_ROWS);
  cp_async_commit();
}

// Where a thread is in a run: at tile `next`, which is on its way while the one before is worked on.
template <typename T, typename Tile>
struct RunWalk {
  SharedQueries<Tile> queries;
  uint32_t work, to;  // this lane's keys in the stage worked on; this thread's first chunk in the one that is filled
  int flip = Tile::STAGE;
  int next;

  __device__ __forceinline__ RunWalk(uint32_t shared, int first) : queries(shared), next(first) {
    const int lane = thread_in<WARP>();
    const uint32_t stages = shared + Tile::ROWS * Tile::QUERY_ROW;
    work = stages + Tile::STAGE + ((lane & 7) + lane / 16 * 8) * Tile::TOKEN_ROW + (lane / 8 & 1) * 16;
    to = stages + thread_by<Tile::CHUNKS>() * Tile::TOKEN_ROW + thread_in<Tile::CHUNKS>() * 16;
  }

  __device__ __forceinline__ void go_on() {
    next += Tile::N;
    to += flip;
    work -= flip;
    flip = -flip;
  }

  // Usual tiles as long as there are, each while a whole one is copied. Where one turns out not to be usual, how many
  // of its tokens have been attended to; -1 where the next has not been received.
  __device__ __forceinline__ int attend_usual_tiles(const PrefillRun &run, PrefillState<Tile> &state) {
    const Sight sight = run.sight[thread_by<WARP>()];
    if (run.exact || state.risen || next - Tile::N < sight.plain_from) return -1;
    const int stop = min(sight.plain_to + 1, run.whole);
    if (next >= stop) return -1;
    TokenCopy<T, Tile> keys(run.keys, next), values(run.values, next);
    const float factor = run.factor;
    const uint32_t apart = from_keys_to_values<Tile>();
    const std::conditional_t<(Tile::HELD > 0), HeldQueries<Tile>, SharedQueries<Tile>> usual_queries(queries);
    const uint32_t ones = UsualWeights<T, Tile>::find_ones();
    int done = -1;
#pragma unroll 1
    while (next < stop) {
      receive<Tile>();
      copy_whole(run, keys, values, to);
#pragma unroll
      for (int part = 0; part < Tile::N; part += Tile::USUAL) {
        const uint32_t at = work + part * Tile::TOKEN_ROW;
        UsualWeights<T, Tile> usual;
        if (!usual.form(state, usual_queries, at, factor, ones)) {
          done = part;
          goto unusual;
        }
        usual.multiply(state, at + apart);
      }
      go_on();
    }
  unusual:
    state.kept_usual();
    return done;
  }
};

// All tiles of one run.
template <typename T, typename Tile>
__device__ __forceinline__ void attend_run(const Attention &p, int number, PrefillNotes &notes,
                                           PrefillState<Tile> &state, uint32_t shared) {
  const PrefillPlace &place = notes.place;
  PrefillRun &run = notes.run;
  __syncthreads();  // everyone is done with the run before
  run.set<Tile>(p, number, place);
  __syncthreads();
  RunWalk<T, Tile> walk(shared, run.first);
#pragma unroll 1
  for (;; walk.go_on()) {
    const int done = walk.attend_usual_tiles(run, state);
    if (done < 0) {
      if (walk.next >= run.stop) break;
      receive<Tile>();
      copy_tile<T, Tile>(p, run, place, walk.to, walk.next);
    }
    attend_parts<T, Tile>(p, run, place, state, walk.queries, walk.work, walk.next - Tile::N, max(done, 0));
    walk.queries = SharedQueries<Tile>(shared);  // so that no register holds it meanwhile
  }
  if (run.exact) finish_run(p, run.number, place, state);
}

template <typename T, typename Tile>
__device__ __forceinline__ void prefill(const Attention &p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  static_assert(sizeof(PrefillNotes) <= 256, "notes fit behind the stages");
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
