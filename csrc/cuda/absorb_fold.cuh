// Folding: rows of a KV head through 64 columns of its key projector, q W. Four warps share the head dims; weights go
// from memory into fragments of mma without shared memory, each read once for 16 rows.
#pragma once

#include "absorb.h"
#include "common.cuh"
#include "decode_softmax.cuh"

namespace c2c {

constexpr int FOLD_SHARED = ABSORB_WARPS * ROWS * FOLD_COLUMNS * 4;  // bytes

// Eight 16-bit numbers of a row of `count`, from `at` on; zeros beyond. Words of two.
__device__ __forceinline__ uint4 load_eight_bits(const void *row, int64_t at, int count, bool vectorised) {
  const uint16_t *const from = static_cast<const uint16_t *>(row) + at;
  if (vectorised && count >= 8) return *reinterpret_cast<const uint4 *>(from);
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) words[i / 2] |= static_cast<uint32_t>(from[i]) << (i % 2 * 16);
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Where eight columns of a tile lie in a projector's row, and how many of them there are.
struct RawColumns {
  int at, count;
  __device__ __forceinline__ RawColumns(const AbsorbedSide &side, int column) {
    const int head = column / side.padded, within = column % side.padded;
    at = head * side.raw_dim + within;
    count = head < side.heads ? min(8, side.raw_dim - within) : 0;
  }
};

// Row number `row` of a KV head in the order of all heads' rows; -1 beyond them.
__device__ __forceinline__ int row_of_all(const Attention &p, int kv_head, int row) {
  const int rows = p.q_len * p.group;
  return row < rows ? kv_head * rows + row : -1;
}

// Where the power of two for a quarter of a row's sums lies.
__device__ __forceinline__ int64_t scale_place(const Attention &p, const Absorbed &s, int64_t row, int split,
                                               int part) {
  const int rows = p.q_heads * p.q_len;
  return ((row / rows * s.splits + split) * ABSORB_WARPS + part) * rows + row % rows;
}

// Adds what 32 head dims from `dim` on give: acc[i] holds columns 8 g + i of lanes g = lane / 4.
template <typename T>
__device__ __forceinline__ void fold_dims(const Attention &p, const AbsorbedSide &side, const void *weights,
                                          const RawColumns &columns, const char *const (&query)[2], int dim,
                                          float (&acc)[8][4]) {
  const int first = dim + threadIdx.x % 4 * 8;  // of this lane's eight dims
  uint4 a[2];
#pragma unroll
  for (int half = 0; half < 2; ++half)
    a[half] = query[half] ? load_eight_bits(query[half], first, p.head_dim - first, p.query_vectorised)
                          : make_uint4(0, 0, 0, 0);
  uint4 b[8];
#pragma unroll
  for (int i = 0; i < 8; ++i)
    b[i] = first + i < p.head_dim
               ? load_eight_bits(weights, (first + i) * side.proj_d + columns.at, columns.count, side.proj_vectorised)
               : make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const uint32_t rows[4] = {step ? a[0].z : a[0].x, step ? a[1].z : a[1].x, step ? a[0].w : a[0].y,
                              step ? a[1].w : a[1].y};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const auto word = [&](int k) {
        const uint4 &each = b[4 * step + k];
        return i < 2 ? each.x : i < 4 ? each.y : i < 6 ? each.z : each.w;
      };
      const uint32_t order = i % 2 ? 0x7632 : 0x5410;
      mma_16816<T>(acc[i], rows, __byte_perm(word(0), word(1), order), __byte_perm(word(2), word(3), order));
    }
  }
}

// Where four columns of a warp's sums lie: what lanes write at once, and what they read, touches all banks.
__device__ __forceinline__ int fold_place(int row, int four) {
  return row * 16 + ((four >> 2 | (four & 3) << 2) ^ (row & 1) << 2);
}

// Factors by which sums are divided and multiplied, powers of two: the largest comes to 2^14, so that float16 holds 11
// bits of all that is not below 2^-28 of it.
__device__ __forceinline__ void powers_of_two(float largest, float &down, float &up) {
  const int exponent = max(static_cast<int>(__float_as_uint(largest) >> 23) - 127, -100);
  down = __uint_as_float(static_cast<uint32_t>(127 + 14 - exponent) << 23);
  up = __uint_as_float(static_cast<uint32_t>(127 - 14 + exponent) << 23);
}

__device__ __forceinline__ float inverse_power(float x) { return __uint_as_float(0x7f000000u - __float_as_uint(x)); }

__device__ __forceinline__ float largest_of(const float4 &x) {
  return fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
}

__device__ __forceinline__ void multiply_by(float4 &x, float factor) {
  x.x *= factor, x.y *= factor, x.z *= factor, x.w *= factor;
}

// Where the power of two for FOLD_COLUMNS folded columns of a row, among them `column`, lies.
__device__ __forceinline__ float *fold_scale(const Absorbed &s, int64_t row, int column) {
  return s.fold_scales + row * (s.key.width / FOLD_COLUMNS) + column / FOLD_COLUMNS;
}

