// Few float32 rows against stored tokens with 32 registers, each token read in the order of addresses: reading four
// tokens side by side halves what memory delivers. Where the hardware needs it, tokens are asked for ahead of their use
// (ahead.h). Included inside an instruction set's namespace.

constexpr int ROW_VECTORS = 16;  // of 32 registers hold rows (dot_chunk) or their sums (weigh_chunk)
constexpr int CHUNK = 8;         // vectors of a token at a time
#if defined(__SANITIZE_ADDRESS__)
constexpr int STRAIGHT = 1;  // with checks on every load straight code, and both forms of it, take minutes to compile
#else
constexpr int STRAIGHT = 4;  // steps of a loop that become one piece of code
#endif

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

  // Asks for what follows token j, `bytes` of it.
  ALWAYS_INLINE void ask_token(int64_t j, int64_t bytes) const {
    const char *const from = place(j);
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(from + byte);
  }

  // Asks for what follows tokens j .. j + TOKENS.
  template <int TOKENS, int BYTES>
  ALWAYS_INLINE void ask(int64_t j) const {
    const char *from = place(j);
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t, from += stride)
#pragma GCC unroll 8
      for (int byte = 0; byte < BYTES; byte += 64) __builtin_prefetch(from + byte);
  }
};

// s[r][j] (+)= dots of ROWS rows and n tokens, BYTES of each: products(token, sums) gives a vector of partial sums a
// row. Sixteen tokens are one straight piece of code, so that loads of the next ones begin before sums are folded.
template <int ROWS, int BYTES, bool ASKS, class T, class F>
static ALWAYS_INLINE void dot_each(const T *tokens, int64_t stride, int64_t n, float *s, int64_t lds, bool add,
                                   const Ahead &ahead, F products) {
  auto four = [&](int64_t j, V(&sum)[4][ROWS]) __attribute__((always_inline)) {
    if constexpr (ASKS) ahead.ask<4, BYTES>(j);
#pragma GCC unroll STRAIGHT
    for (int t = 0; t < 4; ++t, tokens += stride) products(tokens, sum[t]);
  };
  int64_t j = 0;
  for (; j + 16 <= n; j += 16) {
    V sums[4][ROWS];
#pragma GCC unroll STRAIGHT
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

// s[r][j] (+)= x[r] . token[j] over VECTORS whole vectors, for ROWS rows and n tokens.
template <bool ASKS, int ROWS, int VECTORS, class T>
static void dot_chunk(const float *x, int64_t ldx, const T *tokens, int64_t stride, int64_t n, float *s, int64_t lds,
                      bool add, const void *next) {
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
  constexpr int BYTES = VECTORS * LANES * sizeof(T);
  const Ahead ahead(tokens, stride, n, BYTES, next);
  dot_each<ROWS, BYTES, ASKS>(tokens, stride, n, s, lds, add, ahead, products);
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
template <bool ASKS, int ROWS, int VECTORS, class T>
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
    if constexpr (ASKS) ahead.ask<1, BYTES>(j);
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

// AVX-512 without BF16, and AMX, are Intel's, which asks: one form of every loop, which asks for what is there already
// where nothing comes next.
#if defined(C2C_AMX) || !defined(C2C_MATRIX_TILES)
constexpr bool ALWAYS_ASKS = true;
#else
constexpr bool ALWAYS_ASKS = STRAIGHT == 1;
#endif

// Calls f(Count<whether anything is asked for>): a loop that only might ask reads a quarter slower.
template <class F>
static ALWAYS_INLINE void with_asking(const void *next, F f) {
  if constexpr (ALWAYS_ASKS)
    f(Count<1>{});
  else if (next && stream_ahead() > 0)
    f(Count<1>{});
  else
    f(Count<0>{});
}

// What a chunk of a pass over tokens asks for beyond its last one: its part of `next`, where no chunk is left that will
// read these tokens' next dimensions; nothing where rows before have had the tokens fetched.
template <class T>
static ALWAYS_INLINE const void *after_chunk(const T *tokens, const void *next, int64_t row, int64_t end,
                                             int64_t whole) {
  return row > 0 || !next ? nullptr : end < whole ? (const void *)(tokens + end) : next;
}

// s[r][j] (+)= x[r] . token[j] over whole vectors.
template <class T>
static ALWAYS_INLINE void dot_whole(const float *x, int64_t ldx, int64_t rows, const T *token, int64_t stride,
                                    int64_t n, int64_t whole, float *s, int64_t lds, bool add, const void *next, Turn) {
  if (whole > CHUNK * LANES) {
    for (int64_t row = 0; row < rows; row += MAX_ROWS)
      with_count<MAX_ROWS>(least<int64_t>(MAX_ROWS, rows - row), [&](auto r) {
        dot_wide<decltype(r)::value>(x + row * ldx, ldx, token, stride, n, whole, s + row * lds, lds, add,
                                     row > 0 ? nullptr : next);
      });
  } else {
    each_chunk(rows, whole, [&](int64_t row, int64_t count, int64_t first, int64_t vectors) {
      const void *after = after_chunk(token, next, row, first + vectors * LANES, whole);
      with_asking(after, [&](auto asks) {
        with_chunk(count, vectors, [&](auto r, auto v) {
          dot_chunk<asks.value, r.value, v.value>(x + row * ldx + first, ldx, token + first, stride, n, s + row * lds,
                                                  lds, add || first > 0, after);
        });
      });
    });
  }
}

// acc[r] += sum_j p[r][j] token[j] over whole vectors.
template <class T>
static ALWAYS_INLINE void weigh_whole(const float *p, int64_t ldp, int64_t rows, const T *token, int64_t stride,
                                      int64_t n, int64_t whole, float *acc, int64_t lda, const void *next, Turn) {
  each_chunk(rows, whole, [&](int64_t row, int64_t count, int64_t first, int64_t vectors) {
    const void *after = after_chunk(token, next, row, first + vectors * LANES, whole);
    with_asking(after, [&](auto asks) {
      with_chunk(count, vectors, [&](auto r, auto v) {
        weigh_chunk<asks.value, r.value, v.value>(p + row * ldp, ldp, token + first, stride, n, acc + row * lda + first,
                                                  lda, after);
      });
    });
  });
}
