// Vectors of floats for one instruction set. Included inside a namespace by isa_*.cpp, which set LANES.
// GCC and clang vector extensions do the arithmetic; intrinsics stand where these have no word for it.

typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t VI __attribute__((vector_size(4 * LANES)));
typedef uint32_t VU __attribute__((vector_size(4 * LANES)));
typedef uint16_t VH __attribute__((vector_size(2 * LANES)));
typedef float UnalignedV __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t UnalignedVI __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t UnalignedPairs __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef uint16_t UnalignedVH __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

#define ALWAYS_INLINE inline __attribute__((always_inline))

static const float INF = __builtin_inff();

template <class T>
static ALWAYS_INLINE T least(T a, T b) {
  return a < b ? a : b;
}
template <class T>
static ALWAYS_INLINE T most(T a, T b) {
  return a > b ? a : b;
}
static ALWAYS_INLINE int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static ALWAYS_INLINE int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }

// Calls f(Count<N>) for the compile-time N = n of 1 .. LIMIT.
template <int N>
struct Count {
  static constexpr int value = N;
};
template <int LIMIT, class F>
static ALWAYS_INLINE void with_count(int64_t n, F f) {
  if constexpr (LIMIT == 1) {
    f(Count<1>{});
  } else {
    if (n == LIMIT)
      f(Count<LIMIT>{});
    else
      with_count<LIMIT - 1>(n, f);
  }
}

static ALWAYS_INLINE V set1(float x) { return x - V{}; }  // x - 0 is x, sign of zero included: a bare broadcast
static ALWAYS_INLINE V load(const float *p) { return *(const UnalignedV *)p; }
static ALWAYS_INLINE void store(float *p, V x) { *(UnalignedV *)p = x; }

// Keeps the compiler from reading x from memory again at every use.
static ALWAYS_INLINE void keep_in_register(V &x) {
#if defined(C2C_AVX512)
  asm("" : "+v"(x));
#elif defined(C2C_AVX2)
  asm("" : "+x"(x));
#else
  (void)x;
#endif
}

template <class To, class From>
static ALWAYS_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &x, sizeof(to));
  return to;
}

// max(a, b), b where either is NaN: pass the value that may be NaN as b to keep it.
static ALWAYS_INLINE V vmax(V a, V b) {
#if defined(C2C_AVX512)
  return (V)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

static ALWAYS_INLINE V select(VI mask, V yes, V no) {
  return bit_cast<V>((mask & bit_cast<VI>(yes)) | (~mask & bit_cast<VI>(no)));
}

// ---- half precision ----

static ALWAYS_INLINE float to_float(float x) { return x; }
static ALWAYS_INLINE float to_float(int8_t x) { return x; }
static ALWAYS_INLINE float to_float(bf16 x) { return bit_cast<float>((uint32_t)x.bits << 16); }
static ALWAYS_INLINE float to_float(f16 x) {
  // Shift the exponent into place and rescale by 2^112; subnormals come out right, infinities and NaN need a repair.
  uint32_t magnitude = (uint32_t)(x.bits & 0x7fff) << 13;
  float scaled = bit_cast<float>(magnitude) * bit_cast<float>(0x77800000u);
  uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : bit_cast<uint32_t>(scaled);
  return bit_cast<float>(bits | (uint32_t)(x.bits & 0x8000) << 16);
}

static ALWAYS_INLINE void from_float(float *to, float x) { *to = x; }
static ALWAYS_INLINE void from_float(bf16 *to, float x) {
  uint32_t bits = bit_cast<uint32_t>(x);
  to->bits = x != x ? (uint16_t)(bits >> 16 | 0x40) : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static ALWAYS_INLINE void from_float(f16 *to, float x) {
  uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000u) {
    // Subnormal half: adding 0.5 puts the unit of the last half place at the unit of the last float place.
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  to->bits = (uint16_t)(sign | half);
}

static ALWAYS_INLINE V load(const bf16 *p) {
#if defined(C2C_AVX512)
  return (V)_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i *)p)),
                                    16);
#elif defined(C2C_AVX2)
  return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#else
  return bit_cast<V>(__builtin_convertvector(*(const UnalignedVH *)p, VU) << 16);
