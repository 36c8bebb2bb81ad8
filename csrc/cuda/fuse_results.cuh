// What becomes of the products of fuse_kv, in registers: biases, residuals, sums of squares, gelu, weights of tokens.
//
// Lane l holds of a warp's rows l / 4 + 8 j and of every 32 of its columns eight in a row, from 8 (l % 4) on: bytes
// side by side, and a factor of a matrix product for the next one.
#pragma once

#include "fuse_tile.cuh"
#include "stored_rows.cuh"

namespace c2c {

template <typename T>
constexpr int FUSE_TYPE = C2C_BF16;
template <>
constexpr int FUSE_TYPE<__half> = C2C_F16;

// Eight 16-bit numbers, at .. at + 8 of a row of `dim`; zeros beyond it.
__device__ __forceinline__ void load_words(uint32_t (&words)[4], const void *data, int64_t row, int at, int dim,
                                           bool vectorised) {
  const uint16_t *const from = static_cast<const uint16_t *>(data) + row;
  if (vectorised && at + 8 <= dim) {
    const uint4 four = *reinterpret_cast<const uint4 *>(from + at);
    words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = at + 2 * i < dim ? from[at + 2 * i] : 0;
    if (at + 2 * i + 1 < dim) words[i] |= uint32_t{from[at + 2 * i + 1]} << 16;
  }
}

// The sum of neighbours, of pairs of them, and so on.
template <int COUNT>
__device__ __forceinline__ float tree(float (&x)[COUNT]) {
#pragma unroll
  for (int step = 1; step < COUNT; step *= 2)
#pragma unroll
    for (int i = 0; i < COUNT; i += 2 * step) x[i] += x[i + step];
  return x[0];
}

// The sum of what tiles of N columns have left, `stride` apart: trees of FUSE_SUM columns, one after the other.
template <int N>
__device__ __forceinline__ float sum_of_tiles(const float *from, int64_t stride, int tiles) {
  constexpr int LEAVES = FUSE_SUM / N;
  float sum = 0.0f;
#pragma unroll 1
  for (int first = 0; first < tiles; first += LEAVES) {
    float x[LEAVES];
#pragma unroll
    for (int i = 0; i < LEAVES; ++i) x[i] = first + i < tiles ? __ldcg(from + (first + i) * stride) : 0.0f;
    sum += tree(x);
  }
  return sum;
}

// A lane's place in a tile.
template <typename Tile>
struct FuseLane {
  int row, column;  // of the first of its numbers, in the tile
  int warp_n;

  __device__ __forceinline__ FuseLane() {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    warp_n = warp / Tile::WARPS_M;
    row = warp % Tile::WARPS_M * Tile::MT * 16 + lane / 4;
    column = warp_n * Tile::NT * 8 + lane % 4 * 8;
  }
};

// Adds up what every warp has of a row, `values` of them, and leaves it where `store(row, value, sum)` wants it. Warps
// have written shared[(warp_n * values + value) * M + row] before.
template <typename Tile, typename Store>
__device__ __forceinline__ void add_warps(const float *shared, int values, const Store &store) {
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < values * Tile::M; i += Tile::THREADS) {
    float x[Tile::WARPS_N];
#pragma unroll
    for (int n = 0; n < Tile::WARPS_N; ++n) x[n] = shared[n * values * Tile::M + i];
    store(i % Tile::M, i / Tile::M, tree(x));
  }
  __syncthreads();
}

