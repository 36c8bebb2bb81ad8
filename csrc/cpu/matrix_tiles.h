// Products of bfloat16 by matrix tiles, with float32 sums. Included inside an instruction set's namespace.
//
// C[M x N] = A[M x K] B[K x N] in tiles of 16 x 16 sums, 32 of K at a time. A lies in rows of 32 numbers, 16 of them to
// a tile; B in tiles of 16 pairs of rows [16][columns: 16][2]. Operands that do not lie so are packed, whole tiles,
// zeros where nothing is. Every element of C is one chain over K, whatever M and N: a row's result does not depend on
// the rows beside it. Products are exact; subnormal numbers count as 0.
//
// Tiles are multiplied by AMX (tiles_amx.h) or by dot products of pairs (tiles_dot.h).

#if defined(C2C_MATRIX_TILES)
constexpr bool MATRIX_TILES = true;
constexpr int64_t SIDE = 16, DEPTH = 32;
constexpr int64_t PACKED = SIDE * DEPTH;  // numbers of a packed tile, 1 KB

// Where A's tiles are, in elements: rows `stride` apart, tiles `down` (next 16 rows) and `along` (next 32 of K) apart.
struct TileRows {
  const bf16 *data;
  int64_t stride, down, along;
};

static ALWAYS_INLINE TileRows packed_rows(const bf16 *data, int64_t depth_tiles) {
  return {data, DEPTH, depth_tiles * PACKED, PACKED};
}

#if defined(C2C_AMX)
#include "tiles_amx.h"
#else
#include "tiles_dot.h"
#endif

// ---- packing ----

static ALWAYS_INLINE __mmask32 first_of_32(int64_t n) { return n >= 32 ? ~0u : (1u << most<int64_t>(n, 0)) - 1; }

