// merged_attention for many queries on sm_90a: what prefill.cuh does, with copies by tensor maps and products of warp
// groups.
//
// A block takes 128 rows of one KV head and walks over tiles of 64 tokens, run after run. One thread keeps STAGES tiles
// of keys and values on their way; two groups of four warps take 64 rows each, and skip tiles that none of these sees.
// Queries are the first operand of q k^T in shared memory, weights that of the second product in registers. Runs that
// are not stored as they are multiplied (bytes with scales, an index, rows off 16 bytes) are widened by the eight
// warps, in the same stages: what is multiplied, and so every bit, is the same either way, and no call needs another
// kernel.
#pragma once

#include "prefill_copies.cuh"
#include "prefill_weights.cuh"
#include "prefill_wgmma.h"
#include "wgmma.cuh"

namespace c2c {

constexpr int PRODUCERS = 128;  // threads, of which one works: registers are handed from group to group of four warps

// Queries, keys and values lie in blocks of 64 columns, rows of 128 bytes, swizzled.
template <int LARGEST>
struct WgmmaTile {
  static constexpr int DIM = LARGEST;
  static constexpr int WARPS = 8;  // that multiply
  static constexpr int M = 16;     // rows of a warp
  static constexpr int N = 64;     // tokens of a tile
  static constexpr int PART = N;   // tokens for which a maximum is decided on at once
  static constexpr int ROWS = WARPS * M;
  static constexpr int THREADS = WARPS * WARP;        // a third group of warps copies
  static constexpr int CHUNKS = DIM / 8;              // 16-byte chunks of a row
  static constexpr int PASS_ROWS = THREADS / CHUNKS;  // rows that the warps convert at a time
  static constexpr int BLOCKS = DIM / MAP_COLUMNS;
  static constexpr int TOKEN_ROW = 128;           // bytes
  static constexpr int KEY_BLOCK = N * 128;       // bytes of 64 columns
  static constexpr int QUERY_BLOCK = ROWS * 128;  // the same
  static constexpr int QUERIES = BLOCKS * QUERY_BLOCK;
  static constexpr int STAGE = 2 * BLOCKS * KEY_BLOCK;  // keys, then values
  static constexpr bool OVERLAPS = DIM <= 128;          // a product and the next weights; registers are too few beyond
  static constexpr int STAGES = DIM > 128 ? 2 : 4;
  static constexpr int NOTES = QUERIES + STAGES * STAGE;
  static constexpr int BARRIERS = NOTES + 256;                 // behind PrefillNotes
  static constexpr int SHARED = BARRIERS + 2 * STAGES * 8;     // full ones, then empty ones
  static constexpr int MT = M / 16, NT = N / 8, DT = DIM / 8;  // fragments
  static constexpr int LANE_ROWS = 2 * MT;                     // rows that a lane holds numbers of
  static constexpr int SIGHT_ROWS = 64;                        // rows that tiles are skipped for
  static_assert(PASS_ROWS % 8 == 0 && SHARED <= 227 * 1024, "rows of a pass are swizzled alike, and a block fits");

  static __device__ __forceinline__ int query_at(int row, int chunk) {
    return chunk / 8 * QUERY_BLOCK + row * 128 + swizzled(row, chunk % 8) * 16;
  }
  static __device__ __forceinline__ int token_at(int token, int chunk) {
    return chunk / 8 * KEY_BLOCK + token * 128 + swizzled(token, chunk % 8) * 16;
  }
  // The accumulators are about to be changed by others than products: no product of theirs is in flight after this.
  static __device__ __forceinline__ void settle(float (&out)[MT][DT][4]) {
    wgmma_wait<0>();
    wgmma_hold(out[0]);
  }
};

// The tiles of all runs take turns in the stages; producer and consumers count them alike.
template <typename Tile>
struct StageTurn {
  uint32_t stages, barriers;  // in shared memory
  int stage = 0;
  uint32_t parity = 0;  // of the round

