// Decode beside absorbed segments in two launches: split and combine.
#pragma once

#include "absorb_combine.cuh"
#include "absorb_split.cuh"
#include "decode.cuh"

namespace c2c {

// Run and split of a block of those in receiver space.
__device__ __forceinline__ int direct_run(const AbsorbDecode &a, int &split) {
  const int32_t *const first = a.decode.first_split;
  for (int number = 0;; ++number) {
    if (a.absorption.place[number] >= 0) continue;
    if (split < first[number + 1] - first[number]) {
      split += first[number];
      return number;
    }
    split -= first[number + 1] - first[number];
  }
}

// Block `block` of those of runs in receiver space, of head dims up to DIM.
template <typename T, int DIM>
__device__ __noinline__ void direct_block(const AbsorbDecode &a, int block) {
  if (threadIdx.x >= Teams<DIM>::COUNT * Teams<DIM>::THREADS) return;
  const Attention &p = a.decode.attention;
  int split = block % a.direct_splits;
  block /= a.direct_splits;
  const int number = direct_run(a, split), first_row = block % a.decode.row_tiles * ROWS;
  block /= a.decode.row_tiles;
  decode_split<T, DIM>(a.decode, number, split, block / p.kv_heads, block % p.kv_heads, first_row);
}

// Grid: batch x pieces of folding, batch x raw_blocks, batch x KV heads x tiles of 16 rows x splits in receiver space.
// One kernel for all head dims: what a kernel calls is assembled anew for each.
template <typename T>
__device__ __forceinline__ void absorb_decode(const AbsorbDecode &a) {
  extern __shared__ __align__(128) char shared[];
  const Attention &p = a.decode.attention;
  int block = blockIdx.x;
  if (block < p.batch * a.pieces) {
    int place = 0, piece = block % a.pieces;
    while (piece >= a.absorption.segment[place].pieces) piece -= a.absorption.segment[place++].pieces;
    const Absorbed &s = a.absorption.segment[place];
    const int batch = block / a.pieces;
    uint64_t *const mark = s.marks + static_cast<int64_t>(batch) * s.pieces + piece;
    if (!taken_on(mark, a.call)) return;
    fold_piece<T>(p, s, batch, piece, shared);
    tell_folded(mark, a.call);
    return;
  }
  block -= p.batch * a.pieces;
  if (block < p.batch * a.raw_blocks) return absorb_split<T>(a, block / a.raw_blocks, block % a.raw_blocks, shared);
  block -= p.batch * a.raw_blocks;
  if (a.dim == 64) return direct_block<T, 64>(a, block);
  if (a.dim == 128) return direct_block<T, 128>(a, block);
  direct_block<T, 256>(a, block);
}

}  // namespace c2c

#define ABSORB_KERNELS(name, T) \
  extern "C" __global__ void __launch_bounds__(c2c::ABSORB_THREADS, 1) \
      c2c_absorb_##name(const __grid_constant__ c2c::AbsorbDecode a) { \
    c2c::absorb_decode<T>(a); \
  } \
  extern "C" __global__ void __launch_bounds__(c2c::ABSORB_COMBINE_THREADS, 2) \
      c2c_absorb_combine_##name(const __grid_constant__ c2c::AbsorbDecode a) { \
    c2c::absorb_combine<T>(a); \
  } \
  const c2c::AbsorbKernels c2c::absorb_##name = { \
      reinterpret_cast<const void *>(&c2c_absorb_##name), "c2c_absorb_" #name, \
      reinterpret_cast<const void *>(&c2c_absorb_combine_##name), "c2c_absorb_combine_" #name};
