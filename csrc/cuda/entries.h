// The operators with an executor of the caller's: what the C ABI runs on a stream, and tests in a simulator.
#pragma once

#include "kernels.h"

namespace c2c {

c2c_status attention_launches(const c2c_attention_params &p, void *workspace, int capability, Executor run,
                              void *context);
int64_t attention_workspace(const c2c_attention_params &p);  // bytes; 0 where the call is refused

c2c_status project_launches(const c2c_project_params &p, void *workspace, int capability, Executor run, void *context);

c2c_status fuse_launches(const c2c_fuse_params &p, void *workspace, int capability, Executor run, void *context);
int64_t fuse_workspace(const c2c_fuse_params &p);  // bytes; 0 where the call is refused

}  // namespace c2c
