// The two memory-bound loops: a few float32 rows against many stored tokens, each read once and in the order of
// addresses: reading four tokens side by side halves what memory delivers. Where the hardware needs it, tokens are
// asked for ahead of their use (ahead.h). Included inside an instruction set's namespace.

constexpr int MAX_ROWS = 4;  // in one pass
#if LANES == 16
constexpr int ROW_VECTORS = 16;  // of 32 registers hold rows (dot_chunk) or their sums (weigh_chunk)
constexpr int CHUNK = 8;         // vectors of a token at a time
#else
constexpr int ROW_VECTORS = 32;  // rows stay in the first-level cache: what a token needs of them is read beside it
constexpr int CHUNK = 16;
#endif

// Order of a stored token's elements in registers. A pair of bf16 vectors is widened as one: its even elements, then
// its odd ones, which takes half the instructions; rows that meet them are arranged alike.
template <class T>
struct Order {
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

// A token that several rows use is read once: the compiler would read it for each of them.
template <int ROWS, int VECTORS>
static ALWAYS_INLINE void share(V (&token)[VECTORS], Count<ROWS>) {
#pragma GCC unroll 16
  for (int v = 0; ROWS > 1 && v < VECTORS; ++v) keep_in_register(token[v]);
}

// What is asked for while n tokens are used, `bytes` of each: the token so many places on, and beyond the last one the
// first ones of `next` (null: nothing is asked for), which lie alike.
struct Ahead {
  uintptr_t here, there;  // where to ask for what follows token 0, within these tokens and beyond them
  int64_t stride, steps, n;

  template <class T>
  Ahead(const T *tokens, int64_t stride_, int64_t n_, int64_t bytes, const void *next)
      : stride(stride_ * (int64_t)sizeof(T)), steps(next ? least(n_, div_up(stream_ahead(), bytes)) : 0), n(n_) {
    here = (uintptr_t)tokens + steps * stride;
    there = (uintptr_t)next - (n - steps) * stride;
  }

  ALWAYS_INLINE const char *place(int64_t j) const {
    return (const char *)((j < n - steps ? here : there) + j * stride);
  }

  // Asks for what follows tokens j .. j + TOKENS.
  template <int TOKENS, int BYTES>
  ALWAYS_INLINE void ask(int64_t j) const {
    if (!steps) return;
    const char *from = place(j);
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t, from += stride)
#pragma GCC unroll 8
      for (int byte = 0; byte < BYTES; byte += 64) __builtin_prefetch(from + byte);
  }
};

// s[r][j] (+)= x[r] . token[j] over VECTORS whole vectors, for ROWS rows and n tokens.
template <int ROWS, int VECTORS, class T>
static void dot_chunk(const float *x, int64_t ldx, const T *tokens, int64_t stride, int64_t n, float *s, int64_t lds,
                      bool add, const void *next) {
  constexpr int BYTES = VECTORS * LANES * sizeof(T);
  const Ahead ahead(tokens, stride, n, BYTES, next);
  V row[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < VECTORS; ++v) row[r][v] = load(x + r * ldx + v * LANES);
    Order<T>::arrange(row[r]);
  }
  auto products = [&](const T *token, V(&sum)[ROWS]) __attribute__((always_inline)) {
    V k[VECTORS];
    Order<T>::load_token(token, k);
    share(k, Count<ROWS>{});
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      sum[r] = row[r][0] * k[0];
#pragma GCC unroll 16
      for (int v = 1; v < VECTORS; ++v) sum[r] = row[r][v] * k[v] + sum[r];
    }
  };
  auto four = [&](int64_t j, V(&sum)[4][ROWS]) __attribute__((always_inline)) {
    ahead.ask<4, BYTES>(j);
    for (int t = 0; t < 4; ++t, tokens += stride) products(tokens, sum[t]);
  };
  int64_t j = 0;