#endif
}
static ALWAYS_INLINE V load(const f16 *p) {
#if defined(C2C_AVX512)
  return (V)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i *)p));
#elif defined(C2C_AVX2)
  return (V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
  VU bits = __builtin_convertvector(*(const UnalignedVH *)p, VU);
  VU magnitude = (bits & 0x7fff) << 13;
  V scaled = bit_cast<V>(magnitude) * bit_cast<float>(0x77800000u);
  VI special = bit_cast<VI>(magnitude) >= 0x0f800000;
  V whole = select(special, bit_cast<V>(magnitude | 0x7f800000u), scaled);
  return bit_cast<V>(bit_cast<VU>(whole) | (bits & 0x8000) << 16);
#endif
}

static ALWAYS_INLINE V load(const int8_t *p) {
#if defined(C2C_AVX512)
  return (V)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128((const __m128i *)p)));
#elif defined(C2C_AVX2)
  return (V)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
  V x;
  for (int i = 0; i < LANES; ++i) x[i] = p[i];
  return x;
#endif
}

// The first n < LANES elements, zeros behind them; nothing beyond them is read.
template <class T>
static ALWAYS_INLINE V load_first(const T *p, int64_t n) {
  T buffer[LANES] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}

#if defined(C2C_AVX512)
static ALWAYS_INLINE V load_first(const float *p, int64_t n) {
  return (V)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}
#endif

// Writes the first n < LANES elements of x and nothing else.
static ALWAYS_INLINE void store_first(float *p, V x, int64_t n) {
#if defined(C2C_AVX512)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)x);
#else
  for (int64_t i = 0; i < n; ++i) p[i] = x[i];
#endif
}

// x rounded to bfloat16, in the upper halves; what is in the lower ones does not count.
static ALWAYS_INLINE VU round_to_bf16(V x) {
  const VU bits = bit_cast<VU>(x), is_nan = bit_cast<VU>(x != x);
  return (is_nan & (bits | 0x400000)) | (~is_nan & (bits + 0x7fff + (bits >> 16 & 1)));
}

static ALWAYS_INLINE void store(bf16 *p, V x) {
#if defined(C2C_MATRIX_TILES)
  const int subnormal = 0x20;  // which the instruction takes as 0
  if (!_mm512_fpclass_ps_mask((__m512)x, subnormal)) {
    _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh((__m512)x));
    return;
  }
#endif
  *(UnalignedVH *)p = __builtin_convertvector(round_to_bf16(x) >> 16, VH);
}
static ALWAYS_INLINE void store(f16 *p, V x) {
#if defined(C2C_AVX512)
  _mm256_storeu_si256((__m256i *)p, _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(C2C_AVX2)
  _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < LANES; ++i) from_float(p + i, x[i]);
#endif
}

// dst[i] = src[i] in float32, n elements.
template <class T>
static inline void widen(float *dst, const T *src, int64_t n) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(dst + i, load(src + i));
  for (; i < n; ++i) dst[i] = to_float(src[i]);
}
template <class T>
static inline void narrow(T *dst, const float *src, int64_t n) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(dst + i, load(src + i));
  for (; i < n; ++i) from_float(dst + i, src[i]);
}

// ---- order of elements ----

#if LANES == 16
#define C2C_SHUFFLE(a, b, f) \
  __builtin_shufflevector(a, b, f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), \
                          f(13), f(14), f(15))
#elif LANES == 8
#define C2C_SHUFFLE(a, b, f) __builtin_shufflevector(a, b, f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7))
#else
#define C2C_SHUFFLE(a, b, f) __builtin_shufflevector(a, b, f(0), f(1), f(2), f(3))
#endif
#define C2C_EVEN(i) (2 * (i))
#define C2C_ODD(i) (2 * (i) + 1)
#define C2C_LOW(i) ((i) / 2 + (i) % 2 * LANES)
#define C2C_HIGH(i) (LANES / 2 + (i) / 2 + (i) % 2 * LANES)

