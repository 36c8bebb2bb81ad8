// Parameters of the sm_90a variant of prefill, for host and device.
#pragma once

#include "params.h"
#include "tile_map.h"

namespace c2c {

struct MappedAttention {
  Attention attention;
  MapSlot maps[2 * MAX_RUNS];  // of every mapped run's keys, then of its values
  int8_t mapped[MAX_RUNS];     // the run's tiles are copied by its maps; others' are converted by warps
};

}  // namespace c2c
