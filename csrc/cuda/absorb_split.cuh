// A split of raw tokens: 16 or 32 rows of all heads, 4 warps for each 16. A warp has a quarter of the columns, of keys
// and of values: it multiplies its quarter of the keys, all add up the four, each forms all weights, and sums its
// quarter of the values.
#pragma once

#include "absorb_fold.cuh"
#include "absorb_marks.cuh"
#include "absorb_ring.cuh"

namespace c2c {

constexpr int MOST_STEPS = LARGEST_WIDTH / ABSORB_WARPS / 16;  // of 16 columns, of a warp

struct RawTile {
  uint32_t query[MOST_STEPS][4];  // fragments of 16 rows x this warp's columns
  float sum[2 * MOST_STEPS][4];   // fragments of 16 rows x this warp's columns of values
  SoftmaxState state[2];          // of rows lane / 4 and + 8; sums are those of this lane's columns
  float shift[2];                 // q . b of these rows
  float scale[2];                 // of products of these rows: powers of two where T is float16, unused else
};

// A quarter of the columns, in steps of 16.
__device__ __forceinline__ int steps_of(const AbsorbedSide &side) { return side.width / ABSORB_WARPS / 16; }
__device__ __forceinline__ int raw_part() { return threadIdx.x / WARP % ABSORB_WARPS; }

// Folded columns of this warp have a power of two for each FOLD_COLUMNS: makes it the larger one for all, and returns
// it.
__device__ __forceinline__ float join_scales(const Absorbed &s, int64_t row, int half, RawTile &tile) {
  static_assert(MOST_STEPS * 16 <= 2 * FOLD_COLUMNS, "a warp's columns have two powers of two at most");
  const int columns = steps_of(s.key) * 16;
  const float *const scales = fold_scale(s, row, raw_part() * columns);
  if (columns <= FOLD_COLUMNS) return scales[0];
  const float larger = fmaxf(scales[0], scales[1]);
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const __half2 factor = __float2half2_rn(scales[part] * inverse_power(larger));
#pragma unroll
    for (int k = 0; k < MOST_STEPS / 2; ++k)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        __half2 &pair = reinterpret_cast<__half2 &>(tile.query[part * (MOST_STEPS / 2) + k][half + 2 * i]);
        pair = __hmul2(pair, factor);
      }
  }
  return larger;
}

// Fragments of the folded queries of rows rows[0] and rows[1], -1 for none. Of bytes, products 2j and 2j + 1 take
// columns 32 j + 8 c + 0, 1, 2, 3 and + 4, 5, 6, 7: see load_queries of decode.cuh.
template <typename T, bool BYTES>
__device__ __forceinline__ void load_folded(const Absorbed &s, int64_t first_row, const int (&rows)[2], RawTile &tile) {
  const int lane = threadIdx.x % WARP, steps = steps_of(s.key);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = (first_row + max(rows[half], 0)) * s.key.width + raw_part() * steps * 16 + lane % 4 * 8;
    const uint4 *const from = reinterpret_cast<const uint4 *>(static_cast<const uint16_t *>(s.query) + row);
#pragma unroll
    for (int j = 0; j < MOST_STEPS / 2; ++j) {
      const uint4 x = rows[half] >= 0 && 2 * j < steps ? from[4 * j] : make_uint4(0, 0, 0, 0);
      uint32_t words[4] = {x.x, x.y, x.z, x.w};
      if (!BYTES) transpose_quad(words);
      tile.query[2 * j][half] = words[0];
      tile.query[2 * j][2 + half] = words[1];
      tile.query[2 * j + 1][half] = words[2];
      tile.query[2 * j + 1][2 + half] = words[3];
    }
    tile.shift[half] = rows[half] >= 0 && s.key.bias ? s.shift[first_row + rows[half]] : 0.0f;
    if constexpr (Precision<T>::NARROW)
      tile.scale[half] = rows[half] >= 0 ? join_scales(s, first_row + rows[half], half, tile) : 1.0f;
  }
}

