// project_kv: a product of tokens and projector, tiles of M tokens by N columns, K numbers of the sharer's width at a
// time in two stages; before it tokens are gathered, scaled and un-rotated, after it come bias and rotation, and
// results go straight to where the cache wants them. 8 warps of 32 x 64.
#pragma once

#include "project_rows.cuh"

namespace c2c {

// Rows are padded by 16 bytes: eight of them, read by ldmatrix, touch all banks.
struct ProjectTile {
  static constexpr int M = 128, N = 128, K = 64, THREADS = 256;
  static constexpr int CHUNKS = K / 8, PASS_ROWS = THREADS / CHUNKS, PASSES = M / PASS_ROWS;
  static constexpr int ROW = K * 2 + 16;       // bytes
  static constexpr int STAGE = (M + N) * ROW;  // tokens, then weights
  static constexpr int SHARED = 2 * STAGE;     // then, in the same place, the products in float32:
  static constexpr int PRODUCT_ROW = N + 8;    // numbers; 8 so that rows that are written together differ
  static_assert(M * PRODUCT_ROW * 4 <= SHARED && M == N, "products fit; passes are alike");
};

struct ProjectPlace {
  int batch, token, end;  // first token of the tile, valid tokens
  int group, groups;      // first group of 8 columns, and how many there are from it on

  // Of this block among those of its half.
  __device__ __forceinline__ ProjectPlace(const Projection &p, const ProjectHalf &half, int block) {
    group = block % half.column_tiles * (ProjectTile::N / 8);
    groups = half.kv_heads * (half.head_columns / 8) - group;
    block /= half.column_tiles;
    token = block % p.token_tiles * ProjectTile::M;
    batch = block / p.token_tiles;
    end = valid_tokens(p, batch);
  }
};

// Tokens and weights on their way into stages: thread t copies chunk t % CHUNKS of rows t / CHUNKS + PASS_ROWS i.
template <typename T, typename Tile>
struct ProjectCopy {
  static constexpr uint32_t NONE = UINT32_MAX;
  int stored[Tile::PASSES];        // this thread's tokens; -1: zeros
  uint32_t weights[Tile::PASSES];  // where its rows of weights begin; NONE: zeros
  int k, dim;                      // of its chunk in a token, and within a head
  const T *raw, *from;             // of its chunk in token 0 and in the weights' row that begins at 0
  bool whole;                      // every thread of the block copies all its rows as they are, to the end of the width

  __device__ __forceinline__ ProjectCopy(const ProjectHalf &half, const ProjectPlace &place, int width)
      : k(threadIdx.x % Tile::CHUNKS * 8) {
    const int row = threadIdx.x / Tile::CHUNKS;
    bool all = half.raw_copied && half.weights_vectorised && width % Tile::K == 0 && half.raw.n < INT32_MAX;
#pragma unroll
    for (int i = 0; i < Tile::PASSES; ++i) {
      stored[i] = stored_token(half, place.batch, place.token + row + i * Tile::PASS_ROWS, place.end);
      const int column = row + i * Tile::PASS_ROWS;
      const Columns c = columns_of(half, place.group + column / 8);
      weights[i] = column % 8 < c.count
                       ? static_cast<uint32_t>(c.head * half.weights.h + (c.dim + column % 8) * half.weights.n)
                       : NONE;
      all = all && stored[i] >= 0 && weights[i] != NONE;
    }
    whole = __syncthreads_and(all);
    dim = k % half.dim;
    from = static_cast<const T *>(half.weights.data) + k;
    raw = static_cast<const T *>(half.raw.data) + place.batch * half.raw.b + k / half.dim * half.raw.h + dim;
  }

  // The next K numbers of every row, into a stage; `to`: of this thread's first row. WHOLE: as `whole` says.
  template <bool WHOLE>
  __device__ __forceinline__ void next(const ProjectHalf &half, int batch, int width, uint32_t to) {
    if (WHOLE) {
      const uint32_t step = static_cast<uint32_t>(half.raw.n) * sizeof(T);
#pragma unroll
      for (int i = 0; i < Tile::PASSES; ++i) {
        cp_async_16(to + i * Tile::PASS_ROWS * Tile::ROW, further(raw, stored[i], step));
        cp_async_16(to + (i * Tile::PASS_ROWS + Tile::M) * Tile::ROW, further(from, weights[i], sizeof(T)));
      }
    } else {
      some(half, batch, width, to);
    }
    k += Tile::K;
    from += Tile::K;
    dim += Tile::K;
    raw += Tile::K;
#pragma unroll 1
    for (; dim >= half.dim; dim -= half.dim) raw += half.raw.h - half.dim;
  }

