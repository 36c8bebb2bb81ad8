// What becomes of a tile's scores in prefill: scale, softcap, gates, masks, and which tokens a row sees.
#pragma once

#include "common.cuh"

namespace c2c {

// Rows of keys and values are padded by one chunk of 16 bytes, so that all addresses of ldmatrix in a tile are one
// register and constants, and eight rows touch all banks. Queries are swizzled: with them a block stays below 99 KiB,
// or where it may have 163 KiB (LARGE) has tiles of two parts.
template <int LARGEST, bool LARGE>
struct PrefillTile {
  static constexpr int DIM = LARGEST;
  static constexpr int WARPS = 8;
  static constexpr int M = DIM > 128 ? 16 : 32;                     // rows of a warp
  static constexpr int PART = DIM > 128 ? 16 : DIM > 64 ? 32 : 64;  // tokens for which a maximum is decided on at once
  static constexpr int N = LARGE ? 2 * PART : PART;                 // tokens of a tile
  static constexpr int USUAL = DIM > 64 ? N : 64;                   // tokens of it for which registers hold scores
  static constexpr int HELD = DIM > 128 ? 15 : 0;  // steps whose queries registers hold, of 16: one more pads products
  static constexpr int ROWS = WARPS * M;
  static constexpr int THREADS = WARPS * WARP;
  static constexpr int CHUNKS = DIM / 8;                             // 16-byte chunks of a row
  static constexpr int PASS_ROWS = THREADS / CHUNKS;                 // rows that the block copies at a time
  static constexpr int QUERY_ROW = DIM * 2;                          // bytes
  static constexpr int TOKEN_ROW = DIM * 2 + 16;                     // bytes
  static constexpr int STAGE = 2 * N * TOKEN_ROW;                    // keys, then values
  static constexpr int SHARED = ROWS * QUERY_ROW + 2 * STAGE + 256;  // 256: PrefillNotes
  static constexpr int MT = M / 16, NT = PART / 8, DT = DIM / 8;     // fragments
  static constexpr int LANE_ROWS = 2 * MT;                           // rows that a lane holds numbers of
  static constexpr int SIGHT_ROWS = M;                               // rows that tiles are skipped for
  static_assert(N % PASS_ROWS == 0 && SHARED <= (LARGE ? 163 : 99) * 1024,
                "a tile is copied in whole passes, and fits");

  // Where 16 bytes of the block's queries lie among these.
  static __device__ __forceinline__ int query_at(int row, int chunk) {
    return row * QUERY_ROW + swizzled(row, chunk) * 16;
  }
  // Before accumulators are changed by others than products: these are done when they are issued.
  static __device__ __forceinline__ void settle(float (&)[MT][DT][4]) {}
};

// threadIdx.x, read anew: numbers derived from it are cheaper to form again than to keep in registers.
__device__ __forceinline__ int thread() {
  uint32_t number;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(number));
  return static_cast<int>(number);
}

// threadIdx.x modulo and divided by N, as unsigned numbers are.
template <int N>
__device__ __forceinline__ int thread_in() {
  return static_cast<int>(static_cast<uint32_t>(thread()) % N);
}
template <int N>
__device__ __forceinline__ int thread_by() {
  return static_cast<int>(static_cast<uint32_t>(thread()) / N);
}

// Where a block is; in shared memory, for registers are scarce.
struct PrefillPlace {
  int batch, kv_head, own_end;
  int rows;       // of the KV head: queries * group
  int block_row;  // first of the block

  template <typename Tile>
  __device__ __forceinline__ void set(const Attention &p) {
    rows = p.q_len * p.group;
    const int tiles = (rows + Tile::ROWS - 1) / Tile::ROWS, pairs = p.kv_heads * p.batch;
    const int pair = static_cast<int>(blockIdx.x) % pairs;
    batch = pair / p.kv_heads;
    kv_head = pair % p.kv_heads;
    own_end = valid_tokens(p.run[0], batch);
    block_row = (tiles - 1 - static_cast<int>(blockIdx.x) / pairs) * Tile::ROWS;  // most tokens to see first
  }
  template <typename Tile>
  __device__ __forceinline__ int warp_row() const {
    return block_row + thread_by<WARP>() * Tile::M;
  }
  // The row of the lane's r-th scores, the last one where there is none.
  template <typename Tile>
  __device__ __forceinline__ int lane_row(int r) const {
    return min(warp_row<Tile>() + thread_in<WARP>() / 4 + 8 * r, rows - 1);
  }
  __device__ __forceinline__ int head(const Attention &p, int row) const { return kv_head * p.group + row % p.group; }
};

