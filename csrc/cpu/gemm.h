// C[M x N] (+)= A[M x K] B[K x N] in float32, register-blocked. Included inside an instruction set's namespace.
// A has any strides (each element is broadcast). B is packed in panels of PANEL columns: [N / PANEL][K][PANEL], the
// last one padded: rows PANEL, panels K * PANEL apart. Where N is whole vectors B may lie as it is, rows `b_stride` and
// panels PANEL apart. C is row-major; only its N columns are touched.

constexpr int PANEL = 2 * LANES;

// Rows of a tile of so many vectors: accumulators, the vectors of B and one broadcast fit into 16 (32) registers. With
// 32, 6 x 4 over two panels take 10 loads for 24 multiply-adds, 8 x 2 take 10 for 16.
template <int VECTORS>
constexpr int tile_rows() {
  return LANES == 16 && VECTORS <= 3 ? 8 : 6;
}
constexpr int TILE_ROWS = tile_rows<2>();

// Stored tokens that the next block will read, asked for line by line while this one is multiplied: `parts` runs of
// `bytes`, `stride` bytes apart.
struct Upcoming {
  const char *data = nullptr;
  int64_t stride = 0, bytes = 0, parts = 0, at = 0;

  // The next `lines` cache lines, null where none are left. A few beyond a run may be among them.
  ALWAYS_INLINE const char *take(int64_t lines) {
    if (at >= bytes) {
      data += stride;
      at = 0;
      --parts;
    }
    if (parts <= 0) return nullptr;
    const char *from = data + at;
    at += 64 * lines;
    return from;
  }
};

// Every element is one chain of multiply-adds over k, whatever the blocking: results do not depend on M or N. What is
// added to C is summed by itself: a wide sum that comes in pieces is more exact than one chain.
// VECTORS beyond two belong to the next panel.
template <int ROWS, int VECTORS, bool UNIT>
static ALWAYS_INLINE void gemm_tile(int64_t K, const float *a, int64_t row_stride, int64_t k_stride, const float *b,
                                    int64_t b_stride, int64_t panel_stride, float *c, int64_t ldc, bool accumulate,
                                    Upcoming *upcoming) {
  const char *line = upcoming ? upcoming->take(K) : nullptr;
  const int64_t next_line = line ? 64 : 0;
  if (!line) line = (const char *)b;  // at hand already: asking for it costs nothing
  V sum[ROWS][VECTORS];
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < VECTORS; ++v) sum[i][v] = V{};
  if (UNIT) row_stride = 1;
  const float *next_panel = b + panel_stride;
  for (int64_t k = 0; k < K; ++k) {
    __builtin_prefetch(line, 0, 2);
    line += next_line;
    V column[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      column[v] = load((v < 2 ? b : next_panel) + v % 2 * LANES);
      keep_in_register(column[v]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      V x = set1(a[i * row_stride]);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[i][v] = x * column[v] + sum[i][v];
    }
    a += k_stride;
    b += b_stride;
    next_panel += b_stride;
  }
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < VECTORS; ++v) {
      float *to = c + i * ldc + v * LANES;
      store(to, accumulate ? load(to) + sum[i][v] : sum[i][v]);
    }
}

template <int VECTORS, bool UNIT>
static inline void gemm_rows(int64_t rows, int64_t K, const float *a, int64_t row_stride, int64_t k_stride,
                             const float *b, int64_t b_stride, int64_t panel_stride, float *c, int64_t ldc,
                             bool accumulate, Upcoming *upcoming) {
  with_count<tile_rows<VECTORS>()>(rows, [&](auto count) __attribute__((always_inline)) {
    gemm_tile<decltype(count)::value, VECTORS, UNIT>(K, a, row_stride, k_stride, b, b_stride, panel_stride, c, ldc,
                                                     accumulate, upcoming);
  });
}

// The last columns of C, where they are no whole vectors: by way of a buffer, so that nothing beyond them is touched.
template <bool UNIT>
static inline void gemm_edge(int64_t rows, int64_t columns, int64_t K, const float *a, int64_t row_stride,
                             int64_t k_stride, const float *b, int64_t b_stride, float *c, int64_t ldc, bool accumulate,
                             Upcoming *upcoming) {
  float edge[TILE_ROWS * PANEL];
  for (int64_t i = 0; accumulate && i < rows; ++i)
    for (int64_t n = 0; n < PANEL; ++n) edge[i * PANEL + n] = n < columns ? c[i * ldc + n] : 0.0f;
  gemm_rows<2, UNIT>(rows, K, a, row_stride, k_stride, b, b_stride, 0, edge, PANEL, accumulate, upcoming);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t n = 0; n < columns; ++n) c[i * ldc + n] = edge[i * PANEL + n];
}

