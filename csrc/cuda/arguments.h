// From the structs of c2c.h to those of params.h, on the host.
#pragma once

#include "absorb.h"
#include "c2c.h"
#include "params.h"

namespace c2c {

inline int size_of(int32_t dtype) {
  switch (dtype) {
    case C2C_F32:
    case C2C_I32: return 4;
    case C2C_I64: return 8;
    case C2C_I8:
    case C2C_F8E4M3:
    case C2C_BOOL: return 1;
    default: return 2;
  }
}

inline bool is_float(int32_t dtype) { return dtype == C2C_F32 || dtype == C2C_BF16 || dtype == C2C_F16; }
inline bool is_half(int32_t dtype) { return dtype == C2C_BF16 || dtype == C2C_F16; }
inline bool is_byte(int32_t dtype) { return dtype == C2C_I8 || dtype == C2C_F8E4M3; }
inline bool is_integer(int32_t dtype) { return dtype == C2C_I32 || dtype == C2C_I64; }

// Dimensions `b`, `h`, `n` of t; -1 where the tensor has no such dimension.
inline Strided strided(const c2c_tensor &t, int b, int h, int n) {
  auto stride = [&](int dim) { return dim < 0 ? int64_t{0} : t.stride[dim]; };
  return {t.data, stride(b), stride(h), stride(n)};
}

// Whether rows of `dim` numbers can be read 16 bytes at a time.
inline bool vectorised(const c2c_tensor &t, int64_t dim) {
  const int64_t size = size_of(t.dtype);
  int64_t all = reinterpret_cast<int64_t>(t.data) | dim * size;
  for (int d = 0; d < 3; ++d) all |= t.stride[d] * size;
  return all % 16 == 0;
}

// OK where p can be attended to by the kernels of this folder; `out` is then filled, and `absorption` with the segments
// whose projectors are absorbed. c2c_status.segment says which segment is at fault.
c2c_status device_attention(const c2c_attention_params &p, Attention &out, Absorption &absorption);

}  // namespace c2c