// Fragments of the scores: z[m][n][i] belongs to row 16 m + lane / 4 + (i > 1) * 8, token 8 n + lane % 4 * 2 + i % 2.
template <typename Tile>
struct PrefillScores {
  float z[Tile::MT][Tile::NT][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < Tile::MT * Tile::NT * 4; ++i) z[i / (Tile::NT * 4)][i / 4 % Tile::NT][i % 4] = 0.0f;
  }
};

// Tokens that some rows of a span see, and those that all see as they are multiplied.
struct alignas(16) Sight {
  int any_from, any_to, plain_from, plain_to;
};

__device__ __forceinline__ int clamped(int64_t token, int end) {
  return static_cast<int>(token < 0 ? 0 : token > end ? end : token);
}

// Own tokens from `from` up to `to` that a row sees before masks.
__device__ __forceinline__ void own_sight(const Attention &p, const PrefillPlace &place, int row, int &from, int &to) {
  const int64_t at = place.own_end - p.q_len + row / p.group;
  from = p.window ? clamped(at - p.window + 1, place.own_end) : 0;
  to = p.is_causal ? clamped(at + 1, place.own_end) : place.own_end;
}

__device__ __forceinline__ Sight sight_of(const Attention &p, int number, const PrefillPlace &place, int end, int first,
                                          int count) {
  if (first >= place.rows) return {0, 0, 0, 0};
  if (number) return {0, end, 0, end};
  Sight sight;
  const int last = first + count < place.rows ? first + count - 1 : place.rows - 1;
  own_sight(p, place, first, sight.any_from, sight.plain_to);
  own_sight(p, place, last, sight.plain_from, sight.any_to);
  return sight;
}

// The tiles of a run that some row of a block sees, by their first tokens.
struct Span {
  int from, to;
};

template <typename Tile>
__device__ __forceinline__ Span tiles_of(const Attention &p, int number, const PrefillPlace &place) {
  const Sight block = sight_of(p, number, place, valid_tokens(p.run[number], place.batch), place.block_row, Tile::ROWS);
  const int from = block.any_from / Tile::N * Tile::N;
  return {from, max(from, block.any_to)};
}

// Keys or values of a run and a KV head.
struct PrefillRows {
  const void *data;
  int64_t step;  // from a token to the next

  __device__ __forceinline__ void set(const Strided &rows, int size, const PrefillPlace &place) {
    data = static_cast<const char *>(rows.data) + (place.batch * rows.b + place.kv_head * rows.h) * size;
    step = rows.n;
  }
};

// What warps have to know of a run; in shared memory too.
struct PrefillRun {
  Sight sight[8];            // of each warp
  PrefillRows keys, values;  // where they are copied as they are
  int key_step, value_step;  // numbers from a pass of copies to the next, where there are whole tiles
  int whole;                 // tiles that begin before are copied whole
  int stop;                  // one tile after the block's last one, or equal to first where there are none
  int first, number, end;
  float factor;        // of scores in the exponent of 2
  float inner, outer;  // of special ones, before and behind tanh; outer is 0 where there is no softcap
  bool special;        // finish_scores turns scores into logits of base 2; factor is 1 then
  bool compares;       // positions hide tokens
  bool vectorised;     // rows are copied as they are, 16 bytes at a time
  bool exact;          // sums of unrounded weights are wanted