#if defined(C2C_AVX512)
  for (; j + 16 <= n; j += 16) {
    V sums[4][ROWS];
    for (int part = 0; part < 4; ++part) {
      V sum[4][ROWS];
      four(j + 4 * part, sum);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) sums[part][r] = quarter_sums(sum[0][r], sum[1][r], sum[2][r], sum[3][r]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      V dots = fold_quarters(sums[0][r], sums[1][r], sums[2][r], sums[3][r]);
      float *to = s + r * lds + j;
      store(to, add ? load(to) + dots : dots);
    }
  }
#endif
  for (; j + 4 <= n; j += 4) {
    V sum[4][ROWS];
    four(j, sum);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      V4 dots = sum4(sum[0][r], sum[1][r], sum[2][r], sum[3][r]);
      float *to = s + r * lds + j;
      for (int t = 0; t < 4; ++t) to[t] = add ? to[t] + dots[t] : dots[t];
    }
  }
  for (; j < n; ++j, tokens += stride) {
    V sum[ROWS];
    products(tokens, sum);
    for (int r = 0; r < ROWS; ++r) {
      // The same order of additions as above, so that a token's score does not depend on its place in a block.
      float dot = sum4(sum[r], sum[r], sum[r], sum[r])[0];
      s[r * lds + j] = add ? s[r * lds + j] + dot : dot;
    }
  }
}

// s[r][j] (+)= x[r] . token[j] for tokens wider than registers hold: each is read through once, rows beside it.
template <int ROWS, class T>
static void dot_wide(const float *x, int64_t ldx, const T *tokens, int64_t stride, int64_t n, int64_t whole, float *s,
                     int64_t lds, bool add, const void *next) {
  constexpr int PAIR = 2 * LANES * sizeof(T);
  const Ahead ahead(tokens, stride, n, whole * sizeof(T), next);
  for (int64_t j = 0; j < n; ++j, tokens += stride) {
    const char *const line = ahead.steps ? ahead.place(j) : nullptr;
    V sums[ROWS][2] = {};
    int64_t d = 0;
    auto step = [&](int half) __attribute__((always_inline)) {
      const V k = load(tokens + d);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) sums[r][half] = load(x + r * ldx + d) * k + sums[r][half];
      d += LANES;
    };
    while (d + 2 * LANES <= whole) {
#pragma GCC unroll 4
      for (int byte = 0; line && byte < PAIR; byte += 64) __builtin_prefetch(line + d * sizeof(T) + byte);
      step(0);
      step(1);
    }
    if (d < whole) step(0);
    for (int r = 0; r < ROWS; ++r) {
      const float dot = sum(sums[r][0] + sums[r][1]);
      s[r * lds + j] = add ? s[r * lds + j] + dot : dot;
    }
  }
}

// acc[r] += sum_j p[r][j] token[j] over VECTORS whole vectors, for ROWS rows.
template <int ROWS, int VECTORS, class T>
static void weigh_chunk(const float *p, int64_t ldp, const T *tokens, int64_t stride, int64_t n, float *acc,
                        int64_t lda, const void *next) {
  constexpr int BYTES = VECTORS * LANES * sizeof(T);
  const Ahead ahead(tokens, stride, n, BYTES, next);
  V sum[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < VECTORS; ++v) sum[r][v] = load(acc + r * lda + v * LANES);
    Order<T>::arrange(sum[r]);
  }
  for (int64_t j = 0; j < n; ++j, tokens += stride) {
    ahead.ask<1, BYTES>(j);
    V value[VECTORS];
    Order<T>::load_token(tokens, value);
    share(value, Count<ROWS>{});
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const V weight = set1(p[r * ldp + j]);
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = weight * value[v] + sum[r][v];
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    Order<T>::restore(sum[r]);
    for (int v = 0; v < VECTORS; ++v) store(acc + r * lda + v * LANES, sum[r][v]);
  }
}

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

