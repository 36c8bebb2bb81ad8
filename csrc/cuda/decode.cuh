// Decode: one block takes 16 rows (queries and heads of a KV head) over one split of a run's tokens. Every team (a
// warp, or two that share the value dims of wide heads) streams chunks of 16 tokens through shared memory of its own,
// STAGES chunks in flight, and keeps a softmax state of its own: no barrier between teams until their states are
// merged.
#pragma once

#include "decode.h"
#include "decode_softmax.cuh"
#include "storage.cuh"

namespace c2c {

// Warps of a team and teams of a block.
template <int DIM>
struct Teams {
  static constexpr int WARPS = DIM > 128 ? 2 : 1, COUNT = decode_warps(DIM) / WARPS, THREADS = WARPS * WARP;
  static __device__ __forceinline__ int mine() { return threadIdx.x / THREADS; }
  static __device__ __forceinline__ int part() { return threadIdx.x / WARP % WARPS; }  // of the value dims
  static __device__ __forceinline__ void sync() {
    if constexpr (WARPS == 1)
      __syncwarp();
    else
      barrier_sync(1 + mine(), THREADS);
  }
  static __device__ __forceinline__ void sync_all() { barrier_sync(0, COUNT * THREADS); }
};

// Shared memory of a block for head dims up to DIM; BYTES: keys and values of 8 bits, else of 16.
template <int DIM, bool BYTES>
struct Layout {
  static constexpr int DATA_CHUNKS = DIM * (BYTES ? 1 : 2) / 16;               // 16-byte chunks of a token
  static constexpr int ROW = DATA_CHUNKS * 16 < 128 ? 128 : DATA_CHUNKS * 16;  // bytes from token to token
  static constexpr int STAGE = 2 * CHUNK * ROW;                                // keys, then values
  static constexpr int STAGES = decode_shared(DIM) / Teams<DIM>::COUNT / STAGE;
  static_assert(STAGES >= 3, "too little in flight");
  static_assert(ROWS * DIM * 2 <= STAGE, "queries lie in the last team's last stage until they are in registers");

  // Where a token's chunk lies. Bytes of keys are read 8 at a time by 4 tokens and 4 lanes each, bytes of values 4 at a
  // time by tokens 0, 2, 4, 6 and 8 lanes each: 32 bytes of a token, and no two of the four in the same banks.
  static __device__ __forceinline__ int chunk_at(int token, int chunk, bool value) {
    return BYTES ? chunk ^ (((value ? token >> 1 : token) & 3) << 1) : swizzled(token, chunk);
  }
};

template <typename T, int DIM>
struct Tile {
  uint32_t query[DIM / 16][4];                // fragments of 16 rows
  float sum[DIM / 8 / Teams<DIM>::WARPS][4];  // fragments of 16 rows x this warp's value dims
  SoftmaxState state[2];                      // of rows lane / 4 and + 8; sums are those of this lane's columns
};

// Where a chunk of a row of queries lies: eight rows of one chunk, and two rows of four chunks, touch all banks.
__device__ __forceinline__ int query_chunk(int row, int chunk) { return chunk ^ ((row & 1) << 2 | (row >> 1 & 3)); }

// Queries of the block's rows into shared memory, rows of DIM numbers; zeros beyond the rows and their dim.
template <int DIM>
__device__ __forceinline__ void fetch_queries(const Attention &p, int batch, int kv_head, int first_row, char *shared) {
  constexpr int CHUNKS = DIM / 8;
  for (int at = threadIdx.x; at < ROWS * CHUNKS; at += Teams<DIM>::COUNT * Teams<DIM>::THREADS) {
    const int row = at / CHUNKS, chunk = at % CHUNKS;
    const Row r = row_of(p, 0, batch, kv_head, first_row + row, 0);
    const char *start =
        static_cast<const char *>(p.query.data) + 2 * (batch * p.query.b + r.head * p.query.h + r.query * p.query.n);
    char *to = shared + row * DIM * 2 + query_chunk(row, chunk) * 16;
    if (p.query_vectorised)
      fetch_16_bytes<2>(to, start, chunk, p.head_dim, r.inside);
    else
      fetch_numbers<2>(to, start, chunk, p.head_dim, r.inside);
  }
}

// Fragments of the queries. For BYTES, k 0..31 of two products stand for the dims that a lane finds in 8 bytes of a
// key: products 2j and 2j + 1 take dims 32j + 8c + 0, 1, 2, 3 and + 4, 5, 6, 7 where usually 2c, 2c + 1, 2c + 8, 2c
// + 9.
template <int DIM, bool BYTES>
__device__ __forceinline__ void load_queries(const char *shared, uint32_t (&query)[DIM / 16][4]) {
  const int lane = threadIdx.x % WARP;
  if constexpr (BYTES) {
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * half;
#pragma unroll
      for (int j = 0; j < DIM / 32; ++j) {
        const uint4 x =
            *reinterpret_cast<const uint4 *>(shared + row * DIM * 2 + query_chunk(row, 4 * j + lane % 4) * 16);
        query[2 * j][half] = x.x;
        query[2 * j][2 + half] = x.y;
        query[2 * j + 1][half] = x.z;
        query[2 * j + 1][2 + half] = x.w;
      }
    }
  } else {
    const int row = lane % 16;
#pragma unroll
    for (int k = 0; k < DIM / 16; ++k)
      ldmatrix_x4(query[k], shared_address(shared) + row * DIM * 2 + query_chunk(row, 2 * k + lane / 16) * 16);
  }
}

