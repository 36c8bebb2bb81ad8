// The C ABI of c2c-kernels: one parameter struct and one entry per operator and device.
// No Python, no torch. Strides are in elements. A tensor whose data is NULL is absent.
// Words and mathematics: README.md. Results never depend on the number of threads.
#ifndef C2C_H
#define C2C_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define C2C_ABI_VERSION 1

#if defined(__GNUC__)
#define C2C_API __attribute__((visibility("default")))
#else
#define C2C_API
#endif

typedef enum {
  C2C_F32 = 0,
  C2C_BF16 = 1,
  C2C_F16 = 2,
  C2C_I8 = 3,      // storage of a quantised sharer cache
  C2C_F8E4M3 = 4,  // storage of a quantised sharer cache
  C2C_I32 = 5,     // lengths, positions, index
  C2C_I64 = 6,
  C2C_BOOL = 7  // attention mask, one byte
} c2c_dtype;

typedef enum {
  C2C_OK = 0,
  C2C_BAD_LENGTHS = 1,          // a value of `lengths` outside 0..len
  C2C_BAD_SEGMENT_LENGTHS = 2,  // the same in a segment
  C2C_BAD_GATE = 3,             // a gate that is negative, infinite or NaN
  C2C_BAD_INDEX = 4,            // an index outside the segment
  C2C_BAD_DTYPE = 5,            // a tensor stored as something that the operator does not read
  C2C_BAD_SHAPE = 6,            // a size that is negative, or heads that do not divide
  C2C_NO_MEMORY = 7,
  C2C_UNSUPPORTED = 8,  // more than the kernels of this device take; nothing is wrong with the call
  C2C_CUDA_ERROR = 9    // of the CUDA runtime: c2c_cuda_error()
} c2c_status_code;

// What went wrong and, where it is in a segment, in which one. Nothing has been written when code != C2C_OK.
typedef struct {
  c2c_status_code code;
  int32_t segment;  // -1: not in a segment
} c2c_status;

typedef struct {
  void *data;
  int64_t stride[4];  // in elements, one per dimension of the shape given beside each field; 0 where broadcast
  int32_t dtype;      // c2c_dtype
} c2c_tensor;

// A run of keys and values. Without a projector it is in receiver space: heads = kv_heads, dims as the receiver's.
typedef struct {
  c2c_tensor key;            // [batch, heads, len, key_dim] last stride 1
  c2c_tensor value;          // [batch, heads, len, value_dim] last stride 1
  c2c_tensor key_proj;       // [kv_heads, head_dim, heads * key_dim], or [kv_heads, head_dim, key_rank], nullable
  c2c_tensor key_proj_in;    // [key_rank, heads * key_dim], nullable: dense projector
  c2c_tensor value_proj;     // [kv_heads, out_dim, heads * value_dim], or [kv_heads, out_dim, value_rank], nullable
  c2c_tensor value_proj_in;  // [value_rank, heads * value_dim], nullable
  c2c_tensor key_bias;       // [kv_heads, head_dim], nullable
  c2c_tensor value_bias;     // [kv_heads, out_dim], nullable
  c2c_tensor gate;           // [batch, q_heads, len], nullable: 1
  c2c_tensor lengths;        // [batch], nullable: len
  c2c_tensor positions;      // [batch, len], nullable: visible to every query
  c2c_tensor key_scale;      // [batch, heads, raw_len], nullable: 1
  c2c_tensor value_scale;    // [batch, heads, raw_len], nullable: 1
  c2c_tensor index;          // [batch, len], nullable: token j is raw token j
  int64_t heads, key_dim, value_dim;
  int64_t len;      // tokens attended to (selected ones where there is an index)
  int64_t raw_len;  // tokens stored; = len without an index
  int64_t key_rank, value_rank;
  int32_t causal;       // hide tokens from query positions before theirs
  int32_t materialize;  // merged_attention projects the tokens on the way instead of absorbing the projectors
} c2c_segment;

// out = softmax over own tokens and segments; see README.md. int8 segments are read in place with their scales;
// float8 and indexed ones are not: c2c_project_kv_cpu brings them into receiver space.
typedef struct {
  c2c_tensor query;            // [batch, q_heads, q_len, head_dim] last stride 1
  c2c_tensor key;              // [batch, kv_heads, len, head_dim] last stride 1
  c2c_tensor value;            // [batch, kv_heads, len, value_dim] last stride 1
  c2c_tensor mask;             // [batch, q_heads, q_len, len] bool or float, nullable
  c2c_tensor lengths;          // [batch], nullable: len
  c2c_tensor query_positions;  // [batch, q_len], nullable: length - q_len + i
  c2c_tensor sinks;            // [q_heads], nullable
  c2c_tensor out;              // [batch, q_heads, q_len, value_dim] last stride 1
  c2c_tensor lse;              // [batch, q_heads, q_len] f32, nullable
  c2c_tensor mass;             // [batch, q_heads, q_len, 1 + segment_count] f32, nullable
  const c2c_segment *segments;
  int64_t batch, q_heads, kv_heads, q_len, len, head_dim, value_dim;
  int64_t window;          // own tokens: visible when index > query index - window; 0: none
  int64_t segment_window;  // the same for segments with positions; 0: none
  int32_t segment_count;
  int32_t is_causal;
  int32_t threads;  // 0: the OpenMP default
  float scale;
  float softcap;  // 0: none
} c2c_attention_params;

