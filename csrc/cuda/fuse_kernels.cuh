// The kernels of fuse_kv for one dtype.
#pragma once

#include "fuse.cuh"

namespace c2c {

using Fuse16x32 = FuseTile<16, 32, 128, 4, 1, 1>;
using Fuse16x128 = FuseTile<16, 128, 64, 4, 1, 4>;
using Fuse64x128 = FuseTile<64, 128, 32, 6, 2, 2>;
using Fuse64x256 = FuseTile<64, 256, 32, 4, 2, 4>;
using Fuse64x512 = FuseTile<64, 512, 32, 4, 1, 8>;

template <typename Tile>
FuseKernel fuse_kernel(void (*kernel)(Fuse), const char *name) {
  return {reinterpret_cast<const void *>(kernel), name, Tile::M, Tile::N, Tile::THREADS, Tile::SHARED};
}

}  // namespace c2c

// A kernel of each tile, and the function that finds those for blocks of 99 KiB of shared memory.
#define C2C_FUSE_KERNEL(name, T, shape) \
  extern "C" __global__ void __launch_bounds__(c2c::Fuse##shape::THREADS) \
      c2c_fuse_##name##_##shape(const __grid_constant__ c2c::Fuse p) { \
    c2c::fuse<T, c2c::Fuse##shape>(p); \
  }
#define C2C_FUSE_RECORD(name, shape) \
  c2c::fuse_kernel<c2c::Fuse##shape>(&c2c_fuse_##name##_##shape, "c2c_fuse_" #name "_" #shape)
#define C2C_FUSE_KERNELS(name, T) \
  C2C_FUSE_KERNEL(name, T, 16x32) \
  C2C_FUSE_KERNEL(name, T, 16x128) \
  C2C_FUSE_KERNEL(name, T, 64x128) \
  C2C_FUSE_KERNEL(name, T, 64x256) \
  c2c::FuseKernel c2c::fuse_kernel_##name(FuseShape shape) { \
    switch (shape) { \
      case FUSE_16x32: return C2C_FUSE_RECORD(name, 16x32); \
      case FUSE_16x128: return C2C_FUSE_RECORD(name, 16x128); \
      case FUSE_64x128: return C2C_FUSE_RECORD(name, 64x128); \
      default: return C2C_FUSE_RECORD(name, 64x256); \
    } \
  }
#define C2C_LARGE_FUSE_KERNEL(name, T) \
  C2C_FUSE_KERNEL(name, T, 64x512) \
  c2c::FuseKernel c2c::large_fuse_kernel_##name() { return C2C_FUSE_RECORD(name, 64x512); }
