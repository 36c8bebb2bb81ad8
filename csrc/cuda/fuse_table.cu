// What goes before fuse_kv's products: the table of halves and the counters, from parameters, so that a captured call
// keeps them.
#include <cstddef>

#include "common.cuh"
#include "fuse.h"

namespace c2c {

template <int WORDS>
__device__ __forceinline__ void write_table(const FuseTable<WORDS> &p) {
#pragma unroll 1
  for (int i = threadIdx.x; i < p.rows * p.row; i += blockDim.x) p.to[i] = p.word[i];
#pragma unroll 1
  for (int i = threadIdx.x; i < p.count; i += blockDim.x) p.counters[i] = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < p.rows; i += blockDim.x) {
    const auto word = [&](size_t offset) {
      return reinterpret_cast<const void *>(p.word[i * p.row + static_cast<int>(offset / 8)]);
    };
    bool in_place = true;  // the same address and strides
    for (size_t at = 0; at < sizeof(Strided); at += 8)
      in_place = in_place && word(offsetof(FuseHalf, out) + at) == word(offsetof(FuseHalf, residual) + at);
    const bool open = p.gated || load_float(word(offsetof(FuseHalf, gate_logit)), 0, p.type) > 0.0f;
    p.states[i] = open ? FUSE_OPEN : in_place ? FUSE_NOTHING : FUSE_COPY;
  }
}

}  // namespace c2c

extern "C" __global__ void __launch_bounds__(256)
    c2c_fuse_table_small(const __grid_constant__ c2c::FuseTable<c2c::FUSE_TABLE_SMALL> p) {
  c2c::write_table(p);
}

extern "C" __global__ void __launch_bounds__(256)
    c2c_fuse_table_large(const __grid_constant__ c2c::FuseTable<c2c::FUSE_TABLE_LARGE> p) {
  c2c::write_table(p);
}

namespace c2c {

const void *fuse_table_kernel(bool large) {
  return large ? reinterpret_cast<const void *>(&c2c_fuse_table_large)
               : reinterpret_cast<const void *>(&c2c_fuse_table_small);
}

}  // namespace c2c