// Fetches a team's chunks of keys and values. A thread always takes the same 16-byte piece of tokens TOKENS apart.
template <int DIM, bool BYTES>
struct Fetcher {
  using L = Layout<DIM, BYTES>;
  static constexpr int SIZE = BYTES ? 1 : 2, TOKENS = Teams<DIM>::THREADS / L::DATA_CHUNKS;
  const char *key, *value;  // token 0 of the batch row and head
  int token, chunk;         // of this thread

  __device__ __forceinline__ Fetcher(const Run &run, int batch, int kv_head)
      : key(static_cast<const char *>(run.key.data) + SIZE * (batch * run.key.b + kv_head * run.key.h)),
        value(static_cast<const char *>(run.value.data) + SIZE * (batch * run.value.b + kv_head * run.value.h)),
        token(threadIdx.x % Teams<DIM>::THREADS / L::DATA_CHUNKS),
        chunk(threadIdx.x % Teams<DIM>::THREADS % L::DATA_CHUNKS) {}

  // Tokens first, first + 1, ... below `last`; zeros for the rest of the chunk.
  __device__ __forceinline__ void operator()(const Attention &p, const Run &run, int batch, int first, int last,
                                             char *stage) const {
    if (run.vectorised && !run.index.data) {
      const char *from_key = key + SIZE * run.key.n * (first + token) + chunk * 16;
      const char *from_value = value + SIZE * run.value.n * (first + token) + chunk * 16;
      const bool in_key = chunk * (16 / SIZE) < p.head_dim, in_value = chunk * (16 / SIZE) < p.value_dim;
#pragma unroll
      for (int i = 0; i < CHUNK / TOKENS; ++i) {
        const int at = token + i * TOKENS;
        const bool inside = first + at < last;
        cp_async_16(shared_address(place(stage, at, false)), inside && in_key ? from_key : key, inside && in_key);
        cp_async_16(shared_address(place(stage, at, true)), inside && in_value ? from_value : value,
                    inside && in_value);
        from_key += SIZE * TOKENS * run.key.n;
        from_value += SIZE * TOKENS * run.value.n;
      }
      return;
    }
#pragma unroll 1
    for (int at = token; at < CHUNK; at += TOKENS) {
      const int stored = first + at < last ? stored_token(run, batch, first + at) : -1;
      const int64_t row = stored < 0 ? 0 : SIZE * static_cast<int64_t>(stored);
      const auto fetch = [&](char *to, const char *from, int dim) {
        if (run.vectorised)
          fetch_16_bytes<SIZE>(to, from, chunk, dim, stored >= 0);
        else
          fetch_numbers<SIZE>(to, from, chunk, dim, stored >= 0);
      };
      fetch(place(stage, at, false), key + row * run.key.n, p.head_dim);
      fetch(place(stage, at, true), value + row * run.value.n, p.value_dim);
    }
  }

  __device__ __forceinline__ char *place(char *stage, int at, bool is_value) const {
    return stage + (is_value ? CHUNK * L::ROW : 0) + at * L::ROW + L::chunk_at(at, chunk, is_value) * 16;
  }
};

