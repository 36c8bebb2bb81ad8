// `merge_states` and `quantize_kv`: one launch each. See states.cuh.

#include "states.cuh"

#include <initializer_list>

#include "arguments.h"
#include "kernels.h"

namespace c2c { constexpr int ROW_THREADS = 256; }

extern "C" __global__ void __launch_bounds__(c2c::ROW_THREADS)
    c2c_merge_states(const __grid_constant__ c2c::MergeStates p) {
  c2c::merge_states(p);
}

extern "C" __global__ void __launch_bounds__(c2c::ROW_THREADS) c2c_quantize(const __grid_constant__ c2c::Quantize p) {
  c2c::quantize(p);
}

namespace c2c {

namespace {

// Rows of four sizes, the last one the row's length; UNSUPPORTED where they are too many.
c2c_status_code count_rows(int64_t batch, int64_t heads, int64_t tokens, int64_t dim, int64_t &rows) {
  for (int64_t n : {batch, heads, tokens, dim})
    if (n < 0 || n > INT32_MAX - 1024) return n < 0 ? C2C_BAD_SHAPE : C2C_UNSUPPORTED;
  if (dim > LARGEST_DIM || batch * heads > INT32_MAX) return C2C_UNSUPPORTED;
  rows = batch * heads * tokens;
  return C2C_OK;
}

c2c_status_code launch(const void *kernel, const char *name, int64_t threads, const void *params, int64_t size,
                       Executor run, void *context) {
  const int64_t blocks = (threads + ROW_THREADS - 1) / ROW_THREADS;
  if (blocks > INT32_MAX) return C2C_UNSUPPORTED;
  if (!blocks) return C2C_OK;
  return run({kernel, name, static_cast<uint32_t>(blocks), ROW_THREADS, 0, params, size}, context);
}

}  // namespace

c2c_status_code launch_merge_states(const c2c_merge_params &p, Executor run, void *context) {
  MergeStates m{};
  if (c2c_status_code code = count_rows(p.batch, p.q_heads, p.q_len, p.head_dim, m.rows)) return code;
  if (p.state_count < 1) return C2C_BAD_SHAPE;
  if (p.state_count > MAX_STATES) return C2C_UNSUPPORTED;
  if (!is_half(p.out.dtype) || p.lse.dtype != C2C_F32) return C2C_BAD_DTYPE;
  m.out = strided(p.out, 0, 1, 2);
  m.lse = strided(p.lse, 0, 1, 2);
  for (int32_t i = 0; i < p.state_count; ++i) {
    if (p.outs[i].dtype != p.out.dtype || !is_float(p.lses[i].dtype)) return C2C_BAD_DTYPE;
    m.outs[i] = strided(p.outs[i], 0, 1, 2);
    m.lses[i] = strided(p.lses[i], 0, 1, 2);
    m.lse_type[i] = static_cast<int8_t>(p.lses[i].dtype);
    m.vectorised[i] = vectorised(p.outs[i], p.head_dim);
  }
  m.count = p.state_count;
  m.heads = static_cast<int32_t>(p.q_heads);
  m.tokens = static_cast<int32_t>(p.q_len);
  m.dim = static_cast<int32_t>(p.head_dim);
  m.chunks = m.dim ? (m.dim + 7) / 8 : 1;  // a row without numbers has lse all the same
  m.type = static_cast<int8_t>(p.out.dtype);
  m.out_vectorised = vectorised(p.out, p.head_dim) && p.head_dim;
  return launch(reinterpret_cast<const void *>(&c2c_merge_states), "c2c_merge_states", m.rows * m.chunks, &m, sizeof m,
                run, context);
}

c2c_status_code launch_quantize(const c2c_quantize_params &p, Executor run, void *context) {
  Quantize q{};
  if (c2c_status_code code = count_rows(p.batch, p.heads, p.len, p.dim, q.rows)) return code;
  if (!is_float(p.x.dtype) || p.out.dtype != C2C_I8 || p.scale.dtype != C2C_F32) return C2C_BAD_DTYPE;
  q.x = strided(p.x, 0, 1, 2);
  q.out = strided(p.out, 0, 1, 2);
  q.scale = strided(p.scale, 0, 1, 2);
  q.heads = static_cast<int32_t>(p.heads);
  q.tokens = static_cast<int32_t>(p.len);
  q.dim = static_cast<int32_t>(p.dim);
  for (q.lanes = 1; q.lanes * 8 < q.dim;) q.lanes *= 2;
  q.type = static_cast<int8_t>(p.x.dtype);
  q.vectorised = vectorised(p.x, p.dim);
  // A thread writes eight codes where rows begin at multiples of eight.
  int64_t all = reinterpret_cast<int64_t>(p.out.data) | p.dim;
  for (int d = 0; d < 3; ++d) all |= p.out.stride[d];
  q.out_vectorised = all % 8 == 0 && p.dim;
  return launch(reinterpret_cast<const void *>(&c2c_quantize), "c2c_quantize", q.rows * q.lanes, &q, sizeof q, run,
                context);
}

}  // namespace c2c
