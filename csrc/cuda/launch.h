// A kernel launch as data: run by the CUDA runtime, or handed to whoever wants to look at it or to simulate it.
#pragma once

#include <stdint.h>

#include <vector>

#include "c2c.h"
#include "tile_map.h"

namespace c2c {

struct Launch {
  const void *kernel;  // the host's handle, as cudaLaunchKernel takes it
  const char *name;    // of the kernel in PTX; kernels are extern "C"
  uint32_t grid, block;
  uint32_t shared;     // dynamic shared memory, bytes
  const void *params;  // the kernel's only parameter, a struct by value
  int64_t params_size;
  const TileMap *maps = nullptr;  // [map_count], nullable: who runs the launch makes them
  int32_t map_count = 0;
  int64_t maps_at = 0;    // of the MapSlots in params, bytes
  int64_t mapped_at = 0;  // of an int8 for every two maps: whether the kernel copies by them
};

// The driver's map, or another's; false where it makes none.
using Encoder = bool (*)(const TileMap &map, MapSlot &slot);

// The launch's parameters with its maps in their slots. Where one is not made, its pair is not copied by.
std::vector<char> with_maps(const Launch &launch, Encoder encoder);

// Runs a launch. `context` is passed through.
using Executor = c2c_status_code (*)(const Launch &launch, void *context);

// The executor that launches on a stream, which is the context.
c2c_status_code run_on_stream(const Launch &launch, void *stream);

// The compute capability of the current device, 80 for 8.0; 80 too for 9.0 in builds without its kernels, where those
// of 8.0 run. C2C_UNSUPPORTED below 80; c2c_cuda_error() says what.
c2c_status_code current_capability(int &capability);

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Whether a block may have 163 KiB of shared memory; 99 everywhere.
constexpr bool has_large_blocks(int capability) { return capability != 86 && capability != 89 && capability < 120; }

}  // namespace c2c
