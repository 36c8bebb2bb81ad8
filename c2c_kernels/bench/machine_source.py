"""The C program that finds a machine's limits; compiled at run time for the processor at hand."""

SOURCE = r"""
#include <stddef.h>
#include <stdint.h>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define WIDTH 64
#define FMA_CHAINS 24 /* of 32 registers */
#elif defined(__AVX__)
#define WIDTH 32
#define FMA_CHAINS 12 /* of 16 */
#elif defined(__aarch64__)
#define WIDTH 16
#define FMA_CHAINS 24
#else
#define WIDTH 16
#define FMA_CHAINS 12
#endif
#define SUM_CHAINS 8
#define LINE 64
#define INLINE static inline __attribute__((always_inline))

typedef uint64_t words __attribute__((vector_size(WIDTH)));
typedef float floats __attribute__((vector_size(WIDTH)));

int bench_vector_bits(void) { return WIDTH * 8; }

/* FLOPs of one round of bench_multiply_add on one thread. */
int bench_flops_per_round(void) { return FMA_CHAINS * (WIDTH / 4) * 2; }

/* `bytes` in `streams` runs side by side, each fetched `ahead` bytes ahead (0: by the hardware alone). */
INLINE uint64_t sum_run(const char *data, size_t bytes, size_t streams, size_t ahead) {
  words sum[SUM_CHAINS] = {{0}};
  size_t part = bytes / streams;
  for (size_t at = 0; at < part; at += SUM_CHAINS * WIDTH)
    for (size_t s = 0; s < streams; ++s) {
      const char *from = data + s * part + at;
      if (ahead) {
#pragma GCC unroll 8
        for (int line = 0; line < SUM_CHAINS * WIDTH; line += LINE) __builtin_prefetch(from + ahead + line, 0, 3);
      }
#pragma GCC unroll 8
      for (int c = 0; c < SUM_CHAINS; ++c) sum[c] += *(const words *)(from + c * WIDTH);
    }
  uint64_t total = 0;
  for (int c = 0; c < SUM_CHAINS; ++c)
    for (size_t i = 0; i < WIDTH / 8; ++i) total += sum[c][i];
  return total;
}

/* Reads `part` bytes, a multiple of 16 KB, on every thread. */
uint64_t bench_read(const char *data, size_t part, int threads, int streams, size_t ahead) {
  uint64_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : total)
  for (int t = 0; t < threads; ++t) {
    const char *from = data + (size_t)t * part;
    total += streams == 1 ? (ahead ? sum_run(from, part, 1, ahead) : sum_run(from, part, 1, 0))
           : streams == 2 ? (ahead ? sum_run(from, part, 2, ahead) : sum_run(from, part, 2, 0))
                          : (ahead ? sum_run(from, part, 4, ahead) : sum_run(from, part, 4, 0));
  }
  return total;
}

/* Independent chains of x = x * 0.5 + t: latency is hidden, nothing is read. */
float bench_multiply_add(int64_t rounds, int threads) {
  float total = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : total)
  for (int t = 0; t < threads; ++t) {
    floats sum[FMA_CHAINS], factor = {0}, term = {0};
    factor += 0.5f;
    term += 1.0f + (float)t;
#pragma GCC unroll 24
    for (int c = 0; c < FMA_CHAINS; ++c) sum[c] = term + (float)c;
    for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 24
      for (int c = 0; c < FMA_CHAINS; ++c) sum[c] = sum[c] * factor + term;
    }
#pragma GCC unroll 24
    for (int c = 0; c < FMA_CHAINS; ++c)
      for (size_t i = 0; i < WIDTH / 4; ++i) total += sum[c][i];
  }
  return total;
}

/* The same for dot products of pairs of bfloat16 added to float32: FLOPs of a round, 0 where they are missing. */
#if defined(__AVX512BF16__)
int bench_bfloat16_flops_per_round(void) { return FMA_CHAINS * 16 * 4; }

float bench_bfloat16(int64_t rounds, int threads) {
  float total = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : total)
  for (int t = 0; t < threads; ++t) {
    __m512 sum[FMA_CHAINS];
    const __m512bh factor = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps((float)t));
#pragma GCC unroll 24
    for (int c = 0; c < FMA_CHAINS; ++c) sum[c] = _mm512_set1_ps((float)c);
    for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 24
      for (int c = 0; c < FMA_CHAINS; ++c) sum[c] = _mm512_dpbf16_ps(sum[c], factor, factor);
    }
#pragma GCC unroll 24
    for (int c = 0; c < FMA_CHAINS; ++c) total += _mm512_reduce_add_ps(sum[c]);
  }
  return total;
}
#else
int bench_bfloat16_flops_per_round(void) { return 0; }
float bench_bfloat16(int64_t rounds, int threads) { return (float)(rounds * threads); }
#endif
"""
