// The two memory-bound loops: a few float32 rows against many stored tokens, each read once and in order.
// Included inside an instruction set's namespace.

#if LANES == 16
constexpr int MAX_ROWS = 4;  // rows in registers: 4 x 4 accumulators of 32 registers
#else
constexpr int MAX_ROWS = 3;  // 3 x 4 accumulators of 16 registers
#endif

// Elements from a token to the one that is fetched while it is read: 4 to 6 KB ahead, by measurement (2x without).
template <class T>
static ALWAYS_INLINE int64_t fetch_ahead(int64_t stride) {
  const int64_t bytes = sizeof(T) == 4 ? 4096 : 6144;
  return most<int64_t>(4, bytes / (most<int64_t>(stride, 1) * (int64_t)sizeof(T))) * stride;
}

// s[r][j] (+)= x[r] . token[j] for ROWS rows and n tokens of `dim` stored elements.
// Nothing beyond `dim` elements of a row or token is read.
template <int ROWS, class T>
static inline void dot_rows(const float *x, int64_t ldx, const T *tokens, int64_t stride, int64_t n, int64_t dim,
                            float *s, int64_t lds, bool add) {
  const int64_t whole = dim / LANES * LANES, ahead = fetch_ahead<T>(stride);
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) {
    V acc[ROWS][4] = {};
    const T *token[4] = {tokens + j * stride, tokens + (j + 1) * stride, tokens + (j + 2) * stride,
                         tokens + (j + 3) * stride};
    for (int64_t d = 0; d < whole; d += LANES) {
      V k[4];
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        __builtin_prefetch(token[t] + d + ahead);
        k[t] = load(token[t] + d);
      }
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        V q = load(x + r * ldx + d);
#pragma GCC unroll 4
        for (int t = 0; t < 4; ++t) acc[r][t] = q * k[t] + acc[r][t];
      }
    }
    if (whole < dim)
      for (int t = 0; t < 4; ++t) {
        V k = load_first(token[t] + whole, dim - whole);
        for (int r = 0; r < ROWS; ++r) acc[r][t] = load_first(x + r * ldx + whole, dim - whole) * k + acc[r][t];
      }
    for (int r = 0; r < ROWS; ++r) {
      V4 dots = sum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
      for (int t = 0; t < 4; ++t) s[r * lds + j + t] = add ? s[r * lds + j + t] + dots[t] : dots[t];
    }
  }
  for (; j < n; ++j)
    for (int r = 0; r < ROWS; ++r) {
      V acc = {};
      const T *token = tokens + j * stride;
      for (int64_t d = 0; d < whole; d += LANES) acc = load(x + r * ldx + d) * load(token + d) + acc;
      if (whole < dim)
        acc = load_first(x + r * ldx + whole, dim - whole) * load_first(token + whole, dim - whole) + acc;
      // The same order of additions as sum4, so that a token's score does not depend on its place in a block.
      float dot = sum4(acc, acc, acc, acc)[0];
      s[r * lds + j] = add ? s[r * lds + j] + dot : dot;
    }
}

// acc[r] += sum_j p[r][j] token[j] for ROWS rows; nothing beyond `dim` elements is read or written.
template <int ROWS, class T>
static inline void weigh_rows(const float *p, int64_t ldp, const T *tokens, int64_t stride, int64_t n, int64_t dim,
                              float *acc, int64_t lda) {
  const int64_t whole = dim / LANES * LANES, ahead = fetch_ahead<T>(stride);
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) {
    V weight[ROWS][4];
    for (int r = 0; r < ROWS; ++r)
      for (int t = 0; t < 4; ++t) weight[r][t] = set1(p[r * ldp + j + t]);
    const T *token[4] = {tokens + j * stride, tokens + (j + 1) * stride, tokens + (j + 2) * stride,
                         tokens + (j + 3) * stride};
    for (int64_t d = 0; d < whole; d += LANES) {
      V v[4];
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        __builtin_prefetch(token[t] + d + ahead);
        v[t] = load(token[t] + d);
      }
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        V a = load(acc + r * lda + d);
#pragma GCC unroll 4
        for (int t = 0; t < 4; ++t) a = weight[r][t] * v[t] + a;
        store(acc + r * lda + d, a);
      }
    }
    if (whole < dim)
      for (int r = 0; r < ROWS; ++r) {
        float *tail = acc + r * lda + whole;
        V a = load_first(tail, dim - whole);
        for (int t = 0; t < 4; ++t) a = weight[r][t] * load_first(token[t] + whole, dim - whole) + a;
        store_first(tail, a, dim - whole);
      }
  }
  for (; j < n; ++j)
    for (int r = 0; r < ROWS; ++r) {
      V weight = set1(p[r * ldp + j]);
      const T *token = tokens + j * stride;
      for (int64_t d = 0; d < whole; d += LANES)
        store(acc + r * lda + d, weight * load(token + d) + load(acc + r * lda + d));
      if (whole < dim) {
        float *tail = acc + r * lda + whole;
        store_first(tail, weight * load_first(token + whole, dim - whole) + load_first(tail, dim - whole), dim - whole);
      }
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

// dot_rows and weigh_rows for any number of rows and any storage. Tokens start at `tokens`, `stride` elements apart.
static void dot_tokens(const float *x, int64_t ldx, int64_t rows, int32_t dtype, const void *tokens, int64_t stride,
                       int64_t n, int64_t dim, float *s, int64_t lds, bool add) {
  with_type(dtype, tokens, [&](auto *token) {
    for (int64_t r = 0; r < rows; r += MAX_ROWS) {
      const float *from = x + r * ldx;
      float *to = s + r * lds;
      switch (least<int64_t>(MAX_ROWS, rows - r)) {
        case 1: dot_rows<1>(from, ldx, token, stride, n, dim, to, lds, add); break;
        case 2: dot_rows<2>(from, ldx, token, stride, n, dim, to, lds, add); break;
        case 3: dot_rows<3>(from, ldx, token, stride, n, dim, to, lds, add); break;
#if LANES == 16
        case 4: dot_rows<4>(from, ldx, token, stride, n, dim, to, lds, add); break;
#endif
      }
    }
  });
}

static void weigh_tokens(const float *p, int64_t ldp, int64_t rows, int32_t dtype, const void *tokens, int64_t stride,
                         int64_t n, int64_t dim, float *acc, int64_t lda) {
  with_type(dtype, tokens, [&](auto *token) {
    for (int64_t r = 0; r < rows; r += MAX_ROWS) {
      const float *from = p + r * ldp;
      float *to = acc + r * lda;
      switch (least<int64_t>(MAX_ROWS, rows - r)) {
        case 1: weigh_rows<1>(from, ldp, token, stride, n, dim, to, lda); break;
        case 2: weigh_rows<2>(from, ldp, token, stride, n, dim, to, lda); break;
        case 3: weigh_rows<3>(from, ldp, token, stride, n, dim, to, lda); break;
#if LANES == 16
        case 4: weigh_rows<4>(from, ldp, token, stride, n, dim, to, lda); break;
#endif
      }
    }
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