// Elements 0, 2, 4 .. (1, 3, 5 ..) of a followed by b; and back.
static ALWAYS_INLINE V even(V a, V b) { return C2C_SHUFFLE(a, b, C2C_EVEN); }
static ALWAYS_INLINE V odd(V a, V b) { return C2C_SHUFFLE(a, b, C2C_ODD); }
static ALWAYS_INLINE V interleave_low(V even, V odd) { return C2C_SHUFFLE(even, odd, C2C_LOW); }
static ALWAYS_INLINE V interleave_high(V even, V odd) { return C2C_SHUFFLE(even, odd, C2C_HIGH); }

// Rows become columns: as many rounds of interleaving the halves as it takes for every index bit to change its place.
static ALWAYS_INLINE void transpose(V (&x)[LANES]) {
  for (int bit = 1; bit < LANES; bit *= 2) {
    V y[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; ++i) {
      y[2 * i] = interleave_low(x[i], x[i + LANES / 2]);
      y[2 * i + 1] = interleave_high(x[i], x[i + LANES / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) x[i] = y[i];
  }
}

#undef C2C_SHUFFLE
#undef C2C_EVEN
#undef C2C_ODD
#undef C2C_LOW
#undef C2C_HIGH

// ---- reductions ----

typedef float V4 __attribute__((vector_size(16)));

static ALWAYS_INLINE V4 fold_to_4(V x) {
#if LANES == 4
  return x;
#else
  V4 part[LANES / 4];
  memcpy(part, &x, sizeof(x));
#if LANES == 16
  return (part[0] + part[1]) + (part[2] + part[3]);
#else
  return part[0] + part[1];
#endif
#endif
}

static ALWAYS_INLINE float sum(V x) {
  V4 y = fold_to_4(x);
  return (y[0] + y[1]) + (y[2] + y[3]);
}

// The largest element; where one is NaN, any.
static ALWAYS_INLINE float largest_of(V x) {
#if LANES == 4
  V4 y = x;
#else
  V4 part[LANES / 4], y;
  memcpy(part, &x, sizeof(x));
  y = part[0];
  for (int i = 1; i < LANES / 4; ++i) y = part[i] > y ? part[i] : y;
#endif
  return most(most(y[0], y[1]), most(y[2], y[3]));
}

static ALWAYS_INLINE bool any(VI mask) {
#if defined(C2C_AVX512)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(C2C_AVX2)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  int32_t all = 0;
  for (int i = 0; i < LANES; ++i) all |= mask[i];
  return all != 0;
#endif
}

#if defined(C2C_AVX512)
// Partial sums of a, b, c, d, side by side in each quarter.
static ALWAYS_INLINE V quarter_sums(V a, V b, V c, V d) {
  V ab = (V)_mm512_unpacklo_ps((__m512)a, (__m512)b) + (V)_mm512_unpackhi_ps((__m512)a, (__m512)b);
  V cd = (V)_mm512_unpacklo_ps((__m512)c, (__m512)d) + (V)_mm512_unpackhi_ps((__m512)c, (__m512)d);
  return (V)_mm512_shuffle_ps((__m512)ab, (__m512)cd, 0x44) + (V)_mm512_shuffle_ps((__m512)ab, (__m512)cd, 0xee);
}

// fold_to_4 of four vectors, side by side: the same additions in the same order.
static ALWAYS_INLINE V fold_quarters(V a, V b, V c, V d) {
  V ab = (V)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x88) + (V)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xdd);
  V cd = (V)_mm512_shuffle_f32x4((__m512)c, (__m512)d, 0x88) + (V)_mm512_shuffle_f32x4((__m512)c, (__m512)d, 0xdd);
  return (V)_mm512_shuffle_f32x4((__m512)ab, (__m512)cd, 0x88) + (V)_mm512_shuffle_f32x4((__m512)ab, (__m512)cd, 0xdd);
}
#endif

