// fuse_kv in one launch: every product of every layer, those that need others' results behind them.
//
// A program takes a ticket and with it a tile of a step and job. Tickets are given out step by step: whatever a program
// waits for has a lower ticket, so it runs or is done, and nothing waits for a program that cannot start. A job's
// counter says how many of its tiles are done; what they leave is read only by who has seen the counter. Every number
// has one program that sums it in a fixed order, so results do not depend on who was first, nor on the tile.
//
// RMS norms are taken in two parts: tokens are multiplied by the norm on their way into the product, 1 / rms, from sums
// of squares that whoever makes h leaves, multiplies the product.
#pragma once

#include "fuse_results.cuh"

namespace c2c {

constexpr float FUSE_EPSILON = 1e-6f;  // of the RMS norms

// Copies the half's row of the table.
__device__ __forceinline__ void read_half(FuseHalf &half, const Fuse &p, int number) {
  const char *const row = static_cast<const char *>(p.table) + int64_t{number} * p.table_row;
#pragma unroll 1
  for (int i = threadIdx.x; i < p.table_row / 8; i += blockDim.x)
    reinterpret_cast<int64_t *>(&half)[i] = reinterpret_cast<const int64_t *>(row)[i];
}

// Waits until the stages before are done with the job.
template <typename Copy>
__device__ __forceinline__ void wait_for_job(const Fuse &p, const FusePlace &place, const Copy &copy) {
  const int *const done = p.counters + 1 + place.job;
  if (__syncthreads_or(threadIdx.x == 0 && load_acquire(done) < place.wait)) {
    copy.fetch_ahead();
    if (threadIdx.x == 0)
      while (load_acquire(done) < place.wait) {
      }
    __syncthreads();
  }
}

// A tile whose gate is open.
template <typename T, typename Tile>
__device__ __forceinline__ void form_tile(const Fuse &p, const FuseHalf &half, const FusePlace &place,
                                          const FuseRows<Tile::M> &rows, float *factors, char *shared) {
  const FuseBlock &block = half.blocks[place.block];
  const bool scale = place.block == FUSE_SCALE;
  float acc[Tile::MT][Tile::NT][4] = {};
  float *const sums = reinterpret_cast<float *>(shared);
  if (place.kind == FUSE_INNER) {
    const bool later = place.block > FUSE_PROJECT;
    FuseCopy<T, Tile> copy(p, half, rows, place, block.w1, block.norm, later ? p.projected : p.h);
    fuse_product<T, Tile, true>(acc, copy, shared, [&] {
      wait_for_job(p, place, copy);
      if (threadIdx.x < Tile::M) {
        const float *const squares = p.squares + int64_t{place.job} * p.sum_tiles * Tile::M + threadIdx.x;
        const int tiles = rows.token[threadIdx.x] < 0 ? 0 : (p.hidden + Tile::N - 1) / Tile::N;
        factors[threadIdx.x] = rsqrtf(sum_of_tiles<Tile::N>(squares, Tile::M, tiles) / p.hidden + FUSE_EPSILON);
      }
    });
    keep_inner<T, Tile>(acc, p, place, rows, scale ? p.scale_inner : p.inner, factors);
    return;
  }
  const FuseMatrix weights = place.kind == FUSE_ENTER   ? half.in_weight
                             : place.kind == FUSE_OUTER ? block.w2
                                                        : half.out_weight;
  const void *const source = place.kind == FUSE_ENTER   ? half.sharer.data
                             : place.kind == FUSE_LEAVE ? p.projected
                             : scale                    ? p.scale_inner
                                                        : p.inner;
  FuseCopy<T, Tile> copy(p, half, rows, place, weights, nullptr, source);
  fuse_product<T, Tile, false>(acc, copy, shared, [&] {
    if (place.kind == FUSE_ENTER)
      __syncthreads();
    else
      wait_for_job(p, place, copy);
  });
  if (place.kind == FUSE_LEAVE) {
    write_out<T, Tile>(acc, p, half, place, rows, sums);
    return;
  }
  uint32_t words[Tile::MT][Tile::NT][2];
  if (place.kind == FUSE_ENTER) {
    keep_hidden<T, Tile, true>(words, acc, p, half, place, rows, nullptr, p.h, true, sums);
    return;
  }
  void *const result = scale ? nullptr : place.block == FUSE_EMBED ? p.h : p.projected;
  const void *const before = place.block > FUSE_PROJECT ? p.projected : p.h;
  keep_hidden<T, Tile, false>(words, acc, p, half, place, rows, before, result, !scale && place.block + 1 < p.blocks,
                              sums);
  if (scale) store_logits<T, Tile>(words, p, half, place, rows, sums);
}

template <typename T, typename Tile>
__device__ __forceinline__ void fuse(const Fuse &p) {
  extern __shared__ __align__(128) char shared[];
  __shared__ FuseHalf half;
  __shared__ FuseRows<Tile::M> rows;
  __shared__ float factors[Tile::M];
  __shared__ int ticket;
  if (threadIdx.x == 0) ticket = atomicAdd(p.counters, 1);
  __syncthreads();
  const FusePlace place = fuse_place(p, ticket);
  const int state = p.states[place.half];
  if (state == FUSE_NOTHING || (state == FUSE_COPY && place.kind != FUSE_LEAVE)) return;
  read_half(half, p, place.half);
  __syncthreads();
  find_rows(rows, p, half, place);
  if (state == FUSE_COPY) {
    __syncthreads();
    copy_residual<T, Tile>(p, half, place, rows);
    return;
  }
  form_tile<T, Tile>(p, half, place, rows, factors, shared);
  __syncthreads();  // all of the tile is stored before the counter says so
  if (threadIdx.x == 0) add_release(p.counters + 1 + place.job, 1);
}

}  // namespace c2c
