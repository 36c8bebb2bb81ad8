// What the entries of the C ABI call: each works out launches on the host and hands them to `run` in order.
// `capability`: the device's compute capability, 80 for 8.0. Nothing here waits for the device.
#pragma once

#include "absorb.h"
#include "launch.h"
#include "params.h"

namespace c2c {

constexpr int LARGEST_DIM = 256;  // head dims of attention

constexpr int MOST_DECODED = 32;  // rows (queries x heads of a KV head) up to which tokens are split over blocks

bool decodes(const Attention &p);
int64_t decode_workspace(const Attention &p);  // bytes, on the device
c2c_status_code launch_decode(const Attention &p, void *workspace, int capability, Executor run, void *context);

// Decode beside segments whose projectors are absorbed.
int64_t absorb_workspace(const Attention &p, const Absorption &absorption);
c2c_status_code launch_absorb(const Attention &p, const Absorption &absorption, void *workspace, Executor run,
                              void *context);

c2c_status_code launch_prefill(const Attention &p, int capability, Executor run, void *context);
// Its variant for 9.0 alone, which launch_prefill chooses there.
c2c_status_code launch_prefill_wgmma(const Attention &p, Executor run, void *context);
bool wgmma_is_built();  // whether this build has what 9.0 alone runs, of files *_wgmma.cu

int64_t project_workspace(const c2c_project_params &p);
c2c_status_code launch_project(const c2c_project_params &p, void *workspace, int capability, Executor run,
                               void *context);

c2c_status_code launch_merge_states(const c2c_merge_params &p, Executor run, void *context);
c2c_status_code launch_quantize(const c2c_quantize_params &p, Executor run, void *context);

}  // namespace c2c