  // A barrier later all of it is there.
  template <typename Tile>
  __device__ __forceinline__ void set(const Attention &p, int run, const PrefillPlace &place) {
    const Run &source = p.run[run];
    const int tokens = valid_tokens(source, place.batch), warp = thread_by<WARP>();
    const bool hides = run && source.placed && (source.causal || p.segment_window);
    const bool changes = p.softcap != 0.0f || source.gate.data || hides || (!run && p.mask.data) || !(p.scale > 0.0f);
    if (thread_in<WARP>() == 0) {
      const int first_row = warp * Tile::M / Tile::SIGHT_ROWS * Tile::SIGHT_ROWS;
      sight[warp] = sight_of(p, run, place, tokens, place.block_row + first_row, Tile::SIGHT_ROWS);
      if (changes) sight[warp].plain_to = 0;
    }
    if (thread()) return;
    const Span tiles = tiles_of<Tile>(p, run, place);
    number = run;
    end = tokens;
    first = tiles.from;
    stop = tiles.from < tiles.to ? tiles.to + Tile::N : tiles.from;
    factor = changes ? 1.0f : p.scale * LOG2E;
    inner = p.softcap == 0.0f ? p.scale * LOG2E : 2.0f * LOG2E * p.scale / p.softcap;
    outer = p.softcap * LOG2E;
    special = changes;
    compares = hides;
    vectorised = source.vectorised && source.key_type == p.dtype && !source.index.data && !source.key_scale.data &&
                 !source.value_scale.data;
    keys.set(source.key, 2, place);
    values.set(source.value, 2, place);
    key_step = static_cast<int>(keys.step * Tile::PASS_ROWS);
    value_step = static_cast<int>(values.step * Tile::PASS_ROWS);
    whole = vectorised && key_step == keys.step * Tile::PASS_ROWS && value_step == values.step * Tile::PASS_ROWS &&
                    p.head_dim == Tile::DIM && p.value_dim == Tile::DIM
                ? min(tokens, stop - Tile::N) - Tile::N + 1
                : 0;
    exact = p.lse.data || p.mass.data;
  }
};

struct PrefillNotes {
  PrefillPlace place;
  PrefillRun run;
};

// f(score, r, token) for every score of a lane, whose first token is given: of its row r and of a token.
template <typename Tile, typename F>
__device__ __forceinline__ void each_score(PrefillScores<Tile> &scores, int first, F f) {
#pragma unroll
  for (int n = 0; n < Tile::NT; ++n) {
    const int token = first + 8 * n;
    if (n && n % 2 == 0) __syncwarp();  // loads do not move across it: all of them in flight would spill
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int r = 0; r < Tile::LANE_ROWS; ++r) f(scores.z[r / 2][n][r % 2 * 2 + j], r, token + j);
  }
}

// Scores in base 2, capped.
template <typename Tile>
__device__ __forceinline__ void scale_scores(const PrefillRun &run, PrefillScores<Tile> &scores) {
  const float inner = run.inner, outer = run.outer;
  if (outer == 0.0f)
    each_score(scores, 0, [&](float &z, int, int) { z *= inner; });
  else
    each_score(scores, 0, [&](float &z, int, int) { z = capped(z, inner, outer); });
}

// Adds log2 of the gates. A lane's rows are 8 apart: of one head where the group divides 8. Tokens beyond the end are
// hidden later; what is loaded for them is the last one's.
template <typename Tile>
__device__ __forceinline__ void gate_scores(const Attention &p, const PrefillRun &run, const PrefillPlace &place,
                                            PrefillScores<Tile> &scores, int token) {
  const Run &source = p.run[run.number];
  const Strided &gates = source.gate;
  const int end = run.end;
  const bool same = gates.h == 0 || 8 % p.group == 0;
  with_floats(gates.data, source.gate_type, [&](const auto *data) {
    data += place.batch * gates.b;
    if (same) {
      data += place.head(p, place.template lane_row<Tile>(0)) * gates.h;
      float gate = 0.0f;
      each_score(scores, token, [&](float &z, int r, int at) {
        if (r == 0) gate = log_gate(static_cast<float>(data[min(at, end - 1) * gates.n]));
        z += gate;
      });
    } else {
      int64_t heads[Tile::LANE_ROWS];
#pragma unroll
      for (int r = 0; r < Tile::LANE_ROWS; ++r) heads[r] = place.head(p, place.template lane_row<Tile>(r)) * gates.h;
      each_score(scores, token, [&](float &z, int r, int at) {
        z += log_gate(static_cast<float>(data[heads[r] + min(at, end - 1) * gates.n]));
      });
    }
  });
}