  // Rows some of which are not there, or not stored as they are multiplied.
  __device__ __forceinline__ void some(const ProjectHalf &half, int batch, int width, uint32_t to) const {
    const bool inside = k < width;
    if (half.raw_copied) {
#pragma unroll
      for (int i = 0; i < Tile::PASSES; ++i)
        cp_async_16(to + i * Tile::PASS_ROWS * Tile::ROW, raw + max(stored[i], 0) * half.raw.n,
                    inside && stored[i] >= 0);
    } else {
#pragma unroll 1
      for (int i = 0; i < Tile::PASSES; ++i)
        convert(half, batch, width,
                i == 0   ? stored[0]
                : i == 1 ? stored[1]
                : i == 2 ? stored[2]
                         : stored[3],
                to + i * Tile::PASS_ROWS * Tile::ROW);
    }
    to += Tile::M * Tile::ROW;
    if (half.weights_vectorised) {
#pragma unroll
      for (int i = 0; i < Tile::PASSES; ++i) {
        const bool there = weights[i] != NONE;
        cp_async_16(to + i * Tile::PASS_ROWS * Tile::ROW, from + (there ? weights[i] : 0), inside && there);
      }
    } else {
#pragma unroll
      for (int i = 0; i < Tile::PASSES; ++i) {
        float x[8] = {};
        uint32_t words[4];
        if (weights[i] != NONE) load_eight(x, half.weights.data, weights[i], half.weights_type, k, width, false);
        pack_eight<T>(words, x, 1.0f);
        store_shared_16(to + i * Tile::PASS_ROWS * Tile::ROW, words);
      }
    }
  }

