// `project_kv`'s products on sm_90a, whose instructions no other architecture has. See project_wgmma.cuh.

#include "project_wgmma.cuh"

#include "kernels.h"

#if defined(C2C_SM_90A) && defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "C2C_SM_90A is for compilations for sm_90a alone: these kernels would be empty"
#endif
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define PROJECT(T) c2c::project_wgmma<T>(p);
#else
#define PROJECT(T)  // never launched: see wgmma_is_built
#endif

extern "C" __global__ void __launch_bounds__(c2c::ProjectWgmmaTile::THREADS, 1)
    c2c_project_wgmma_f16(const __grid_constant__ c2c::Projection p) {
  PROJECT(__half)
}

extern "C" __global__ void __launch_bounds__(c2c::ProjectWgmmaTile::THREADS, 1)
    c2c_project_wgmma_bf16(const __grid_constant__ c2c::Projection p) {
  PROJECT(__nv_bfloat16)
}

namespace c2c {

c2c_status_code launch_project_wgmma(const Projection &p, int type, int64_t blocks, Executor run, void *context) {
  const bool bf16 = type == C2C_BF16;
  const auto kernel = bf16 ? &c2c_project_wgmma_bf16 : &c2c_project_wgmma_f16;
  return run({reinterpret_cast<const void *>(kernel), bf16 ? "c2c_project_wgmma_bf16" : "c2c_project_wgmma_f16",
              static_cast<uint32_t>(blocks), ProjectWgmmaTile::THREADS, ProjectWgmmaTile::SHARED, &p, sizeof p},
             context);
}

}  // namespace c2c