// Products of 16 rows and 16 tokens: fragment 0 is of tokens 0..7, 1 of 8..15.
template <typename T, int DIM, bool BYTES>
__device__ __forceinline__ void score(const Tile<T, DIM> &tile, const char *keys, bool e4m3, float (&scores)[2][4]) {
  using L = Layout<DIM, BYTES>;
  const int lane = threadIdx.x % WARP;
#pragma unroll
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 4; ++j) scores[i][j] = 0.0f;
  if constexpr (BYTES) {
#pragma unroll
    for (int j = 0; j < DIM / 32; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = 8 * half + lane / 4, chunk = 2 * j + lane % 4 / 2;
        const uint2 bytes = *reinterpret_cast<const uint2 *>(keys + token * L::ROW +
                                                             L::chunk_at(token, chunk, false) * 16 + lane % 2 * 8);
        multiply_bytes<T>(scores[half], tile.query[2 * j], tile.query[2 * j + 1], bytes, e4m3, 1.0f);
      }
  } else {
    const int token = lane / 16 * 8 + lane % 8;
#pragma unroll
    for (int k = 0; k < DIM / 16; ++k) {
      uint32_t b[4];
      ldmatrix_x4(b, shared_address(keys) + token * L::ROW + L::chunk_at(token, 2 * k + lane / 8 % 2, false) * 16);
      mma_16816<T>(scores[0], tile.query[k], b[0], b[1]);
      mma_16816<T>(scores[1], tile.query[k], b[2], b[3]);
    }
  }
}

// sum += weights values, of this warp's value dims. `scales`: of this lane's tokens 2c, 2c + 1, 2c + 8, 2c + 9, for
// values that are scaled here.
template <typename T, int DIM, bool BYTES>
__device__ __forceinline__ void accumulate(Tile<T, DIM> &tile, const uint32_t (&weights)[4], const char *values,
                                           bool e4m3, bool scaled, const float (&scales)[4]) {
  using L = Layout<DIM, BYTES>;
  constexpr int DIMS = DIM / Teams<DIM>::WARPS;
  const int lane = threadIdx.x % WARP, first_chunk = Teams<DIM>::part() * (DIMS * (BYTES ? 1 : 2) / 16);
  if constexpr (BYTES) {
#pragma unroll
    for (int j = 0; j < DIMS / 32; ++j) {
      const int chunk = first_chunk + 2 * j + lane / 16;
      accumulate_bytes<T>(
          tile.sum + 4 * j, weights, e4m3, scaled,
          [&](int token) { return values + token * L::ROW + L::chunk_at(token, chunk, true) * 16 + lane / 4 % 4 * 4; },
          [&](int i, int) { return scales[i]; });
    }
  } else {
    const int token = lane % 16;
#pragma unroll
    for (int j = 0; j < DIMS / 16; ++j) {
      const int chunk = first_chunk + 2 * j + lane / 16;
      uint32_t b[4];
      ldmatrix_x4_trans(b, shared_address(values) + token * L::ROW + L::chunk_at(token, chunk, true) * 16);
      mma_16816<T>(tile.sum[2 * j], weights, b[0], b[1]);
      mma_16816<T>(tile.sum[2 * j + 1], weights, b[2], b[3]);
    }
  }
}

// Takes a chunk of 16 tokens, which lies in `stage`, into the team's state.
template <typename T, int DIM, bool BYTES>
__device__ __forceinline__ void take_chunk(const Attention &p, const Work &w, const Row (&rows)[2], int first,
                                           const char *stage, Tile<T, DIM> &tile) {
  constexpr bool SCALES_VALUES = BYTES && Precision<T>::NARROW;
  using L = Layout<DIM, BYTES>;
  float scores[2][4], value_scales[4] = {1.0f, 1.0f, 1.0f, 1.0f}, factor[2];
  score<T, DIM, BYTES>(tile, stage, w.run.key_type == C2C_F8E4M3, scores);
  find_logits(p, w, rows, first, scores, value_scales);
  find_weights(tile.state, scores, factor);
  rescale(tile.sum, factor);
  if constexpr (!SCALES_VALUES)
#pragma unroll
    for (int i = 0; i < 8; ++i) scores[i / 4][i % 4] *= value_scales[i / 4 * 2 + i % 2];
  const uint32_t weights[4] = {pack<T>(scores[0][0], scores[0][1]), pack<T>(scores[0][2], scores[0][3]),
                               pack<T>(scores[1][0], scores[1][1]), pack<T>(scores[1][2], scores[1][3])};
  accumulate<T, DIM, BYTES>(tile, weights, stage + CHUNK * L::ROW, w.run.value_type == C2C_F8E4M3,
                            SCALES_VALUES && w.run.value_scale.data, value_scales);
}

