// c2c_kernels._cpu: lists of integers in, a status out. See reader.h.
#include "reader.h"

namespace {

using namespace c2c_bindings;

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
  const c2c_project_params p = read_projection(numbers);
  py::gil_scoped_release release;
  return encode(c2c_project_kv_cpu(&p));
}

int merge_states(const py::list &numbers) {
  std::vector<c2c_tensor> states;
  const c2c_merge_params p = read_merge(numbers, states);
  py::gil_scoped_release release;
  return encode(c2c_merge_states_cpu(&p));
}

int quantize(const py::list &numbers) {
  const c2c_quantize_params p = read_quantize(numbers);
  py::gil_scoped_release release;
  return encode(c2c_quantize_cpu(&p));
}

int fuse_kv(const py::list &numbers) {
  std::vector<std::vector<c2c_fuse_block>> blocks;
  std::vector<c2c_fuse_half> halves;
  const c2c_fuse_params p = read_fuse(numbers, halves, blocks);
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
