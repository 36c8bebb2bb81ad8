// merge_states and quantize_kv: a thread takes eight numbers of a row.
#pragma once

#include "states.h"
#include "stored_rows.cuh"

namespace c2c {

// Where a row of a tensor begins.
__device__ __forceinline__ int64_t row_of(const Strided &tensor, int64_t row, int heads, int tokens) {
  return row / tokens / heads * tensor.b + row / tokens % heads * tensor.h + row % tokens * tensor.n;
}

__device__ __forceinline__ void merge_states(const MergeStates &p) {
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, row = thread / p.chunks;
  const int at = static_cast<int>(thread % p.chunks) * 8;
  if (row >= p.rows) return;
  const auto lse_of = [&](int state) {
    const Strided &lse = p.lses[state];
    return load_float(lse.data, row_of(lse, row, p.heads, p.tokens), p.lse_type[state]);
  };
  // As SoftmaxState, of natural logarithms: those of states may be large, and products with log2 e less exact.
  float most = -INF, total = 0.0f, sum[8] = {};
  for (int i = 0; i < p.count; ++i) most = fmaxf(most, lse_of(i));
  if (most == -INF) most = 0.0f;
#pragma unroll 1
  for (int i = 0; i < p.count; ++i) {
    const float lse = lse_of(i), weight = expf(lse - most);
    if (lse == -INF) continue;  // it is not read
    float x[8];
    load_eight(x, p.outs[i].data, row_of(p.outs[i], row, p.heads, p.tokens), p.type, at, p.dim, p.vectorised[i]);
    total += weight;
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[j] += x[j] * weight;
  }
  const bool empty = total == 0.0f;
  const float divisor = empty ? 1.0f : total;
#pragma unroll
  for (float &each : sum) each /= divisor;
  const int64_t to = row_of(p.out, row, p.heads, p.tokens) + at;
  void *const out = const_cast<void *>(p.out.data);
  if (p.out_vectorised) {
    uint32_t words[4];
    if (p.type == C2C_BF16)
      pack_eight<__nv_bfloat16>(words, sum, 1.0f);
    else
      pack_eight<__half>(words, sum, 1.0f);
    *reinterpret_cast<uint4 *>(static_cast<char *>(out) + 2 * to) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (at + j < p.dim) store_float(out, to + j, p.type, sum[j]);
  }
  if (at == 0)
    static_cast<float *>(const_cast<void *>(p.lse.data))[row_of(p.lse, row, p.heads, p.tokens)] =
        empty ? -INF : most + logf(total);
}

// The code of x: rounded to nearest even; 0 where the product is not a number (of a scale so small that 1 / scale =
// inf).
__device__ __forceinline__ uint32_t code_of(float x, float inverse) {
  const float scaled = x * inverse;
  return scaled == scaled ? static_cast<uint8_t>(static_cast<int8_t>(rintf(fminf(fmaxf(scaled, -127.0f), 127.0f)))) : 0;
}

// `lanes` threads, a power of two within a warp, take a row.
__device__ __forceinline__ void quantize(const Quantize &p) {
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, row = thread / p.lanes;
  const int at = static_cast<int>(thread % p.lanes) * 8;
  const bool inside = row < p.rows;
  float x[8] = {};
  if (inside) load_eight(x, p.x.data, row_of(p.x, row, p.heads, p.tokens), p.type, at, p.dim, p.vectorised);
  uint32_t most = 0;  // bits of the largest |x|; those of a NaN are above all others
#pragma unroll
  for (const float each : x) most = max(most, __float_as_uint(each) & 0x7fffffffu);
  for (int step = 1; step < p.lanes; step *= 2) most = max(most, __shfl_xor_sync(~0u, most, step));
  const float scale = __fdiv_rn(__uint_as_float(most), 127.0f);
  const float inverse = scale > 0.0f && scale < INF ? __fdiv_rn(1.0f, scale) : 0.0f;
  if (!inside) return;
  if (at == 0) static_cast<float *>(const_cast<void *>(p.scale.data))[row_of(p.scale, row, p.heads, p.tokens)] = scale;
  uint32_t words[2] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) words[i / 4] |= (inverse == 0.0f ? 0 : code_of(x[i], inverse)) << i % 4 * 8;
  char *const to = static_cast<char *>(const_cast<void *>(p.out.data)) + row_of(p.out, row, p.heads, p.tokens) + at;
  if (p.out_vectorised) {
    if (at < p.dim) *reinterpret_cast<uint2 *>(to) = make_uint2(words[0], words[1]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (at + i < p.dim) to[i] = static_cast<char>(words[i / 4] >> i % 4 * 8);
  }
}

}  // namespace c2c
