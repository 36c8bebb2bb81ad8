// The products of fuse_kv: a tile of M tokens by N columns, K numbers at a time in a ring of stages.
#pragma once

#include "fuse.h"
#include "storage.cuh"

namespace c2c {

// WARPS_M x WARPS_N warps, each of a multiple of 32 columns. Every tile adds up a number in the same order.
template <int M_, int N_, int K_, int STAGES_, int WARPS_M_, int WARPS_N_>
struct FuseTile {
  static constexpr int M = M_, N = N_, K = K_, STAGES = STAGES_, WARPS_M = WARPS_M_, WARPS_N = WARPS_N_;
  static constexpr int THREADS = WARPS_M * WARPS_N * WARP;
  static constexpr int MT = M / WARPS_M / 16, NT = N / WARPS_N / 8;  // products of a warp
  static constexpr int CHUNKS = K / 8, PASS = THREADS / CHUNKS;      // of 16 bytes in a row; rows copied at a time
  static constexpr int ROW = K * 2, WEIGHTS = M * ROW, NORM = (M + N) * ROW, STAGE = NORM + ROW;  // bytes
  static constexpr int SHARED = STAGES * STAGE;
  // Weights that are asked for while a program waits, beside those of the first stages: all SMs' fit in an L2 cache.
  static constexpr int AHEAD = 128 * 1024 / (2 * N);
  static_assert(NT % 4 == 0 && M % PASS == 0 && N % PASS == 0 && FUSE_SUM % N == 0, "whole warps, passes, sums");

  // How a row's chunks are exchanged, so that eight rows read by ldmatrix touch all banks.
  static constexpr __host__ __device__ int key(int row) { return CHUNKS >= 8 ? row & 7 : row >> 1 & 3; }
};

// The column behind row `row` of a tile's weights: a lane's columns of four neighbouring products are eight in a row.
__host__ __device__ constexpr int fuse_column(int row) {
  return (row & ~31) + (row & 7) / 2 * 8 + (row & 31) / 8 * 2 + (row & 1);
}

// Where a program is: its step, tile of columns, job, half and tile of rows.
struct FusePlace {
  int kind, block, size, width, tiles, wait;
  int tile, job, half, row_tile;
};

__device__ __forceinline__ FusePlace fuse_place(const Fuse &p, int ticket) {
  int number = 0;
  while (number + 1 < p.steps && ticket >= p.step[number + 1].first * p.jobs) ++number;
  const FuseStep &step = p.step[number];
  const int place = ticket - step.first * p.jobs, job = place / step.tiles;
  return {step.kind, step.block,         step.size, step.width,        step.tiles,
          step.wait, place % step.tiles, job,       job / p.row_tiles, p.first_tile + job % p.row_tiles};
}

// The tokens of a tile and where they begin in what the product reads; -1: zeros.
template <int M>
struct FuseRows {
  int64_t offset[2][M];  // in the sharer, then the receiver; or in a buffer
  int batch[M], token[M];
};

template <int M>
__device__ __forceinline__ void find_rows(FuseRows<M> &rows, const Fuse &p, const FuseHalf &half,
                                          const FusePlace &place) {
#pragma unroll 1
  for (int i = threadIdx.x; i < M; i += blockDim.x) {
    const int number = place.row_tile * M + i;
    const bool inside = number < p.batch * p.len;
    const int batch = inside ? number / p.len : -1, token = inside ? number % p.len : -1;
    rows.batch[i] = batch;
    rows.token[i] = token;
    rows.offset[0][i] = rows.offset[1][i] = -1;
    if (!inside) continue;
    if (place.kind == FUSE_ENTER) {
      int64_t stored = token;
      if (half.index.data) {
        stored = load_integer(half.index.data, batch * half.index.b + token * half.index.n, half.index_type);
        if (stored < 0 || stored >= half.stored) stored = -1;
      }
      if (stored >= 0) rows.offset[0][i] = batch * half.sharer.b + stored * half.sharer.n;
      rows.offset[1][i] = batch * half.receiver.b + token * half.receiver.n;
    } else {
      const int pitch = place.kind == FUSE_OUTER ? p.inner_pitch : p.hidden_pitch;
      rows.offset[0][i] = (int64_t{place.job} * M + i) * pitch;
    }
  }
}

// Where a thread is in a token: in a head of the sharer, then of the receiver; a buffer is one head.
struct FuseCursor {
  const uint16_t *head;  // of a token at offset 0
  int at, dim, left;     // number in the head, numbers of a head, heads to come with this one
  int part;              // 0, 1; 2: beyond the token