// 32 numbers of a row, of which `n` are there, as bfloat16.
static ALWAYS_INLINE __m512i load_32(const bf16 *p, int64_t n) { return _mm512_maskz_loadu_epi16(first_of_32(n), p); }
static ALWAYS_INLINE __m512i load_32(const float *p, int64_t n) {
  const __mmask32 there = first_of_32(n);
  const __m512 low = _mm512_maskz_loadu_ps((__mmask16)there, p);
  const __m512 high = n > LANES ? _mm512_maskz_loadu_ps((__mmask16)(there >> 16), p + LANES) : _mm512_setzero_ps();
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// Pairs (even[i], odd[i]) of two rows of 16, as bfloat16.
static ALWAYS_INLINE V pair_up(V even, V odd) {
  const __m512i places = (__m512i)(VU{0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
                                      0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f});
  return (V)_mm512_maskz_permutexvar_epi16(~0u, places, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
}

static ALWAYS_INLINE void store_packed(bf16 *p, V x) { store((float *)p, x); }

// Where row r of A begins in packed tiles [rows / 16][depth / 32]; its numbers k and k + 32 are PACKED apart.
static ALWAYS_INLINE bf16 *packed_row(bf16 *tiles, int64_t r, int64_t depth_tiles) {
  return tiles + r / SIDE * depth_tiles * PACKED + r % SIDE * DEPTH;
}

// Numbers first .. first + n of a packed row.
template <class T>
static ALWAYS_INLINE void pack_row(bf16 *row, int64_t first, const T *from, int64_t n) {
  for (const int64_t end = first + n; first < end;) {
    const int64_t taken = least(DEPTH - first % DEPTH, end - first);
    _mm512_mask_storeu_epi16(row + first / DEPTH * PACKED + first % DEPTH, first_of_32(taken), load_32(from, taken));
    first += taken;
    from += taken;
  }
}

// Zeros behind the n numbers of a packed row.
static ALWAYS_INLINE void end_packed_row(bf16 *row, int64_t n) {
  if (n % DEPTH) _mm512_mask_storeu_epi16(row + n / DEPTH * PACKED, ~first_of_32(n % DEPTH), _mm512_setzero_si512());
}

// Zeros for the rows behind n in their tiles.
static void end_packed_rows(bf16 *tiles, int64_t n, int64_t depth_tiles) {
  for (int64_t r = n; r % SIDE; ++r)
    for (int64_t k = 0; k < depth_tiles; ++k) store_packed(packed_row(tiles, r, depth_tiles) + k * PACKED, V{});
}

// B = R^T from rows R[columns][depth], [columns / 16][depth / 32] tiles.
template <class T>
static void pack_tile_columns(bf16 *to, const T *rows, int64_t ld, int64_t count, int64_t depth) {
  for (int64_t r = 0; r < count; r += SIDE)
    for (int64_t k = 0; k < depth; k += DEPTH, to += PACKED) {
      V block[LANES];
      for (int64_t i = 0; i < SIDE; ++i)
        block[i] = r + i < count ? (V)load_32(rows + (r + i) * ld + k, depth - k) : V{};
      transpose(block);
      for (int64_t i = 0; i < SIDE; ++i) store_packed(to + i * DEPTH, block[i]);
    }
}

// Pairs (even[i], odd[i]) of two rows of 32: the first 16 and the others.
static ALWAYS_INLINE void interleave(__m512i even, __m512i odd, V *first, V *second) {
  const VU low = {0x200000, 0x210001, 0x220002, 0x230003, 0x240004, 0x250005, 0x260006, 0x270007,
                  0x280008, 0x290009, 0x2a000a, 0x2b000b, 0x2c000c, 0x2d000d, 0x2e000e, 0x2f000f};
  *first = (V)_mm512_maskz_permutex2var_epi16(~0u, even, (__m512i)low, odd);
  *second = (V)_mm512_maskz_permutex2var_epi16(~0u, even, (__m512i)(low + 0x100010), odd);
}

// Two rows as pairs, of which `there` are there (at most 0: none): their first 32 of `columns` numbers.
template <class T>
static ALWAYS_INLINE void interleave_rows(const T *rows, int64_t ld, int64_t there, int64_t columns, V *first,
                                          V *second) {
  interleave(there > 0 ? load_32(rows, columns) : _mm512_setzero_si512(),
             there > 1 ? load_32(rows + ld, columns) : _mm512_setzero_si512(), first, second);
}

// Row `row` of B's packed tiles, whose next 16 columns are `b_across` further on: two rows of `columns` numbers as
// pairs.
template <class T>
static ALWAYS_INLINE void pack_pair(bf16 *row, int64_t b_across, const T *rows, int64_t ld, int64_t there,
                                    int64_t columns) {
  for (int64_t n = 0; n < columns; n += 2 * SIDE, row += 2 * b_across) {
    V first, second;
    interleave_rows(rows + n, ld, there, columns - n, &first, &second);
    store_packed(row, first);
    if (columns - n > SIDE) store_packed(row + b_across, second);
  }
}

// B from rows [depth][columns]: [columns / 16][depth / 32] tiles.
template <class T>
static void pack_tile_pairs(bf16 *to, const T *rows, int64_t ld, int64_t depth, int64_t columns) {
  const int64_t b_across = div_up(depth, DEPTH) * PACKED;
  for (int64_t k = 0; k < round_up(depth, DEPTH); k += 2)
    pack_pair(to + k / DEPTH * PACKED + k % DEPTH * SIDE, b_across, rows + k * ld, ld, depth - k, columns);
}

// A = R^T from rows R[depth][rows]: [rows / 16][depth / 32] tiles.
template <class T>
static void pack_tile_turned(bf16 *to, const T *rows, int64_t ld, int64_t depth, int64_t columns) {
  const int64_t depth_tiles = div_up(depth, DEPTH);
  for (int64_t k = 0; k < depth; k += DEPTH)
    for (int64_t n = 0; n < columns; n += 2 * SIDE) {
      V block[2][LANES];
      for (int64_t i = 0; i < SIDE; ++i)
        interleave_rows(rows + (k + 2 * i) * ld + n, ld, depth - k - 2 * i, columns - n, &block[0][i], &block[1][i]);
      for (int64_t half = 0; half < (columns - n > SIDE ? 2 : 1); ++half) {
        transpose(block[half]);
        bf16 *const tile = to + ((n / SIDE + half) * depth_tiles + k / DEPTH) * PACKED;
        for (int64_t i = 0; i < SIDE; ++i) store_packed(tile + i * DEPTH, block[half][i]);
      }
    }
}
#else
constexpr bool MATRIX_TILES = false;
struct TileRegisters {
  TileRegisters() {}
};
#endif
