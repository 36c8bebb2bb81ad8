// The entry of `project_kv`.
#include <cstdint>

#include "entries.h"

namespace c2c {

c2c_status project_launches(const c2c_project_params &p, void *workspace, int capability, Executor run, void *context) {
  return {launch_project(p, workspace, capability, run, context), -1};
}

}  // namespace c2c

extern "C" int64_t c2c_project_kv_workspace_cuda(const c2c_project_params *params) {
  return c2c::project_workspace(*params);
}

extern "C" c2c_status c2c_project_kv_cuda(const c2c_project_params *params, void *workspace, void *stream) {
  int capability = 0;
  if (c2c_status_code code = c2c::current_capability(capability)) return {code, -1};
  return c2c::project_launches(*params, workspace, capability, c2c::run_on_stream, stream);
}