  __device__ __forceinline__ void advance(const Fuse &p, const FuseHalf &half, bool enters, int by) {
    at += by;
#pragma unroll 1
    while (at >= dim && part < 2) {
      at -= dim;
      if (--left) {
        head += part ? half.receiver.h : half.sharer.h;
      } else if (part == 0 && enters) {
        part = 1, head = static_cast<const uint16_t *>(half.receiver.data), dim = p.dim, left = p.kv_heads;
      } else {
        part = 2;
      }
    }
  }
};

// Eight numbers of a token, one by one: rows that are not aligned. `sharer`, `receiver`: a token's offsets.
static __device__ __noinline__ void copy_numbers(char *to, const Fuse &p, const FuseHalf &half, bool enters,
                                                 FuseCursor where, int64_t sharer, int64_t receiver) {
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {
    const int64_t offset = where.part == 0 ? sharer : where.part == 1 ? receiver : -1;
    reinterpret_cast<uint16_t *>(to)[i] = offset >= 0 ? where.head[offset + where.at] : 0;
    where.advance(p, half, enters, 1);
  }
}

// Tokens, weights and the norm on their way into stages. Thread t copies chunk t % CHUNKS of rows t / CHUNKS + PASS i.
template <typename T, typename Tile>
struct FuseCopy {
  const Fuse &p;
  const FuseHalf &half;
  const FuseRows<Tile::M> &rows;
  const FuseMatrix weights;
  const uint16_t *const norm;  // nullable
  const int size, width, column, first, chunk;
  const int start;  // of its chunk in the first of its rows, bytes
  const bool enters;
  const bool whole;  // all of the tile's weights are there, in chunks
  FuseCursor cursor;
  int weights_at = 0;    // first number of the next step
  const uint16_t *from;  // this thread's next number of weights, in the first of its rows

  __device__ __forceinline__ FuseCopy(const Fuse &p, const FuseHalf &half, const FuseRows<Tile::M> &rows,
                                      const FusePlace &place, const FuseMatrix &weights, const void *norm,
                                      const void *source)
      : p(p),
        half(half),
        rows(rows),
        weights(weights),
        norm(static_cast<const uint16_t *>(norm)),
        size(place.size),
        width(place.width),
        column(place.tile * Tile::N + fuse_column(threadIdx.x / Tile::CHUNKS)),
        first(threadIdx.x / Tile::CHUNKS),
        chunk(threadIdx.x % Tile::CHUNKS),
        start(first * Tile::ROW + (chunk ^ Tile::key(first)) * 16),
        enters(place.kind == FUSE_ENTER),
        whole(p.weights_vectorised && width % Tile::K == 0 && (place.tile + 1) * Tile::N <= size) {
    from = static_cast<const uint16_t *>(weights.data) + column * weights.row + chunk * 8;
    cursor = {static_cast<const uint16_t *>(source), 0, enters ? p.sharer_dim : width, enters ? p.sharer_heads : 1, 0};
    cursor.advance(p, half, enters, chunk * 8);
  }

  // Where its chunk of row `first` + `more` lies; `more` leaves the bits of `first` alone.
  __device__ __forceinline__ int place_of(int more) const { return (start ^ Tile::key(more) * 16) + more * Tile::ROW; }

  // The weights of the next step, and the norm with them.
  __device__ __forceinline__ void next_weights(char *stage) {
    const int k = weights_at + chunk * 8;
    char *const to = stage + Tile::WEIGHTS;
    if (norm && p.weights_vectorised && threadIdx.x < Tile::CHUNKS)
      cp_async_16(shared_address(stage + Tile::NORM + chunk * 16), norm + (k < width ? k : 0), k < width);
    if (whole) {
      const uint32_t shared = shared_address(to);
      const uint16_t *row = from;
#pragma unroll
      for (int i = 0; i < Tile::N; i += Tile::PASS) {
        cp_async_16(shared + place_of(i), row, true);
        row += (fuse_column(i + Tile::PASS) - fuse_column(i)) * weights.row;
      }
    } else if (p.weights_vectorised) {
      const uint32_t shared = shared_address(to);
#pragma unroll 1
      for (int i = 0; i < Tile::N; i += Tile::PASS) {
        const bool inside = k < width && column + fuse_column(i) < size;
        cp_async_16(shared + place_of(i), inside ? from + fuse_column(i) * weights.row : weights.data, inside);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < Tile::N; i += Tile::PASS)
        fetch_numbers<2>(to + place_of(i), reinterpret_cast<const char *>(from - k + fuse_column(i) * weights.row),
                         k / 8, width, column + fuse_column(i) < size);
      if (norm && threadIdx.x < Tile::CHUNKS)
        fetch_numbers<2>(stage + Tile::NORM + chunk * 16, reinterpret_cast<const char *>(norm), k / 8, width, true);
    }
    weights_at += Tile::K;
    from += Tile::K;
  }