// Walks rows and dimensions of a product in chunks that registers hold:
// f(first row, count of rows, first dimension, vectors).
template <class F>
static ALWAYS_INLINE void each_chunk(int64_t rows, int64_t dim, F f) {
  const int64_t vectors = dim / LANES;
  const int64_t together =
      most<int64_t>(1, least<int64_t>(MAX_ROWS, ROW_VECTORS / most<int64_t>(1, least<int64_t>(CHUNK, vectors))));
  for (int64_t r = 0; r < rows; r += together)
    for (int64_t v = 0; v < vectors;) {
      const int64_t left = vectors - v;
      const int64_t take = left >= CHUNK ? CHUNK : left >= CHUNK / 2 ? CHUNK / 2 : left >= CHUNK / 4 ? CHUNK / 4 : 1;
      f(r, least(together, rows - r), v * LANES, take);
      v += take;
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

// Calls f(Count<rows>, Count<vectors>) for the sizes that each_chunk gives.
template <class F>
static ALWAYS_INLINE void with_chunk(int64_t rows, int64_t vectors, F f) {
  with_count<MAX_ROWS>(rows, [&](auto r) __attribute__((always_inline)) {
    constexpr int R = decltype(r)::value;
    if (vectors == 1) return f(r, Count<1>{});
    if (vectors == CHUNK / 4) return f(r, Count<CHUNK / 4>{});
    if (vectors == CHUNK / 2) return f(r, Count<CHUNK / 2>{});
    if constexpr (R * CHUNK <= ROW_VECTORS) f(r, Count<CHUNK>{});
  });
}

// What a chunk of a pass over tokens asks for beyond its last one: its part of `next`, where no chunk is left that will
// read these tokens' next dimensions; nothing where rows before have had the tokens fetched.
template <class T>
static ALWAYS_INLINE const void *after_chunk(const T *tokens, const void *next, int64_t row, int64_t end,
                                             int64_t whole) {
  return row > 0 || !next ? nullptr : end < whole ? (const void *)(tokens + end) : next;
}

// s[r][j] (+)= x[r] . token[j] for any number of rows and any storage: n tokens of `dim` stored elements, `stride`
// elements apart. Nothing beyond `dim` elements of a row or token is read. `next` (nullable) is what the caller reads
// afterwards.
static void dot_tokens(const float *x, int64_t ldx, int64_t rows, int32_t dtype, const void *tokens, int64_t stride,
                       int64_t n, int64_t dim, float *s, int64_t lds, bool add, const void *next = nullptr) {
  with_type(dtype, tokens, [&](auto *token) {
    const int64_t whole = dim / LANES * LANES;
    if (whole > CHUNK * LANES) {
      for (int64_t row = 0; row < rows; row += MAX_ROWS)
        with_count<MAX_ROWS>(least<int64_t>(MAX_ROWS, rows - row), [&](auto r) {
          dot_wide<decltype(r)::value>(x + row * ldx, ldx, token, stride, n, whole, s + row * lds, lds, add,
                                       row > 0 ? nullptr : next);
        });
    } else {
      each_chunk(rows, dim, [&](int64_t row, int64_t count, int64_t first, int64_t vectors) {
        const void *after = after_chunk(token, next, row, first + vectors * LANES, whole);
        with_chunk(count, vectors, [&](auto r, auto v) {
          dot_chunk<decltype(r)::value, decltype(v)::value>(x + row * ldx + first, ldx, token + first, stride, n,
                                                            s + row * lds, lds, add || first > 0, after);
        });
      });
    }
    if (whole < dim) dot_tail(x + whole, ldx, rows, token + whole, stride, n, dim - whole, s, lds, add || whole > 0);
  });
}

// acc[r] += sum_j p[r][j] token[j]; nothing beyond `dim` elements is read or written.
static void weigh_tokens(const float *p, int64_t ldp, int64_t rows, int32_t dtype, const void *tokens, int64_t stride,
                         int64_t n, int64_t dim, float *acc, int64_t lda, const void *next = nullptr) {
  with_type(dtype, tokens, [&](auto *token) {
    const int64_t whole = dim / LANES * LANES;
    each_chunk(rows, dim, [&](int64_t row, int64_t count, int64_t first, int64_t vectors) {
      const void *after = after_chunk(token, next, row, first + vectors * LANES, whole);
      with_chunk(count, vectors, [&](auto r, auto v) {
        weigh_chunk<decltype(r)::value, decltype(v)::value>(p + row * ldp, ldp, token + first, stride, n,
                                                            acc + row * lda + first, lda, after);
      });
    });
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