// Products of 16 rows and 16 tokens over this warp's columns.
template <typename T, bool BYTES>
__device__ __forceinline__ void score_raw(const AbsorbedSide &side, const RawTile &tile, const char *keys,
                                          const float *scales, bool e4m3, float (&scores)[2][4]) {
  const int lane = threadIdx.x % WARP, steps = steps_of(side), first = raw_part() * steps;
  const int pitch = side.width * (BYTES ? 1 : 2);
#pragma unroll
  for (int i = 0; i < 8; ++i) scores[i / 4][i % 4] = 0.0f;
  if constexpr (BYTES) {
#pragma unroll
    for (int j = 0; j < MOST_STEPS / 2; ++j) {
      if (2 * j >= steps) break;
      const int chunk = first + 2 * j + lane % 4 / 2, head = chunk * 16 / side.padded;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = 8 * half + lane / 4;
        const uint2 bytes = *reinterpret_cast<const uint2 *>(
            keys + token * pitch + raw_chunk_at<true>(token, chunk, false) * 16 + lane % 2 * 8);
        const float scale = scales && head < side.heads ? scales[head * CHUNK + token] : 1.0f;
        multiply_bytes<T>(scores[half], tile.query[2 * j], tile.query[2 * j + 1], bytes, e4m3, scale);
      }
    }
  } else {
    const int token = lane / 16 * 8 + lane % 8;
#pragma unroll
    for (int k = 0; k < MOST_STEPS; ++k) {
      if (k >= steps) break;
      const int chunk = 2 * (first + k) + lane / 8 % 2;
      uint32_t b[4];
      ldmatrix_x4(b, shared_address(keys) + token * pitch + raw_chunk_at<false>(token, chunk, false) * 16);
      mma_16816<T>(scores[0], tile.query[k], b[0], b[1]);
      mma_16816<T>(scores[1], tile.query[k], b[2], b[3]);
    }
  }
}

// sum += weights values, over this warp's columns.
template <typename T, bool BYTES>
__device__ __forceinline__ void accumulate_raw(const AbsorbedSide &side, RawTile &tile, const uint32_t (&weights)[4],
                                               const char *values, const float *scales, bool e4m3) {
  const int lane = threadIdx.x % WARP, steps = steps_of(side), first = raw_part() * steps;
  const int pitch = side.width * (BYTES ? 1 : 2);
  if constexpr (BYTES) {
#pragma unroll
    for (int j = 0; j < MOST_STEPS / 2; ++j) {
      if (2 * j >= steps) break;
      const int chunk = first + 2 * j + lane / 16, head = chunk * 16 / side.padded;
      accumulate_bytes<T>(
          tile.sum + 4 * j, weights, e4m3, scales && head < side.heads,
          [&](int token) {
            return values + token * pitch + raw_chunk_at<true>(token, chunk, true) * 16 + lane / 4 % 4 * 4;
          },
          [&](int, int token) { return scales[head * CHUNK + token]; });
    }
  } else {
    const int token = lane % 16;
#pragma unroll
    for (int k = 0; k < MOST_STEPS; ++k) {
      if (k >= steps) break;
      const int chunk = 2 * (first + k) + lane / 16;
      uint32_t b[4];
      ldmatrix_x4_trans(b, shared_address(values) + token * pitch + raw_chunk_at<false>(token, chunk, true) * 16);
      mma_16816<T>(tile.sum[2 * k], weights, b[0], b[1]);
      mma_16816<T>(tile.sum[2 * k + 1], weights, b[2], b[3]);
    }
  }
}

