// The two memory-bound loops: a few float32 rows against many stored tokens, each read once: as chunks that 32
// registers hold (rows_chunk.h), or several tokens side by side where there are 16 (rows_beside.h). Included inside an
// instruction set's namespace.

constexpr int MAX_ROWS = 4;  // in one pass

// Which of two passes that take turns over blocks of the same size, keys and values, one is; `next` is the other's.
enum class Turn { ALONE, FIRST, SECOND };

// Order of a stored token's elements in registers. A pair of bf16 vectors is widened as one: its even elements, then
// its odd ones, which takes half the instructions; rows that meet them are arranged alike.
template <class T>
struct Order {
  static constexpr bool PAIRED = false;
  // Vector AT of a pair that begins at p; -1: the one vector there, that has no other beside it.
  template <int AT>
  static ALWAYS_INLINE V vector(const T *p) {
    return load(p + (AT < 0 ? 0 : AT) * LANES);
  }
  template <int VECTORS>
  static ALWAYS_INLINE void load_token(const T *p, V (&to)[VECTORS]) {
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) to[v] = load(p + v * LANES);
  }
  template <int VECTORS>
  static ALWAYS_INLINE void arrange(V (&)[VECTORS]) {}
  template <int VECTORS>
  static ALWAYS_INLINE void restore(V (&)[VECTORS]) {}
};

template <>
struct Order<bf16> {
  static constexpr bool PAIRED = true;
  template <int AT>
  static ALWAYS_INLINE V vector(const bf16 *p) {
    if (AT < 0) return load(p);
    const VU both = *(const UnalignedPairs *)p;
    return bit_cast<V>(AT == 0 ? both << 16 : both & 0xffff0000u);
  }
  template <int VECTORS>
  static ALWAYS_INLINE void load_token(const bf16 *p, V (&to)[VECTORS]) {
#pragma GCC unroll 16
    for (int v = 0; v + 2 <= VECTORS; v += 2) {
      VU both = *(const UnalignedPairs *)(p + v * LANES);
      to[v] = bit_cast<V>(both << 16);
      to[v + 1] = bit_cast<V>(both & 0xffff0000u);
    }
    if (VECTORS % 2) to[VECTORS - 1] = load(p + (VECTORS - 1) * LANES);
  }
  template <int VECTORS>
  static ALWAYS_INLINE void arrange(V (&x)[VECTORS]) {
#pragma GCC unroll 16
    for (int v = 0; v + 2 <= VECTORS; v += 2) {
      V first = x[v], second = x[v + 1];
      x[v] = even(first, second);
      x[v + 1] = odd(first, second);
    }
  }
  template <int VECTORS>
  static ALWAYS_INLINE void restore(V (&x)[VECTORS]) {
#pragma GCC unroll 16
    for (int v = 0; v + 2 <= VECTORS; v += 2) {
      V first = x[v], second = x[v + 1];
      x[v] = interleave_low(first, second);
      x[v + 1] = interleave_high(first, second);
    }
  }
};

#if LANES == 16
#include "rows_chunk.h"
#else
#include "rows_beside.h"
#endif

// The last dim < LANES elements of tokens; nothing beyond them is read or written.
template <class T>
static void dot_tail(const float *x, int64_t ldx, int64_t rows, const T *tokens, int64_t stride, int64_t n, int64_t dim,
                     float *s, int64_t lds, bool add) {
  for (int64_t j = 0; j < n; ++j)
    for (int64_t r = 0; r < rows; ++r) {
      float dot = sum(load_first(x + r * ldx, dim) * load_first(tokens + j * stride, dim));
      s[r * lds + j] = add ? s[r * lds + j] + dot : dot;
    }
}
template <class T>
static void weigh_tail(const float *p, int64_t ldp, int64_t rows, const T *tokens, int64_t stride, int64_t n,
                       int64_t dim, float *acc, int64_t lda) {
  for (int64_t r = 0; r < rows; ++r) {
    V sum = load_first(acc + r * lda, dim);
    for (int64_t j = 0; j < n; ++j) sum = set1(p[r * ldp + j]) * load_first(tokens + j * stride, dim) + sum;
    store_first(acc + r * lda, sum, dim);
  }
}

