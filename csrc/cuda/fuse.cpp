// The entry of `fuse_kv`: for halves alike one launch of all products, and before it what writes the table of halves.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "entries.h"
#include "fuse_plan.h"

namespace c2c {

namespace {

template <int WORDS>
c2c_status_code fill_table(const FusePart &from, const Fuse &p, Executor run, void *context) {
  constexpr bool LARGE = WORDS == FUSE_TABLE_LARGE;
  const std::vector<int64_t> table = fuse_table(from);
  const int32_t row = fuse_table_words(*from.group), most = WORDS / row;
  for (int32_t first = 0; first < from.halves; first += most) {
    FuseTable<WORDS> part{};
    part.to = static_cast<int64_t *>(const_cast<void *>(p.table)) + int64_t{first} * row;
    part.states = const_cast<int8_t *>(p.states) + first;
    part.counters = p.counters;
    part.count = first ? 0 : 1 + p.jobs;
    part.rows = std::min(most, from.halves - first);
    part.row = row;
    part.gated = p.gated;
    part.type = static_cast<int8_t>(from.group->like->gate_logit.dtype);
    std::memcpy(part.word, &table[static_cast<size_t>(first) * row], sizeof(int64_t) * part.rows * row);
    const Launch launch = {fuse_table_kernel(LARGE),
                           LARGE ? "c2c_fuse_table_large" : "c2c_fuse_table_small",
                           1,
                           256,
                           0,
                           &part,
                           sizeof part};
    if (c2c_status_code code = run(launch, context)) return code;
  }
  return C2C_OK;
}

c2c_status_code launch_part(const FusePart &part, const FuseKernel &kernel, void *workspace, Executor run,
                            void *context) {
  Fuse p;
  if (c2c_status_code code = fuse_arguments(part, kernel, static_cast<char *>(workspace), p)) return code;
  const bool small = part.halves * fuse_table_words(*part.group) <= FUSE_TABLE_SMALL;
  const auto fill = small ? fill_table<FUSE_TABLE_SMALL> : fill_table<FUSE_TABLE_LARGE>;
  if (c2c_status_code code = fill(part, p, run, context)) return code;
  const FuseStep &last = p.step[p.steps - 1];
  return run({kernel.kernel, kernel.name, static_cast<uint32_t>((last.first + last.tiles) * p.jobs),
              static_cast<uint32_t>(kernel.threads), static_cast<uint32_t>(kernel.shared), &p, sizeof p},
             context);
}

int64_t workspace_for(const std::vector<FuseGroup> &groups, int capability) {
  int64_t most = 0;
  for (const FuseGroup &group : groups) {
    const FuseKernel kernel = fuse_kernel_of(group, capability);
    for (const FusePart &part : fuse_parts(group, kernel)) most = std::max(most, fuse_space(part, kernel).size);
  }
  return most;
}

}  // namespace

int64_t fuse_workspace(const c2c_fuse_params &p) {
  std::vector<FuseGroup> groups;
  if (fuse_groups(p, groups)) return 0;
  return std::max(workspace_for(groups, 80), workspace_for(groups, 86));  // whatever the device is
}

c2c_status fuse_launches(const c2c_fuse_params &p, void *workspace, int capability, Executor run, void *context) {
  std::vector<FuseGroup> groups;
  if (c2c_status_code code = fuse_groups(p, groups)) return {code, -1};
  for (const FuseGroup &group : groups) {
    const FuseKernel kernel = fuse_kernel_of(group, capability);
    for (const FusePart &part : fuse_parts(group, kernel))
      if (c2c_status_code code = launch_part(part, kernel, workspace, run, context)) return {code, -1};
  }
  return {C2C_OK, -1};
}

}  // namespace c2c

extern "C" int64_t c2c_fuse_kv_workspace_cuda(const c2c_fuse_params *params) { return c2c::fuse_workspace(*params); }

extern "C" c2c_status c2c_fuse_kv_cuda(const c2c_fuse_params *params, void *workspace, void *stream) {
  int capability = 0;
  if (c2c_status_code code = c2c::current_capability(capability)) return {code, -1};
  return c2c::fuse_launches(*params, workspace, capability, c2c::run_on_stream, stream);
}
