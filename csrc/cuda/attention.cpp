// The entry of `merged_attention`: decode where a KV head has few rows, beside absorbed segments or without, else
// prefill.
#include <cstdint>

#include "arguments.h"
#include "entries.h"

namespace c2c {

c2c_status attention_launches(const c2c_attention_params &p, void *workspace, int capability, Executor run,
                              void *context) {
  Attention a;
  Absorption absorption;
  const c2c_status status = device_attention(p, a, absorption);
  if (status.code) return status;
  if (absorption.count) return {launch_absorb(a, absorption, workspace, run, context), -1};
  const c2c_status_code code =
      decodes(a) ? launch_decode(a, workspace, capability, run, context) : launch_prefill(a, capability, run, context);
  return {code, -1};
}

int64_t attention_workspace(const c2c_attention_params &p) {
  Attention a;
  Absorption absorption;
  if (device_attention(p, a, absorption).code) return 0;
  if (absorption.count) return absorb_workspace(a, absorption);
  return decodes(a) ? decode_workspace(a) : 0;
}

}  // namespace c2c

extern "C" int64_t c2c_merged_attention_workspace_cuda(const c2c_attention_params *params) {
  return c2c::attention_workspace(*params);
}

extern "C" c2c_status c2c_merged_attention_cuda(const c2c_attention_params *params, void *workspace, void *stream) {
  int capability = 0;
  if (c2c_status_code code = c2c::current_capability(capability)) return {code, -1};
  return c2c::attention_launches(*params, workspace, capability, c2c::run_on_stream, stream);
}
