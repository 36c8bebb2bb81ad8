// Matrix tiles by dot products of pairs (vdpbf16ps), sums in steps of 2 of K. Included by matrix_tiles.h.

struct TileRegisters {
  TileRegisters() {}
};

constexpr bool SUMS_APART = true;  // what is added to C is summed by itself
constexpr int DOT_ROWS = 8;        // by 2 vectors of C: 10 loads for 16 dot products, of which Zen 4 starts one a cycle

// DOT_ROWS x ACROSS vectors of C, at rows of A that begin at `a`.
template <int ACROSS>
static ALWAYS_INLINE void multiply_rows(int64_t depth_tiles, const bf16 *a, const TileRows &rows, const bf16 *b,
                                        int64_t b_across, float *c, int64_t ldc, bool accumulate) {
  V sum[DOT_ROWS][ACROSS];
  for (int i = 0; i < DOT_ROWS; ++i)
    for (int v = 0; v < ACROSS; ++v) sum[i][v] = V{};
  for (int64_t k = 0; k < depth_tiles; ++k, a += rows.along, b += PACKED) {
#pragma GCC unroll 4
    for (int64_t pair = 0; pair < SIDE; ++pair) {
      V column[ACROSS];
      for (int v = 0; v < ACROSS; ++v) {
        column[v] = load((const float *)(b + v * b_across + pair * DEPTH));
        keep_in_register(column[v]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < DOT_ROWS; ++i) {
        int32_t numbers;
        memcpy(&numbers, a + i * rows.stride + 2 * pair, sizeof(numbers));
        const __m512bh x = (__m512bh)_mm512_set1_epi32(numbers);
        for (int v = 0; v < ACROSS; ++v) sum[i][v] = (V)_mm512_dpbf16_ps((__m512)sum[i][v], x, (__m512bh)column[v]);
      }
    }
  }
  for (int i = 0; i < DOT_ROWS; ++i)
    for (int v = 0; v < ACROSS; ++v) {
      float *const to = c + i * ldc + v * LANES;
      store(to, accumulate ? load(to) + sum[i][v] : sum[i][v]);
    }
}

// C (+)= A B for so many tiles; columns of B's tiles are `b_across` elements apart, C's rows `ldc`.
static void gemm_tiles(int64_t down, int64_t across, int64_t depth_tiles, const TileRows &a, const bf16 *b,
                       int64_t b_across, float *c, int64_t ldc, bool accumulate) {
  for (int64_t n = 0; n < across; n += 2)
    with_count<2>(least<int64_t>(2, across - n), [&](auto wide) __attribute__((always_inline)) {
      for (int64_t m = 0; m < down * SIDE; m += DOT_ROWS)
        multiply_rows<decltype(wide)::value>(depth_tiles, a.data + m / SIDE * a.down + m % SIDE * a.stride, a,
                                             b + n * b_across, b_across, c + m * ldc + n * SIDE, ldc, accumulate);
    });
}