// Own tokens under the attention mask.
template <typename Tile>
__device__ __forceinline__ void mask_scores(const Attention &p, const PrefillRun &run, const PrefillPlace &place,
                                            PrefillScores<Tile> &scores, int token) {
  const int end = run.end;
  int64_t rows[Tile::LANE_ROWS];
#pragma unroll
  for (int r = 0; r < Tile::LANE_ROWS; ++r) {
    const int row = place.template lane_row<Tile>(r);
    rows[r] = place.batch * p.mask.b + place.head(p, row) * p.mask.h + row / p.group * p.mask.n;
  }
  if (p.mask_type == C2C_BOOL)
    each_score(scores, token, [&](float &z, int r, int at) {
      const int64_t number = rows[r] + min(at, end - 1) * p.mask_token;
      z = static_cast<const uint8_t *>(p.mask.data)[number] ? z : -INF;
    });
  else
    with_floats(p.mask.data, p.mask_type, [&](const auto *data) {
      each_score(scores, token, [&](float &z, int r, int at) {
        z += additive(static_cast<float>(data[rows[r] + min(at, end - 1) * p.mask_token]));
      });
    });
}

// Hides a segment's tokens by their positions.
template <typename Tile>
__device__ __forceinline__ void hide_by_position(const Attention &p, const PrefillRun &run, const PrefillPlace &place,
                                                 PrefillScores<Tile> &scores, int token) {
  const Run &source = p.run[run.number];
  const int end = run.end;
  int64_t rows[Tile::LANE_ROWS], position = 0;
#pragma unroll
  for (int r = 0; r < Tile::LANE_ROWS; ++r) {
    const int query = place.template lane_row<Tile>(r) / p.group;
    rows[r] = place.own_end - p.q_len + query;
    if (p.query_positions.data)
      rows[r] = load_integer(p.query_positions.data, place.batch * p.query_positions.b + query * p.query_positions.n,
                             p.query_positions_type);
  }
  const int64_t first = place.batch * source.positions.b;
  each_score(scores, token, [&](float &z, int r, int at) {
    if (r == 0)
      position =
          load_integer(source.positions.data, first + min(at, end - 1) * source.positions.n, source.positions_type);
    if (!in_sight(rows[r], position, source.causal, p.segment_window)) z = -INF;
  });
}

// Hides tokens that a row does not see by their index: beyond the end, causally, outside of the window.
template <typename Tile>
__device__ __forceinline__ void hide_edges(const Attention &p, const PrefillRun &run, const PrefillPlace &place,
                                           PrefillScores<Tile> &scores, int token) {
  int from[Tile::LANE_ROWS], to[Tile::LANE_ROWS];
#pragma unroll
  for (int r = 0; r < Tile::LANE_ROWS; ++r) {
    from[r] = 0, to[r] = run.end;
    if (run.number == 0) own_sight(p, place, place.template lane_row<Tile>(r), from[r], to[r]);
  }
  each_score(scores, token, [&](float &z, int r, int at) {
    if (at < from[r] || at >= to[r]) z = -INF;
  });
}

// Everything between products and exponentials that a tile of tokens from `first` on needs.
template <typename Tile>
__device__ __forceinline__ void finish_scores(const Attention &p, const PrefillRun &run, const PrefillPlace &place,
                                              PrefillScores<Tile> &scores, int first) {
  const int token = first + thread() % 4 * 2;
  if (run.special) {
    scale_scores(run, scores);
    if (p.run[run.number].gate.data) gate_scores(p, run, place, scores, token);
    if (run.number == 0 && p.mask.data) mask_scores(p, run, place, scores, token);
    if (run.compares) hide_by_position(p, run, place, scores, token);
  }
  hide_edges(p, run, place, scores, token);
}

}  // namespace c2c