// What h adds to scale_weight h: `words` are the tile's h.
template <typename T, typename Tile>
__device__ __forceinline__ void store_logits(const uint32_t (&words)[Tile::MT][Tile::NT][2], const Fuse &p,
                                             const FuseHalf &half, const FusePlace &place,
                                             const FuseRows<Tile::M> &rows, float *shared) {
  const FuseLane<Tile> at;
  const int lane = threadIdx.x % WARP;
  float *const to = p.logits + (int64_t{place.job} * p.sum_tiles + place.tile) * p.kv_heads * Tile::M;
#pragma unroll 1
  for (int first = 0; first < p.kv_heads; first += 8) {
    float parts[Tile::MT][4];
    const int head = first + lane / 4;
#pragma unroll
    for (int q = 0; q < Tile::NT / 4; ++q) {
      uint32_t b[4];
      load_words(b, half.scale_weight.data, head < p.kv_heads ? head * half.scale_weight.row : 0,
                 place.tile * Tile::N + at.column + q * 32, head < p.kv_heads ? place.size : 0, p.weights_vectorised);
#pragma unroll
      for (int m = 0; m < Tile::MT; ++m) {
        float sum[4] = {};
#pragma unroll
        for (int t = 0; t < 4; t += 2) {
          const uint32_t a[4] = {words[m][4 * q + t][0], words[m][4 * q + t][1], words[m][4 * q + t + 1][0],
                                 words[m][4 * q + t + 1][1]};
          mma_16816<T>(sum, a, b[t], b[t + 1]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) parts[m][i] = q ? parts[m][i] + sum[i] : sum[i];
      }
    }
#pragma unroll
    for (int m = 0; m < Tile::MT; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        shared[(at.warp_n * 8 + lane % 4 * 2 + i % 2) * Tile::M + at.row + m * 16 + i / 2 * 8] = parts[m][i];
    add_warps<Tile>(shared, 8, [&](int row, int head, float sum) {
      if (first + head < p.kv_heads && rows.token[row] >= 0) to[(first + head) * Tile::M + row] = sum;
    });
  }
}

// h = product + bias, or before + product: into `result` (nullable), with sums of squares where `squared`. Leaves h in
// `words`.
template <typename T, typename Tile, bool ENTERS>
__device__ __forceinline__ void keep_hidden(uint32_t (&words)[Tile::MT][Tile::NT][2],
                                            const float (&acc)[Tile::MT][Tile::NT][4], const Fuse &p,
                                            const FuseHalf &half, const FusePlace &place, const FuseRows<Tile::M> &rows,
                                            const void *before, void *result, bool squared, float *shared) {
  const FuseLane<Tile> at;
  float squares[Tile::MT][2];
#pragma unroll
  for (int q = 0; q < Tile::NT / 4; ++q) {
    const int column = place.tile * Tile::N + at.column + q * 32;
    float bias[8];
    if (ENTERS) load_eight(bias, half.in_bias, 0, FUSE_TYPE<T>, column, place.size, p.weights_vectorised);
#pragma unroll
    for (int m = 0; m < Tile::MT; ++m)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = at.row + m * 16 + j * 8;
        const bool inside = rows.token[row] >= 0 && column < p.hidden_pitch;
        const int64_t place_of = (int64_t{place.job} * Tile::M + row) * p.hidden_pitch + column;
        uint4 old = make_uint4(0, 0, 0, 0);
        if (!ENTERS && inside)
          old = __ldcg(reinterpret_cast<const uint4 *>(static_cast<const uint16_t *>(before) + place_of));
        const uint32_t olds[4] = {old.x, old.y, old.z, old.w};
        float sum = 0.0f;
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          const float2 base = ENTERS ? make_float2(bias[2 * t], bias[2 * t + 1]) : unpack<T>(olds[t]);
          const float (&x)[4] = acc[m][4 * q + t];
          const uint32_t word = pack<T>(x[2 * j] + base.x, x[2 * j + 1] + base.y);
          const float2 h = unpack<T>(word);
          sum += h.x * h.x;
          sum += h.y * h.y;
          words[m][4 * q + t][j] = word;
        }
        if (inside && result)
          *reinterpret_cast<uint4 *>(static_cast<uint16_t *>(result) + place_of) =
              make_uint4(words[m][4 * q][j], words[m][4 * q + 1][j], words[m][4 * q + 2][j], words[m][4 * q + 3][j]);
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        squares[m][j] = q ? squares[m][j] + sum : sum;
      }
  }
  __syncthreads();  // stages have been read
  if (!squared) return;
  if (threadIdx.x % 4 == 0)
#pragma unroll
    for (int m = 0; m < Tile::MT; ++m)
#pragma unroll
      for (int j = 0; j < 2; ++j) shared[at.warp_n * Tile::M + at.row + m * 16 + j * 8] = squares[m][j];
  float *const to = p.squares + (int64_t{place.job} * p.sum_tiles + place.tile) * Tile::M;
  add_warps<Tile>(shared, 1, [&](int row, int, float sum) {
    if (rows.token[row] >= 0) to[row] = sum;
  });
}

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f)); }

// gelu(product / rms) into `result`; `factors`: 1 / rms of the rows.
template <typename T, typename Tile>
__device__ __forceinline__ void keep_inner(const float (&acc)[Tile::MT][Tile::NT][4], const Fuse &p,
                                           const FusePlace &place, const FuseRows<Tile::M> &rows, void *result,
                                           const float *factors) {
  const FuseLane<Tile> at;
#pragma unroll
  for (int m = 0; m < Tile::MT; ++m)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = at.row + m * 16 + j * 8;
      const float factor = factors[row];
      const bool inside = rows.token[row] >= 0;
#pragma unroll
      for (int q = 0; q < Tile::NT / 4; ++q) {
        const int column = place.tile * Tile::N + at.column + q * 32;
        uint32_t words[4];
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          const float (&x)[4] = acc[m][4 * q + t];
          words[t] = pack<T>(gelu(x[2 * j] * factor), gelu(x[2 * j + 1] * factor));
        }
        if (inside && column < p.inner_pitch)
          *reinterpret_cast<uint4 *>(static_cast<uint16_t *>(result) +
                                     (int64_t{place.job} * Tile::M + row) * p.inner_pitch + column) =
              make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
}

__device__ __forceinline__ int64_t fuse_at(const Strided &cache, int batch, int token, int head) {
  return batch * cache.b + token * cache.n + head * cache.h;
}

