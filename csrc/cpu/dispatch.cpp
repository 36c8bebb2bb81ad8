// The C ABI: checks that need values, the choice of the instruction set, and one entry per operator.
#include <stdlib.h>

#include "kernels.h"

#if defined(C2C_HAS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

static const Kernels *const all_kernels[] = {
#if defined(C2C_HAS_AMX)
    &c2c_amx_bf16::kernels,
#endif
#if defined(__x86_64__)
    &c2c_avx512_bf16::kernels, &c2c_avx512::kernels, &c2c_avx2::kernels, &c2c_baseline::kernels
#elif defined(__aarch64__)
    &c2c_neon::kernels
#else
    &c2c_baseline::kernels
#endif
};

#if defined(C2C_HAS_AMX)
// Tiles of bfloat16: in the processor, kept by the system across switches of threads, and granted to this process.
static bool tiles_are_usable() {
  unsigned a, b, c, d;
  const unsigned bf16_and_tiles = 1u << 22 | 1u << 24, xsave = 1u << 27, tile_state = 3u << 17;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & bf16_and_tiles) != bf16_and_tiles) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & xsave)) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & tile_state) != tile_state) return false;
  const long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

static bool machine_has(const char *isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#if defined(C2C_HAS_AMX)
  if (!strcmp(isa, "amx_bf16")) return machine_has("avx512_bf16") && tiles_are_usable();
#endif
  if (!strcmp(isa, "avx512_bf16")) return __builtin_cpu_supports("avx512bf16") && machine_has("avx512");
  if (!strcmp(isa, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && machine_has("avx2");
  if (!strcmp(isa, "avx2"))
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // every AVX2 processor has F16C
#endif
  (void)isa;
  return true;
}

static const Kernels *best_kernels() {
  for (const Kernels *kernels : all_kernels)
    if (machine_has(kernels->isa)) return kernels;
  return all_kernels[sizeof(all_kernels) / sizeof(*all_kernels) - 1];
}

static const Kernels *chosen = nullptr;

static const Kernels &active() {
  const Kernels *kernels = __atomic_load_n(&chosen, __ATOMIC_ACQUIRE);
  if (!kernels) {
    kernels = best_kernels();
    __atomic_store_n(&chosen, kernels, __ATOMIC_RELEASE);
  }
  return *kernels;
}

extern "C" const char *c2c_cpu_isa(void) { return active().isa; }

extern "C" int c2c_set_cpu_isa(const char *name) {
  const Kernels *found = name ? nullptr : best_kernels();
  for (const Kernels *kernels : all_kernels)
    if (name && !strcmp(kernels->isa, name) && machine_has(name)) found = kernels;
  if (!found) return 1;
  __atomic_store_n(&chosen, found, __ATOMIC_RELEASE);
  return 0;
}

extern "C" const char *c2c_status_text(c2c_status_code code) {
  switch (code) {
    case C2C_OK: return "no error";
    case C2C_BAD_LENGTHS: return "lengths has values outside 0..len";
    case C2C_BAD_SEGMENT_LENGTHS: return "a segment's lengths has values outside 0..len";
    case C2C_BAD_GATE: return "a segment's gate is negative, infinite or NaN";
    case C2C_BAD_INDEX: return "a segment's index points outside its tokens";
    case C2C_BAD_DTYPE: return "a tensor is stored as something that the operator does not read";
    case C2C_BAD_SHAPE: return "a size is negative or too large, or heads do not divide";
    case C2C_NO_MEMORY: return "no memory for scratch";
    case C2C_UNSUPPORTED: return "more than the kernels of this device take";
    case C2C_CUDA_ERROR: return "an error of the CUDA runtime";
  }
  return "unknown status";
}

// ---- checks, before anything is written ----

static bool is_float(const c2c_tensor &t) { return t.dtype == C2C_F32 || t.dtype == C2C_BF16 || t.dtype == C2C_F16; }
static bool float_or_absent(const c2c_tensor &t) { return !t.data || is_float(t); }
static bool integer_or_absent(const c2c_tensor &t) { return !t.data || t.dtype == C2C_I32 || t.dtype == C2C_I64; }

static int64_t integer(const c2c_tensor &t, int64_t offset) {
  return t.dtype == C2C_I64 ? static_cast<const int64_t *>(t.data)[offset]
                            : static_cast<const int32_t *>(t.data)[offset];
}

static bool within(const c2c_tensor &t, int64_t rows, int64_t columns, int64_t low, int64_t high) {
  if (!t.data) return true;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      int64_t value = integer(t, i * t.stride[0] + j * t.stride[1]);
      if (value < low || value > high) return false;
    }
  return true;
}

// A gate's bits as unsigned numbers: everything above +infinity's predecessor is infinite, NaN or negative (but -0).
static bool gate_is_good(const c2c_tensor &gate, int64_t offset) {
  if (gate.dtype == C2C_F32) {
    uint32_t bits = static_cast<const uint32_t *>(gate.data)[offset];
    return bits < 0x7f800000u || bits == 0x80000000u;
  }
  uint16_t bits = static_cast<const uint16_t *>(gate.data)[offset];
  return bits < (gate.dtype == C2C_BF16 ? 0x7f80 : 0x7c00) || bits == 0x8000;
}

static bool gates_are_good(const c2c_tensor &gate, const int64_t shape[3]) {
  if (!gate.data) return true;
  int64_t extent[3];
  for (int d = 0; d < 3; ++d) extent[d] = gate.stride[d] == 0 && shape[d] ? 1 : shape[d];
  bool good = true;
  for (int64_t i = 0; i < extent[0]; ++i)
    for (int64_t j = 0; j < extent[1]; ++j)
      for (int64_t k = 0; k < extent[2]; ++k)
        good &= gate_is_good(gate, i * gate.stride[0] + j * gate.stride[1] + k * gate.stride[2]);
  return good;
}

static c2c_status status(c2c_status_code code, int32_t segment = -1) {
  c2c_status result = {code, segment};
  return result;
}

// Storage that attention reads in place: floats, or int8 with a scale for every token and head.
static bool readable(const c2c_tensor &t, const c2c_tensor &scale) {
  return is_float(t) || !t.data || (t.dtype == C2C_I8 && scale.data);
}

static const int64_t LENGTH_LIMIT = 2147483000;  // tokens are counted in 32 bits; offsets in 64

static c2c_status check_segment(const c2c_segment &s, int32_t number, int64_t batch, int64_t q_heads) {
  const bool floats = float_or_absent(s.key_proj) && float_or_absent(s.key_proj_in) && float_or_absent(s.value_proj) &&
                      float_or_absent(s.value_proj_in) && float_or_absent(s.key_bias) &&
                      float_or_absent(s.value_bias) && float_or_absent(s.gate) && float_or_absent(s.key_scale) &&
                      float_or_absent(s.value_scale);
  if (!floats || !integer_or_absent(s.lengths) || !integer_or_absent(s.positions) || !integer_or_absent(s.index))
    return status(C2C_BAD_DTYPE, number);
  if (s.len < 0 || s.raw_len < 0 || s.len > LENGTH_LIMIT || s.heads <= 0 || s.key_dim <= 0 || s.value_dim <= 0)
    return status(C2C_BAD_SHAPE, number);
  if (!within(s.lengths, batch, 1, 0, s.len)) return status(C2C_BAD_SEGMENT_LENGTHS, number);
  if (!within(s.index, batch, s.len, 0, s.raw_len - 1)) return status(C2C_BAD_INDEX, number);
  const int64_t shape[3] = {batch, q_heads, s.len};
  if (!gates_are_good(s.gate, shape)) return status(C2C_BAD_GATE, number);
  return status(C2C_OK);
}

static c2c_status check_attention(const c2c_attention_params &p) {
  if (!is_float(p.query) || !is_float(p.key) || !is_float(p.value) || !is_float(p.out) || !float_or_absent(p.sinks) ||
      !integer_or_absent(p.lengths) || !integer_or_absent(p.query_positions) ||
      !(float_or_absent(p.mask) || p.mask.dtype == C2C_BOOL))
    return status(C2C_BAD_DTYPE);
  if (p.batch < 0 || p.q_len < 0 || p.len < 0 || p.len > LENGTH_LIMIT || p.q_len > LENGTH_LIMIT || p.head_dim <= 0 ||
      p.value_dim <= 0 || p.kv_heads <= 0 || p.q_heads % p.kv_heads)
    return status(C2C_BAD_SHAPE);
  if (!within(p.lengths, p.batch, 1, 0, p.len)) return status(C2C_BAD_LENGTHS);
  for (int32_t i = 0; i < p.segment_count; ++i) {
    const c2c_segment &s = p.segments[i];
    // A stage applies scales and reads whatever storage project_kv does.
    if (!is_staged(s) && (!readable(s.key, s.key_scale) || !readable(s.value, s.value_scale)))
      return status(C2C_BAD_DTYPE, i);
    const bool absorbed = s.key_proj.data && s.value_proj.data && !s.materialize;
    const bool key_fits = s.heads == p.kv_heads && s.key_dim == p.head_dim;
    const bool value_fits = s.heads == p.kv_heads && s.value_dim == p.value_dim;
    const bool plain = !s.key_proj.data && !s.value_proj.data && !s.key_bias.data && !s.value_bias.data;
    if (s.materialize ? (!s.key_proj.data && !key_fits) || (!s.value_proj.data && !value_fits)
                      : !absorbed && !(plain && key_fits && value_fits))
      return status(C2C_BAD_SHAPE, i);
    c2c_status found = check_segment(s, i, p.batch, p.q_heads);
    if (found.code != C2C_OK) return found;
  }
  return status(C2C_OK);
}

static c2c_status_code check_fuse_half(const c2c_fuse_half &half) {
  const c2c_tensor *const floats[] = {&half.receiver,     &half.sharer,     &half.residual,   &half.out,
                                      &half.in_weight,    &half.in_bias,    &half.out_weight, &half.out_bias,
                                      &half.scale_weight, &half.scale_bias, &half.gate_logit};
  for (const c2c_tensor *t : floats)
    if (!is_float(*t)) return C2C_BAD_DTYPE;
  if (!float_or_absent(half.gate) || !integer_or_absent(half.index)) return C2C_BAD_DTYPE;
  if (half.batch < 0 || half.len < 0 || half.len > LENGTH_LIMIT || half.kv_heads <= 0 || half.dim <= 0 ||
      half.sharer_len < 0 || half.sharer_heads <= 0 || half.sharer_dim <= 0 || half.hidden <= 0 ||
      half.project_count < 1 || (!half.index.data && half.sharer_len < half.len))
    return C2C_BAD_SHAPE;
  for (int32_t i = 0; i < 2 + half.project_count; ++i) {
    const c2c_fuse_block &block = half.blocks[i];
    if (!is_float(block.norm) || !is_float(block.w1) || !is_float(block.w2)) return C2C_BAD_DTYPE;
    if (block.inner <= 0) return C2C_BAD_SHAPE;
  }
  return within(half.index, half.batch, half.len, 0, half.sharer_len - 1) ? C2C_OK : C2C_BAD_INDEX;
}

// ---- entries ----

extern "C" c2c_status c2c_merged_attention_cpu(const c2c_attention_params *params) {
  c2c_status found = check_attention(*params);
  return found.code != C2C_OK ? found : status(active().merged_attention(*params));
}

extern "C" c2c_status c2c_merged_attention_backward_cpu(const c2c_attention_backward_params *params) {
  c2c_status found = check_attention(params->forward);
  if (found.code != C2C_OK) return found;
  for (int32_t i = 0; i < params->forward.segment_count; ++i) {
    const c2c_segment &s = params->forward.segments[i];
    if (s.key_proj.data || s.key_scale.data || s.value_scale.data || s.materialize || s.index.data)
      return status(C2C_BAD_SHAPE, i);
  }
  return status(active().merged_attention_backward(*params));
}

extern "C" c2c_status c2c_project_kv_cpu(const c2c_project_params *params) {
  const c2c_project_params &p = *params;
  if (!float_or_absent(p.remove_cos) || !float_or_absent(p.remove_sin) || !float_or_absent(p.apply_cos) ||
      !float_or_absent(p.apply_sin) || !is_float(p.key_out) || !is_float(p.value_out))
    return status(C2C_BAD_DTYPE);
  if (p.batch < 0 || p.kv_heads <= 0 || p.head_dim <= 0 || p.out_dim <= 0) return status(C2C_BAD_SHAPE);
  c2c_status found = check_segment(p.segment, 0, p.batch, 0);
  return found.code != C2C_OK ? found : status(active().project_kv(p));
}

extern "C" c2c_status c2c_quantize_cpu(const c2c_quantize_params *params) {
  const c2c_quantize_params &p = *params;
  if (p.batch < 0 || p.heads < 0 || p.len < 0 || p.dim < 0) return status(C2C_BAD_SHAPE);
  if (!is_float(p.x) || p.out.dtype != C2C_I8 || p.scale.dtype != C2C_F32) return status(C2C_BAD_DTYPE);
  return status(active().quantize(p));
}

extern "C" c2c_status c2c_fuse_kv_cpu(const c2c_fuse_params *params) {
  for (int32_t i = 0; i < params->half_count; ++i) {
    const c2c_status_code found = check_fuse_half(params->halves[i]);
    if (found != C2C_OK) return status(found, i);
  }
  return status(active().fuse_kv(*params));
}

extern "C" c2c_status c2c_merge_states_cpu(const c2c_merge_params *params) {
  const c2c_merge_params &p = *params;
  if (p.batch < 0 || p.q_heads < 0 || p.q_len < 0 || p.head_dim < 0 || p.state_count < 1) return status(C2C_BAD_SHAPE);
  if (!is_float(p.out)) return status(C2C_BAD_DTYPE);
  for (int32_t s = 0; s < p.state_count; ++s)
    if (!is_float(p.outs[s]) || !is_float(p.lses[s])) return status(C2C_BAD_DTYPE);
  return status(active().merge_states(p));
}
