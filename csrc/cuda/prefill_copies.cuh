// Queries, and tokens that are not copied as they are stored, on their way into shared memory in prefill.
#pragma once

#include "prefill_scores.cuh"
#include "stored_rows.cuh"

namespace c2c {

// The tile of tokens from `first` on of a run whose rows cannot be copied as they are. `to`: this thread's first chunk.
template <typename T, typename Tile>
__device__ __forceinline__ void convert_tile(const Attention &p, const PrefillRun &run, const PrefillPlace &place,
                                             uint32_t to, int first) {
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
    store_shared_16(to + (is_key ? i : i - Tile::N) * Tile::TOKEN_ROW + (is_key ? 0 : Tile::STAGE / 2), words);
  }
}

template <typename T, typename Tile>
__device__ __forceinline__ void copy_queries(const Attention &p, const PrefillPlace &place, uint32_t shared) {
  const int chunk = thread_in<Tile::CHUNKS>();
  const T *query = static_cast<const T *>(p.query.data) + place.batch * p.query.b + chunk * 8;
#pragma unroll 1
  for (int i = thread_by<Tile::CHUNKS>(); i < Tile::ROWS; i += Tile::PASS_ROWS) {
    const bool inside = place.block_row + i < place.rows;
    const int row = inside ? place.block_row + i : 0;
    const T *from = query + place.head(p, row) * p.query.h + row / p.group * p.query.n;
    const int count = inside ? p.head_dim - chunk * 8 : 0;
    const uint32_t to = shared + Tile::query_at(i, chunk);
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

}  // namespace c2c
