// The loops of rows_chunk.h over bfloat16 tokens, multiplied as they are stored: dot products of pairs (vdpbf16ps) with
// rows that are bfloat16 too, half the instructions of widening. Included inside an instruction set's namespace.
//
// Queries are multiplied unscaled, as they came; weights are rounded to bfloat16, as PyTorch's attention rounds them.
// Values go in pairs of tokens, from a block's first; dims in whole vectors of 32.

#if defined(C2C_MATRIX_TILES)
static ALWAYS_INLINE __m512bh load_pairs(const bf16 *p) { return (__m512bh)(*(const UnalignedPairs *)p); }

static ALWAYS_INLINE V add_pairs(V sum, __m512bh a, __m512bh b) { return (V)_mm512_dpbf16_ps((__m512)sum, a, b); }

// s[r][j] (+)= x[r] . token[j] over VECTORS vectors of 32, for ROWS rows and n tokens.
template <bool ASKS, int ROWS, int VECTORS>
static void dot_pairs_chunk(const bf16 *x, int64_t ldx, const bf16 *tokens, int64_t stride, int64_t n, float *s,
                            int64_t lds, bool add, const void *next) {
  __m512bh row[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) row[r][v] = load_pairs(x + r * ldx + v * DEPTH);
  auto products = [&](const bf16 *token, V(&sum)[ROWS]) __attribute__((always_inline)) {
    V k[VECTORS];
    for (int v = 0; v < VECTORS; ++v) k[v] = (V)load_pairs(token + v * DEPTH);
    share(k, Count<ROWS>{});
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      sum[r] = V{};
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[r] = add_pairs(sum[r], row[r][v], (__m512bh)k[v]);
    }
  };
  const Ahead ahead(tokens, stride, n, VECTORS * 64, next);
  dot_each<ROWS, VECTORS * 64, ASKS>(tokens, stride, n, s, lds, add, ahead, products);
}

// Columns of 32 numbers as two vectors of sums hold them, which meet pairs that were interleaved within quarters:
// 0 .. 3 of every eight, and 4 .. 7; and back.
static ALWAYS_INLINE void part_quarters(V &first, V &second) {
  const V low = (V)_mm512_shuffle_f32x4((__m512)first, (__m512)second, 0x88);
  const V high = (V)_mm512_shuffle_f32x4((__m512)first, (__m512)second, 0xdd);
  first = low, second = high;
}
static ALWAYS_INLINE void join_quarters(V &low, V &high) {
  const VU places = {0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23};
  const V first = (V)_mm512_permutex2var_ps((__m512)low, (__m512i)places, (__m512)high);
  const V second = (V)_mm512_permutex2var_ps((__m512)low, (__m512i)(places + 8), (__m512)high);
  low = first, high = second;
}

// acc[r] += sum_j p[r][j] token[j] over VECTORS vectors of 32, for ROWS rows. p[r][n] is 0 where n is odd.
template <bool ASKS, int ROWS, int VECTORS>
static void weigh_pairs_chunk(const bf16 *p, int64_t ldp, const bf16 *tokens, int64_t stride, int64_t n, float *acc,
                              int64_t lda, const void *next) {
  const Ahead ahead(tokens, stride, n, VECTORS * 64, next);
  V sum[ROWS][VECTORS][2];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) {
      for (int half = 0; half < 2; ++half) sum[r][v][half] = load(acc + r * lda + v * DEPTH + half * LANES);
      part_quarters(sum[r][v][0], sum[r][v][1]);
    }
  auto weigh = [&](int64_t j, bool both) __attribute__((always_inline)) {
    const bf16 *const even = tokens + j * stride, *const odd = even + stride;
    __m512bh weight[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      int32_t pair;
      memcpy(&pair, p + r * ldp + j, sizeof(pair));
      weight[r] = (__m512bh)_mm512_set1_epi32(pair);
    }
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      const __m512i one = (__m512i)load_pairs(even + v * DEPTH);
      const __m512i other = both ? (__m512i)load_pairs(odd + v * DEPTH) : _mm512_setzero_si512();
      const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(one, other);
      const __m512bh high = (__m512bh)_mm512_unpackhi_epi16(one, other);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        sum[r][v][0] = add_pairs(sum[r][v][0], weight[r], low);
        sum[r][v][1] = add_pairs(sum[r][v][1], weight[r], high);
      }
    }
  };
  for (int64_t j = 0; j + 2 <= n; j += 2) {
    if constexpr (ASKS) ahead.ask<2, VECTORS * 64>(j);
    weigh(j, true);
  }
  if (n % 2) weigh(n - 1, false);
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) {
      join_quarters(sum[r][v][0], sum[r][v][1]);
      for (int half = 0; half < 2; ++half) store(acc + r * lda + v * DEPTH + half * LANES, sum[r][v][half]);
    }
}

// f(Count<asks>, first row, Count<rows>, first dimension, Count<vectors of 32>, what to ask for afterwards) over a
// token's `dim`.
template <class F>
static ALWAYS_INLINE void each_pairs_chunk(int64_t rows, int64_t dim, const bf16 *tokens, const void *next, F f) {
  each_chunk(rows, dim, [&](int64_t row, int64_t count, int64_t first, int64_t vectors) {
    const void *after = after_chunk(tokens, next, row, first + vectors * LANES, dim);
    with_asking(after, [&](auto asks) {
      with_chunk(count, vectors, [&](auto r, auto v) {
        constexpr int VECTORS = v.value / 2;
        if constexpr (VECTORS > 0) f(asks, row, r, first, Count<VECTORS>{}, after);
      });
    });
  });
}

static void dot_pairs(const bf16 *x, int64_t ldx, int64_t rows, const bf16 *tokens, int64_t stride, int64_t n,
                      int64_t dim, float *s, int64_t lds, const void *next) {
  each_pairs_chunk(rows, dim, tokens, next,
                   [&](auto asks, int64_t row, auto r, int64_t first, auto v, const void *after) {
                     dot_pairs_chunk<asks.value, r.value, v.value>(x + row * ldx + first, ldx, tokens + first, stride,
                                                                   n, s + row * lds, lds, first > 0, after);
                   });
}

static void weigh_pairs(const bf16 *p, int64_t ldp, int64_t rows, const bf16 *tokens, int64_t stride, int64_t n,
                        int64_t dim, float *acc, int64_t lda, const void *next) {
  each_pairs_chunk(rows, dim, tokens, next,
                   [&](auto asks, int64_t row, auto r, int64_t first, auto v, const void *after) {
                     weigh_pairs_chunk<asks.value, r.value, v.value>(p + row * ldp, ldp, tokens + first, stride, n,
                                                                     acc + row * lda + first, lda, after);
                   });
}
#endif
