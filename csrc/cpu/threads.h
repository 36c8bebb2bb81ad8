// Threads and scratch memory, outside any instruction set.
#pragma once
#include <stdint.h>
#include <stdlib.h>

#include <atomic>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

static inline float *allocate_floats(int64_t floats) {
  return static_cast<float *>(aligned_alloc(64, ((size_t)floats * sizeof(float) + 63) / 64 * 64));
}

// A calling thread keeps one block between calls: a fresh one costs page faults, more than a small call itself.
struct KeptBlock {
  static constexpr int64_t LIMIT = 1 << 22;  // floats; larger blocks are returned to the system
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

// Jobs 0 .. count for the threads of a team. Each thread has a run of them that is the same in every call, so that what
// it reads may lie in a cache of its own from the call before; one that is done takes the last ones of the others'
// runs.
class Shares {
 public:
  Shares(int64_t count, int threads) : runs(threads), threads_(threads) {
    if (!runs.data) return;
    for (int64_t t = 0; t < threads; ++t)
      new (&runs.data[t].left) std::atomic<uint64_t>(pack(count * t / threads, count * (t + 1) / threads));
  }

  bool allocated() const { return runs.data != nullptr; }

  // f(job) for every job that no other thread takes; called once by each thread of the team.
  template <class F>
  void each(int thread, F f) {
    for (int t = 0; t < threads_; ++t) {
      std::atomic<uint64_t> &left = runs.data[(thread + t) % threads_].left;
      uint64_t seen = left.load(std::memory_order_relaxed);
      while (first(seen) < last(seen)) {
        const bool own = t == 0;
        const uint64_t after = own ? pack(first(seen) + 1, last(seen)) : pack(first(seen), last(seen) - 1);
        if (!left.compare_exchange_weak(seen, after, std::memory_order_relaxed)) continue;
        f(own ? first(seen) : last(seen) - 1);
        seen = left.load(std::memory_order_relaxed);
      }
    }
  }

 private:
  struct Run {
    std::atomic<uint64_t> left;  // first and end of what nobody has taken
    char apart[56];              // threads do not share a cache line
  };

  static uint64_t pack(int64_t first, int64_t end) { return (uint64_t)first << 32 | (uint64_t)end; }
  static int64_t first(uint64_t packed) { return packed >> 32; }
  static int64_t last(uint64_t packed) { return packed & 0xffffffffu; }

  Array<Run> runs;
  int threads_;
};

// Threads of the parallel region that runs: the system may give fewer than were asked for.
static inline int team_size() {
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}
