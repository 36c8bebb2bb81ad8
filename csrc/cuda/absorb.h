// Parameters of decode beside segments whose projectors are absorbed, and its sizes, for host and device.
//
// A score is q . (W x + b) = (W^T q) . x + q . b, an output V (sum w y) + c sum w: queries are folded through W once,
// raw tokens are read once for all heads, at the sharer's width, and what they leave goes through V where it is
// combined. Raw heads are padded to 16 dims each, their columns then to a width of 128, 256 or 512.
#pragma once

#include "decode.h"

namespace c2c {

constexpr int LARGEST_WIDTH = 512;
constexpr int RAW_PAD = 16;           // of a raw head's dims
constexpr int CHUNK_TOKENS = 16;      // taken at once
constexpr int EXCHANGE_BYTES = 4096;  // of products that the warps of 16 rows leave for each other
constexpr int COMBINE_PITCH_PAD = 4;  // numbers between rows of raw sums: two rows' 16-byte chunks touch all banks
constexpr int FOLD_COLUMNS = 64;      // of a projector, folded by a block at once
constexpr int ABSORB_WARPS = 4;       // that share the columns of 16 rows
constexpr int ABSORB_ROWS = 32;       // of all heads, taken by a block at most
constexpr int ABSORB_THREADS = ABSORB_ROWS / 16 * ABSORB_WARPS * 32;  // at most
constexpr int COMBINE_ROWS = 16;  // of a KV head, multiplied by the value projector at once
constexpr int ABSORB_COMBINE_THREADS = 2 * COMBINE_THREADS;

// Keys or values of an absorbed segment.
struct AbsorbedSide {
  const void *proj;  // [kv_heads, dim, heads * raw_dim] last stride 1, of the query's dtype
  int64_t proj_h, proj_d;
  const void *bias;  // [kv_heads, dim] last stride 1, nullable
  int64_t bias_h;
  Strided scale;           // [batch, heads, stored], nullable: 1
  int32_t heads, raw_dim;  // the sharer's
  int32_t padded;          // raw_dim in tiles
  int32_t width;           // all heads in tiles
  int8_t bias_type, scale_type;
  int8_t proj_vectorised;   // 8 numbers of the projector can be read at once
  int8_t scale_vectorised;  // scales are float32 and those of 4 tokens can be read at once
};

// A segment whose projectors are absorbed, beside its Run.
struct Absorbed {
  AbsorbedSide key, value;
  void *query;         // [batch, rows of all heads, key.width] of the query's dtype: queries through the key projector
  float *fold_scales;  // [batch, rows, key.width / FOLD_COLUMNS]: powers of two to multiply it by; null but in float16
  float *shift;        // [batch, rows]: q . b, where there is a key bias
  void *sums;          // [batch, rows, splits, value.width] f16, to be multiplied by `scales`
  float *scales;       // [batch, splits, ABSORB_WARPS, rows]: powers of two, of each quarter of the columns
  uint64_t *marks;     // [batch, pieces]: how far the folding of each piece is
  int32_t splits;
  int32_t pieces;             // of the queries' folding, of a batch row: KV heads x FOLD_COLUMNS columns
  int32_t number;             // of its run
  int32_t slots, slot_bytes;  // of the ring that its raw tokens go through
};

struct Absorption {
  Absorbed segment[MAX_RUNS - 1];
  int32_t count;
  int8_t place[MAX_RUNS];  // of every run in `segment`; -1 where it is in receiver space
};

struct AbsorbDecode {
  Decode decode;
  Absorption absorption;
  uint64_t call;          // a number of the call's own, even
  int32_t dim;            // that head dims are padded to: 64, 128 or 256
  int32_t pieces;         // of a batch row, all segments
  int32_t raw_blocks;     // of a batch row: splits of all absorbed segments x row_tiles
  int32_t row_tiles;      // of the rows of all heads
  int32_t direct_splits;  // of runs in receiver space
  int32_t result_pitch;   // numbers between rows of results in combine's shared memory, padded to 8 and 8 more
};

// Half stages (16 tokens of keys, or of values) in the ring of a block, of which all but one are in flight: so many
// that two blocks of up to 16 rows fit on a multiprocessor of sm_80 (one of 32, by its registers), and one in the 99
// KiB of sm_86, sm_89 and sm_120.
constexpr int DEEP_RING = 8, SHALLOW_RING = 4;  // shallow where a half stage has 16 KiB

// The two kernels of a dtype.
struct AbsorbKernels {
  const void *split;
  const char *split_name;
  const void *combine;
  const char *combine_name;
};
extern const AbsorbKernels absorb_bf16, absorb_f16;

}  // namespace c2c