// Tokens first .. last - 1 of the run into the tiles of the block's teams; ends with all copies arrived.
template <typename T, int DIM, bool BYTES>
__device__ __forceinline__ void stream(const Attention &p, const Work &w, const Row (&rows)[2], char *shared,
                                       Tile<T, DIM> &tile) {
  using L = Layout<DIM, BYTES>;
  using Team = Teams<DIM>;
  char *const stages = shared + Team::mine() * L::STAGES * L::STAGE;
  char *const queries = shared + Team::COUNT * L::STAGES * L::STAGE - L::STAGE;
  // Which team takes a chunk does not depend on where sight begins.
  const int step = Team::COUNT * CHUNK;
  int token = w.split_first + (w.first - w.split_first) / step * step + Team::mine() * CHUNK;
  int ahead = token, stage_ahead = 0;
  const Fetcher<DIM, BYTES> fetcher(w.run, w.batch, w.kv_head);
  const auto fetch = [&] {
    if (ahead < w.last) fetcher(p, w.run, w.batch, ahead, w.last, stages + stage_ahead * L::STAGE);
    cp_async_commit();
    ahead += step;
    stage_ahead = stage_ahead + 1 == L::STAGES ? 0 : stage_ahead + 1;
  };
  fetch_queries<DIM>(p, w.batch, w.kv_head, w.first_row, queries);
  cp_async_commit();
#pragma unroll 1
  for (int i = 1; i < L::STAGES; ++i) fetch();
  cp_async_wait<L::STAGES - 1>();
  Team::sync_all();
  load_queries<DIM, BYTES>(queries, tile.query);
  Team::sync_all();
  int stage = 0;
  for (; token < w.last; token += step) {
    fetch();
    cp_async_wait<L::STAGES - 1>();
    Team::sync();
    take_chunk<T, DIM, BYTES>(p, w, rows, token, stages + stage * L::STAGE, tile);
    stage = stage + 1 == L::STAGES ? 0 : stage + 1;
    Team::sync();
  }
  cp_async_wait<0>();
}

// Merges the teams' states and writes the block's: max and sum of every row, and the sums of values.
template <typename T, int DIM>
__device__ __forceinline__ void write_split(const Decode &d, int64_t base_row, int first_row, int split, bool bytes,
                                            float *shared, const Tile<T, DIM> &tile) {
  using Team = Teams<DIM>;
  constexpr int PITCH = DIM + 8;  // rows 8 banks apart: 4 rows of 4 lanes' 8 bytes a pass
  const Attention &p = d.attention;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  float *const sums = shared, *const maxima = shared + Team::COUNT * ROWS * PITCH;
  float *const counts = maxima + Team::COUNT * ROWS;
  Team::sync_all();  // the stages are read
  float2 both[2];    // max and sum of rows lane / 4 and + 8
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = tile.state[half].sum;
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    both[half] = make_float2(tile.state[half].max, sum);
    const int row = Team::mine() * ROWS + lane / 4 + 8 * half;
    float *to = sums + row * PITCH + Team::part() * (DIM / Team::WARPS) + 2 * (lane % 4);
#pragma unroll
    for (int j = 0; j < DIM / 8 / Team::WARPS; ++j)
      store_shared_pair(shared_address(to + 8 * j), tile.sum[j][2 * half], tile.sum[j][2 * half + 1]);
  }
  // Lane r < 16 stores row r's, so that neighbours write side by side.
  const int holder = lane % 8 * 4;
  for (float2 &each : both) each = make_float2(__shfl_sync(~0u, each.x, holder), __shfl_sync(~0u, each.y, holder));
  if (lane < ROWS && Team::part() == 0) {
    maxima[Team::mine() * ROWS + lane] = lane < 8 ? both[0].x : both[1].x;
    counts[Team::mine() * ROWS + lane] = lane < 8 ? both[0].y : both[1].y;
  }
  Team::sync_all();
  const int rows = p.q_len * p.group - first_row;
  for (int row = warp; row < ROWS && row < rows; row += Team::COUNT * Team::WARPS) {
    SoftmaxState state;
    for (int t = 0; t < Team::COUNT; ++t) state.merge({maxima[t * ROWS + row], counts[t * ROWS + row]});
    const int64_t at = (base_row + row) * d.splits + split;
    if (lane == 0) d.states[at] = make_float2(state.max, state.sum);
    if (state.sum == 0.0f) continue;
    float factors[Team::COUNT];
    for (int t = 0; t < Team::COUNT; ++t) factors[t] = state.weight(maxima[t * ROWS + row]);
    for (int dim = lane; dim < p.value_dim; dim += WARP) {
      // Of bytes, product 4 j + i holds dims 32 j + 4 n + i in its columns n.
      const int place = bytes ? dim / 32 * 32 + dim % 4 * 8 + dim % 32 / 4 : dim;
      float total = 0.0f;
      for (int t = 0; t < Team::COUNT; ++t) total += sums[(t * ROWS + row) * PITCH + place] * factors[t];
      d.sums[at * p.value_dim + dim] = total;
    }
  }
}