// This warp's products become those over all columns, added in the columns' order. `shared`: 4 KiB for 16 rows.
template <bool TAKE>
__device__ __forceinline__ void exchange_scores(float4 *shared, float (&scores)[2][4]) {
  const int lane = threadIdx.x % WARP;
  float4 *const rows = shared + threadIdx.x / (WARP * ABSORB_WARPS) * ABSORB_WARPS * 2 * WARP + lane;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float4 *const mine = rows + raw_part() * 2 * WARP + i * WARP;
    if (!TAKE) {
      *mine = make_float4(scores[i][0], scores[i][1], scores[i][2], scores[i][3]);
      continue;
    }
    float4 sum = rows[i * WARP];
    for (int part = 1; part < ABSORB_WARPS; ++part) {
      const float4 x = rows[part * 2 * WARP + i * WARP];
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    scores[i][0] = sum.x, scores[i][1] = sum.y, scores[i][2] = sum.z, scores[i][3] = sum.w;
  }
}

// All tokens of the split into the tile; ends with all copies arrived.
template <typename T, bool BYTES>
__device__ __forceinline__ void stream_raw(const Attention &p, const Absorbed &s, const Work &w, const Row (&rows)[2],
                                           Ring<BYTES> &ring, float4 *exchange, RawTile &tile) {
  for (int token = w.first; token < w.last; token += CHUNK) {
    float scores[2][4], none[4], factor[2];
    char *slot = ring.take();
    score_raw<T, BYTES>(s.key, tile, slot, BYTES && s.key.scale.data ? ring.scales_of(slot, false) : nullptr,
                        w.run.key_type == C2C_F8E4M3, scores);
    if constexpr (Precision<T>::NARROW)
#pragma unroll
      for (int i = 0; i < 8; ++i) scores[i / 4][i % 4] *= tile.scale[i % 4 / 2];
    exchange_scores<false>(exchange, scores);
    slot = ring.take();  // and all have left their products
    exchange_scores<true>(exchange, scores);
#pragma unroll
    for (int i = 0; i < 8; ++i) scores[i / 4][i % 4] += tile.shift[i % 4 / 2];
    find_logits(p, w, rows, token, scores, none);
    find_weights(tile.state, scores, factor);
    rescale(tile.sum, factor);
    const uint32_t weights[4] = {pack<T>(scores[0][0], scores[0][1]), pack<T>(scores[0][2], scores[0][3]),
                                 pack<T>(scores[1][0], scores[1][1]), pack<T>(scores[1][2], scores[1][3])};
    accumulate_raw<T, BYTES>(s.value, tile, weights, slot,
                             BYTES && s.value.scale.data ? ring.scales_of(slot, true) : nullptr,
                             w.run.value_type == C2C_F8E4M3);
  }
  cp_async_wait<0>();
}

// Leaves what the warp has found: max and sum of every row, sums in float16. `first_row`: the batch row's first.
template <bool BYTES>
__device__ __forceinline__ void write_raw(const Decode &d, const Absorbed &s, int64_t first_row, const int (&rows)[2],
                                          int split, int state_split, const RawTile &tile) {
  const int lane = threadIdx.x % WARP, steps = steps_of(s.value);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float count = tile.state[half].sum, largest = 0.0f, down, up;
    count += __shfl_xor_sync(~0u, count, 1);
    count += __shfl_xor_sync(~0u, count, 2);
#pragma unroll
    for (int i = 0; i < 2 * MOST_STEPS; ++i)
      largest = fmaxf(largest, fmaxf(fabsf(tile.sum[i][2 * half]), fabsf(tile.sum[i][2 * half + 1])));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    powers_of_two(largest, down, up);
    const int64_t row = first_row + max(rows[half], 0), at = row * s.splits + split;
    const bool kept = rows[half] >= 0 && count != 0.0f;
    if (rows[half] >= 0 && lane % 4 == 0 && raw_part() == 0)
      d.states[row * d.splits + state_split] = make_float2(tile.state[half].max, count);
    if (kept && lane % 4 == 0) s.scales[scale_place(d.attention, s, row, split, raw_part())] = up;
    __half *const to = static_cast<__half *>(s.sums) + at * s.value.width + raw_part() * steps * 16 + lane % 4 * 8;
#pragma unroll
    for (int j = 0; j < MOST_STEPS / 2; ++j) {
      if (2 * j >= steps) break;
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float *const pair = tile.sum[4 * j + i] + 2 * half;
        words[i] = BYTES ? pack<__half>(tile.sum[4 * j + i % 2 * 2][2 * half + i / 2] * down,
                                        tile.sum[4 * j + i % 2 * 2 + 1][2 * half + i / 2] * down)
                         : pack<__half>(pair[0] * down, pair[1] * down);
      }
      if (!BYTES) transpose_quad(words);
      if (kept) store_16(to + 32 * j, words);
    }
  }
}

