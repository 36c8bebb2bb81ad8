#include "arguments.h"

#include <initializer_list>

#include "kernels.h"

namespace c2c {

namespace {

constexpr int64_t MOST = INT32_MAX - 1024;  // tokens and rows are counted in 32 bits

bool absent_or(const c2c_tensor &t, bool (*fits)(int32_t)) { return !t.data || fits(t.dtype); }

// Keys and values are read as 16-bit numbers of the query's dtype or as bytes, both alike.
bool readable(const c2c_tensor &key, const c2c_tensor &value, int32_t dtype) {
  return (key.dtype == dtype && value.dtype == dtype) || (is_byte(key.dtype) && is_byte(value.dtype));
}

c2c_status_code own_run(const c2c_attention_params &p, Run &run) {
  if (p.key.dtype != p.query.dtype || p.value.dtype != p.query.dtype) return C2C_BAD_DTYPE;
  if (!absent_or(p.lengths, is_integer)) return C2C_BAD_DTYPE;
  run.key = strided(p.key, 0, 1, 2);
  run.value = strided(p.value, 0, 1, 2);
  run.lengths = strided(p.lengths, 0, -1, -1);
  run.len = run.stored = static_cast<int32_t>(p.len);
  run.key_type = static_cast<int8_t>(p.key.dtype);
  run.value_type = static_cast<int8_t>(p.value.dtype);
  run.lengths_type = static_cast<int8_t>(p.lengths.dtype);
  run.causal = p.is_causal != 0;
  run.vectorised = vectorised(p.key, p.head_dim) && vectorised(p.value, p.value_dim);
  run.placed = p.is_causal || p.window;
  return C2C_OK;
}

// What a segment's tokens are, in receiver space or raw.
c2c_status_code segment_run(const c2c_segment &s, const c2c_attention_params &p, Run &run) {
  if (s.len < 0 || s.raw_len < 0 || s.len > MOST || s.raw_len > MOST) return C2C_BAD_SHAPE;
  if (!s.index.data && s.len > s.raw_len) return C2C_BAD_SHAPE;
  if (!readable(s.key, s.value, p.query.dtype)) return C2C_BAD_DTYPE;
  for (const c2c_tensor *t : {&s.lengths, &s.positions, &s.index})
    if (!absent_or(*t, is_integer)) return C2C_BAD_DTYPE;
  for (const c2c_tensor *t : {&s.gate, &s.key_scale, &s.value_scale})
    if (!absent_or(*t, is_float)) return C2C_BAD_DTYPE;
  run.key = strided(s.key, 0, 1, 2);
  run.value = strided(s.value, 0, 1, 2);
  run.gate = strided(s.gate, 0, 1, 2);
  run.key_scale = strided(s.key_scale, 0, 1, 2);
  run.value_scale = strided(s.value_scale, 0, 1, 2);
  run.positions = strided(s.positions, 0, -1, 1);
  run.index = strided(s.index, 0, -1, 1);
  run.lengths = strided(s.lengths, 0, -1, -1);
  run.len = static_cast<int32_t>(s.len);
  run.stored = static_cast<int32_t>(s.raw_len);
  run.key_type = static_cast<int8_t>(s.key.dtype);
  run.value_type = static_cast<int8_t>(s.value.dtype);
  run.gate_type = static_cast<int8_t>(s.gate.dtype);
  run.key_scale_type = static_cast<int8_t>(s.key_scale.dtype);
  run.value_scale_type = static_cast<int8_t>(s.value_scale.dtype);
  run.positions_type = static_cast<int8_t>(s.positions.dtype);
  run.index_type = static_cast<int8_t>(s.index.dtype);
  run.lengths_type = static_cast<int8_t>(s.lengths.dtype);
  run.causal = s.causal != 0;
  run.vectorised = vectorised(s.key, s.key_dim) && vectorised(s.value, s.value_dim);
  run.placed = s.positions.data && (s.causal || p.segment_window);
  return C2C_OK;
}

bool in_receiver_space(const c2c_segment &s) {
  return !s.key_proj.data && !s.value_proj.data && !s.key_bias.data && !s.value_bias.data;
}

// Keys or values of an absorbed segment. Scales of raw tokens are read beside them, not with the run's other numbers.
c2c_status_code absorbed_side(const c2c_tensor &proj, const c2c_tensor &bias, int64_t heads, int64_t raw_dim,
                              int32_t dtype, AbsorbedSide &side, Strided &scale, int8_t scale_type) {
  if (heads < 1 || raw_dim < 1) return C2C_BAD_SHAPE;
  if (heads > LARGEST_WIDTH || raw_dim > LARGEST_WIDTH) return C2C_UNSUPPORTED;
  if (proj.dtype != dtype || !absent_or(bias, is_float)) return C2C_BAD_DTYPE;
  side.proj = proj.data;
  side.proj_h = proj.stride[0];
  side.proj_d = proj.stride[1];
  side.bias = bias.data;
  side.bias_h = bias.stride[0];
  side.bias_type = static_cast<int8_t>(bias.dtype);
  side.scale = scale;
  side.scale_type = scale_type;
  scale = {};
  side.heads = static_cast<int32_t>(heads);
  side.raw_dim = static_cast<int32_t>(raw_dim);
  side.padded = (side.raw_dim + RAW_PAD - 1) / RAW_PAD * RAW_PAD;
  side.width = 128;
  while (side.width < side.heads * side.padded) side.width *= 2;
  if (side.width > LARGEST_WIDTH) return C2C_UNSUPPORTED;
  const int64_t proj_bits = reinterpret_cast<int64_t>(proj.data) | 2 * (side.proj_h | side.proj_d | raw_dim);
  side.proj_vectorised = proj_bits % 16 == 0;
  const int64_t scale_bits = reinterpret_cast<int64_t>(side.scale.data) | 4 * (side.scale.b | side.scale.h);
  side.scale_vectorised = scale_type == C2C_F32 && side.scale.n == 1 && scale_bits % 16 == 0;
  return C2C_OK;
}

c2c_status_code absorbed_segment(const c2c_segment &s, const c2c_attention_params &p, Run &run, Absorbed &out) {
  const bool few = p.kv_heads && p.q_len * (p.q_heads / p.kv_heads) <= MOST_DECODED;
  if (s.materialize || !few || !s.key_proj.data || !s.value_proj.data) return C2C_UNSUPPORTED;
  if (s.key_proj_in.data || s.value_proj_in.data) return C2C_UNSUPPORTED;
  // Scales are applied where bytes are widened.
  if (!is_byte(s.key.dtype) && (s.key_scale.data || s.value_scale.data)) return C2C_UNSUPPORTED;
  if (c2c_status_code code = absorbed_side(s.key_proj, s.key_bias, s.heads, s.key_dim, p.query.dtype, out.key,
                                           run.key_scale, run.key_scale_type))
    return code;
  return absorbed_side(s.value_proj, s.value_bias, s.heads, s.value_dim, p.query.dtype, out.value, run.value_scale,
                       run.value_scale_type);
}

c2c_status_code check_call(const c2c_attention_params &p) {
  for (int64_t n : {p.batch, p.q_heads, p.kv_heads, p.q_len, p.len, p.head_dim, p.value_dim})
    if (n < 0 || n > MOST) return C2C_BAD_SHAPE;
  if (p.kv_heads == 0 ? p.q_heads != 0 : p.q_heads % p.kv_heads != 0) return C2C_BAD_SHAPE;
  if (p.head_dim > LARGEST_DIM || p.value_dim > LARGEST_DIM) return C2C_UNSUPPORTED;
  if (p.segment_count < 0 || p.segment_count >= MAX_RUNS) return C2C_UNSUPPORTED;
  if (p.q_len * p.q_heads > MOST || p.batch * p.q_heads > MOST) return C2C_UNSUPPORTED;
  if (!is_half(p.query.dtype) || !is_float(p.out.dtype)) return C2C_BAD_DTYPE;
  if (!absent_or(p.sinks, is_float) || !absent_or(p.query_positions, is_integer)) return C2C_BAD_DTYPE;
  if (p.mask.data && p.mask.dtype != C2C_BOOL && !is_float(p.mask.dtype)) return C2C_BAD_DTYPE;
  return C2C_OK;
}

}  // namespace

c2c_status device_attention(const c2c_attention_params &p, Attention &out, Absorption &absorption) {
  out = {};
  absorption = {};
  if (c2c_status_code code = check_call(p)) return {code, -1};
  out.query = strided(p.query, 0, 1, 2);
  out.mask = strided(p.mask, 0, 1, 2);
  out.mask_token = p.mask.data ? p.mask.stride[3] : 0;
  out.query_positions = strided(p.query_positions, 0, -1, 1);
  out.sinks = p.sinks.data;
  out.sinks_stride = p.sinks.stride[0];
  out.out = strided(p.out, 0, 1, 2);
  out.lse = strided(p.lse, 0, 1, 2);
  out.mass = strided(p.mass, 0, 1, 2);
  out.window = p.window;
  out.segment_window = p.segment_window;
  out.batch = static_cast<int32_t>(p.batch);
  out.q_heads = static_cast<int32_t>(p.q_heads);
  out.kv_heads = static_cast<int32_t>(p.kv_heads);
  out.group = p.kv_heads ? static_cast<int32_t>(p.q_heads / p.kv_heads) : 0;
  out.q_len = static_cast<int32_t>(p.q_len);
  out.head_dim = static_cast<int32_t>(p.head_dim);
  out.value_dim = static_cast<int32_t>(p.value_dim);
  out.runs = 1 + p.segment_count;
  out.scale = p.scale;
  out.softcap = p.softcap;
  out.is_causal = p.is_causal != 0;
  out.dtype = static_cast<int8_t>(p.query.dtype);
  out.query_vectorised = vectorised(p.query, p.head_dim);
  out.mask_type = static_cast<int8_t>(p.mask.dtype);
  out.query_positions_type = static_cast<int8_t>(p.query_positions.dtype);
  out.sinks_type = static_cast<int8_t>(p.sinks.dtype);
  out.out_type = static_cast<int8_t>(p.out.dtype);
  if (c2c_status_code code = own_run(p, out.run[0])) return {code, -1};
  for (int8_t &place : absorption.place) place = -1;
  for (int32_t i = 0; i < p.segment_count; ++i) {
    const c2c_segment &s = p.segments[i];
    if (c2c_status_code code = segment_run(s, p, out.run[1 + i])) return {code, i};
    if (in_receiver_space(s)) {
      if (s.heads != p.kv_heads || s.key_dim != p.head_dim || s.value_dim != p.value_dim) return {C2C_BAD_SHAPE, i};
      continue;
    }
    absorption.place[1 + i] = static_cast<int8_t>(absorption.count);
    Absorbed &absorbed = absorption.segment[absorption.count++];
    absorbed.number = 1 + i;
    if (c2c_status_code code = absorbed_segment(s, p, out.run[1 + i], absorbed)) return {code, i};
  }
  return {C2C_OK, -1};
}

}  // namespace c2c
