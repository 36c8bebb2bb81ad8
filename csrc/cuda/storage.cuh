// Keys and values as they are stored: int8 and e4m3 bytes widened in registers, tiles of tokens fetched into shared
// memory.
#pragma once

#include "common.cuh"

namespace c2c {

// Four bytes as float32, int8 or e4m3, without their scale.
__device__ __forceinline__ void widen_bytes(uint32_t bytes, bool e4m3, float (&x)[4]) {
  if (e4m3) {
    for (int pair = 0; pair < 2; ++pair) {
      // Two codes, each in the upper byte of a half; then as in from_e4m3. Of code 0x7f, which is NaN and not 480, the
      // exponent's highest bit is set too.
      const uint32_t codes = __byte_perm(bytes, 0, pair ? 0x3424 : 0x1404), sizes = codes & 0x7f007f00u;
      const uint32_t nan = (sizes + 0x01000100u) & 0x80008000u;
      const uint32_t halves = (codes & 0x80008000u) | sizes >> 1 | nan >> 1;
      const float2 both = __half22float2(*reinterpret_cast<const __half2 *>(&halves));
      x[2 * pair] = both.x * 256.0f;
      x[2 * pair + 1] = both.y * 256.0f;
    }
    return;
  }
  const uint32_t shifted = bytes ^ 0x80808080u;  // x + 128, unsigned
  for (int i = 0; i < 4; ++i)                    // 2^23 + 128 + x, exactly
    x[i] = __uint_as_float(__byte_perm(shifted, 0x4b000000u, 0x7440 | i)) - 8388736.0f;
}

// Products of rows with 8 of a token's bytes that a lane holds: scores += queries of two steps times them.
template <typename T>
__device__ __forceinline__ void multiply_bytes(float (&scores)[4], const uint32_t (&first)[4],
                                               const uint32_t (&second)[4], uint2 bytes, bool e4m3, float scale) {
  float x[4];
  widen_bytes(bytes.x, e4m3, x);
  mma_16816<T>(scores, first, pack<T>(x[0] * scale, x[1] * scale), pack<T>(x[2] * scale, x[3] * scale));
  widen_bytes(bytes.y, e4m3, x);
  mma_16816<T>(scores, second, pack<T>(x[0] * scale, x[1] * scale), pack<T>(x[2] * scale, x[3] * scale));
}

// sums[0..3] += weights of 16 tokens times 32 columns of theirs. A lane has of tokens 2c, 2c + 1, 2c + 8, 2c + 9 (c =
// lane % 4) the four columns from 4 (lane / 4) on, one for each sum: `bytes_of(token)`, times `scale_of(i, token)` of
// its i-th token where they are `scaled`.
template <typename T, typename Bytes, typename Scale>
__device__ __forceinline__ void accumulate_bytes(float (*sums)[4], const uint32_t (&weights)[4], bool e4m3, bool scaled,
                                                 Bytes bytes_of, Scale scale_of) {
  float x[4][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = 2 * (threadIdx.x % 4) + i % 2 + i / 2 * 8;
    widen_bytes(*reinterpret_cast<const uint32_t *>(bytes_of(token)), e4m3, x[i]);
    if (scaled)
      for (float &each : x[i]) each *= scale_of(i, token);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) mma_16816<T>(sums[i], weights, pack<T>(x[0][i], x[1][i]), pack<T>(x[2][i], x[3][i]));
}

// Two ways to fetch 16-byte chunk `chunk` of a row of `dim` numbers of SIZE bytes into shared memory; zeros beyond the
// row and where not `inside`. By cp.async, where the row allows it:
template <int SIZE>
__device__ __forceinline__ void fetch_16_bytes(char *shared, const char *row, int chunk, int dim, bool inside) {
  const bool some = inside && chunk * (16 / SIZE) < dim;
  cp_async_16(shared_address(shared), some ? row + chunk * 16 : row, some);
}

// Number by number:
template <int SIZE>
__device__ __noinline__ void fetch_numbers(char *shared, const char *row, int chunk, int dim, bool inside) {
  constexpr int NUMBERS = 16 / SIZE, HALF = NUMBERS / 2;
  uint64_t low = 0, high = 0;
#pragma unroll 1
  for (int i = 0; i < NUMBERS; ++i) {
    const int at = chunk * NUMBERS + i;
    if (!inside || at >= dim) break;
    const uint64_t bits = SIZE == 2 ? reinterpret_cast<const uint16_t *>(row)[at]
                                    : static_cast<uint64_t>(reinterpret_cast<const uint8_t *>(row)[at]);
    const uint64_t moved = bits << (i % HALF * SIZE * 8);
    low |= i < HALF ? moved : 0;
    high |= i < HALF ? 0 : moved;
  }
  *reinterpret_cast<ulonglong2 *>(shared) = make_ulonglong2(low, high);
}

}  // namespace c2c