  __device__ __forceinline__ explicit StageTurn(uint32_t shared)
      : stages(shared + Tile::QUERIES), barriers(shared + Tile::BARRIERS) {}
  __device__ __forceinline__ uint32_t at() const { return stages + stage * Tile::STAGE; }
  __device__ __forceinline__ uint32_t full() const { return barriers + stage * 8; }
  __device__ __forceinline__ uint32_t empty() const { return barriers + (Tile::STAGES + stage) * 8; }
  // The round before is done with the stage; at once in the first round.
  __device__ __forceinline__ void wait_empty() const { mbarrier_wait(empty(), parity ^ 1); }
  __device__ __forceinline__ void wait_full() const { mbarrier_wait(full(), parity); }
  __device__ __forceinline__ void next() {
    if (++stage == Tile::STAGES) stage = 0, parity ^= 1;
  }
};

__device__ __forceinline__ void consumers_meet() { barrier_sync(1, 256); }

// One thread has the tiles of all mapped runs copied.
template <typename Tile>
__device__ __forceinline__ void produce(const MappedAttention &mapped, const PrefillPlace &place, uint32_t shared) {
  const Attention &p = mapped.attention;
  StageTurn<Tile> turn(shared);
#pragma unroll 1
  for (int number = 0; number < p.runs; ++number) {
    const Run &run = p.run[number];
    const Span tiles = tiles_of<Tile>(p, number, place);
    const MapSlot *const maps = mapped.maps + 2 * number;
    // A tensor that is broadcast over heads or batch has one of them.
    const int key_head = run.key.h ? place.kv_head : 0, key_batch = run.key.b ? place.batch : 0;
    const int value_head = run.value.h ? place.kv_head : 0, value_batch = run.value.b ? place.batch : 0;
#pragma unroll 1
    for (int token = tiles.from; token < tiles.to; token += Tile::N, turn.next()) {
      // Also where the consumers convert the tile: a barrier tells a round from the next alone, so that who goes on
      // without waiting takes a round that is not over for one that has not begun.
      turn.wait_empty();
      if (!mapped.mapped[number]) continue;
      mbarrier_expect(turn.full(), Tile::STAGE);
#pragma unroll
      for (int block = 0; block < Tile::BLOCKS; ++block) {
        const uint32_t to = turn.at() + block * Tile::KEY_BLOCK;
        copy_box(to, maps, block * MAP_COLUMNS, token, key_head, key_batch, turn.full());
        copy_box(to + Tile::STAGE / 2, maps + 1, block * MAP_COLUMNS, token, value_head, value_batch, turn.full());
      }
    }
  }
}

// The consumers' part of having a tile: it is in its stage afterwards.
template <typename T, typename Tile>
__device__ __forceinline__ void receive_tile(const MappedAttention &mapped, const PrefillRun &run,
                                             const PrefillPlace &place, const StageTurn<Tile> &turn, int first) {
  const int chunk = thread_in<Tile::CHUNKS>(), row = thread_by<Tile::CHUNKS>();
  if (mapped.mapped[run.number]) {
    turn.wait_full();
    // Values behind a row's length may be anything, and their weights are 0: zeros make their products 0 as well.
    if (first + Tile::N > run.end && run.end < mapped.attention.run[run.number].len) {
      const uint32_t zeros[4] = {};
#pragma unroll 1
      for (int i = row; i < Tile::N; i += Tile::PASS_ROWS)
        if (first + i >= run.end) store_shared_16(turn.at() + Tile::STAGE / 2 + Tile::token_at(i, chunk), zeros);
      fence_async();
      consumers_meet();
    }
  } else {
    turn.wait_empty();
    convert_tile<T, Tile>(mapped.attention, run, place, turn.at() + Tile::token_at(row, chunk), first);
    fence_async();
    consumers_meet();
    if (thread() == 0) mbarrier_arrive(turn.full());
    turn.wait_full();
  }
}

// Starts scores = q k^T.
template <typename T, typename Tile>
__device__ __forceinline__ void start_keys(PrefillScores<Tile> &scores, uint32_t queries, uint32_t keys) {
  const uint64_t a = wgmma_rows(queries), b = wgmma_rows(keys);
  wgmma_hold(scores.z[0]);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < Tile::DIM / 16; ++k)
    wgmma_shared<T>(scores.z[0], wgmma_further(a, k / 4 * Tile::QUERY_BLOCK + k % 4 * 32),
                    wgmma_further(b, k / 4 * Tile::KEY_BLOCK + k % 4 * 32), k > 0);
  wgmma_commit();
}

// Starts out += weights v, of the tile whose keys are given.
template <typename T, typename Tile>
__device__ __forceinline__ void start_values(PrefillState<Tile> &state, const PrefillWeights<Tile> &weights,
                                             uint32_t keys) {
  const uint64_t b = wgmma_columns(keys + Tile::STAGE / 2, Tile::KEY_BLOCK);
  wgmma_hold(state.out[0]);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < Tile::NT / 2; ++k)
    wgmma_registers<T>(state.out[0], weights.words[0][k], wgmma_further(b, k * 16 * Tile::TOKEN_ROW));
  wgmma_commit();
}

// This warp is done with a stage.
__device__ __forceinline__ void release(uint32_t empty) {
  __syncwarp();
  if (thread_in<WARP>() == 0) mbarrier_arrive(empty);
}

// Where a group is in a run.
template <typename T, typename Tile>
struct RunWork {
  const MappedAttention &mapped;
  const PrefillRun &run;
  const PrefillPlace &place;
  PrefillState<Tile> &state;
  StageTurn<Tile> &turn;
  uint32_t queries;
  int tile;

  __device__ __forceinline__ void receive() { receive_tile<T, Tile>(mapped, run, place, turn, tile); }
  __device__ __forceinline__ void next() { tile += Tile::N, turn.next(); }

  // Tiles before `to`, which the other group alone sees.
  __device__ __forceinline__ void pass_by(int to) {
#pragma unroll 1
    for (; tile < to; next()) {
      receive();
      release(turn.empty());
    }
  }

