// Threads and scratch memory, outside any instruction set.
#pragma once
#include <stdint.h>
#include <stdlib.h>

#ifdef _OPENMP
#include <omp.h>
#endif

// Cache-line aligned floats, freed at the end of the scope; data is null where memory ran out.
struct Block {
  float *data;
  explicit Block(int64_t floats) {
    size_t bytes = ((size_t)(floats > 0 ? floats : 1) * sizeof(float) + 63) / 64 * 64;
    data = static_cast<float *>(aligned_alloc(64, bytes));
  }
  ~Block() { free(data); }
  Block(const Block &) = delete;
  Block &operator=(const Block &) = delete;
};

// Threads for a call: as many as asked for (0: the OpenMP default), one where starting others would cost more than
// the work (about 5 microseconds; `multiply_adds` at some 10 per nanosecond).
static inline int thread_count(int32_t wanted, double multiply_adds) {
#ifdef _OPENMP
  if (multiply_adds < 50e3) return 1;
  return wanted > 0 ? wanted : omp_get_max_threads();
#else
  (void)wanted;
  (void)multiply_adds;
  return 1;
#endif
}

static inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}
