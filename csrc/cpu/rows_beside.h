// Few float32 rows against stored tokens with 16 registers: tokens side by side, as many as make 8 to 12 sums with the
// rows. A vector of a token is read once for all rows, a vector of a row once for all these tokens, so that
// multiply-adds are the bound from two rows on, and loads for one. Included inside an instruction set's namespace.

constexpr int64_t ARRANGED = 512;  // elements of rows that are arranged like tokens at a time

constexpr int ROWS_BESIDE = 3;  // at most
#if defined(__x86_64__)
constexpr int64_t BYTES_AHEAD = 4096;  // Zen 3: half as much again from the last-level cache
#else
constexpr int64_t BYTES_AHEAD = 0;  // unmeasured
#endif
constexpr int64_t LONG_BLOCK = 16384;  // bytes from which on runs are long enough for the processor to follow

template <int ROWS>
constexpr int tokens_beside() {
  return ROWS == 1 ? 8 : 4;
}

static ALWAYS_INLINE V4 load4(const float *p) {
  V4 x;
  memcpy(&x, p, sizeof(x));
  return x;
}
static ALWAYS_INLINE void store4(float *p, V4 x) { memcpy(p, &x, sizeof(x)); }

// f(first row, Count<rows>) for all rows, at most ROWS_BESIDE at once and evenly many.
template <class F>
static ALWAYS_INLINE void each_rows(int64_t rows, F f) {
  for (int64_t r = 0; r < rows;) {
    const int64_t left = rows - r, take = div_up(left, div_up(left, ROWS_BESIDE));
    with_count<ROWS_BESIDE>(take, [&](auto count) { f(r, count); });
    r += take;
  }
}

// What a pass over n tokens asks for. Reading tokens side by side keeps the processor from seeing a stream, and one
// stream a core is short of what memory delivers (Zen 3: 25 GB/s of 38 with two cores). Keys and values that take turns
// are asked for a block ahead, in four runs side by side: the halves of both, of each half the first part during the
// keys' pass, the second one during the values'. Short blocks are asked for in the order of addresses, BYTES_AHEAD
// further on. Nothing is asked for where tokens do not lie side by side or a pass before has had them fetched.
struct Lines {
  const char *line;
  int64_t other = 0, half = 0;  // bytes from a run to that of the other tensor, and to that of the second half
  int64_t step = 0, turn = 0;   // bytes to the next lines of all runs, and to what is next where a pass takes two
  int64_t at = 0;               // run, where it takes one

  template <class T>
  Lines(const T *tokens, int64_t stride, int64_t vectors, int64_t n, bool fetched, const void *next, Turn which)
      : line((const char *)tokens) {
    if (BYTES_AHEAD == 0 || fetched || stride != vectors * LANES) return;
    const int64_t bytes = n * stride * sizeof(T);
    if (which == Turn::ALONE || bytes < LONG_BLOCK) {
      line += BYTES_AHEAD;
      other = 64, half = turn = 128, step = 256;
      return;
    }
    const uintptr_t keys = which == Turn::FIRST ? (uintptr_t)tokens + bytes : (uintptr_t)next;
    const uintptr_t values = which == Turn::FIRST ? (uintptr_t)next + bytes : (uintptr_t)tokens + bytes;
    line = (const char *)keys + (which == Turn::FIRST ? 0 : bytes / 4);
    other = values - keys;
    half = turn = bytes / 2;
    step = 64;
  }

  // Asks for as many lines as BYTES fill, 1, 2 or a multiple of 4.
  template <int BYTES>
  ALWAYS_INLINE void take() {
    constexpr int COUNT = BYTES / 64;
    if (BYTES_AHEAD == 0 || COUNT == 0) return;
    if (COUNT == 1) {
      __builtin_prefetch(line + at % 2 * other + at / 2 * half);
      at = (at + 1) % 4;
      line += at == 0 ? step : 0;
      return;
    }
    if (COUNT == 2) {
      __builtin_prefetch(line);
      __builtin_prefetch(line + other);
      line += turn;
      turn = step - turn;
      return;
    }
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; ++i) __builtin_prefetch(line + i % 2 * other + i / 2 % 2 * half + i / 4 * 64);
    line += COUNT / 4 * step;
  }
};

// f(first vector of a pair, Count<which>) for all of a token's vectors: the first ones of pairs, then the second ones,
// which leaves a register more than both at once; then one that has no other beside it (Count<-1>).
template <class F>
static ALWAYS_INLINE void each_vector(int64_t vectors, F f) {
  const int64_t paired = vectors / 2 * 2;
  for (int64_t v = 0; v < paired; v += 2) f(v, Count<0>{});
  for (int64_t v = 0; v < paired; v += 2) f(v, Count<1>{});
  if (paired < vectors) f(paired, Count<-1>{});
}

// The products of ROWS rows with TOKENS tokens, [ROWS][TOKENS].
template <int ROWS, int TOKENS, class T>
static ALWAYS_INLINE void dot_group(const float *x, int64_t ldx, const T *const (&token)[TOKENS], int64_t vectors,
                                    Lines &lines, V (&sum)[ROWS][TOKENS]) {
  each_vector(vectors, [&](int64_t first, auto which) __attribute__((always_inline)) {
    constexpr int AT = decltype(which)::value;
    if (AT <= 0) lines.take<2 * LANES * sizeof(T) * TOKENS>();
    V row[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) row[r] = load(x + r * ldx + (first + (AT < 0 ? 0 : AT)) * LANES);
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) {
      V k = Order<T>::template vector<AT>(token[t] + first * LANES);
      keep_in_register(k);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) sum[r][t] = row[r] * k + sum[r][t];
    }
  });
}