// Gradients of the above for segments in receiver space (no projector). All gradients are f32, contiguous, written
// (not accumulated); NULL where not wanted.
typedef struct {
  c2c_attention_params forward;    // out and lse as the forward call left them; mass unused
  c2c_tensor grad_out;             // [batch, q_heads, q_len, value_dim] last stride 1
  c2c_tensor delta;                // [batch, q_heads, q_len, 1 + segment_count] f32: what every score's gradient loses,
                                   // out . grad_out - grad_lse - grad_mass_s + sum_s' mass_s' grad_mass_s'
  float *grad_query;               // [batch, q_heads, q_len, head_dim]
  float *grad_key;                 // [batch, kv_heads, len, head_dim]
  float *grad_value;               // [batch, kv_heads, len, value_dim]
  float *sink_weight;              // [batch, q_heads, q_len], nullable: the share of the normaliser that a sink holds
  float *const *grad_segment_key;  // segment_count pointers, each [batch, kv_heads, len_s, head_dim], nullable
  float *const *grad_segment_value;  // segment_count pointers, each [batch, kv_heads, len_s, value_dim], nullable
  float *const *grad_gate;           // segment_count pointers, each [batch, q_heads, len_s], nullable
} c2c_attention_backward_params;

// key_out = rotate(W unrotate(x) + b), value_out = W y + b for every token of a segment; tokens beyond `lengths` are
// written as zero. A half without a projector is copied (scaled, gathered, rotated).
typedef struct {
  c2c_segment segment;                // gate, positions and causal are not read
  c2c_tensor remove_cos, remove_sin;  // [batch, raw_len, remove_dim] last stride 1, nullable
  c2c_tensor apply_cos, apply_sin;    // [batch, len, apply_dim] last stride 1, nullable
  c2c_tensor key_out;                 // [batch, kv_heads, len, head_dim] last stride 1
  c2c_tensor value_out;               // [batch, kv_heads, len, out_dim] last stride 1
  int64_t batch, kv_heads, head_dim, out_dim;
  int64_t remove_dim, apply_dim;
  int32_t threads;
} c2c_project_params;

// out = sum_s exp(lse_s - lse) out_s, lse = ln sum_s exp(lse_s). States with lse = -inf are not read.
typedef struct {
  const c2c_tensor *outs;  // state_count tensors [batch, q_heads, q_len, head_dim] last stride 1
  const c2c_tensor *lses;  // state_count tensors [batch, q_heads, q_len]
  c2c_tensor out;          // [batch, q_heads, q_len, head_dim] last stride 1
  c2c_tensor lse;          // [batch, q_heads, q_len] f32
  int64_t batch, q_heads, q_len, head_dim;
  int32_t state_count;
  int32_t threads;
} c2c_merge_params;

// scale = max |x| / 127 of a token and head, out = x / scale rounded to nearest even: |x - out * scale| <= scale / 2.
typedef struct {
  c2c_tensor x;      // [batch, heads, len, dim] last stride 1
  c2c_tensor out;    // [batch, heads, len, dim] int8, last stride 1
  c2c_tensor scale;  // [batch, heads, len] f32
  int64_t batch, heads, len, dim;
  int32_t threads;
} c2c_quantize_params;

// h + w2 gelu(w1 rmsnorm(h)), gelu by erf, epsilon 1e-6.
typedef struct {
  c2c_tensor norm;  // [hidden]
  c2c_tensor w1;    // [inner, hidden] last stride 1
  c2c_tensor w2;    // [hidden, inner] last stride 1
  int64_t inner;
} c2c_fuse_block;

