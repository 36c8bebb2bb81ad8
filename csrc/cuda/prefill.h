// Kernels of prefill by mma.sync, for the host.
#pragma once

#include <stdint.h>

namespace c2c {

struct PrefillVariant {
  int dim, rows, threads, shared;
  int8_t dtype;
  const void *kernel;
  const char *name;
};

// For blocks that may have 163 KiB of shared memory, and for those that have 99; of each dtype head dims rise.
extern const PrefillVariant prefill_large[6], prefill_small[6];

}  // namespace c2c