// Split `split` of all runs' (of run `number`), rows first_row .. + 15 of a KV head.
template <typename T, int DIM>
__device__ __forceinline__ void decode_split(const Decode &d, int number, int split, int batch, int kv_head,
                                             int first_row) {
  extern __shared__ __align__(128) char shared[];
  const Attention &p = d.attention;
  const Run &run = p.run[number];
  const int own_end = valid_tokens(p.run[0], batch), end = number ? valid_tokens(run, batch) : own_end;
  const int split_first = (split - d.first_split[number]) * d.split_tokens[number];
  Work w{run,
         number,
         batch,
         kv_head,
         first_row,
         split_first,
         split_first,
         min(split_first + d.split_tokens[number], end),
         !run.gate.data && !run.key_scale.data && !run.value_scale.data && p.softcap == 0.0f};
  const int lane = threadIdx.x % WARP;
  const Row rows[2] = {row_of(p, number, batch, kv_head, first_row + lane / 4, own_end),
                       row_of(p, number, batch, kv_head, first_row + lane / 4 + 8, own_end)};
  if (number) {
    w.plain = w.plain && !run.placed;
  } else {  // what no row sees is not read
    const int64_t lowest = own_end - p.q_len + first_row / p.group;
    const int64_t highest = own_end - p.q_len + min(first_row + ROWS - 1, p.q_len * p.group - 1) / p.group;
    w.plain = w.plain && !p.mask.data && (!p.is_causal || w.last - 1 <= lowest) &&
              (!p.window || w.first > highest - p.window);
    if (p.window) w.first = static_cast<int>(max(static_cast<int64_t>(w.first), lowest - p.window + 1));
    if (p.is_causal) w.last = static_cast<int>(min(static_cast<int64_t>(w.last), highest + 1));
  }
  Tile<T, DIM> tile;
  for (float (&sum)[4] : tile.sum)
    for (float &each : sum) each = 0.0f;
  const bool bytes = run.key_type == C2C_I8 || run.key_type == C2C_F8E4M3;
  if (w.first < w.last) {
    if (bytes)
      stream<T, DIM, true>(p, w, rows, shared, tile);
    else
      stream<T, DIM, false>(p, w, rows, shared, tile);
  }
  const int64_t base_row = (static_cast<int64_t>(batch) * p.kv_heads + kv_head) * p.q_len * p.group + first_row;
  write_split<T, DIM>(d, base_row, first_row, split, bytes, reinterpret_cast<float *>(shared), tile);
}

// Grid: batch x KV heads x tiles of 16 rows x splits, splits fastest.
template <typename T, int DIM>
__device__ __forceinline__ void decode_splits(const Decode &d) {
  const int split = blockIdx.x % d.splits;
  int program = blockIdx.x / d.splits, number = 0;
  const int first_row = program % d.row_tiles * ROWS;
  program /= d.row_tiles;
  while (split >= d.first_split[number + 1]) ++number;
  decode_split<T, DIM>(d, number, split, program / d.attention.kv_heads, program % d.attention.kv_heads, first_row);
}

}  // namespace c2c
