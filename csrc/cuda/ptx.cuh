// The PTX instructions that kernels use, each wrapped once: asynchronous copies, ldmatrix, mma.sync (sm_80 and up).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace c2c {

__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Of four neighbours lane c holds word i; it gets word c of lane i.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4]) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = threadIdx.x & step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const uint32_t given = upper ? words[i] : words[i + step];
      const uint32_t got = __shfl_xor_sync(~0u, given, step);
      words[i] = upper ? got : words[i];
      words[i + step] = upper ? words[i + step] : got;
    }
  }
}

// The pointer `count` times `bytes` further, in one instruction.
template <typename T>
__device__ __forceinline__ const T *further(const T *pointer, uint32_t count, uint32_t bytes) {
  uint64_t result;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(result) : "r"(count), "r"(bytes), "l"(pointer));
  return reinterpret_cast<const T *>(result);
}

// Copies the first `bytes` of 16 bytes past L1, zeros after them. Both sides 16-byte aligned.
__device__ __forceinline__ void cp_async_some(uint32_t shared, const void *global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

// Copies 16 bytes past L1; where not `inside`, nothing is read and zeros are written. Both sides 16-byte aligned.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void *global, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(inside ? 16 : 0)
               : "memory");
}

// The same, always inside: fewer instructions.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void *global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's latest groups are in flight; others see the data after a barrier.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// A barrier of `threads` threads, by number; 0 is __syncthreads'.
__device__ __forceinline__ void barrier_sync(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Four 8x8 matrices of 16-bit numbers; lanes 8i..8i+7 give the rows' addresses of matrix i. Lane l gets of each row
// l / 4 columns 2 (l % 4) and + 1: the fragments of mma.m16n8k16.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

// d += a b with a 16 x 16, b 16 x 8, d 16 x 8 in float32. With g = lane / 4 and c = lane % 4, lane holds
//   a[0], a[1], a[2], a[3]: rows g, g + 8, g, g + 8; columns 2c and 2c + 1, the same, then both + 8
//   b0, b1: rows 2c and 2c + 1, then + 8; column g
//   d[0], d[1]: row g, columns 2c and 2c + 1; d[2], d[3]: row g + 8
template <typename T>
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma_16816<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_16816<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2^x to 2 ulp; 2^-inf = 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2 x to 2^-22 absolute, for numbers below 2^-126 too; log2 0 = -inf.
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ void store_shared_16(uint32_t shared, const uint32_t (&words)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(words[0]), "r"(words[1]), "r"(words[2]),
               "r"(words[3])
               : "memory");
}

// In one store: the compiler would make two of some.
__device__ __forceinline__ void store_shared_pair(uint32_t shared, float first, float second) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(shared), "f"(first), "f"(second) : "memory");
}

__device__ __forceinline__ uint32_t load_shared_word(uint32_t shared) {
  uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(shared) : "memory");
  return word;
}

// A counter of other blocks: what these stored before they added to it can be read after.
__device__ __forceinline__ int load_acquire(const int *counter) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

__device__ __forceinline__ void add_release(int *counter, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

__device__ __forceinline__ uint64_t load_acquire(const uint64_t *mark) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(mark) : "memory");
  return value;
}

__device__ __forceinline__ void store_release(uint64_t *mark, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(mark), "l"(value) : "memory");
}

// Returns what was there; only where that is `compared` is it now `value`.
__device__ __forceinline__ uint64_t compare_and_swap(uint64_t *mark, uint64_t compared, uint64_t value) {
  uint64_t found;
  asm volatile("atom.relaxed.gpu.global.cas.b64 %0, [%1], %2, %3;"
               : "=l"(found)
               : "l"(mark), "l"(compared), "l"(value)
               : "memory");
  return found;
}

// What other blocks of the launch read after a release and an acquire.
__device__ __forceinline__ void store_relaxed(float *to, float x) {
  asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(to), "f"(x) : "memory");
}

__device__ __forceinline__ void store_relaxed_16(void *to, const uint4 &x) {
  asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

// In one store: the compiler would make four of some.
__device__ __forceinline__ void store_16(void *to, const uint32_t (&words)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]),
               "r"(words[3])
               : "memory");
}

// Asks for the line of an address to be brought to the L2 cache.
__device__ __forceinline__ void prefetch_l2(const void *global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// Two numbers rounded to 16 bits, the first in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float first, float second);

template <>
__device__ __forceinline__ uint32_t pack<__half>(float first, float second) {
  const __half2 both = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t *>(&both);
}

template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float first, float second) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t *>(&both);
}

// pack<T>(1, 1), as a constant.
template <typename T>
constexpr __device__ uint32_t pair_of_ones();

template <>
constexpr __device__ uint32_t pair_of_ones<__half>() {
  return 0x3c003c00;
}

template <>
constexpr __device__ uint32_t pair_of_ones<__nv_bfloat16>() {
  return 0x3f803f80;
}

// Two pairs of 16-bit numbers multiplied, each product rounded once.
template <typename T>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b);

template <>
__device__ __forceinline__ uint32_t multiply_pairs<__half>(uint32_t a, uint32_t b) {
  const __half2 both = __hmul2_rn(*reinterpret_cast<const __half2 *>(&a), *reinterpret_cast<const __half2 *>(&b));
  return *reinterpret_cast<const uint32_t *>(&both);
}

template <>
__device__ __forceinline__ uint32_t multiply_pairs<__nv_bfloat16>(uint32_t a, uint32_t b) {
  const __nv_bfloat162 both =
      __hmul2_rn(*reinterpret_cast<const __nv_bfloat162 *>(&a), *reinterpret_cast<const __nv_bfloat162 *>(&b));
  return *reinterpret_cast<const uint32_t *>(&both);
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t pair);

template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2 *>(&pair));
}

template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t pair) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(&pair));
}

}  // namespace c2c
