// Tensor maps by the driver, whose library is not linked: the runtime knows where its functions are.

#include "tile_map.h"

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <atomic>

#include "c2c.h"

namespace c2c {

namespace {

using Encode = PFN_cuTensorMapEncodeTiled_v12000;

std::atomic<int64_t> refused{0};

Encode find_encode() {
  void *function = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

}  // namespace

bool encode(const TileMap &map, MapSlot &slot) {
  static const Encode encode = find_encode();
  cuuint64_t size[4], stride[3];
  for (int i = 0; i < 4; ++i) size[i] = static_cast<cuuint64_t>(map.size[i]);
  for (int i = 0; i < 3; ++i) stride[i] = static_cast<cuuint64_t>(map.stride[i]);
  const cuuint32_t box[4] = {MAP_COLUMNS, static_cast<cuuint32_t>(map.tokens), 1, 1}, steps[4] = {1, 1, 1, 1};
  // Numbers are copied as they are: which 16-bit type they have is no matter.
  const bool made =
      encode &&
      encode(reinterpret_cast<CUtensorMap *>(&slot), CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void *>(map.data),
             size, stride, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
  refused += !made;
  return made;
}

}  // namespace c2c

extern "C" int64_t c2c_cuda_unmapped(void) { return c2c::refused; }
