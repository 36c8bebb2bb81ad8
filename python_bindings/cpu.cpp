// c2c_kernels._cpu: parameter structs read from flat lists of integers, in the order of the C structs; status out.
// A tensor is six integers: address, dtype, four strides. Python (backends/native.py) writes the lists.
#include <pybind11/pybind11.h>

#include <vector>

#include "c2c.h"

namespace py = pybind11;

namespace {

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
    for (c2c_tensor *t :
         {&h.receiver, &h.sharer, &h.residual, &h.out, &h.index, &h.gate, &h.in_weight, &h.in_bias, &h.out_weight,
          &h.out_bias, &h.scale_weight, &h.scale_bias, &h.gate_logit})
      *t = tensor();
    for (int64_t *n :
         {&h.batch, &h.len, &h.kv_heads, &h.dim, &h.sharer_len, &h.sharer_heads, &h.sharer_dim, &h.hidden})
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

c2c_attention_params read_attention(const py::list &numbers, double scale, double softcap,
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

// Status in the low byte, segment + 1 above it.
int encode(c2c_status status) { return status.code == C2C_OK ? 0 : status.code | (status.segment + 1) << 8; }

int merged_attention(const py::list &numbers, double scale, double softcap) {
  std::vector<c2c_segment> segments;
  c2c_attention_params p = read_attention(numbers, scale, softcap, segments);
  py::gil_scoped_release release;
  return encode(c2c_merged_attention_cpu(&p));
}

int merged_attention_backward(const py::list &numbers, const py::list &gradients, double scale, double softcap) {
  std::vector<c2c_segment> segments;
  c2c_attention_backward_params p;
  p.forward = read_attention(numbers, scale, softcap, segments);
  Reader in(gradients);
  p.grad_out = in.tensor();
  p.delta = in.tensor();
  for (float **pointer : {&p.grad_query, &p.grad_key, &p.grad_value, &p.sink_weight})
    *pointer = static_cast<float *>(in.pointer());
  std::vector<float *> keys, values, gates;
  for (size_t i = 0; i < segments.size(); ++i)
    for (std::vector<float *> *group : {&keys, &values, &gates}) group->push_back(static_cast<float *>(in.pointer()));
  in.end();
  p.grad_segment_key = keys.data();
  p.grad_segment_value = values.data();
  p.grad_gate = gates.data();
  py::gil_scoped_release release;
  return encode(c2c_merged_attention_backward_cpu(&p));
}

int project_kv(const py::list &numbers) {
  Reader in(numbers);
  c2c_project_params p;
  for (c2c_tensor *t : {&p.remove_cos, &p.remove_sin, &p.apply_cos, &p.apply_sin, &p.key_out, &p.value_out})
    *t = in.tensor();
  for (int64_t *n : {&p.batch, &p.kv_heads, &p.head_dim, &p.out_dim, &p.remove_dim, &p.apply_dim}) *n = in.number();
  p.threads = static_cast<int32_t>(in.number());
  p.segment = in.segment();
  in.end();
  py::gil_scoped_release release;
  return encode(c2c_project_kv_cpu(&p));
}

int merge_states(const py::list &numbers) {
  Reader in(numbers);
  c2c_merge_params p;
  p.out = in.tensor();
  p.lse = in.tensor();
  for (int64_t *n : {&p.batch, &p.q_heads, &p.q_len, &p.head_dim}) *n = in.number();
  p.state_count = static_cast<int32_t>(in.number());
  p.threads = static_cast<int32_t>(in.number());
  std::vector<c2c_tensor> outs, lses;
  for (int32_t i = 0; i < p.state_count; ++i) outs.push_back(in.tensor());
  for (int32_t i = 0; i < p.state_count; ++i) lses.push_back(in.tensor());
  in.end();
  p.outs = outs.data();
  p.lses = lses.data();
  py::gil_scoped_release release;
  return encode(c2c_merge_states_cpu(&p));
}

int quantize(const py::list &numbers) {
  Reader in(numbers);
  c2c_quantize_params p;
  for (c2c_tensor *t : {&p.x, &p.out, &p.scale}) *t = in.tensor();
  for (int64_t *n : {&p.batch, &p.heads, &p.len, &p.dim}) *n = in.number();
  p.threads = static_cast<int32_t>(in.number());
  in.end();
  py::gil_scoped_release release;
  return encode(c2c_quantize_cpu(&p));
}

int fuse_kv(const py::list &numbers) {
  Reader in(numbers);
  c2c_fuse_params p;
  p.half_count = static_cast<int32_t>(in.number());
  p.threads = static_cast<int32_t>(in.number());
  std::vector<std::vector<c2c_fuse_block>> blocks;
  std::vector<c2c_fuse_half> halves;
  for (int32_t i = 0; i < p.half_count; ++i) halves.push_back(in.fuse_half(blocks));
  in.end();
  p.halves = halves.data();
  py::gil_scoped_release release;
  return encode(c2c_fuse_kv_cpu(&p));
}

void set_isa(const py::object &name) {
  std::string text = name.is_none() ? "" : py::cast<std::string>(name);
  if (c2c_set_cpu_isa(name.is_none() ? nullptr : text.c_str()))
    throw py::value_error("this machine or build does not have the instruction set " + text);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of c2c-kernels. Private: use c2c_kernels.";
  m.attr("abi_version") = C2C_ABI_VERSION;
  m.def("merged_attention", &merged_attention);
  m.def("merged_attention_backward", &merged_attention_backward);
  m.def("project_kv", &project_kv);
  m.def("merge_states", &merge_states);
  m.def("quantize", &quantize);
  m.def("fuse_kv", &fuse_kv);
  m.def("isa", &c2c_cpu_isa);
  m.def("set_isa", &set_isa);
  m.def("status_text", [](int code) { return c2c_status_text(static_cast<c2c_status_code>(code)); });
}