  // The tokens' numbers of the next step.
  __device__ __forceinline__ void next_tokens(char *stage) {
    if (!enters || p.caches_vectorised) {
      const uint32_t shared = shared_address(stage);
      const int64_t *const offset = rows.offset[cursor.part & 1];
#pragma unroll
      for (int i = 0; i < Tile::M; i += Tile::PASS) {
        const int64_t row = offset[first + i];
        const bool inside = row >= 0 && cursor.part < 2;
        cp_async_16(shared + place_of(i), inside ? cursor.head + row + cursor.at : cursor.head, inside);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < Tile::M; i += Tile::PASS)
        copy_numbers(stage + place_of(i), p, half, enters, cursor, rows.offset[0][first + i],
                     rows.offset[1][first + i]);
    }
    cursor.advance(p, half, enters, Tile::K);
  }

  // Asks for weights behind those of the first stages.
  __device__ __forceinline__ void fetch_ahead() const {
    constexpr int LINE = 64;  // numbers
    const int start = (Tile::STAGES - 1) * Tile::K, end = min(width, start + Tile::AHEAD);
    if (start >= end) return;
    const int lines = (end - start + LINE - 1) / LINE, tile = column - fuse_column(first);
#pragma unroll 1
    for (int i = threadIdx.x; i < Tile::N * lines; i += Tile::THREADS) {
      const int row = tile + i / lines;
      if (row < size)
        prefetch_l2(static_cast<const uint16_t *>(weights.data) + row * weights.row + start + i % lines * LINE);
    }
  }
};

// acc += tokens weights^T over a stage, for the warp's rows and columns; `SCALED`: tokens times the norm.
template <typename T, typename Tile, bool SCALED>
__device__ __forceinline__ void multiply_stage(float (&acc)[Tile::MT][Tile::NT][4], uint32_t stage) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int warp_m = warp % Tile::WARPS_M, warp_n = warp / Tile::WARPS_M;
  const uint32_t tokens = stage + (warp_m * Tile::MT * 16 + lane % 16) * Tile::ROW;
  const uint32_t weights = stage + Tile::WEIGHTS + (warp_n * Tile::NT * 8 + (lane & 7) + lane / 16 * 8) * Tile::ROW;
  const int token_chunk = (lane / 16 ^ Tile::key(lane & 7)) * 16;
  const int weight_chunk = ((lane / 8 & 1) ^ Tile::key(lane & 7)) * 16;
#pragma unroll
  for (int k = 0; k < Tile::K / 16; ++k) {
    uint32_t a[Tile::MT][4];
#pragma unroll
    for (int m = 0; m < Tile::MT; ++m) ldmatrix_x4(a[m], tokens + m * 16 * Tile::ROW + (token_chunk ^ k * 32));
    if (SCALED) {
      const uint32_t norm = stage + Tile::NORM + k * 32 + lane % 4 * 4;
      const uint32_t low = load_shared_word(norm), high = load_shared_word(norm + 16);
#pragma unroll
      for (int m = 0; m < Tile::MT; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][i] = multiply_pairs<T>(a[m][i], i < 2 ? low : high);
    }
#pragma unroll
    for (int n = 0; n < Tile::NT; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, weights + n * 8 * Tile::ROW + (weight_chunk ^ k * 32));
#pragma unroll
      for (int m = 0; m < Tile::MT; ++m) {
        mma_16816<T>(acc[m][n], a[m], b[0], b[1]);
        mma_16816<T>(acc[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// acc = tokens weights^T. `wait` is called between the first copies of weights, which need no other program's work, and
// those of tokens, which do.
template <typename T, typename Tile, bool SCALED, typename Wait>
__device__ __forceinline__ void fuse_product(float (&acc)[Tile::MT][Tile::NT][4], FuseCopy<T, Tile> &copy, char *shared,
                                             const Wait &wait) {
  const int steps = (copy.width + Tile::K - 1) / Tile::K;
#pragma unroll 1
  for (int step = 0; step < Tile::STAGES - 1; ++step) {
    if (step < steps) copy.next_weights(shared + step * Tile::STAGE);
    cp_async_commit();
  }
  wait();
#pragma unroll 1
  for (int step = 0; step < Tile::STAGES - 1; ++step) {
    if (step < steps) copy.next_tokens(shared + step * Tile::STAGE);
    cp_async_commit();
  }
  int reads = 0, writes = (Tile::STAGES - 1) * Tile::STAGE;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<Tile::STAGES - 2>();
    __syncthreads();
    if (step + Tile::STAGES - 1 < steps) {
      copy.next_weights(shared + writes);
      copy.next_tokens(shared + writes);
    }
    cp_async_commit();
    multiply_stage<T, Tile, SCALED>(acc, shared_address(shared + reads));
    reads = reads + Tile::STAGE == Tile::SHARED ? 0 : reads + Tile::STAGE;
    writes = writes + Tile::STAGE == Tile::SHARED ? 0 : writes + Tile::STAGE;
  }
  cp_async_wait<0>();
}

}  // namespace c2c
