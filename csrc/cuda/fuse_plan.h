// How a call of fuse_kv is cut into launches, on the host.
#pragma once

#include <cstdint>
#include <vector>

#include "c2c.h"
#include "fuse.h"

namespace c2c {

// Halves that are alike in shapes and dtypes, so that one launch takes them.
struct FuseGroup {
  const c2c_fuse_half *like;
  std::vector<const c2c_fuse_half *> halves;
  bool weights_vectorised, caches_vectorised;
};

// One launch: some halves of a group and some of their tiles of tokens.
struct FusePart {
  const FuseGroup *group;
  int32_t first_half, halves;
  int32_t first_tile, row_tiles;
};

// Where what programs leave for each other lies in the workspace, in bytes.
struct FuseSpace {
  int64_t table, states, counters, h, projected, inner, scale_inner, squares, logits, size;
};

// OK where the halves can be fused by the kernels of this folder; `groups` then holds those that have tokens.
c2c_status_code fuse_groups(const c2c_fuse_params &p, std::vector<FuseGroup> &groups);

// The kernel for a group. `capability`: the device's, 80 for 8.0.
FuseKernel fuse_kernel_of(const FuseGroup &group, int capability);

// As few launches as keep scratch small: of few tokens one for all.
std::vector<FusePart> fuse_parts(const FuseGroup &group, const FuseKernel &kernel);

FuseSpace fuse_space(const FusePart &part, const FuseKernel &kernel);

// What the kernel is told; pointers are in `workspace`. C2C_UNSUPPORTED where tiles cannot be counted in 32 bits.
c2c_status_code fuse_arguments(const FusePart &part, const FuseKernel &kernel, char *workspace, Fuse &out);

// The part's table, `fuse_table_words` of a half each.
int32_t fuse_table_words(const FuseGroup &group);
std::vector<int64_t> fuse_table(const FusePart &part);

}  // namespace c2c
