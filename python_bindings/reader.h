// Parameter structs read from flat lists of integers, in the order of the C structs. A tensor is six integers:
// address, dtype, four strides. Python (backends/native.py) writes the lists.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "c2c.h"

namespace c2c_bindings {

namespace py = pybind11;

class Reader {
 public:
  explicit Reader(const py::list &numbers) : list_(numbers.ptr()), size_(PyList_GET_SIZE(numbers.ptr())) {}

  int64_t number() {
    if (next_ >= size_) throw py::value_error("the parameter list is too short");
    int64_t value = PyLong_AsLongLong(PyList_GET_ITEM(list_, next_++));
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

  void *pointer() { return reinterpret_cast<void *>(number()); }

  c2c_tensor tensor() {
    c2c_tensor t;
    t.data = pointer();
    t.dtype = static_cast<int32_t>(number());
    for (int64_t &stride : t.stride) stride = number();
    return t;
  }

  c2c_segment segment() {
    c2c_segment s;
    for (c2c_tensor *t : {&s.key, &s.value, &s.key_proj, &s.key_proj_in, &s.value_proj, &s.value_proj_in, &s.key_bias,
                          &s.value_bias, &s.gate, &s.lengths, &s.positions, &s.key_scale, &s.value_scale, &s.index})
      *t = tensor();
    for (int64_t *n : {&s.heads, &s.key_dim, &s.value_dim, &s.len, &s.raw_len, &s.key_rank, &s.value_rank})
      *n = number();
    for (int32_t *n : {&s.causal, &s.materialize}) *n = static_cast<int32_t>(number());
    return s;
  }

  c2c_fuse_half fuse_half(std::vector<std::vector<c2c_fuse_block>> &blocks) {
    c2c_fuse_half h;
    for (c2c_tensor *t : {&h.receiver, &h.sharer, &h.residual, &h.out, &h.index, &h.gate, &h.in_weight, &h.in_bias,
                          &h.out_weight, &h.out_bias, &h.scale_weight, &h.scale_bias, &h.gate_logit})
      *t = tensor();
    for (int64_t *n : {&h.batch, &h.len, &h.kv_heads, &h.dim, &h.sharer_len, &h.sharer_heads, &h.sharer_dim, &h.hidden})
      *n = number();
    h.project_count = static_cast<int32_t>(number());
    blocks.emplace_back();
    for (int32_t i = 0; i < 2 + h.project_count; ++i) {
      c2c_fuse_block block;
      for (c2c_tensor *t : {&block.norm, &block.w1, &block.w2}) *t = tensor();
      block.inner = number();
      blocks.back().push_back(block);
    }
    h.blocks = blocks.back().data();
    return h;
  }

  void end() const {
    if (next_ != size_) throw py::value_error("the parameter list is too long");
  }

 private:
  PyObject *list_;
  Py_ssize_t size_, next_ = 0;
};

// `segments` has to outlive what is returned.
inline c2c_attention_params read_attention(const py::list &numbers, double scale, double softcap,
                                           std::vector<c2c_segment> &segments) {
  Reader in(numbers);
  c2c_attention_params p;
  for (c2c_tensor *t :
       {&p.query, &p.key, &p.value, &p.mask, &p.lengths, &p.query_positions, &p.sinks, &p.out, &p.lse, &p.mass})
    *t = in.tensor();
  for (int64_t *n :
       {&p.batch, &p.q_heads, &p.kv_heads, &p.q_len, &p.len, &p.head_dim, &p.value_dim, &p.window, &p.segment_window})
    *n = in.number();
  for (int32_t *n : {&p.segment_count, &p.is_causal, &p.threads}) *n = static_cast<int32_t>(in.number());
  for (int32_t i = 0; i < p.segment_count; ++i) segments.push_back(in.segment());
  in.end();
  p.segments = segments.data();
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  return p;
}

inline c2c_project_params read_projection(const py::list &numbers) {
  Reader in(numbers);
  c2c_project_params p;
  for (c2c_tensor *t : {&p.remove_cos, &p.remove_sin, &p.apply_cos, &p.apply_sin, &p.key_out, &p.value_out})
    *t = in.tensor();
  for (int64_t *n : {&p.batch, &p.kv_heads, &p.head_dim, &p.out_dim, &p.remove_dim, &p.apply_dim}) *n = in.number();
  p.threads = static_cast<int32_t>(in.number());
  p.segment = in.segment();
  in.end();
  return p;
}

// `halves` and `blocks` have to outlive what is returned.
inline c2c_fuse_params read_fuse(const py::list &numbers, std::vector<c2c_fuse_half> &halves,
                                 std::vector<std::vector<c2c_fuse_block>> &blocks) {
  Reader in(numbers);
  c2c_fuse_params p;
  p.half_count = static_cast<int32_t>(in.number());
  p.threads = static_cast<int32_t>(in.number());
  for (int32_t i = 0; i < p.half_count; ++i) halves.push_back(in.fuse_half(blocks));
  in.end();
  p.halves = halves.data();
  return p;
}

// `states` has to outlive what is returned.
inline c2c_merge_params read_merge(const py::list &numbers, std::vector<c2c_tensor> &states) {
  Reader in(numbers);
  c2c_merge_params p;
  p.out = in.tensor();
  p.lse = in.tensor();
  for (int64_t *n : {&p.batch, &p.q_heads, &p.q_len, &p.head_dim}) *n = in.number();
  p.state_count = static_cast<int32_t>(in.number());
  p.threads = static_cast<int32_t>(in.number());
  for (int32_t i = 0; i < 2 * p.state_count; ++i) states.push_back(in.tensor());
  in.end();
  p.outs = states.data();
  p.lses = states.data() + p.state_count;
  return p;
}

inline c2c_quantize_params read_quantize(const py::list &numbers) {
  Reader in(numbers);
  c2c_quantize_params p;
  for (c2c_tensor *t : {&p.x, &p.out, &p.scale}) *t = in.tensor();
  for (int64_t *n : {&p.batch, &p.heads, &p.len, &p.dim}) *n = in.number();
  p.threads = static_cast<int32_t>(in.number());
  in.end();
  return p;
}

// Status in the low byte, segment + 1 above it.
inline int encode(c2c_status status) {
  return status.code == C2C_OK ? 0 : static_cast<int>(status.code) | (status.segment + 1) << 8;
}

}  // namespace c2c_bindings
