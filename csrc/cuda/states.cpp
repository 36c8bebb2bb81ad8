// The entries of `merge_states` and `quantize_kv`.
#include "entries.h"

extern "C" c2c_status c2c_merge_states_cuda(const c2c_merge_params *params, void *stream) {
  int capability = 0;
  if (c2c_status_code code = c2c::current_capability(capability)) return {code, -1};
  return {c2c::launch_merge_states(*params, c2c::run_on_stream, stream), -1};
}

extern "C" c2c_status c2c_quantize_cuda(const c2c_quantize_params *params, void *stream) {
  int capability = 0;
  if (c2c_status_code code = c2c::current_capability(capability)) return {code, -1};
  return {c2c::launch_quantize(*params, c2c::run_on_stream, stream), -1};
}
