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

// The splits of all runs. A run's tokens of a split are kept where they are there already.
void plan_decode(Decode &d);

// Warps of a block for head dims up to `dim`.
constexpr int decode_warps(int dim) { return dim > 64 && dim <= 128 ? 2 : 4; }

// Bytes of shared memory for keys and values in flight: 3 or 4 stages of 16-bit numbers. So little that 96 to 144
// KiB are in flight on a multiprocessor of sm_80, and a block fits in the 99 KiB of sm_86, sm_89 and sm_120.
constexpr int decode_shared(int dim) { return (dim > 128 ? 96 : dim > 64 ? 48 : 64) * 1024; }

constexpr int COMBINE_THREADS = 128;

}  // namespace c2c
