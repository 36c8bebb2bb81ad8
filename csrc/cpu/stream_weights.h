// Few float32 rows against the rows of a weight matrix, which passes by once: one-token projections and fusers, bound
// by memory. Included inside an instruction set's namespace.

#if defined(C2C_AVX2)
constexpr int WEIGHT_CHAINS = 4;    // of additions for a row: as many loads of 32 bytes as the latency of one covers
constexpr int WEIGHTS_AHEAD = 512;  // bytes: Zen 3 reads 5 to 8 % faster from memory, as fast in its caches
constexpr int SHORT_WEIGHTS = 64;   // numbers of a row, up to which rows pass side by side as tokens do

// Sums of x[r] . weight over `dim` elements, folded to one vector a row; the same chains for any number of rows.
template <int ROWS, class T>
static ALWAYS_INLINE void stream_row(const float *x, int64_t ldx, const T *weight, int64_t dim, V (&folded)[ROWS]) {
  V sum[ROWS][WEIGHT_CHAINS] = {};
  auto step = [&](int64_t d, int chain) __attribute__((always_inline)) {
    V w = load(weight + d);
    if (ROWS > 1) keep_in_register(w);
#pragma GCC unroll 2
    for (int r = 0; r < ROWS; ++r) sum[r][chain] = load(x + r * ldx + d) * w + sum[r][chain];
  };
  int64_t d = 0;
  for (; d + WEIGHT_CHAINS * LANES <= dim; d += WEIGHT_CHAINS * LANES) {
#pragma GCC unroll 2
    for (int byte = 0; byte < WEIGHT_CHAINS * LANES * (int)sizeof(T); byte += 64)
      __builtin_prefetch((const char *)(weight + d) + WEIGHTS_AHEAD + byte);
#pragma GCC unroll 4
    for (int chain = 0; chain < WEIGHT_CHAINS; ++chain) step(d + chain * LANES, chain);
  }
  for (; d + LANES <= dim; d += LANES) step(d, 0);
  for (int r = 0; r < ROWS; ++r) {
    folded[r] = (sum[r][0] + sum[r][1]) + (sum[r][2] + sum[r][3]);
    if (d < dim) folded[r] = load_first(x + r * ldx + d, dim - d) * load_first(weight + d, dim - d) + folded[r];
  }
}

// s[r][j] = x[r] . weights[j] of n <= 4 weight rows, which the next rows of x find in the first-level cache.
template <int N, int ROWS, class T>
static ALWAYS_INLINE void stream_rows(const float *x, int64_t ldx, const T *weights, int64_t stride, int64_t dim,
                                      float *s, int64_t lds) {
  V folded[N][ROWS];
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) stream_row<ROWS>(x, ldx, weights + j * stride, dim, folded[j]);
  for (int r = 0; r < ROWS; ++r) {
    const V4 dots = sum4(folded[0][r], folded[N > 1][r], folded[N > 2 ? 2 : 0][r], folded[N > 3 ? 3 : 0][r]);
    for (int j = 0; j < N; ++j) s[r * lds + j] = dots[j];
  }
}

static void dot_weights(const float *x, int64_t ldx, int64_t rows, int32_t dtype, const void *weights, int64_t stride,
                        int64_t n, int64_t dim, float *s, int64_t lds, const void *next) {
  if (dim <= SHORT_WEIGHTS) return dot_tokens(x, ldx, rows, dtype, weights, stride, n, dim, s, lds, false, next);
  with_type(dtype, weights, [&](auto *weight) {
    for (int64_t j = 0; j < n; j += 4)
      with_count<4>(least<int64_t>(4, n - j), [&](auto taken) {
        int64_t r = 0;
        auto take = [&](auto count) __attribute__((always_inline)) {
          stream_rows<decltype(taken)::value, decltype(count)::value>(x + r * ldx, ldx, weight + j * stride, stride,
                                                                      dim, s + r * lds + j, lds);
        };
        for (; r + 2 <= rows; r += 2) take(Count<2>{});
        if (r < rows) take(Count<1>{});
      });
  });
}
#else
// s[r][j] = x[r] . weights[j] for n weight rows of `dim` elements; `next` is what the caller reads afterwards.
static void dot_weights(const float *x, int64_t ldx, int64_t rows, int32_t dtype, const void *weights, int64_t stride,
                        int64_t n, int64_t dim, float *s, int64_t lds, const void *next) {
  dot_tokens(x, ldx, rows, dtype, weights, stride, n, dim, s, lds, false, next);
}
#endif
