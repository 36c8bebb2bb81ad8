// What the kernels of merge_states and quantize_kv are told.
#pragma once

#include "params.h"

namespace c2c {

constexpr int MAX_STATES = 32;

struct MergeStates {
  Strided outs[MAX_STATES];  // each [batch, heads, tokens, dim] last stride 1
  Strided lses[MAX_STATES];  // each [batch, heads, tokens]
  Strided out;               // [batch, heads, tokens, dim] last stride 1; written
  Strided lse;               // [batch, heads, tokens] float32; written
  int64_t rows;              // batch * heads * tokens
  int32_t count, heads, tokens, dim, chunks;
  int8_t type, out_vectorised;  // of outs and out
  int8_t lse_type[MAX_STATES], vectorised[MAX_STATES];
};

struct Quantize {
  Strided x;      // [batch, heads, tokens, dim] last stride 1
  Strided out;    // [batch, heads, tokens, dim] int8, last stride 1; written
  Strided scale;  // [batch, heads, tokens] float32; written
  int64_t rows;   // batch * heads * tokens
  int32_t heads, tokens, dim;
  int32_t lanes;  // threads of a row
  int8_t type, vectorised, out_vectorised;
};

}  // namespace c2c
