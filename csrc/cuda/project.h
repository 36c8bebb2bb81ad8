// What the kernels of project_kv are told.
#pragma once

#include "launch.h"
#include "params.h"

namespace c2c {

// Keys or values: out = rotate(W unrotate(raw) + bias), or the same without W. Of a low-rank W = U A first A's product,
// which goes to a workspace, then U's.
struct ProjectHalf {
  Strided raw;                     // [batch, heads, stored, dim] last stride 1
  Strided scale;                   // [batch, heads, stored], nullable: 1
  Strided index;                   // [batch, 1, len], nullable: token j is stored token j
  Strided remove_cos, remove_sin;  // [batch, 1, stored, remove_dim] last stride 1, nullable
  Strided weights;                 // h, n: [kv_heads, out_dim, heads * dim] last stride 1; nullable: tokens are copied
  Strided bias;                    // h: [kv_heads, out_dim], nullable
  Strided apply_cos, apply_sin;    // [batch, 1, len, apply_dim] last stride 1, nullable
  Strided out;                     // [batch, kv_heads, len, out_dim] last stride 1; written
  int32_t heads, dim, stored, kv_heads, out_dim, remove_dim, apply_dim;
  int32_t head_columns;  // of a head's tile columns, see columns_of
  int32_t column_tiles;
  int8_t raw_type, weights_type, scale_type, index_type, bias_type, remove_type, apply_type, out_type;
  int8_t raw_vectorised;      // rows of raw can be read 16 bytes at a time
  int8_t raw_copied;          // and are multiplied as they are stored
  int8_t weights_vectorised;  // rows of weights can be read 16 bytes at a time
  int8_t out_vectorised;      // rows of out can be written 16 bytes at a time
};

struct Projection {
  ProjectHalf half[2];  // keys, values
  Strided lengths;      // [batch], nullable: len
  int32_t batch, len;
  int32_t token_tiles;
  int32_t blocks[2];  // of each half, 0 where it is not part of this launch
  int8_t lengths_type;
};

// Products on 9.0; `type`: of the weights.
c2c_status_code launch_project_wgmma(const Projection &p, int type, int64_t blocks, Executor run, void *context);

}  // namespace c2c