// s[r][j] (+)= x[r] . token[j] over whole vectors, for ROWS rows and n tokens.
template <int ROWS, class T>
static void dot_beside(const float *x, int64_t ldx, const T *tokens, int64_t stride, int64_t n, int64_t vectors,
                       float *s, int64_t lds, bool add, Lines lines) {
  constexpr int TOKENS = tokens_beside<ROWS>();
  for (int64_t j = 0; j < n; j += TOKENS, tokens += TOKENS * stride) {
    const int64_t count = least<int64_t>(TOKENS, n - j);
    // Tokens that a group lacks are its last one again: a token's score does not depend on its place in a block.
    const T *token[TOKENS];
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) token[t] = tokens + least<int64_t>(t, count - 1) * stride;
    V sum[ROWS][TOKENS] = {};
    dot_group(x, ldx, token, vectors, lines, sum);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
      for (int t = 0; t < TOKENS; t += 4) {
        V4 dots = sum4(sum[r][t], sum[r][t + 1], sum[r][t + 2], sum[r][t + 3]);
        float *const to = s + r * lds + j + t;
        if (t + 4 <= count) {
          if (add) dots += load4(to);
          store4(to, dots);
        } else {
          for (int64_t i = t; i < count; ++i) to[i - t] = add ? to[i - t] + dots[i - t] : dots[i - t];
        }
      }
  }
}

// Rows of whole vectors in the order of stored tokens' elements.
template <class T>
static ALWAYS_INLINE void arrange_rows(const float *x, int64_t ldx, int64_t rows, int64_t vectors, float *to) {
  for (int64_t r = 0; r < rows; ++r, x += ldx, to += ARRANGED) {
    int64_t v = 0;
    for (; v + 2 <= vectors; v += 2) {
      V pair[2] = {load(x + v * LANES), load(x + (v + 1) * LANES)};
      Order<T>::arrange(pair);
      store(to + v * LANES, pair[0]);
      store(to + (v + 1) * LANES, pair[1]);
    }
    if (v < vectors) store(to + v * LANES, load(x + v * LANES));
  }
}

template <class T>
static void dot_whole(const float *x, int64_t ldx, int64_t rows, const T *tokens, int64_t stride, int64_t n,
                      int64_t whole, float *s, int64_t lds, bool add, const void *next, Turn which) {
  each_rows(rows, [&](int64_t row, auto count) {
    constexpr int ROWS = decltype(count)::value;
    const float *from = x + row * ldx;
    if (!Order<T>::PAIRED)
      return dot_beside<ROWS>(from, ldx, tokens, stride, n, whole / LANES, s + row * lds, lds, add,
                              Lines(tokens, stride, whole / LANES, n, row > 0, next, which));
    float arranged[ROWS * ARRANGED];
    for (int64_t d = 0; d < whole; d += ARRANGED) {
      const int64_t vectors = least(ARRANGED, whole - d) / LANES;
      arrange_rows<T>(from + d, ldx, ROWS, vectors, arranged);
      dot_beside<ROWS>(arranged, ARRANGED, tokens + d, stride, n, vectors, s + row * lds, lds, add || d > 0,
                       Lines(tokens + d, stride, vectors, n, row > 0, next, which));
    }
  });
}

// acc[r] += sum_t p[r][t] token[t] over whole vectors, for ROWS rows and TOKENS tokens.
template <int ROWS, int TOKENS, class T>
static ALWAYS_INLINE void weigh_group(const float *p, int64_t ldp, const T *tokens, int64_t stride, int64_t vectors,
                                      Lines &lines, float *acc, int64_t lda) {
  V weight[ROWS][TOKENS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) weight[r][t] = set1(p[r * ldp + t]);
  each_vector(vectors, [&](int64_t first, auto which) __attribute__((always_inline)) {
    constexpr int AT = decltype(which)::value;
    if (AT <= 0) lines.take<2 * LANES * sizeof(T) * TOKENS>();
    float *const to = acc + (first + (AT < 0 ? 0 : AT)) * LANES;
    V sum[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) sum[r] = load(to + r * lda);
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) {
      V value = Order<T>::template vector<AT>(tokens + t * stride + first * LANES);
      keep_in_register(value);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) sum[r] = weight[r][t] * value + sum[r];
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) store(to + r * lda, sum[r]);
  });
}

template <class T>
static void weigh_whole(const float *p, int64_t ldp, int64_t rows, const T *tokens, int64_t stride, int64_t n,
                        int64_t whole, float *acc, int64_t lda, const void *next, Turn which) {
  const int64_t vectors = whole / LANES;
  auto reorder = [&](bool back) __attribute__((always_inline)) {
    for (int64_t r = 0; Order<T>::PAIRED && r < rows; ++r)
      for (float *a = acc + r * lda; a + 2 * LANES <= acc + r * lda + whole; a += 2 * LANES) {
        V pair[2] = {load(a), load(a + LANES)};
        back ? Order<T>::restore(pair) : Order<T>::arrange(pair);
        store(a, pair[0]);
        store(a + LANES, pair[1]);
      }
  };
  reorder(false);
  each_rows(rows, [&](int64_t row, auto count) {
    constexpr int ROWS = decltype(count)::value, TOKENS = tokens_beside<ROWS>();
    const float *weights = p + row * ldp;
    float *sums = acc + row * lda;
    const T *from = tokens;
    Lines lines(tokens, stride, vectors, n, row > 0, next, which);
    int64_t j = 0;
    for (; j + TOKENS <= n; j += TOKENS, from += TOKENS * stride)
      weigh_group<ROWS, TOKENS>(weights + j, ldp, from, stride, vectors, lines, sums, lda);
    for (; j < n; ++j, from += stride) weigh_group<ROWS, 1>(weights + j, ldp, from, stride, vectors, lines, sums, lda);
  });
  reorder(true);
}