// Eight lanes have the FOLD_COLUMNS folded columns of a row, which float16 may be too narrow for: they become ones that
// it holds, and a power of two.
__device__ __forceinline__ void scale_folded(float4 &low, float4 &high, float *scale) {
  float largest = fmaxf(largest_of(low), largest_of(high)), down, up;
#pragma unroll
  for (int step = 1; step < 8; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
  powers_of_two(largest, down, up);
  multiply_by(low, down);
  multiply_by(high, down);
  if (scale) store_relaxed(scale, up);
}

// Rows first_row .. + 15 of a KV head through columns `column` .. + 63. `shared`: FOLD_SHARED bytes.
template <typename T>
__device__ __forceinline__ void fold_rows(const Attention &p, const Absorbed &s, int batch, int kv_head, int first_row,
                                          int column, float4 *shared) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  if (warp < ABSORB_WARPS) {
    float acc[8][4] = {};
    const char *query[2];
    for (int half = 0; half < 2; ++half) {
      const Row r = row_of(p, 0, batch, kv_head, first_row + lane / 4 + 8 * half, 0);
      query[half] = r.inside ? static_cast<const char *>(p.query.data) +
                                   2 * (batch * p.query.b + r.head * p.query.h + r.query * p.query.n)
                             : nullptr;
    }
    const RawColumns columns(s.key, column + lane / 4 * 8);
    const char *const weights = static_cast<const char *>(s.key.proj) + 2 * kv_head * s.key.proj_h;
#pragma unroll 1
    for (int dim = 32 * warp; dim < p.head_dim; dim += 32 * ABSORB_WARPS)
      fold_dims<T>(p, s.key, weights, columns, query, dim, acc);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int four = 0; four < 4; ++four) {  // a lane holds columns 16 c .. + 15
        const int pair = four / 2, i = four % 2 * 4;
        shared[warp * ROWS * 16 + fold_place(lane / 4 + 8 * half, 4 * (lane % 4) + four)] =
            make_float4(acc[i][2 * half + pair], acc[i + 1][2 * half + pair], acc[i + 2][2 * half + pair],
                        acc[i + 3][2 * half + pair]);
      }
  }
  __syncthreads();
  const int row = threadIdx.x / 8, eight = threadIdx.x % 8, to = row_of_all(p, kv_head, first_row + row);
  if (row < ROWS) {
    float4 sums[2] = {};
    for (int each = 0; each < ABSORB_WARPS; ++each)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 x = shared[each * ROWS * 16 + fold_place(row, 2 * eight + (i ^ (eight & 1)))];
        sums[i].x += x.x, sums[i].y += x.y, sums[i].z += x.z, sums[i].w += x.w;
      }
    const bool swapped = eight & 1;
    float4 low = swapped ? sums[1] : sums[0], high = swapped ? sums[0] : sums[1];
    const int64_t at = static_cast<int64_t>(batch) * p.q_heads * p.q_len + to;
    if constexpr (Precision<T>::NARROW)
      scale_folded(low, high, to >= 0 && eight == 0 ? fold_scale(s, at, column) : nullptr);
    if (to >= 0)
      store_relaxed_16(
          static_cast<char *>(s.query) + 2 * (at * s.key.width + column + 8 * eight),
          make_uint4(pack<T>(low.x, low.y), pack<T>(low.z, low.w), pack<T>(high.x, high.y), pack<T>(high.z, high.w)));
  }
  __syncthreads();
}

// q . b of all rows of a KV head, a row to a warp.
__device__ __forceinline__ void fold_bias(const Attention &p, const Absorbed &s, int batch, int kv_head) {
  const int lane = threadIdx.x % WARP;
  for (int row = threadIdx.x / WARP; row < p.q_len * p.group; row += blockDim.x / WARP) {
    const Row r = row_of(p, 0, batch, kv_head, row, 0);
    const int64_t query = batch * p.query.b + r.head * p.query.h + r.query * p.query.n;
    float sum = 0.0f;
    for (int dim = lane; dim < p.head_dim; dim += WARP)
      sum += load_float(p.query.data, query + dim, p.dtype) *
             load_float(s.key.bias, kv_head * s.key.bias_h + dim, s.key.bias_type);
    for (int step = WARP / 2; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0)
      store_relaxed(s.shift + static_cast<int64_t>(batch) * p.q_heads * p.q_len + row_of_all(p, kv_head, row), sum);
  }
}

// Piece `piece` of a batch row's queries. `shared`: FOLD_SHARED bytes.
template <typename T>
__device__ __noinline__ void fold_piece(const Attention &p, const Absorbed &s, int batch, int piece, char *shared) {
  const int tiles = s.key.width / FOLD_COLUMNS, kv_head = piece / tiles, column = piece % tiles * FOLD_COLUMNS;
  for (int first = 0; first < p.q_len * p.group; first += ROWS)
    fold_rows<T>(p, s, batch, kv_head, first, column, reinterpret_cast<float4 *>(shared));
  if (column == 0 && s.key.bias) fold_bias(p, s, batch, kv_head);
}

}  // namespace c2c
