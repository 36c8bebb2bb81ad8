// Rows of keys or values as they are stored: of 16-bit floats, of bytes with scales, selected by an index; widened in
// registers eight numbers at a time. For whatever cannot be copied as it is.
#pragma once

#include "storage.cuh"

namespace c2c {

__device__ __forceinline__ int bytes_of(int type) {
  return type == C2C_F32 ? 4 : type == C2C_I8 || type == C2C_F8E4M3 ? 1 : 2;
}

// One number of any storage as float32.
__device__ __forceinline__ float load_stored(const void *data, int64_t at, int type) {
  if (type == C2C_I8) return static_cast<const int8_t *>(data)[at];
  if (type == C2C_F8E4M3) return from_e4m3(static_cast<const uint8_t *>(data)[at]);
  return load_float(data, at, type);
}

// Numbers at .. at + 8 of a row of `dim`, zeros beyond it. `vectorised`: the row and 8 of its numbers are aligned.
__device__ __forceinline__ void load_eight(float (&x)[8], const void *data, int64_t row, int type, int at, int dim,
                                           bool vectorised) {
#pragma unroll
  for (float &each : x) each = 0.0f;
  if (vectorised && at + 8 <= dim && bytes_of(type) == 1) {
    const uint2 bytes = *reinterpret_cast<const uint2 *>(static_cast<const char *>(data) + row + at);
    float low[4], high[4];
    widen_bytes(bytes.x, type == C2C_F8E4M3, low);
    widen_bytes(bytes.y, type == C2C_F8E4M3, high);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = low[i], x[4 + i] = high[i];
  } else if (vectorised && at + 8 <= dim && bytes_of(type) == 2) {
    const uint4 words = *reinterpret_cast<const uint4 *>(static_cast<const char *>(data) + 2 * (row + at));
    const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 both = type == C2C_BF16 ? __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(&pairs[i]))
                                           : __half22float2(*reinterpret_cast<const __half2 *>(&pairs[i]));
      x[2 * i] = both.x, x[2 * i + 1] = both.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (at + i < dim) x[i] = load_stored(data, row + at + i, type);
  }
}

// Eight numbers, times `scale`, rounded to 16 bits each.
template <typename T>
__device__ __forceinline__ void pack_eight(uint32_t (&words)[4], const float (&x)[8], float scale) {
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = pack<T>(x[2 * i] * scale, x[2 * i + 1] * scale);
}

}  // namespace c2c
