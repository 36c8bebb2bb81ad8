// What project_kv does before and after its product: scales, selected tokens, rotations, bias, results.
#pragma once

#include "project.h"
#include "stored_rows.cuh"

namespace c2c {

__device__ __forceinline__ int valid_tokens(const Projection &p, int batch) {
  return valid_tokens(p.lengths, p.lengths_type, batch, p.len);
}

// Where token `token` is stored; -1 where nothing is read and zeros count.
__device__ __forceinline__ int stored_token(const ProjectHalf &half, int batch, int token, int end) {
  if (token >= end) return -1;
  if (!half.index.data) return token;
  const int64_t at = load_integer(half.index.data, batch * half.index.b + token * half.index.n, half.index_type);
  return at >= 0 && at < half.stored ? static_cast<int>(at) : -1;
}

__device__ __forceinline__ int64_t row_at(const Strided &tensor, int batch, int head, int token) {
  return batch * tensor.b + head * tensor.h + token * tensor.n;
}

// Number `d` of a stored head, scaled, without the rotation that it carries.
static __device__ __noinline__ float raw_number(const ProjectHalf &half, int batch, int head, int stored, int d) {
  const int64_t row = row_at(half.raw, batch, head, stored);
  const float scale =
      half.scale.data ? load_float(half.scale.data, row_at(half.scale, batch, head, stored), half.scale_type) : 1.0f;
  const float x = load_stored(half.raw.data, row + d, half.raw_type) * scale;
  if (!half.remove_cos.data || d >= half.remove_dim) return x;
  const int middle = half.remove_dim / 2, other = d < middle ? d + middle : d - middle;
  const float y = load_stored(half.raw.data, row + other, half.raw_type) * scale;
  const float c = load_float(half.remove_cos.data, row_at(half.remove_cos, batch, 0, stored) + d, half.remove_type);
  const float s = load_float(half.remove_sin.data, row_at(half.remove_sin, batch, 0, stored) + d, half.remove_type);
  return (d < middle ? x * c + y * s : x * c - y * s) / (c * c + s * s);
}

// Numbers d .. d + 8 of a stored head, as above. d, and half of what is rotated, are multiples of 8.
__device__ __forceinline__ void raw_eight(float (&x)[8], const ProjectHalf &half, int batch, int head, int stored,
                                          int d) {
  const int64_t row = row_at(half.raw, batch, head, stored);
  const float scale =
      half.scale.data ? load_float(half.scale.data, row_at(half.scale, batch, head, stored), half.scale_type) : 1.0f;
  load_eight(x, half.raw.data, row, half.raw_type, d, half.dim, half.raw_vectorised);
#pragma unroll
  for (float &each : x) each *= scale;
  if (!half.remove_cos.data || d >= half.remove_dim) return;
  const int middle = half.remove_dim / 2;
  float y[8], c[8], s[8];
  load_eight(y, half.raw.data, row, half.raw_type, d < middle ? d + middle : d - middle, half.dim, half.raw_vectorised);
  load_eight(c, half.remove_cos.data, row_at(half.remove_cos, batch, 0, stored), half.remove_type, d, half.remove_dim,
             false);
  load_eight(s, half.remove_sin.data, row_at(half.remove_sin, batch, 0, stored), half.remove_type, d, half.remove_dim,
             false);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float turned = d < middle ? scale * y[i] * s[i] : -scale * y[i] * s[i];
    x[i] = __fdividef(x[i] * c[i] + turned, c[i] * c[i] + s[i] * s[i]);
  }
}

__device__ __forceinline__ bool in_eights(const ProjectHalf &half) {
  return half.dim % 8 == 0 && (!half.remove_cos.data || half.remove_dim % 16 == 0);
}

// Columns of tiles are grouped by eights so that whoever holds two neighbouring groups, from an even one on, holds the
// pairs that a rotation turns: of a head first groups 0, half, 8, half + 8 .. of the rotary dims, then the others in
// the same way: threads side by side then write side by side.
struct Columns {
  int head, dim;  // of the first
  int count;      // that exist, 0 .. 8
};

__device__ __forceinline__ Columns columns_of(const ProjectHalf &half, int group) {
  const int per_head = half.head_columns / 8;
  Columns c;
  c.head = group / per_head;
  group %= per_head;
  const int middle = half.apply_dim / 2, pairs = (middle + 7) / 8;
  if (group < 2 * pairs) {
    c.dim = group / 2 * 8 + group % 2 * middle;
    c.count = middle - group / 2 * 8;
  } else {
    group -= 2 * pairs;
    c.dim = half.apply_dim + (group / 2 + group % 2 * (per_head / 2 - pairs)) * 8;
    c.count = half.out_dim - c.dim;
  }
  c.count = c.head >= half.kv_heads || c.count < 0 ? 0 : c.count > 8 ? 8 : c.count;
  return c;
}

__device__ __forceinline__ void store_eight(const ProjectHalf &half, int batch, int token, const Columns &c,
                                            const float (&y)[8]) {
  const int64_t at = row_at(half.out, batch, c.head, token) + c.dim;
  void *const out = const_cast<void *>(half.out.data);
  if (half.out_vectorised && c.count == 8 && c.dim % 8 == 0 && half.out_type != C2C_F32) {
    uint32_t words[4];
    if (half.out_type == C2C_BF16)
      pack_eight<__nv_bfloat16>(words, y, 1.0f);
    else
      pack_eight<__half>(words, y, 1.0f);
    *reinterpret_cast<uint4 *>(static_cast<char *>(out) + 2 * at) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < c.count) store_float(out, at + i, half.out_type, y[i]);
  }
}

// Bias, rotation and rounding of two neighbouring groups of a token's columns; zeros where the token is not `inside`.
__device__ __forceinline__ void finish_columns(const ProjectHalf &half, int batch, int token, bool inside,
                                               const Columns (&c)[2], float (&y)[2][8]) {
  if (half.bias.data)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float bias[8];
      load_eight(bias, half.bias.data, c[j].head * half.bias.h, half.bias_type, c[j].dim, c[j].dim + c[j].count, false);
#pragma unroll
      for (int i = 0; i < 8; ++i) y[j][i] += bias[i];
    }
  if (half.apply_cos.data && c[0].dim < half.apply_dim / 2 && inside) {
    const int64_t cosines = row_at(half.apply_cos, batch, 0, token), sines = row_at(half.apply_sin, batch, 0, token);
    float cos[2][8], sin[2][8];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      load_eight(cos[j], half.apply_cos.data, cosines, half.apply_type, c[j].dim, c[j].dim + c[j].count, false);
      load_eight(sin[j], half.apply_sin.data, sines, half.apply_type, c[j].dim, c[j].dim + c[j].count, false);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float first = y[0][i], second = y[1][i];
      y[0][i] = first * cos[0][i] - second * sin[0][i];
      y[1][i] = second * cos[1][i] + first * sin[1][i];
    }
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (!inside) y[j][i] = 0.0f;
    if (c[j].count) store_eight(half, batch, token, c[j], y[j]);
  }
}

}  // namespace c2c
