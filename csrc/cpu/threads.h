// Threads and scratch memory, outside any instruction set.
#pragma once
#include <stdint.h>
#include <stdlib.h>

#ifdef _OPENMP
#include <omp.h>
#endif

static inline float *allocate_floats(int64_t floats) {
  return static_cast<float *>(aligned_alloc(64, ((size_t)floats * sizeof(float) + 63) / 64 * 64));
}

// A calling thread keeps one block between calls: a fresh one costs page faults, more than a small call itself.
struct KeptBlock {
  static constexpr int64_t LIMIT = 1 << 21;  // floats; larger blocks are returned to the system
  float *data = nullptr;
  int64_t floats = 0;
  bool taken = false;
  ~KeptBlock() { free(data); }
};

static inline KeptBlock &kept_block() {
  static thread_local KeptBlock kept;
  return kept;
}

// Cache-line aligned floats until the end of the scope; data is null where memory ran out.
struct Block {
  float *data;
  bool kept;

  explicit Block(int64_t floats) {
    KeptBlock &block = kept_block();
    kept = !block.taken && floats <= KeptBlock::LIMIT;
    if (!kept) {
      data = allocate_floats(floats > 0 ? floats : 1);
      return;
    }
    if (block.floats < floats) {
      free(block.data);
      block.data = allocate_floats(floats);
      block.floats = block.data ? floats : 0;
    }
    data = block.data;
    block.taken = true;
  }

  ~Block() {
    if (kept)
      kept_block().taken = false;
    else
      free(data);
  }

  Block(const Block &) = delete;
  Block &operator=(const Block &) = delete;
};

// n uninitialised objects until the end of the scope; data is null where memory ran out.
template <class T>
struct Array {
  T *data;
  explicit Array(int64_t n) : data(static_cast<T *>(malloc((size_t)n * sizeof(T)))) {}
  ~Array() { free(data); }
  Array(const Array &) = delete;
  Array &operator=(const Array &) = delete;
};

// Threads for a call: as many as asked for (0: the OpenMP default), one where starting others would cost more than
// the work (5 to 10 microseconds; `multiply_adds` at some 10 to 20 per nanosecond).
static inline int thread_count(int32_t wanted, double multiply_adds) {
#ifdef _OPENMP
  if (multiply_adds < 150e3) return 1;
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

// Threads of the parallel region that runs: the system may give fewer than were asked for.
static inline int team_size() {
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}
