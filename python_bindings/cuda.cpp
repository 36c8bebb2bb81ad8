// c2c_kernels._cuda: lists of integers in, a status out. See reader.h. Importing it asks for no driver and no device.
#include "../csrc/cuda/entries.h"
#include "../csrc/cuda/fuse.h"
#include "../csrc/cuda/states.h"
#include "reader.h"

namespace {

using namespace c2c_bindings;

int64_t attention_workspace(const py::list &numbers) {
  std::vector<c2c_segment> segments;
  const c2c_attention_params p = read_attention(numbers, 1.0, 0.0, segments);
  return c2c_merged_attention_workspace_cuda(&p);
}

int merged_attention(const py::list &numbers, double scale, double softcap, uintptr_t workspace, uintptr_t stream) {
  std::vector<c2c_segment> segments;
  const c2c_attention_params p = read_attention(numbers, scale, softcap, segments);
  py::gil_scoped_release release;
  return encode(c2c_merged_attention_cuda(&p, reinterpret_cast<void *>(workspace), reinterpret_cast<void *>(stream)));
}

// Tensor maps that a launch wants in its parameters: where, of which tensor, boxes of how many rows.
py::tuple maps_of(const c2c::Launch &launch) {
  py::list found;
  for (int32_t i = 0; i < launch.map_count; ++i) {
    const c2c::TileMap &map = launch.maps[i];
    const int64_t at = launch.maps_at + i * static_cast<int64_t>(sizeof(c2c::MapSlot));
    if (map.data)
      found.append(py::make_tuple(at, reinterpret_cast<uintptr_t>(map.data),
                                  py::make_tuple(map.size[0], map.size[1], map.size[2], map.size[3]),
                                  py::make_tuple(map.stride[0], map.stride[1], map.stride[2]), map.tokens));
  }
  return py::tuple(found);
}

// An executor that hands every launch to a Python function: name, grid, block, shared memory, parameters as bytes,
// maps, and parameters as they are where no map can be made.
c2c_status_code tell(const c2c::Launch &launch, void *function) {
  const std::vector<char> unmapped = c2c::with_maps(launch, [](const c2c::TileMap &, c2c::MapSlot &) { return false; });
  (*static_cast<const py::function *>(function))(
      launch.name, launch.grid, launch.block, launch.shared,
      py::bytes(static_cast<const char *>(launch.params), static_cast<size_t>(launch.params_size)), maps_of(launch),
      py::bytes(unmapped.data(), unmapped.size()));
  return C2C_OK;
}

int attention_launches(const py::list &numbers, double scale, double softcap, uintptr_t workspace, int capability,
                       py::function function) {
  std::vector<c2c_segment> segments;
  const c2c_attention_params p = read_attention(numbers, scale, softcap, segments);
  return encode(c2c::attention_launches(p, reinterpret_cast<void *>(workspace), capability, tell, &function));
}

int64_t project_workspace(const py::list &numbers) {
  const c2c_project_params p = read_projection(numbers);
  return c2c_project_kv_workspace_cuda(&p);
}

int project_kv(const py::list &numbers, uintptr_t workspace, uintptr_t stream) {
  const c2c_project_params p = read_projection(numbers);
  py::gil_scoped_release release;
  return encode(c2c_project_kv_cuda(&p, reinterpret_cast<void *>(workspace), reinterpret_cast<void *>(stream)));
}

int project_launches(const py::list &numbers, uintptr_t workspace, int capability, py::function function) {
  const c2c_project_params p = read_projection(numbers);
  return encode(c2c::project_launches(p, reinterpret_cast<void *>(workspace), capability, tell, &function));
}

int64_t fuse_workspace(const py::list &numbers) {
  std::vector<std::vector<c2c_fuse_block>> blocks;
  std::vector<c2c_fuse_half> halves;
  const c2c_fuse_params p = read_fuse(numbers, halves, blocks);
  return c2c_fuse_kv_workspace_cuda(&p);
}

int fuse_kv(const py::list &numbers, uintptr_t workspace, uintptr_t stream) {
  std::vector<std::vector<c2c_fuse_block>> blocks;
  std::vector<c2c_fuse_half> halves;
  const c2c_fuse_params p = read_fuse(numbers, halves, blocks);
  py::gil_scoped_release release;
  return encode(c2c_fuse_kv_cuda(&p, reinterpret_cast<void *>(workspace), reinterpret_cast<void *>(stream)));
}

int fuse_launches(const py::list &numbers, uintptr_t workspace, int capability, py::function function) {
  std::vector<std::vector<c2c_fuse_block>> blocks;
  std::vector<c2c_fuse_half> halves;
  const c2c_fuse_params p = read_fuse(numbers, halves, blocks);
  return encode(c2c::fuse_launches(p, reinterpret_cast<void *>(workspace), capability, tell, &function));
}

int merge_states(const py::list &numbers, uintptr_t stream) {
  std::vector<c2c_tensor> states;
  const c2c_merge_params p = read_merge(numbers, states);
  py::gil_scoped_release release;
  return encode(c2c_merge_states_cuda(&p, reinterpret_cast<void *>(stream)));
}

int merge_launches(const py::list &numbers, py::function function) {
  std::vector<c2c_tensor> states;
  return c2c::launch_merge_states(read_merge(numbers, states), tell, &function);
}

int quantize(const py::list &numbers, uintptr_t stream) {
  const c2c_quantize_params p = read_quantize(numbers);
  py::gil_scoped_release release;
  return encode(c2c_quantize_cuda(&p, reinterpret_cast<void *>(stream)));
}

int quantize_launches(const py::list &numbers, py::function function) {
  return c2c::launch_quantize(read_quantize(numbers), tell, &function);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of c2c-kernels. Private: use c2c_kernels.";
  m.attr("abi_version") = C2C_ABI_VERSION;
  m.attr("archs") = C2C_CUDA_ARCHS;
  m.attr("largest_dim") = c2c::LARGEST_DIM;
  m.attr("largest_width") = c2c::LARGEST_WIDTH;
  m.attr("most_decoded") = c2c::MOST_DECODED;
  m.attr("raw_pad") = c2c::RAW_PAD;
  m.attr("most_fuser_blocks") = c2c::MAX_FUSE_BLOCKS - 2;
  m.attr("most_segments") = c2c::MAX_RUNS - 1;
  m.attr("most_states") = c2c::MAX_STATES;
  m.def("unavailable", &c2c_cuda_unavailable);
  m.def("error", &c2c_cuda_error);
  m.def("unmapped", &c2c_cuda_unmapped);
  m.def("attention_workspace", &attention_workspace);
  m.def("merged_attention", &merged_attention);
  m.def("attention_launches", &attention_launches);
  m.def("project_workspace", &project_workspace);
  m.def("project_kv", &project_kv);
  m.def("project_launches", &project_launches);
  m.def("fuse_workspace", &fuse_workspace);
  m.def("fuse_kv", &fuse_kv);
  m.def("fuse_launches", &fuse_launches);
  m.def("merge_states", &merge_states);
  m.def("merge_launches", &merge_launches);
  m.def("quantize", &quantize);
  m.def("quantize_launches", &quantize_launches);
}
