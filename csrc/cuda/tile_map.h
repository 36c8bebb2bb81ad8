// What a kernel's tensor map (CUtensorMap) says, as data: made by the driver where a launch is run, by a simulator its
// own way.
#pragma once

#include <stdint.h>

namespace c2c {

constexpr int MAP_COLUMNS = 64;  // of a box: 128 bytes, swizzled

// Boxes of `tokens` rows of MAP_COLUMNS 16-bit numbers of a tensor [batch, heads, tokens, dim]. data null: no map.
struct TileMap {
  const void *data;
  int64_t size[4];    // dim, tokens, heads, batch
  int64_t stride[3];  // bytes from a token, head, row of the batch to the next
  int32_t tokens;     // of a box
};

// What takes its place in the kernel's parameters.
struct alignas(64) MapSlot {
  uint64_t opaque[16];
};

// The driver's map; false where it makes none.
bool encode(const TileMap &map, MapSlot &slot);

}  // namespace c2c