// The fuser's network over a layer's keys, or its values, with embed, scale and project made of blocks:
//   h = embed(in_weight [sharer, receiver] + in_bias)
//   out = residual + gate * sigmoid(scale_weight scale(h) + scale_bias) * (out_weight project(h) + out_bias)
// Where a hard gate is closed nothing of it is read: out is the residual, and is not written where it is that already.
typedef struct {
  c2c_tensor receiver;           // [batch, kv_heads, len, dim] last stride 1
  c2c_tensor sharer;             // [batch, sharer_heads, sharer_len, sharer_dim] last stride 1
  c2c_tensor residual;           // [batch, kv_heads, len, dim] last stride 1; may be receiver
  c2c_tensor out;                // [batch, kv_heads, len, dim] last stride 1; may be receiver or residual
  c2c_tensor index;              // [batch, len], nullable: token i reads the sharer's token i
  c2c_tensor gate;               // [batch, kv_heads, len], nullable: hard, 1 where gate_logit > 0
  c2c_tensor in_weight;          // [hidden, sharer_heads * sharer_dim + kv_heads * dim] last stride 1
  c2c_tensor in_bias;            // [hidden] stride 1
  c2c_tensor out_weight;         // [kv_heads * dim, hidden] last stride 1
  c2c_tensor out_bias;           // [kv_heads * dim] stride 1
  c2c_tensor scale_weight;       // [kv_heads, hidden] last stride 1
  c2c_tensor scale_bias;         // [kv_heads] stride 1
  c2c_tensor gate_logit;         // []
  const c2c_fuse_block *blocks;  // embed, scale, then project_count >= 1 others
  int64_t batch, len, kv_heads, dim, sharer_len, sharer_heads, sharer_dim, hidden;
  int32_t project_count;
} c2c_fuse_half;

// Halves of any layers. No half's out may be what another one reads.
typedef struct {
  const c2c_fuse_half *halves;
  int32_t half_count;
  int32_t threads;
} c2c_fuse_params;

C2C_API c2c_status c2c_merged_attention_cpu(const c2c_attention_params *params);
C2C_API c2c_status c2c_merged_attention_backward_cpu(const c2c_attention_backward_params *params);
C2C_API c2c_status c2c_project_kv_cpu(const c2c_project_params *params);
C2C_API c2c_status c2c_merge_states_cpu(const c2c_merge_params *params);
C2C_API c2c_status c2c_quantize_cpu(const c2c_quantize_params *params);
C2C_API c2c_status c2c_fuse_kv_cpu(const c2c_fuse_params *params);

// On an NVIDIA GPU, in libraries that were built with CUDA. Tensors are on the device, `stream` is a cudaStream_t of
// the current device; work is put into it and not waited for, and may be captured into a graph. fp16 and bf16 queries;
// the values of lengths, gates and indices are not checked: lengths are cut to the tensor, an index outside of it reads
// zeros, a gate that is not above 0 closes its token. Segments are in receiver space, where c2c_project_kv_cuda brings
// them, or have both projectors, which are absorbed (`materialize` 0): full-rank and of the query's dtype, heads x dims
// (each to 16) up to 512, for up to 32 queries x heads of a KV head. `workspace`: as many bytes on the device as the
// function before says, in use until the work is done.
C2C_API int64_t c2c_merged_attention_workspace_cuda(const c2c_attention_params *params);
C2C_API c2c_status c2c_merged_attention_cuda(const c2c_attention_params *params, void *workspace, void *stream);
C2C_API int64_t c2c_project_kv_workspace_cuda(const c2c_project_params *params);
C2C_API c2c_status c2c_project_kv_cuda(const c2c_project_params *params, void *workspace, void *stream);
// All tensors of a half in fp16, or all in bf16, gates in any float; up to 13 blocks of project, more are unsupported.
C2C_API int64_t c2c_fuse_kv_workspace_cuda(const c2c_fuse_params *params);
C2C_API c2c_status c2c_fuse_kv_cuda(const c2c_fuse_params *params, void *workspace, void *stream);
// Up to 32 states in fp16 or bf16, rows of up to 256 numbers.
C2C_API c2c_status c2c_merge_states_cuda(const c2c_merge_params *params, void *stream);
// Rows of up to 256 numbers in fp32, fp16 or bf16.
C2C_API c2c_status c2c_quantize_cuda(const c2c_quantize_params *params, void *stream);
// "" where kernels can run here, else why not: no driver, no device, a compute capability below 8.0.
C2C_API const char *c2c_cuda_unavailable(void);
// The last error of the CUDA runtime in this thread and the kernel that met it, as words.
C2C_API const char *c2c_cuda_error(void);
// How many tensor maps the driver has refused to make so far: attention copies those keys and values without, slower.
C2C_API int64_t c2c_cuda_unmapped(void);

// The instruction set in use: "avx512_bf16", "avx512", "avx2", "baseline" or "neon". Chosen by cpuid on first use.
C2C_API const char *c2c_cpu_isa(void);
// Forces an instruction set (for tests and comparisons); NULL returns to the automatic choice.
// Returns 0 where it was set, 1 where this machine or build does not have it.
C2C_API int c2c_set_cpu_isa(const char *name);
// A status as words.
C2C_API const char *c2c_status_text(c2c_status_code code);

#ifdef __cplusplus
}
#endif
#endif
