// `project_kv`: products of tokens and projectors, up to two after another where a projector has low rank, and copies
// of halves that have none. What is not there is not launched.

#include "project.cuh"

#include <algorithm>
#include <initializer_list>

#include "arguments.h"
#include "kernels.h"

extern "C" __global__ void __launch_bounds__(c2c::ProjectTile::THREADS, 1)
    c2c_project_f16(const __grid_constant__ c2c::Projection p) {
  c2c::project<__half>(p);
}

extern "C" __global__ void __launch_bounds__(c2c::ProjectTile::THREADS, 1)
    c2c_project_bf16(const __grid_constant__ c2c::Projection p) {
  c2c::project<__nv_bfloat16>(p);
}

extern "C" __global__ void __launch_bounds__(c2c::ProjectTile::THREADS)
    c2c_project_copy(const __grid_constant__ c2c::Projection p) {
  c2c::copy_tokens(p);
}

namespace c2c {

namespace {

constexpr int64_t MOST = INT32_MAX - 1024;

// The tensors of keys or of values.
struct Source {
  const c2c_tensor &raw, &proj, &proj_in, &bias, &scale, &out;
  int64_t dim, rank, out_dim;
  bool is_key;
};

Source source_of(const c2c_project_params &p, int number) {
  const c2c_segment &s = p.segment;
  if (number == 0)
    return {s.key,     s.key_proj, s.key_proj_in, s.key_bias, s.key_scale,
            p.key_out, s.key_dim,  s.key_rank,    p.head_dim, true};
  return {s.value,     s.value_proj, s.value_proj_in, s.value_bias, s.value_scale,
          p.value_out, s.value_dim,  s.value_rank,    p.out_dim,    false};
}

c2c_status_code check(const c2c_project_params &p, const Source &s) {
  const c2c_segment &segment = p.segment;
  for (int64_t n : {p.batch, p.kv_heads, s.out_dim, segment.heads, s.dim, segment.len, segment.raw_len, s.rank})
    if (n < 0 || n > MOST) return C2C_BAD_SHAPE;
  if (!segment.index.data && segment.len > segment.raw_len) return C2C_BAD_SHAPE;
  if (segment.heads * s.dim > MOST || p.kv_heads * round_up(s.out_dim, 16) > MOST) return C2C_UNSUPPORTED;
  // Rows of weights are counted in 32 bits.
  if (s.proj.data && (p.kv_heads - 1) * s.proj.stride[0] + (s.out_dim - 1) * s.proj.stride[1] >= UINT32_MAX)
    return C2C_UNSUPPORTED;
  if (s.proj_in.data && (s.rank - 1) * s.proj_in.stride[0] >= UINT32_MAX) return C2C_UNSUPPORTED;
  if (!s.proj.data && (segment.heads != p.kv_heads || s.dim != s.out_dim)) return C2C_BAD_SHAPE;
  const int32_t type = s.raw.dtype;
  if (!is_float(type) && !is_byte(type)) return C2C_BAD_DTYPE;
  if (s.proj.data && (!is_half(s.proj.dtype) || (type != s.proj.dtype && !is_byte(type)))) return C2C_BAD_DTYPE;
  if (s.proj_in.data && s.proj_in.dtype != s.proj.dtype) return C2C_BAD_DTYPE;
  for (const c2c_tensor *t : {&s.bias, &s.scale, &p.remove_cos, &p.apply_cos})
    if (t->data && !is_float(t->dtype)) return C2C_BAD_DTYPE;
  for (const c2c_tensor *t : {&segment.lengths, &segment.index})
    if (t->data && !is_integer(t->dtype)) return C2C_BAD_DTYPE;
  if (p.remove_cos.data && p.remove_cos.dtype != p.remove_sin.dtype) return C2C_BAD_DTYPE;
  if (p.apply_cos.data && p.apply_cos.dtype != p.apply_sin.dtype) return C2C_BAD_DTYPE;
  return is_float(s.out.dtype) ? C2C_OK : C2C_BAD_DTYPE;
}

// What both kernels and both products ask of the sizes.
void lay_out(ProjectHalf &half) {
  const int64_t pairs = (half.apply_dim / 2 + 7) / 8;
  half.head_columns = static_cast<int32_t>(16 * pairs + round_up(half.out_dim - half.apply_dim, 16));
  const int64_t columns = int64_t{half.kv_heads} * half.head_columns;
  half.column_tiles = static_cast<int32_t>((columns + ProjectTile::N - 1) / ProjectTile::N);
}

// Rows of `width` numbers of 16 bits, `head` and `row` numbers apart.
void set_weights(ProjectHalf &half, const c2c_tensor &weights, int64_t head, int64_t row, int64_t width) {
  half.weights = {weights.data, 0, head, row};
  half.weights_type = static_cast<int8_t>(weights.dtype);
  half.weights_vectorised = (reinterpret_cast<int64_t>(weights.data) | 2 * (head | row | width)) % 16 == 0;
}

// A half as it is stored, up to its results.
ProjectHalf half_of(const c2c_project_params &p, const Source &s) {
  const c2c_segment &segment = p.segment;
  ProjectHalf half{};
  half.raw = strided(s.raw, 0, 1, 2);
  half.scale = strided(s.scale, 0, 1, 2);
  half.index = strided(segment.index, 0, -1, 1);
  half.bias = strided(s.bias, -1, 0, -1);
  half.out = strided(s.out, 0, 1, 2);
  if (s.is_key) {
    half.remove_cos = strided(p.remove_cos, 0, -1, 1);
    half.remove_sin = strided(p.remove_sin, 0, -1, 1);
    half.apply_cos = strided(p.apply_cos, 0, -1, 1);
    half.apply_sin = strided(p.apply_sin, 0, -1, 1);
    half.remove_dim = p.remove_cos.data ? static_cast<int32_t>(p.remove_dim) : 0;
    half.apply_dim = p.apply_cos.data ? static_cast<int32_t>(p.apply_dim) : 0;
  }
  half.heads = static_cast<int32_t>(segment.heads);
  half.dim = static_cast<int32_t>(s.dim);
  half.stored = static_cast<int32_t>(segment.raw_len);
  half.kv_heads = static_cast<int32_t>(p.kv_heads);
  half.out_dim = static_cast<int32_t>(s.out_dim);
  half.raw_type = static_cast<int8_t>(s.raw.dtype);
  half.scale_type = static_cast<int8_t>(s.scale.dtype);
  half.index_type = static_cast<int8_t>(segment.index.dtype);
  half.bias_type = static_cast<int8_t>(s.bias.dtype);
  half.remove_type = static_cast<int8_t>(p.remove_cos.dtype);
  half.apply_type = static_cast<int8_t>(p.apply_cos.dtype);
  half.out_type = static_cast<int8_t>(s.out.dtype);
  half.raw_vectorised = vectorised(s.raw, s.dim);
  half.out_vectorised = vectorised(s.out, s.out_dim);
  if (s.proj.data)
    set_weights(half, s.proj, s.proj.stride[0], s.proj.stride[1], s.proj_in.data ? s.rank : segment.heads * s.dim);
  half.raw_copied = half.raw_vectorised && half.raw_type == half.weights_type && !s.scale.data && !half.remove_cos.data;
  lay_out(half);
  return half;
}

// Of a low-rank projector the product with A, [batch, 1, len, rank] in `out`.
ProjectHalf inner_of(const c2c_project_params &p, const Source &s, void *out) {
  ProjectHalf half = half_of(p, s);
  const int64_t row = round_up(s.rank, 8);
  set_weights(half, s.proj_in, 0, s.proj_in.stride[0], p.segment.heads * s.dim);
  half.bias = half.apply_cos = half.apply_sin = Strided{};
  half.apply_dim = 0;
  half.out = {out, p.segment.len * row, 0, row};
  half.out_type = half.weights_type;
  half.out_vectorised = s.rank % 8 == 0;
  half.kv_heads = 1;
  half.out_dim = static_cast<int32_t>(s.rank);
  lay_out(half);
  return half;
}

// Of a low-rank projector the product with U, of tokens that `inner` has written.
ProjectHalf outer_of(const c2c_project_params &p, const Source &s, const ProjectHalf &inner) {
  ProjectHalf half = half_of(p, s);
  half.raw = inner.out;
  half.scale = half.index = half.remove_cos = half.remove_sin = Strided{};
  half.heads = 1;
  half.dim = inner.out_dim;
  half.stored = static_cast<int32_t>(p.segment.len);
  half.remove_dim = 0;
  half.raw_type = inner.out_type;
  half.raw_vectorised = half.raw_copied = inner.out_vectorised;
  return half;
}

int64_t inner_bytes(const c2c_project_params &p, const Source &s) {
  return s.proj.data && s.proj_in.data ? round_up(p.batch * p.segment.len * round_up(s.rank, 8) * 2, 16) : 0;
}

// Launches the halves that are marked.
c2c_status_code launch(Projection &p, const bool (&takes)[2], bool copies, int capability, Executor run,
                       void *context) {
  int64_t total = 0;
  int type = C2C_F16;
  for (int i = 0; i < 2; ++i) {
    const ProjectHalf &half = p.half[i];
    const int64_t units = int64_t{p.batch} * p.len * half.kv_heads * (half.head_columns / 16);
    const int64_t blocks = copies ? (units + ProjectTile::THREADS - 1) / ProjectTile::THREADS
                                  : int64_t{p.batch} * p.token_tiles * half.column_tiles;
    p.blocks[i] = takes[i] ? static_cast<int32_t>(std::min<int64_t>(blocks, INT32_MAX)) : 0;
    total += takes[i] ? blocks : 0;
    if (takes[i]) type = half.weights_type;
  }
  if (total > INT32_MAX) return C2C_UNSUPPORTED;
  if (!total) return C2C_OK;
  const auto handle = [](void (*kernel)(Projection)) { return reinterpret_cast<const void *>(kernel); };
  const uint32_t blocks = static_cast<uint32_t>(total), threads = ProjectTile::THREADS;
  if (copies) return run({handle(&c2c_project_copy), "c2c_project_copy", blocks, threads, 0, &p, sizeof p}, context);
  if (capability == 90) return launch_project_wgmma(p, type, total, run, context);
  const bool bf16 = type == C2C_BF16;
  return run({handle(bf16 ? &c2c_project_bf16 : &c2c_project_f16), bf16 ? "c2c_project_bf16" : "c2c_project_f16",
              blocks, threads, ProjectTile::SHARED, &p, sizeof p},
             context);
}

}  // namespace

int64_t project_workspace(const c2c_project_params &p) {
  return inner_bytes(p, source_of(p, 0)) + inner_bytes(p, source_of(p, 1));
}

c2c_status_code launch_project(const c2c_project_params &p, void *workspace, int capability, Executor run,
                               void *context) {
  const Source sources[2] = {source_of(p, 0), source_of(p, 1)};
  for (const Source &s : sources)
    if (c2c_status_code code = check(p, s)) return code;
  const bool multiplies[2] = {sources[0].proj.data != nullptr, sources[1].proj.data != nullptr};
  if (multiplies[0] && multiplies[1] && sources[0].proj.dtype != sources[1].proj.dtype) return C2C_BAD_DTYPE;
  Projection inner{}, outer{};
  outer.lengths = strided(p.segment.lengths, 0, -1, -1);
  outer.lengths_type = static_cast<int8_t>(p.segment.lengths.dtype);
  outer.batch = static_cast<int32_t>(p.batch);
  outer.len = static_cast<int32_t>(p.segment.len);
  outer.token_tiles = static_cast<int32_t>((p.segment.len + ProjectTile::M - 1) / ProjectTile::M);
  inner = outer;
  bool low[2];
  char *place = static_cast<char *>(workspace);
  for (int i = 0; i < 2; ++i) {
    low[i] = multiplies[i] && sources[i].proj_in.data;
    if (low[i]) inner.half[i] = inner_of(p, sources[i], place);
    outer.half[i] = low[i] ? outer_of(p, sources[i], inner.half[i]) : half_of(p, sources[i]);
    place += inner_bytes(p, sources[i]);
  }
  if (c2c_status_code code = launch(inner, low, false, capability, run, context)) return code;
  if (c2c_status_code code = launch(outer, multiplies, false, capability, run, context)) return code;
  const bool copied[2] = {!multiplies[0], !multiplies[1]};
  return launch(outer, copied, true, capability, run, context);
}

}  // namespace c2c
