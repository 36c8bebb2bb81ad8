// What the kernels of fuse_kv are told.
#pragma once

#include "params.h"

namespace c2c {

// The products of the network over one half of a layer, by what becomes of them.
enum FuseKind : int32_t {
  FUSE_ENTER,  // h = in_weight [sharer, receiver] + in_bias
  FUSE_INNER,  // gelu(w1 rmsnorm(h))
  FUSE_OUTER,  // h + w2 inner
  FUSE_LEAVE   // out = residual + gate * w * (out_weight h + out_bias)
};
// Blocks that are told apart.
constexpr int FUSE_EMBED = 0, FUSE_SCALE = 1, FUSE_PROJECT = 2;

constexpr int MAX_FUSE_BLOCKS = 15;                            // embed, scale and 13 of project
constexpr int MAX_FUSE_STEPS = 4 + 2 * (MAX_FUSE_BLOCKS - 1);  // enter, leave, two of each block
constexpr int FUSE_SUM = 512;  // columns whose sums are added as a tree, so that no tile's width changes a bit

struct FuseMatrix {
  const void *data;  // last stride 1
  int64_t row;       // numbers between rows
};

struct FuseBlock {
  const void *norm;   // [hidden]
  FuseMatrix w1, w2;  // [inner, hidden], [hidden, inner]
};

// One half of one layer: a row of the table in device memory, which holds as many blocks as there are.
struct FuseHalf {
  Strided receiver;         // [batch, kv_heads, len, dim] last stride 1
  Strided sharer;           // [batch, sharer_heads, stored, sharer_dim] last stride 1
  Strided residual;         // as the receiver
  Strided out;              // as the receiver; written
  Strided index;            // [batch, 1, len], nullable: token i is the sharer's token i
  Strided gate;             // [batch, kv_heads, len], nullable: gate_logit > 0
  FuseMatrix in_weight;     // [hidden, sharer_heads * sharer_dim + kv_heads * dim]
  FuseMatrix out_weight;    // [kv_heads * dim, hidden]
  FuseMatrix scale_weight;  // [kv_heads, hidden]
  const void *in_bias;      // [hidden]
  const void *out_bias;     // [kv_heads * dim]
  const void *scale_bias;   // [kv_heads]
  const void *gate_logit;   // []
  int32_t stored;           // tokens of the sharer
  int8_t index_type, gate_type;
  FuseBlock blocks[MAX_FUSE_BLOCKS];
};

// What becomes of a half: nothing where its gate is closed and out is the residual.
enum FuseState : int8_t { FUSE_NOTHING, FUSE_COPY, FUSE_OPEN };

// One product of every job: its rows by `width` numbers, `size` columns.
struct FuseStep {
  int32_t first;  // tiles of a job before this step's
  int32_t kind, block;
  int32_t size, width;
  int32_t tiles;  // of a job
  int32_t wait;   // tiles of the job that have to be done before
};

// A job is one half of a layer and as many of its tokens as a tile has rows.
struct Fuse {
  int32_t steps;
  FuseStep step[MAX_FUSE_STEPS];
  const void *table;     // FuseHalf, each
  int32_t table_row;     // bytes
  const int8_t *states;  // [halves] FuseState
  int32_t *counters;     // [1 + jobs] tickets, then tiles of each job that are done; zeros at first
  // What programs leave for each other.
  void *h;            // [jobs, rows, hidden_pitch]: of embed
  void *projected;    // the same, of project
  void *inner;        // [jobs, rows, inner_pitch]: between the products of embed's and project's blocks
  void *scale_inner;  // the same, of the scale's
  float *squares;     // [jobs, sum_tiles, rows] sums of squares of h, by tiles of columns
  float *logits;      // [jobs, sum_tiles, kv_heads, rows] parts of scale_weight h
  int32_t hidden_pitch, inner_pitch, sum_tiles;
  int32_t jobs, row_tiles, first_tile;  // jobs: halves x row_tiles; a half's tiles of rows start at first_tile
  int32_t batch, len, kv_heads, dim, sharer_heads, sharer_dim, hidden, blocks;
  int8_t weights_vectorised;  // weights, norms and biases can be read 16 bytes at a time
  int8_t caches_vectorised;   // and caches, eight numbers of one head each
  int8_t gated;               // halves have gates
};

// What fills rows of the table, looks at their gates, and fills counters with zeros.
template <int WORDS>
struct FuseTable {
  int64_t *to;
  int8_t *states;  // of the rows
  int32_t *counters;
  int32_t count;      // of counters
  int32_t rows, row;  // rows, and words of a row
  int8_t gated;       // all halves are open
  int8_t type;        // of gate_logit
  int64_t word[WORDS];
};
constexpr int FUSE_TABLE_SMALL = 256, FUSE_TABLE_LARGE = 3072;
static_assert(sizeof(FuseHalf) <= 8 * FUSE_TABLE_SMALL, "a row fits");

// Tiles: rows (tokens) x columns of a product that a program forms.
enum FuseShape { FUSE_16x32, FUSE_16x128, FUSE_64x128, FUSE_64x256 };

// A kernel as the host launches it.
struct FuseKernel {
  const void *kernel;
  const char *name;
  int32_t rows, columns, threads, shared;  // shared memory in bytes
};
FuseKernel fuse_kernel_f16(FuseShape shape);
FuseKernel fuse_kernel_bf16(FuseShape shape);
FuseKernel large_fuse_kernel_f16();  // 64 x 512, for blocks that may have 144 KiB of shared memory
FuseKernel large_fuse_kernel_bf16();
const void *fuse_table_kernel(bool large);

}  // namespace c2c