template <bool UNIT>
static inline void gemm_strided(int64_t M, int64_t N, int64_t K, const float *a, int64_t row_stride, int64_t k_stride,
                                const float *b, int64_t b_stride, int64_t panel_stride, float *c, int64_t ldc,
                                bool accumulate, Upcoming *upcoming) {
  auto panel = [&](auto count, int64_t n, const float *from) __attribute__((always_inline)) {
    constexpr int VECTORS = decltype(count)::value, ROWS = tile_rows<VECTORS>();
    for (int64_t m = 0; m < M; m += ROWS)
      gemm_rows<VECTORS, UNIT>(least<int64_t>(ROWS, M - m), K, a + m * row_stride, row_stride, k_stride, from, b_stride,
                               panel_stride, c + m * ldc + n, ldc, accumulate, upcoming);
  };
  int64_t n = 0;
#if LANES == 16
  // Five vectors are two and three.
  for (; n + 2 * PANEL <= N && N - n != 5 * LANES; n += 2 * PANEL, b += 2 * panel_stride) panel(Count<4>{}, n, b);
  if (N - n == 5 * LANES) panel(Count<2>{}, n, b), n += PANEL, b += panel_stride;
  if (N - n == 3 * LANES) return panel(Count<3>{}, n, b);
#endif
  for (; n + PANEL <= N; n += PANEL, b += panel_stride) panel(Count<2>{}, n, b);
  if (N - n == LANES) return panel(Count<1>{}, n, b);
  for (int64_t m = 0; n < N && m < M; m += TILE_ROWS)
    gemm_edge<UNIT>(least<int64_t>(TILE_ROWS, M - m), N - n, K, a + m * row_stride, row_stride, k_stride, b, b_stride,
                    c + m * ldc + n, ldc, accumulate, upcoming);
}

static void gemm(int64_t M, int64_t N, int64_t K, const float *a, int64_t row_stride, int64_t k_stride, const float *b,
                 int64_t b_stride, int64_t panel_stride, float *c, int64_t ldc, bool accumulate,
                 Upcoming *upcoming = nullptr) {
  if (row_stride == 1)
    gemm_strided<true>(M, N, K, a, 1, k_stride, b, b_stride, panel_stride, c, ldc, accumulate, upcoming);
  else
    gemm_strided<false>(M, N, K, a, row_stride, k_stride, b, b_stride, panel_stride, c, ldc, accumulate, upcoming);
}

// Panels of B[K x N] from row-major rows; columns beyond N are zero.
static void pack_panels(float *panels, const float *b, int64_t ldb, int64_t K, int64_t N) {
  for (int64_t n = 0; n < N; n += PANEL) {
    int64_t columns = least<int64_t>(PANEL, N - n);
    for (int64_t k = 0; k < K; ++k, panels += PANEL) {
      const float *row = b + k * ldb + n;
      if (columns == PANEL) {
        store(panels, load(row));
        store(panels + LANES, load(row + LANES));
      } else {
        for (int64_t i = 0; i < PANEL; ++i) panels[i] = i < columns ? row[i] : 0.0f;
      }
    }
  }
}

// to[c][r] = from[r][c] for `rows` <= LANES rows of `columns` elements; the places of further rows up to LANES become
// 0.
static void transpose_rows(const float *from, int64_t ld_from, int64_t rows, int64_t columns, float *to,
                           int64_t ld_to) {
  int64_t c = 0;
  for (; c + LANES <= columns; c += LANES) {
    V block[LANES];
    for (int64_t r = 0; r < LANES; ++r) block[r] = r < rows ? load(from + r * ld_from + c) : V{};
    transpose(block);
    for (int64_t r = 0; r < LANES; ++r) store(to + (c + r) * ld_to, block[r]);
  }
  for (; c < columns; ++c)
    for (int64_t r = 0; r < LANES; ++r) to[c * ld_to + r] = r < rows ? from[r * ld_from + c] : 0.0f;
}

// The same for stored bfloat16 of whole panels, in float32: pairs are
// transposed as one and widened afterwards, which takes half the shuffles.
static void transpose_pairs(const bf16 *from, int64_t ld_from, int64_t rows, int64_t columns, float *to,
                            int64_t ld_to) {
  for (int64_t c = 0; c < columns; c += PANEL) {
    V block[LANES];
    for (int64_t r = 0; r < LANES; ++r)
      block[r] = r < rows ? bit_cast<V>(*(const UnalignedPairs *)(from + r * ld_from + c)) : V{};
    transpose(block);
    for (int64_t r = 0; r < LANES; ++r) {
      const VU both = bit_cast<VU>(block[r]);
      store(to + (c + 2 * r) * ld_to, bit_cast<V>(both << 16));
      store(to + (c + 2 * r + 1) * ld_to, bit_cast<V>(both & 0xffff0000u));
    }
  }
}

// Panels of B = R^T from rows R[N x K].
static void pack_panels_transposed(float *panels, const float *rows, int64_t ld, int64_t K, int64_t N) {
  for (int64_t n = 0; n < N; n += PANEL, panels += K * PANEL)
    for (int64_t half = 0; half < PANEL; half += LANES)
      transpose_rows(rows + (n + half) * ld, ld, most<int64_t>(0, least<int64_t>(LANES, N - n - half)), K,
                     panels + half, PANEL);
}