// Calls f(pointer as its storage type) for a float, bf16, f16 or int8 pointer.
template <class F>
static ALWAYS_INLINE void with_type(int32_t dtype, const void *data, F f) {
  if (dtype == C2C_F32)
    f((const float *)data);
  else if (dtype == C2C_BF16)
    f((const bf16 *)data);
  else if (dtype == C2C_F16)
    f((const f16 *)data);
  else
    f((const int8_t *)data);
}

static ALWAYS_INLINE int64_t dtype_size(int32_t dtype) {
  return dtype == C2C_F32 || dtype == C2C_I32    ? 4
         : dtype == C2C_I64                      ? 8
         : dtype == C2C_BF16 || dtype == C2C_F16 ? 2
                                                 : 1;
}

// Address of element (i, j, k) of a tensor; the last dimension starts at 0.
static ALWAYS_INLINE const void *at(const c2c_tensor &t, int64_t i, int64_t j = 0, int64_t k = 0) {
  return (const char *)t.data + (i * t.stride[0] + j * t.stride[1] + k * t.stride[2]) * dtype_size(t.dtype);
}

// s[r][j] (+)= x[r] . token[j] for any number of rows and any storage: n tokens of `dim` stored elements, `stride`
// elements apart. Nothing beyond `dim` elements of a row or token is read. `next` (nullable) is what the caller reads
// afterwards.
static void dot_tokens(const float *x, int64_t ldx, int64_t rows, int32_t dtype, const void *tokens, int64_t stride,
                       int64_t n, int64_t dim, float *s, int64_t lds, bool add, const void *next = nullptr,
                       Turn which = Turn::ALONE) {
  with_type(dtype, tokens, [&](auto *token) {
    const int64_t whole = dim / LANES * LANES;
    dot_whole(x, ldx, rows, token, stride, n, whole, s, lds, add, next, which);
    if (whole < dim) dot_tail(x + whole, ldx, rows, token + whole, stride, n, dim - whole, s, lds, add || whole > 0);
  });
}

// acc[r] += sum_j p[r][j] token[j]; nothing beyond `dim` elements is read or written.
static void weigh_tokens(const float *p, int64_t ldp, int64_t rows, int32_t dtype, const void *tokens, int64_t stride,
                         int64_t n, int64_t dim, float *acc, int64_t lda, const void *next = nullptr,
                         Turn which = Turn::ALONE) {
  with_type(dtype, tokens, [&](auto *token) {
    const int64_t whole = dim / LANES * LANES;
    weigh_whole(p, ldp, rows, token, stride, n, whole, acc, lda, next, which);
    if (whole < dim) weigh_tail(p, ldp, rows, token + whole, stride, n, dim - whole, acc + whole, lda);
  });
}

// dst[i] = element i of a stored row in float32.
static void widen_row(float *dst, int32_t dtype, const void *src, int64_t n) {
  with_type(dtype, src, [&](auto *from) { widen(dst, from, n); });
}

static void narrow_row(int32_t dtype, void *dst, const float *src, int64_t n) {
  if (dtype == C2C_F32)
    memcpy(dst, src, n * sizeof(float));
  else if (dtype == C2C_BF16)
    narrow((bf16 *)dst, src, n);
  else
    narrow((f16 *)dst, src, n);
}

// One number of a vector tensor: lengths, positions and indices as integers; gates, sinks and masks as floats.
static ALWAYS_INLINE int64_t integer_at(const c2c_tensor &t, int64_t offset) {
  return t.dtype == C2C_I64 ? ((const int64_t *)t.data)[offset] : ((const int32_t *)t.data)[offset];
}
static ALWAYS_INLINE float number_at(const c2c_tensor &t, int64_t offset) {
  if (t.dtype == C2C_F32) return ((const float *)t.data)[offset];
  if (t.dtype == C2C_BF16) return to_float(((const bf16 *)t.data)[offset]);
  return to_float(((const f16 *)t.data)[offset]);
}
