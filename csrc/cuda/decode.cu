// `merged_attention` for few queries: tokens of all runs split over blocks, then combined. Two launches.
// How tokens are split depends on nothing but the shape of a row's tokens, so that a row gives the same bits in any
// batch.

#include "decode.cuh"

#include <algorithm>

#include "arguments.h"
#include "combine.cuh"
#include "kernels.h"

#define DECODE_KERNEL(name, T, DIM) \
  extern "C" __global__ void __launch_bounds__(c2c::decode_warps(DIM) * 32, 2) \
      c2c_decode_##name##_##DIM(const __grid_constant__ c2c::Decode d) { \
    c2c::decode_splits<T, DIM>(d); \
  }
DECODE_KERNEL(f16, __half, 64)
DECODE_KERNEL(f16, __half, 128)
DECODE_KERNEL(f16, __half, 256)
DECODE_KERNEL(bf16, __nv_bfloat16, 64)
DECODE_KERNEL(bf16, __nv_bfloat16, 128)
DECODE_KERNEL(bf16, __nv_bfloat16, 256)

extern "C" __global__ void __launch_bounds__(c2c::COMBINE_THREADS) c2c_combine(const __grid_constant__ c2c::Decode d) {
  c2c::combine_row(d);
}

namespace c2c {

namespace {

struct Variant {
  int dim;
  int8_t dtype;
  const void *kernel;
  const char *name;
};

#define VARIANT(name, dtype, DIM) \
  {DIM, dtype, reinterpret_cast<const void *>(&c2c_decode_##name##_##DIM), "c2c_decode_" #name "_" #DIM}
const Variant VARIANTS[] = {VARIANT(f16, C2C_F16, 64),   VARIANT(f16, C2C_F16, 128),   VARIANT(f16, C2C_F16, 256),
                            VARIANT(bf16, C2C_BF16, 64), VARIANT(bf16, C2C_BF16, 128), VARIANT(bf16, C2C_BF16, 256)};

int64_t rows_of(const Attention &p) { return static_cast<int64_t>(p.q_len) * p.group; }

// Tokens of a split, of numbers of `size` bytes: so many that partial sums are below 3% of the bytes of keys and
// values.
int32_t split_tokens(int64_t rows, int size) {
  int64_t tokens = 128;
  while (tokens < 128 * std::min<int64_t>(rows, ROWS) / size) tokens *= 2;
  return static_cast<int32_t>(tokens);
}

int64_t states_of(const Decode &d) {
  return d.attention.batch * d.attention.kv_heads * rows_of(d.attention) * d.splits;
}

// Bytes of the states in the workspace; sums lie behind them and begin a sector.
int64_t states_bytes(const Decode &d) { return round_up(states_of(d) * static_cast<int64_t>(sizeof(float2)), 32); }

}  // namespace

void plan_decode(Decode &d) {
  const Attention &p = d.attention;
  for (int number = 0; number < p.runs; ++number) {
    const Run &run = p.run[number];
    if (!d.split_tokens[number]) d.split_tokens[number] = split_tokens(rows_of(p), size_of(run.key_type));
    const int32_t count =
        static_cast<int32_t>((int64_t{run.len} + d.split_tokens[number] - 1) / d.split_tokens[number]);
    d.first_split[number + 1] = d.first_split[number] + count;
  }
  d.splits = d.first_split[p.runs];
  d.row_tiles = static_cast<int32_t>((rows_of(p) + ROWS - 1) / ROWS);
}

bool decodes(const Attention &p) { return rows_of(p) <= MOST_DECODED; }

int64_t decode_workspace(const Attention &p) {
  Decode d{};
  d.attention = p;
  plan_decode(d);
  return states_bytes(d) + states_of(d) * static_cast<int64_t>(sizeof(float)) * p.value_dim;
}

c2c_status_code launch_decode(const Attention &p, void *workspace, int, Executor run, void *context) {
  Decode d{};
  d.attention = p;
  plan_decode(d);
  d.states = static_cast<float2 *>(workspace);
  d.sums = reinterpret_cast<float *>(static_cast<char *>(workspace) + states_bytes(d));
  const int64_t rows = p.batch * p.kv_heads * rows_of(p),
                blocks = int64_t{p.batch} * p.kv_heads * d.row_tiles * d.splits;
  if (!rows) return C2C_OK;
  if (blocks > INT32_MAX || rows > INT32_MAX) return C2C_UNSUPPORTED;
  const int dim = std::max(p.head_dim, p.value_dim);
  for (const Variant &v : VARIANTS) {
    if (v.dtype != p.dtype || v.dim < dim) continue;
    if (blocks) {
      const Launch split{v.kernel,
                         v.name,
                         static_cast<uint32_t>(blocks),
                         static_cast<uint32_t>(decode_warps(v.dim) * 32),
                         static_cast<uint32_t>(decode_shared(v.dim)),
                         &d,
                         sizeof d};
      if (c2c_status_code code = run(split, context)) return code;
    }
    const Launch combine{reinterpret_cast<const void *>(&c2c_combine),
                         "c2c_combine",
                         static_cast<uint32_t>(rows),
                         COMBINE_THREADS,
                         0,
                         &d,
                         sizeof d};
    return run(combine, context);
  }
  return C2C_UNSUPPORTED;
}

}  // namespace c2c