// (sum a, sum b, sum c, sum d): four horizontal sums for little more than the price of one.
static ALWAYS_INLINE V4 sum4(V a, V b, V c, V d) {
#if defined(C2C_AVX512)
  return fold_to_4(quarter_sums(a, b, c, d));
#elif defined(C2C_AVX2)
  // Both halves at once, and these added last.
  const V ab = (V)_mm256_unpacklo_ps((__m256)a, (__m256)b) + (V)_mm256_unpackhi_ps((__m256)a, (__m256)b);
  const V cd = (V)_mm256_unpacklo_ps((__m256)c, (__m256)d) + (V)_mm256_unpackhi_ps((__m256)c, (__m256)d);
  return fold_to_4((V)_mm256_shuffle_ps((__m256)ab, (__m256)cd, 0x44) +
                   (V)_mm256_shuffle_ps((__m256)ab, (__m256)cd, 0xee));
#elif defined(__x86_64__)
  V4 p = fold_to_4(a), q = fold_to_4(b), r = fold_to_4(c), s = fold_to_4(d);
  __m128 ab = _mm_add_ps(_mm_unpacklo_ps((__m128)p, (__m128)q), _mm_unpackhi_ps((__m128)p, (__m128)q));
  __m128 cd = _mm_add_ps(_mm_unpacklo_ps((__m128)r, (__m128)s), _mm_unpackhi_ps((__m128)r, (__m128)s));
  return (V4)_mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
#elif defined(__aarch64__)
  V4 p = fold_to_4(a), q = fold_to_4(b), r = fold_to_4(c), s = fold_to_4(d);
  return (V4)vpaddq_f32(vpaddq_f32((float32x4_t)p, (float32x4_t)q), vpaddq_f32((float32x4_t)r, (float32x4_t)s));
#else
  V4 p = fold_to_4(a), q = fold_to_4(b), r = fold_to_4(c), s = fold_to_4(d);
  return V4{p[0] + p[1] + p[2] + p[3], q[0] + q[1] + q[2] + q[3], r[0] + r[1] + r[2] + r[3], s[0] + s[1] + s[2] + s[3]};
#endif
}

// ---- functions ----

// exp(x) within 2 ulp; exactly 0 below -87.3 (and for -inf), NaN stays NaN, saturates above 88.
static ALWAYS_INLINE V vexp(V x) {
  VI under = x < set1(-87.3f);
  x = vmax(set1(-87.3f), x);
  x = set1(88.0f) < x ? set1(88.0f) : x;
  V shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer part lands in the low bits
  V n = shifted - 12582912.0f;
  V r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  V p = set1(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  VI power = (bit_cast<VI>(shifted) + (127 - 0x4b400000)) << 23;
  return bit_cast<V>(bit_cast<VI>(p * bit_cast<V>(power)) & ~under);
}

// tanh(x) within 4 ulp: an odd polynomial near 0, where 1 - 2 / (exp(2x) + 1) would cancel.
static ALWAYS_INLINE V vtanh(V x) {
  V magnitude = bit_cast<V>(bit_cast<VI>(x) & 0x7fffffff);
  V square = x * x;
  V p = set1(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  V small = p * square * x + x;
  V large = 1.0f - 2.0f / (vexp(magnitude + magnitude) + 1.0f);
  large = bit_cast<V>(bit_cast<VI>(large) | (bit_cast<VI>(x) & (int32_t)0x80000000));
  return select(magnitude < set1(0.625f), small, large);
}

// x Phi(x) = x / 2 (1 + erf(x / sqrt 2)), absolute error below 6e-8 max(1, |x|): ln Phi(-|x|) as a polynomial, fitted
// on 0 .. 13.5 with the weight of its effect; beyond 14 Phi(-|x|) is 0.
static ALWAYS_INLINE V vgelu(V x) {
  V u = bit_cast<V>(bit_cast<VI>(x) & 0x7fffffff);
  u = u < set1(14.0f) ? u : set1(14.0f);
  V p = set1(1.6374104e-8f);
  p = p * u - 5.5672001e-7f;
  p = p * u + 7.5006128e-6f;
  p = p * u - 5.3173535e-5f;
  p = p * u + 1.9481679e-4f;
  p = p * u - 6.9010383e-8f;
  p = p * u - 4.8189866e-3f;
  p = p * u + 3.6354888e-2f;
  p = p * u + 3.1830502e-1f;
  p = p * u + 7.9788500e-1f;
  p = p * u + 6.9314718e-1f;
  const V tail = vexp(-p);
  return x * select(x < V{}, tail, 1.0f - tail);
}

static ALWAYS_INLINE float exp1(float x) { return vexp(set1(x))[0]; }
