// `merged_attention` for many queries: one launch over all runs. See prefill.cuh.
#include "prefill.h"

#include <algorithm>

#include "kernels.h"

namespace c2c {

c2c_status_code launch_prefill(const Attention &p, int capability, Executor run, void *context) {
  if (capability == 90) return launch_prefill_wgmma(p, run, context);
  const int dim = std::max(p.head_dim, p.value_dim);
  for (const PrefillVariant &v : has_large_blocks(capability) ? prefill_large : prefill_small) {
    if (v.dtype != p.dtype || v.dim < dim) continue;
    const int64_t rows = int64_t{p.q_len} * p.group, tiles = (rows + v.rows - 1) / v.rows;
    const int64_t blocks = tiles * p.batch * p.kv_heads;
    if (rows > INT32_MAX - v.rows || blocks > INT32_MAX) return C2C_UNSUPPORTED;
    if (!blocks) return C2C_OK;
    return run({v.kernel, v.name, static_cast<uint32_t>(blocks), static_cast<uint32_t>(v.threads),
                static_cast<uint32_t>(v.shared), &p, sizeof p},
               context);
  }
  return C2C_UNSUPPORTED;
}

}  // namespace c2c