// Split `split` of segment `place`, rows first_row, ... of all heads. A function of its own, and so are its registers.
template <typename T, bool BYTES>
__device__ __noinline__ void absorb_tokens(const AbsorbDecode &a, int place, int batch, int split, int first_row,
                                           char *shared) {
  const Attention &p = a.decode.attention;
  const Absorbed &s = a.absorption.segment[place];
  const Run &run = p.run[s.number];
  const int tokens = a.decode.split_tokens[s.number], first = split * tokens;
  const Work w{run,
               s.number,
               batch,
               0,
               0,
               first,
               first,
               min(first + tokens, valid_tokens(run, batch)),
               !run.gate.data && p.softcap == 0.0f && !run.placed};
  const int lane = threadIdx.x % WARP, rows_of_head = p.q_len * p.group, all = p.kv_heads * rows_of_head;
  const int own_end = valid_tokens(p.run[0], w.batch);
  const int64_t base = static_cast<int64_t>(w.batch) * all;
  int numbers[2];
  Row rows[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + threadIdx.x / (WARP * ABSORB_WARPS) * ROWS + lane / 4 + 8 * half;
    const bool inside = row < all;
    numbers[half] = inside ? row : -1;
    rows[half] = row_of(p, w.number, w.batch, inside ? row / rows_of_head : 0,
                        inside ? row % rows_of_head : rows_of_head, own_end);
  }
  RawTile tile;
#pragma unroll
  for (int i = 0; i < 8 * MOST_STEPS; ++i) tile.sum[i / 4][i % 4] = 0.0f;
  if (w.first < w.last) {
    uint64_t *const marks = s.marks + static_cast<int64_t>(w.batch) * s.pieces;
    const bool folded = all_folded(marks, s.pieces, a.call);
    if (!folded && any_free(marks, s.pieces, a.call))
      for (int piece = 0; piece < s.pieces; ++piece)
        if (taken_on(marks + piece, a.call)) {
          fold_piece<T>(p, s, w.batch, piece, shared);
          tell_folded(marks + piece, a.call);
        }
    Ring<BYTES> ring(s, w, shared);
    ring.start();
    if (!folded) wait_until_folded(marks, s.pieces, a.call);
    load_folded<T, BYTES>(s, base, numbers, tile);
    stream_raw<T, BYTES>(p, s, w, rows, ring, reinterpret_cast<float4 *>(shared + s.slots * s.slot_bytes), tile);
  }
  write_raw<BYTES>(a.decode, s, base, numbers, split, a.decode.first_split[s.number] + split, tile);
}

// Block `block` of those of a batch row's raw tokens: of each segment splits x tiles of rows, rows fastest.
template <typename T>
__device__ __forceinline__ void absorb_split(const AbsorbDecode &a, int batch, int block, char *shared) {
  int place = 0, split = block / a.row_tiles;
  while (split >= a.absorption.segment[place].splits) split -= a.absorption.segment[place++].splits;
  const int first_row = block % a.row_tiles * static_cast<int>(blockDim.x / (WARP * ABSORB_WARPS)) * ROWS;
  const int type = a.decode.attention.run[a.absorption.segment[place].number].key_type;
  if (type == C2C_I8 || type == C2C_F8E4M3)
    absorb_tokens<T, true>(a, place, batch, split, first_row, shared);
  else
    absorb_tokens<T, false>(a, place, batch, split, first_row, shared);
}

}  // namespace c2c
