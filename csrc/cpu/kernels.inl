// The body of every operator, compiled once per instruction set. The including file sets C2C_NAMESPACE, LANES and the
// target, and has included the system headers before it: nothing but these kernels may be compiled for that target.
namespace C2C_NAMESPACE {

#include "vec.h"

#include "gemm.h"

#include "matrix_tiles.h"

#include "rows.h"

#include "rows_pairs.h"

#include "stream_weights.h"

#include "softmax.h"

#include "attention_common.h"

#include "project.h"

#include "project_tiles.h"

#include "project_kv.h"

#include "stage.h"

#include "attention_stream.h"

#include "attention_block.h"

#include "attention_tiles.h"

#include "attention_stream_tiles.h"

#include "attention_forward.h"

#include "normaliser.h"

#include "attention_backward.h"

#include "attention_backward_tiles.h"

#include "attention_backward_jobs.h"

#include "merge.h"

#include "quantize.h"

#include "fuse_tile.h"

#include "fuse_stages.h"

#include "fuse.h"

extern const Kernels kernels = {C2C_ISA_NAME, merged_attention, merged_attention_backward, project_kv, merge_states,
                                quantize,     fuse_kv};

}  // namespace C2C_NAMESPACE
