// Decode's parameters and its sizes, for host and device.
#pragma once

#include <vector_types.h>

#include "params.h"

namespace c2c {

struct Decode {
  Attention attention;
  float2 *states;  // [batch, kv_heads, rows, splits]: max and sum of every split, empty ones too
  float *sums;     // [batch, kv_heads, rows, splits, value_dim]; that of empty splits is not written
  int32_t splits, row_tiles;
  int32_t first_split[MAX_RUNS + 1];  // of every run, then their number
  int32_t split_tokens[MAX_RUNS];
};

constexpr int DECODE_WARPS = 4;

// Bytes of shared memory for keys and values in flight: 3 stages of 16-bit numbers or more, and no more than the 99 KiB
// that sm_86, sm_89 and sm_120 have.
constexpr int decode_shared(int dim) { return dim > 64 ? 96 * 1024 : 64 * 1024; }

constexpr int COMBINE_THREADS = 128;

}  // namespace c2c
