// Launches on a stream, and what stands in the way of that.

#include "launch.h"

#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "kernels.h"

namespace c2c {

namespace {

thread_local std::string last_error;

c2c_status_code failed(const char *what, cudaError_t error) {
  last_error = std::string(what) + ": " + cudaGetErrorString(error);
  return C2C_CUDA_ERROR;
}

}  // namespace

std::vector<char> with_maps(const Launch &launch, Encoder encoder) {
  const char *const bytes = static_cast<const char *>(launch.params);
  std::vector<char> params(bytes, bytes + launch.params_size);
  for (int32_t i = 0; i < launch.map_count; ++i) {
    if (!launch.maps[i].data) continue;
    MapSlot slot{};
    if (!encoder(launch.maps[i], slot)) params[launch.mapped_at + i / 2] = 0;
    memcpy(params.data() + launch.maps_at + i * sizeof slot, &slot, sizeof slot);
  }
  return params;
}

c2c_status_code run_on_stream(const Launch &launch, void *stream) {
  // 48 KiB need no leave, static shared memory (16 KiB at most) among them.
  if (launch.shared > 32 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(launch.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(launch.shared));
    if (error != cudaSuccess) return failed(launch.name, error);
  }
  std::vector<char> params;
  if (launch.map_count) params = with_maps(launch, encode);
  void *arguments[] = {launch.map_count ? params.data() : const_cast<void *>(launch.params)};
  const cudaError_t error = cudaLaunchKernel(launch.kernel, dim3(launch.grid), dim3(launch.block), arguments,
                                             launch.shared, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? C2C_OK : failed(launch.name, error);
}

c2c_status_code current_capability(int &capability) {
  int device = 0, major = 0, minor = 0;
  last_error.clear();
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) return failed("no device", error);
  capability = 10 * major + minor;
  if (capability == 90 && !wgmma_is_built()) capability = 80;
  if (major >= 8) return C2C_OK;
  char text[96];
  snprintf(text, sizeof text, "device %d has compute capability %d.%d, wanted 8.0 or later", device, major, minor);
  last_error = text;
  return C2C_UNSUPPORTED;
}

}  // namespace c2c

extern "C" const char *c2c_cuda_error(void) { return c2c::last_error.c_str(); }

extern "C" const char *c2c_cuda_unavailable(void) {
  int capability = 0;
  return c2c::current_capability(capability) == C2C_OK ? "" : c2c::last_error.c_str();
}
