// Matrix tiles in AMX's tile registers, sums in steps of 32 of K. Included by matrix_tiles.h.

constexpr bool SUMS_APART = false;  // sums go on from what C holds

// A thread's tile registers, configured until the end of the scope: none stay in use between jobs.
struct TileRegisters {
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } shape = {};
    shape.palette = 1;
    for (int t = 0; t < 8; ++t) {
      shape.row_bytes[t] = 64;
      shape.rows[t] = SIDE;
    }
    asm volatile("ldtilecfg %0" : : "m"(shape));
  }
  ~TileRegisters() { asm volatile("tilerelease" ::: "memory"); }
  TileRegisters(const TileRegisters &) = delete;
  TileRegisters &operator=(const TileRegisters &) = delete;
};

// ---- tile register T ----

template <int T>
static ALWAYS_INLINE void clear_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T) : "memory");
}
template <int T>
static ALWAYS_INLINE void load_tile(const void *from, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_bytes), "i"(T) : "memory");
}
template <int T>
static ALWAYS_INLINE void store_tile(void *to, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_bytes), "i"(T) : "memory");
}
template <int C, int A, int B>
static ALWAYS_INLINE void multiply_tile() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B) : "memory");
}

// DOWN x ACROSS tiles of C.
template <int DOWN, int ACROSS>
static ALWAYS_INLINE void multiply_tiles(int64_t depth_tiles, const bf16 *a, const TileRows &rows, const bf16 *b,
                                         int64_t b_across, float *c, int64_t ldc, bool accumulate) {
  const int64_t c_bytes = ldc * sizeof(float), a_bytes = rows.stride * sizeof(bf16);
  float *const below = c + SIDE * ldc;
  if (accumulate) {
    load_tile<0>(c, c_bytes);
    if (ACROSS > 1) load_tile<1>(c + SIDE, c_bytes);
    if (DOWN > 1) load_tile<2>(below, c_bytes);
    if (DOWN > 1 && ACROSS > 1) load_tile<3>(below + SIDE, c_bytes);
  } else {
    clear_tile<0>();
    clear_tile<1>();
    clear_tile<2>();
    clear_tile<3>();
  }
  for (int64_t k = 0; k < depth_tiles; ++k, a += rows.along, b += PACKED) {
    load_tile<4>(a, a_bytes);
    load_tile<6>(b, 64);
    multiply_tile<0, 4, 6>();
    if (ACROSS > 1) {
      load_tile<7>(b + b_across, 64);
      multiply_tile<1, 4, 7>();
    }
    if (DOWN > 1) {
      load_tile<5>(a + rows.down, a_bytes);
      multiply_tile<2, 5, 6>();
      if (ACROSS > 1) multiply_tile<3, 5, 7>();
    }
  }
  store_tile<0>(c, c_bytes);
  if (ACROSS > 1) store_tile<1>(c + SIDE, c_bytes);
  if (DOWN > 1) store_tile<2>(below, c_bytes);
  if (DOWN > 1 && ACROSS > 1) store_tile<3>(below + SIDE, c_bytes);
}

// C (+)= A B for so many tiles; columns of B's tiles are `b_across` elements apart, C's rows `ldc`.
static void gemm_tiles(int64_t down, int64_t across, int64_t depth_tiles, const TileRows &a, const bf16 *b,
                       int64_t b_across, float *c, int64_t ldc, bool accumulate) {
  for (int64_t n = 0; n < across; n += 2)
    for (int64_t m = 0; m < down; m += 2)
      with_count<2>(least<int64_t>(2, down - m), [&](auto tall) __attribute__((always_inline)) {
        with_count<2>(least<int64_t>(2, across - n), [&](auto wide) __attribute__((always_inline)) {
          multiply_tiles<decltype(tall)::value, decltype(wide)::value>(depth_tiles, a.data + m * a.down, a,
                                                                       b + n * b_across, b_across,
                                                                       c + m * SIDE * ldc + n * SIDE, ldc, accumulate);
        });
      });
}
