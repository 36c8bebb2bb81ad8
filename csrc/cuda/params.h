// What kernels are told: plain structs passed by value. Made on the host by arguments.h out of the structs of c2c.h.
#pragma once

#include <stdint.h>

namespace c2c {

constexpr int MAX_RUNS = 17;  // the own cache and 16 segments

// A tensor of up to three outer dimensions. Strides are in elements; 0 where broadcast. data null: absent.
struct Strided {
  const void *data;
  int64_t b, h, n;  // batch, head, token
};

// One run of tokens in receiver space, or raw ones with scales. Number 0 is the own cache.
struct Run {
  Strided key;          // [batch, kv_heads, stored, key_dim] last stride 1
  Strided value;        // [batch, kv_heads, stored, value_dim] last stride 1
  Strided gate;         // [batch, q_heads, len], nullable: 1
  Strided key_scale;    // [batch, kv_heads, stored], nullable: 1
  Strided value_scale;  // [batch, kv_heads, stored], nullable: 1
  Strided positions;    // [batch, 1, len], nullable: visible to every query
  Strided index;        // [batch, 1, len], nullable: token j is stored token j
  Strided lengths;      // [batch], nullable: len
  int32_t len;          // tokens attended to
  int32_t stored;       // tokens in key and value
  int8_t key_type, value_type, gate_type, key_scale_type, value_scale_type, positions_type, index_type, lengths_type;
  int8_t causal;      // segments: hide tokens from query positions before theirs
  int8_t vectorised;  // rows of key and value can be read 16 bytes at a time
  int8_t placed;      // positions are compared: own tokens' index, segments' `positions`
};

struct Attention {
  Strided query;  // [batch, q_heads, q_len, head_dim] last stride 1
  Strided mask;   // [batch, q_heads, q_len, len] and mask_token; nullable
  int64_t mask_token;
  Strided query_positions;  // [batch, 1, q_len], nullable: length - q_len + i
  const void *sinks;        // [q_heads], nullable
  int64_t sinks_stride;
  Strided out;             // [batch, q_heads, q_len, value_dim] last stride 1; written
  Strided lse;             // [batch, q_heads, q_len] f32, nullable; written
  Strided mass;            // [batch, q_heads, q_len, runs] f32, last stride 1, nullable; written
  int64_t window;          // own tokens: visible when index > query index - window; 0: none
  int64_t segment_window;  // the same for segments with positions; 0: none
  int32_t batch, q_heads, kv_heads, group, q_len, head_dim, value_dim, runs;
  float scale, softcap;  // softcap 0: none
  int8_t is_causal, dtype, mask_type, query_positions_type, sinks_type, out_type;
  int8_t query_vectorised;  // rows of query can be read 16 bytes at a time
  Run run[MAX_RUNS];
};

}  // namespace c2c