  // Eight numbers of a token that are not stored as they are multiplied.
  __device__ __forceinline__ void convert(const ProjectHalf &half, int batch, int width, int token, uint32_t to) const {
    uint32_t words[4] = {};
    if (token >= 0 && k < width) {
      float x[8] = {};
      if (in_eights(half)) {
        raw_eight(x, half, batch, k / half.dim, token, dim);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (k + i < width) x[i] = raw_number(half, batch, (k + i) / half.dim, token, (k + i) % half.dim);
      }
      pack_eight<T>(words, x, 1.0f);
    }
    store_shared_16(to, words);
  }
};

// products += tokens weights^T over a stage, for the warp's 32 tokens and 64 columns.
template <typename T>
__device__ __forceinline__ void multiply_stage(float (&products)[2][8][4], uint32_t tokens, uint32_t weights) {
  using Tile = ProjectTile;
#pragma unroll
  for (int k = 0; k < Tile::K / 16; ++k) {
    uint32_t a[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) ldmatrix_x4(a[m], tokens + m * 16 * Tile::ROW + k * 32);
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, weights + n * 8 * Tile::ROW + k * 32);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        mma_16816<T>(products[m][n], a[m], b[0], b[1]);
        mma_16816<T>(products[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// products = tokens weights^T over the whole width: while a step is multiplied the next one is on its way. Of tiles
// that are not WHOLE warps without a token or a column multiply nothing.
template <typename T, bool WHOLE>
__device__ __forceinline__ void multiply(float (&products)[2][8][4], ProjectCopy<T, ProjectTile> &copy,
                                         const ProjectHalf &half, const ProjectPlace &place, int width, int steps,
                                         uint32_t stages) {
  using Tile = ProjectTile;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, batch = place.batch;
  const bool busy = WHOLE || (place.token + warp % 4 * 32 < place.end && warp / 4 * 8 < place.groups);
  uint32_t to = stages + threadIdx.x / Tile::CHUNKS * Tile::ROW + threadIdx.x % Tile::CHUNKS * 16;
  uint32_t tokens = stages + Tile::STAGE + (warp % 4 * 32 + lane % 16) * Tile::ROW + lane / 16 * 16;
  uint32_t weights =
      stages + Tile::STAGE + (Tile::M + warp / 4 * 64 + (lane & 7) + lane / 16 * 8) * Tile::ROW + (lane / 8 & 1) * 16;
  int flip = Tile::STAGE;
  if (steps) copy.template next<WHOLE>(half, batch, width, to);
  cp_async_commit();
#pragma unroll 1
  for (int left = steps; left > 0; --left) {
    to += flip;
    tokens -= flip;
    weights -= flip;
    flip = -flip;
    cp_async_wait<0>();
    __syncthreads();
    if (left > 1) copy.template next<WHOLE>(half, batch, width, to);
    cp_async_commit();
    if (busy) multiply_stage<T>(products, tokens, weights);
  }
}

// Where 16-byte chunk `chunk` of a row of products lies: moved within 64 bytes so that threads that read 64 bytes each
// touch all banks.
__device__ __forceinline__ int product_chunk(int chunk) { return chunk ^ (chunk >> 3 & 3); }

__device__ __forceinline__ void stage_products(float *shared, const float (&products)[2][8][4]) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int row = warp % 4 * 32 + lane / 4, chunk = warp / 4 * 16 + lane % 4 / 2;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        store_shared_pair(shared_address(shared + (row + m * 16 + j * 8) * ProjectTile::PRODUCT_ROW +
                                         product_chunk(chunk + 2 * n) * 4 + lane % 2 * 2),
                          products[m][n][2 * j], products[m][n][2 * j + 1]);
}

__device__ __forceinline__ void finish_tile(const Projection &p, const ProjectHalf &half, const ProjectPlace &place,
                                            const float *shared) {
  using Tile = ProjectTile;
  constexpr int UNITS = Tile::N / 16;
#pragma unroll 1
  for (int i = threadIdx.x; i < Tile::M * UNITS; i += Tile::THREADS) {
    const int row = i / UNITS, unit = i % UNITS, token = place.token + row;
    if (token >= p.len) break;
    const Columns c[2] = {columns_of(half, place.group + 2 * unit), columns_of(half, place.group + 2 * unit + 1)};
    float y[2][8];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float4 four =
          *reinterpret_cast<const float4 *>(shared + row * Tile::PRODUCT_ROW + product_chunk(4 * unit + k) * 4);
      float *const to = y[k / 2] + k % 2 * 4;
      to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
    }
    finish_columns(half, place.batch, token, token < place.end, c, y);
  }
}

// The half that a block works on, and its number among that half's blocks.
struct ProjectBlock {
  const ProjectHalf &half;
  int number;

  __device__ __forceinline__ ProjectBlock(const Projection &p)
      : half(p.half[static_cast<int>(blockIdx.x) >= p.blocks[0]]),
        number(static_cast<int>(blockIdx.x) - (static_cast<int>(blockIdx.x) >= p.blocks[0] ? p.blocks[0] : 0)) {}
};

// A tile. `multiply_all` leaves its products in the shared memory that it is given.
template <typename T, typename Tile, typename F>
__device__ __forceinline__ void project_tile(const Projection &p, F multiply_all) {
  extern __shared__ __align__(1024) char shared[];
  const ProjectBlock block(p);
  const ProjectHalf &half = block.half;
  const ProjectPlace place(p, half, block.number);
  const int width = half.heads * half.dim;
  const int steps = place.token < place.end ? (width + Tile::K - 1) / Tile::K : 0;
  ProjectCopy<T, Tile> copy(half, place, width);
  multiply_all(shared, copy, half, place, width, steps, shared_address(shared));
  __syncthreads();
  finish_tile(p, half, place, reinterpret_cast<const float *>(shared));
}

template <typename T>
__device__ __forceinline__ void project(const Projection &p) {
  project_tile<T, ProjectTile>(p, [](char *shared, auto &copy, const auto &...rest) {
    float products[2][8][4] = {};
    if (copy.whole)
      multiply<T, true>(products, copy, rest...);
    else
      multiply<T, false>(products, copy, rest...);
    __syncthreads();
    stage_products(reinterpret_cast<float *>(shared), products);
  });
}

// Halves without a projector: a thread takes two groups of columns of one token.
__device__ __forceinline__ void copy_tokens(const Projection &p) {
  const ProjectBlock block(p);
  const ProjectHalf &half = block.half;
  const int units = half.kv_heads * (half.head_columns / 16);
  const int64_t number = int64_t{block.number} * blockDim.x + threadIdx.x;
  const int unit = static_cast<int>(number % units);
  const int64_t row = number / units;
  if (row >= int64_t{p.batch} * p.len) return;
  const int batch = static_cast<int>(row / p.len), token = static_cast<int>(row % p.len);
  const int stored = stored_token(half, batch, token, valid_tokens(p, batch));
  const Columns c[2] = {columns_of(half, 2 * unit), columns_of(half, 2 * unit + 1)};
  float y[2][8] = {};
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (stored < 0 || !c[j].count) continue;
    if (in_eights(half) && c[j].dim % 8 == 0 && c[j].count == 8) {
      raw_eight(y[j], half, batch, c[j].head, stored, c[j].dim);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (i < c[j].count) y[j][i] = raw_number(half, batch, c[j].head, stored, c[j].dim + i);
    }
  }
  finish_columns(half, batch, token, token < valid_tokens(p, batch), c, y);
}

}  // namespace c2c