  // From a tile's scores to its weights.
  __device__ __forceinline__ void form(PrefillWeights<Tile> &weights, PrefillScores<Tile> &scores) {
    const Attention &p = mapped.attention;
    const Sight sight = run.sight[thread_by<WARP>()];
    if (tile < sight.plain_from || tile + Tile::N > sight.plain_to) finish_scores(p, run, place, scores, tile);
    weigh<T, Tile>(weights, state, scores, run.factor);
    if (run.exact) add_exact(state, scores, run.factor);
  }

  // The tiles up to `to`, one product after another.
  __device__ __forceinline__ void in_turn(int to) {
#pragma unroll 1
    for (; tile < to; next()) {
      receive();
      PrefillScores<Tile> scores;
      start_keys<T>(scores, queries, turn.at());
      wgmma_wait<0>();
      wgmma_hold(scores.z[0]);
      PrefillWeights<Tile> weights;
      form(weights, scores);
      start_values<T>(state, weights, turn.at());
      wgmma_wait<0>();
      wgmma_hold(state.out[0]);
      release(turn.empty());
    }
  }

  // The same, at least one: a tile's scores become weights while the product of the weights before goes on.
  __device__ __forceinline__ void overlapping(int to) {
    PrefillScores<Tile> scores;
    PrefillWeights<Tile> weights;
    receive();
    start_keys<T>(scores, queries, turn.at());
    wgmma_wait<0>();
    wgmma_hold(scores.z[0]);
    form(weights, scores);
#pragma unroll 1
    while (tile + Tile::N < to) {
      const uint32_t before = turn.at(), empty = turn.empty();
      next();
      receive();
      start_keys<T>(scores, queries, turn.at());
      start_values<T>(state, weights, before);
      wgmma_wait<1>();
      wgmma_hold(scores.z[0]);
      PrefillWeights<Tile> following;
      form(following, scores);
      wgmma_wait<0>();
      wgmma_hold(state.out[0]);
      release(empty);
      weights.take(following);
    }
    start_values<T>(state, weights, turn.at());
    wgmma_wait<0>();
    wgmma_hold(state.out[0]);
    release(turn.empty());
    next();
  }
};

// All tiles of one run.
template <typename T, typename Tile>
__device__ __forceinline__ void multiply_run(const MappedAttention &mapped, int number, PrefillNotes &notes,
                                             PrefillState<Tile> &state, StageTurn<Tile> &turn, uint32_t queries) {
  PrefillRun &run = notes.run;
  consumers_meet();  // everyone is done with the run before
  run.set<Tile>(mapped.attention, number, notes.place);
  consumers_meet();
  RunWork<T, Tile> work{mapped, run, notes.place, state, turn, queries, run.first};
  const int stop = run.stop - Tile::N, any_from = run.sight[thread_by<WARP>()].any_from;
  work.pass_by(min(stop, any_from / Tile::N * Tile::N));
  const int any_to = min(stop, run.sight[thread_by<WARP>()].any_to);
  if constexpr (Tile::OVERLAPS) {
    if (work.tile < any_to) work.overlapping(any_to);
  } else {
    work.in_turn(any_to);
  }
  work.pass_by(stop);
  if (run.exact) finish_run(mapped.attention, run.number, notes.place, state);
}

template <typename T, typename Tile>
__device__ __forceinline__ void prefill_wgmma(const MappedAttention &mapped) {
  const Attention &p = mapped.attention;
  extern __shared__ __align__(1024) unsigned char shared[];
  static_assert(sizeof(PrefillNotes) <= Tile::BARRIERS - Tile::NOTES, "notes end before barriers");
  PrefillNotes &notes = *reinterpret_cast<PrefillNotes *>(shared + Tile::NOTES);
  const PrefillPlace &place = notes.place;
  if (thread() == 0) {
    notes.place.template set<Tile>(p);
    const StageTurn<Tile> turn(shared_address(shared));
    for (int stage = 0; stage < Tile::STAGES; ++stage) {
      mbarrier_init(turn.full() + stage * 8, 1);
      mbarrier_init(turn.empty() + stage * 8, Tile::WARPS);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (thread() >= Tile::THREADS) {
    keep_registers<24>();
    if (thread() == Tile::THREADS) produce<Tile>(mapped, place, shared_address(shared));
    return;
  }
  take_registers<240>();
  copy_queries<T, Tile>(p, place, shared_address(shared));
  cp_async_commit();
  cp_async_wait<0>();
  fence_async();  // seen after the next meeting
  StageTurn<Tile> turn(shared_address(shared));
  const uint32_t queries = shared_address(shared) + thread_by<128>() * 64 * 128;
  PrefillState<Tile> state;
#pragma unroll 1
  for (int number = 0; number < p.runs; number = notes.run.number + 1)
    multiply_run<T, Tile>(mapped, number, notes, state, turn, queries);
  consumers_meet();
  finish_rows(p, place, state);
  store_rows<T, Tile>(p, place, state, shared);
}

}  // namespace c2c
