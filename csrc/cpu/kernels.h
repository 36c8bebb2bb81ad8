// The table of kernels that every instruction set provides, and the system headers they use.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "ahead.h"
#include "c2c.h"
#include "threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Compilers before GCC 11 and clang 12 have no word for tiles; only Linux hands them out (dispatch.cpp).
#if defined(__x86_64__) && defined(__linux__) && defined(__has_include)
#if __has_include(<amxbf16intrin.h>)
#define C2C_HAS_AMX
#endif
#endif

struct Kernels {
  const char *isa;
  c2c_status_code (*merged_attention)(const c2c_attention_params &);
  c2c_status_code (*merged_attention_backward)(const c2c_attention_backward_params &);
  c2c_status_code (*project_kv)(const c2c_project_params &);
  c2c_status_code (*merge_states)(const c2c_merge_params &);
  c2c_status_code (*quantize)(const c2c_quantize_params &);
  c2c_status_code (*fuse_kv)(const c2c_fuse_params &);
};

// Whether attention cannot read a segment as it is stored, and passes it through a stage (stage.h).
static inline bool is_staged(const c2c_segment &s) {
  return s.materialize || s.index.data || s.key.dtype == C2C_F8E4M3 || s.value.dtype == C2C_F8E4M3;
}

#if defined(__x86_64__)
namespace c2c_baseline { extern const Kernels kernels; }
namespace c2c_avx2 { extern const Kernels kernels; }
#if defined(C2C_HAS_AMX)
namespace c2c_amx_bf16 { extern const Kernels kernels; }
#endif
namespace c2c_avx512_bf16 { extern const Kernels kernels; }
namespace c2c_avx512 { extern const Kernels kernels; }
#elif defined(__aarch64__)
namespace c2c_neon { extern const Kernels kernels; }
#else
namespace c2c_baseline { extern const Kernels kernels; }
#endif