// out = residual + added for eight columns of a token; the residual's bits where nothing is ADDED.
template <typename T, bool ADDED>
__device__ __forceinline__ void write_eight(const Fuse &p, const FuseHalf &half, int batch, int token, int column,
                                            int size, const float (&added)[8]) {
  const uint16_t *const residual = static_cast<const uint16_t *>(half.residual.data);
  uint16_t *const out = static_cast<uint16_t *>(const_cast<void *>(half.out.data));
  if (column >= size) return;
  if (p.caches_vectorised) {
    const int head = column / p.dim, dim = column % p.dim;
    uint4 words = *reinterpret_cast<const uint4 *>(residual + fuse_at(half.residual, batch, token, head) + dim);
    if (ADDED) {
      const auto sum = [&](uint32_t word, int i) {
        const float2 base = unpack<T>(word);
        return pack<T>(base.x + added[i], base.y + added[i + 1]);
      };
      words = make_uint4(sum(words.x, 0), sum(words.y, 2), sum(words.z, 4), sum(words.w, 6));
    }
    *reinterpret_cast<uint4 *>(out + fuse_at(half.out, batch, token, head) + dim) = words;
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (column + i >= size) break;
    const int head = (column + i) / p.dim, dim = (column + i) % p.dim;
    uint16_t bits = residual[fuse_at(half.residual, batch, token, head) + dim];
    if (ADDED) bits = static_cast<uint16_t>(pack<T>(unpack<T>(bits).x + added[i], 0.0f));
    out[fuse_at(half.out, batch, token, head) + dim] = bits;
  }
}

// out = residual, where the gate is closed.
template <typename T, typename Tile>
__device__ __forceinline__ void copy_residual(const Fuse &p, const FuseHalf &half, const FusePlace &place,
                                              const FuseRows<Tile::M> &rows) {
  const float nothing[8] = {};
#pragma unroll 1
  for (int i = threadIdx.x; i < Tile::M * (Tile::N / 8); i += Tile::THREADS) {
    const int row = i / (Tile::N / 8), column = place.tile * Tile::N + i % (Tile::N / 8) * 8;
    if (rows.token[row] >= 0)
      write_eight<T, false>(p, half, rows.batch[row], rows.token[row], column, place.size, nothing);
  }
}

// gate * sigmoid(scale_weight h + scale_bias) of the tile's heads and rows, into shared[head - first][row].
template <typename T, typename Tile>
__device__ __forceinline__ void find_weights(const Fuse &p, const FuseHalf &half, const FusePlace &place,
                                             const FuseRows<Tile::M> &rows, int first, int heads, float *shared) {
  const float *const logits = p.logits + int64_t{place.job} * p.sum_tiles * p.kv_heads * Tile::M;
#pragma unroll 1
  for (int i = threadIdx.x; i < heads * Tile::M; i += Tile::THREADS) {
    const int row = i % Tile::M, head = first + i / Tile::M, token = rows.token[row];
    if (token < 0) continue;
    const float logit = sum_of_tiles<Tile::N>(logits + head * Tile::M + row, int64_t{p.kv_heads} * Tile::M,
                                              (p.hidden + Tile::N - 1) / Tile::N) +
                        load_float(half.scale_bias, head, FUSE_TYPE<T>);
    float weight = 1.0f / (1.0f + expf(-logit));
    if (p.gated) weight *= load_float(half.gate.data, fuse_at(half.gate, rows.batch[row], token, head), half.gate_type);
    shared[i] = weight;
  }
}

// out = residual + weight * (product + out_bias)
template <typename T, typename Tile>
__device__ __forceinline__ void write_out(const float (&acc)[Tile::MT][Tile::NT][4], const Fuse &p,
                                          const FuseHalf &half, const FusePlace &place, const FuseRows<Tile::M> &rows,
                                          float *shared) {
  const FuseLane<Tile> at;
  const int start = place.tile * Tile::N, first = start / p.dim;
  const int heads = (min(start + Tile::N, place.size) - 1) / p.dim - first + 1;
  __syncthreads();  // stages have been read
  find_weights<T, Tile>(p, half, place, rows, first, heads, shared);
  __syncthreads();
#pragma unroll
  for (int q = 0; q < Tile::NT / 4; ++q) {
    const int column = start + at.column + q * 32;
    float bias[8];
    load_eight(bias, half.out_bias, 0, FUSE_TYPE<T>, column, place.size, p.weights_vectorised);
#pragma unroll
    for (int m = 0; m < Tile::MT; ++m)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = at.row + m * 16 + j * 8, token = rows.token[row];
        if (token < 0) continue;
        float added[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int head = min(p.caches_vectorised ? column : column + i, place.size - 1) / p.dim - first;
          added[i] = (acc[m][4 * q + i / 2][2 * j + i % 2] + bias[i]) * shared[max(head, 0) * Tile::M + row];
        }
        write_eight<T, true>(p, half, rows.batch[row], token, column, place.size, added);
      }
  }
}

}  // namespace c2c
