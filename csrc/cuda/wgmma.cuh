// The PTX instructions of sm_90a beside those of ptx.cuh: mbarriers, tiles copied by tensor maps, products of warp
// groups.
#pragma once

#include "ptx.cuh"

namespace c2c {

// --- mbarriers: 8 bytes of shared memory. A phase ends with as many arrivals as it was made for and all bytes that
// were announced; waiting for the parity of a phase's number means waiting for its end.

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Made barriers are seen by copies too, once the block has met.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and announces bytes that copies will bring in this phase.
__device__ __forceinline__ void mbarrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  } while (!done);
}

// --- registers: a warp group gives back what it has beyond COUNT of each thread, or waits until it has as many.

template <int COUNT>
__device__ __forceinline__ void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// --- copies

// What this thread has written to shared memory is seen by products and copies that start after a barrier.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The box of a tensor map that begins with these coordinates; its bytes, zeros outside of the tensor, count on
// `barrier`.
__device__ __forceinline__ void copy_box(uint32_t shared, const void *map, int number, int token, int head, int batch,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared),
      "l"(map), "r"(number), "r"(token), "r"(head), "r"(batch), "r"(barrier)
      : "memory");
}

// --- products of a warp group: d += a b with a 64 x 16, b 16 x N, d in float32. Warp w of the group holds rows 16 w
// and on of a and d, laid out as mma_16816's; d[n] are columns 8 n and on. Operands in shared memory are matrices of
// rows of 128 bytes, swizzled as tensor maps do (16-byte chunk c of row r lies at c ^ r % 8), the first row at a
// multiple of 1024.

// What registers hold is what the products that follow find in them; a group of products ends with the second.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most PENDING of the latest groups are in flight.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving uses of accumulators across it.
template <int N>
__device__ __forceinline__ void wgmma_hold(float (&d)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
}

// A number that is the same in all lanes, as one that the compiler knows to be: descriptions are then formed once a
// warp.
__device__ __forceinline__ uint32_t of_warp(uint32_t number) { return __shfl_sync(0xffffffff, number, 0); }

// Describes an operand whose 16 steps of the product run along its rows (keys, queries).
__device__ __forceinline__ uint64_t wgmma_rows(uint32_t shared) {
  shared = of_warp(shared);
  return uint64_t{(shared & 0x3ffff) >> 4} | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// The same where steps run along its columns (values); the next 64 columns lie `block` bytes on.
__device__ __forceinline__ uint64_t wgmma_columns(uint32_t shared, uint32_t block) {
  shared = of_warp(shared);
  return uint64_t{(shared & 0x3ffff) >> 4} | uint64_t{block >> 4} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// The same operand `bytes` further on.
__device__ __forceinline__ uint64_t wgmma_further(uint64_t operand, uint32_t bytes) { return operand + (bytes >> 4); }

// a b^T, both in shared memory and described by wgmma_rows; `add`: else d is written anew.
template <typename T, int N>
__device__ __forceinline__ void wgmma_shared(float (&d)[N][4], uint64_t a, uint64_t b, bool add);

// a b, a in registers; b described by wgmma_columns.
template <typename T, int N>
__device__ __forceinline__ void wgmma_registers(float (&d)[N][4], const uint32_t (&a)[4], uint64_t b);

#define C2C_FOUR(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])

#define C2C_WGMMA_SHARED_64(T, type) \
  template <> \
  __device__ __forceinline__ void wgmma_shared<T>(float (&d)[8][4], uint64_t a, uint64_t b, bool add) { \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type \
                 " {" \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
                 "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
                 "}, %32, %33, p, 1, 1, 0, 0; }" \
                 : C2C_FOUR(d[0]), C2C_FOUR(d[1]), C2C_FOUR(d[2]), C2C_FOUR(d[3]), C2C_FOUR(d[4]), C2C_FOUR(d[5]), \
                   C2C_FOUR(d[6]), C2C_FOUR(d[7]) \
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)) \
                 : "memory"); \
  }
C2C_WGMMA_SHARED_64(__half, "f16")
C2C_WGMMA_SHARED_64(__nv_bfloat16, "bf16")

#define C2C_WGMMA_SHARED_128(T, type) \
  template <> \
  __device__ __forceinline__ void wgmma_shared<T>(float (&d)[16][4], uint64_t a, uint64_t b, bool add) { \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type \
                 " {" \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
                 "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, " \
                 "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, " \
                 "%56, %57, %58, %59, %60, %61, %62, %63" \
                 "}, %64, %65, p, 1, 1, 0, 0; }" \
                 : C2C_FOUR(d[0]), C2C_FOUR(d[1]), C2C_FOUR(d[2]), C2C_FOUR(d[3]), C2C_FOUR(d[4]), C2C_FOUR(d[5]), \
                   C2C_FOUR(d[6]), C2C_FOUR(d[7]), C2C_FOUR(d[8]), C2C_FOUR(d[9]), C2C_FOUR(d[10]), C2C_FOUR(d[11]), \
                   C2C_FOUR(d[12]), C2C_FOUR(d[13]), C2C_FOUR(d[14]), C2C_FOUR(d[15]) \
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)) \
                 : "memory"); \
  }
C2C_WGMMA_SHARED_128(__half, "f16")
C2C_WGMMA_SHARED_128(__nv_bfloat16, "bf16")

#define C2C_WGMMA_REGISTERS_64(T, type) \
  template <> \
  __device__ __forceinline__ void wgmma_registers<T>(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type \
                 " {" \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
                 "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;" \
                 : C2C_FOUR(d[0]), C2C_FOUR(d[1]), C2C_FOUR(d[2]), C2C_FOUR(d[3]), C2C_FOUR(d[4]), C2C_FOUR(d[5]), \
                   C2C_FOUR(d[6]), C2C_FOUR(d[7]) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) \
                 : "memory"); \
  }
C2C_WGMMA_REGISTERS_64(__half, "f16")
C2C_WGMMA_REGISTERS_64(__nv_bfloat16, "bf16")

#define C2C_WGMMA_REGISTERS_128(T, type) \
  template <> \
  __device__ __forceinline__ void wgmma_registers<T>(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type \
                 " {" \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
                 "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
                 "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, " \
                 "%59, %60, %61, %62, %63" \
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;" \
                 : C2C_FOUR(d[0]), C2C_FOUR(d[1]), C2C_FOUR(d[2]), C2C_FOUR(d[3]), C2C_FOUR(d[4]), C2C_FOUR(d[5]), \
                   C2C_FOUR(d[6]), C2C_FOUR(d[7]), C2C_FOUR(d[8]), C2C_FOUR(d[9]), C2C_FOUR(d[10]), C2C_FOUR(d[11]), \
                   C2C_FOUR(d[12]), C2C_FOUR(d[13]), C2C_FOUR(d[14]), C2C_FOUR(d[15]) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) \
                 : "memory"); \
  }
C2C_WGMMA_REGISTERS_128(__half, "f16")
C2C_WGMMA_REGISTERS_128(__nv_bfloat16, "bf16")

#define C2C_WGMMA_REGISTERS_256(T, type) \
  template <> \
  __device__ __forceinline__ void wgmma_registers<T>(float (&d)[32][4], const uint32_t (&a)[4], uint64_t b) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type \
                 " {" \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
                 "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
                 "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, " \
                 "%59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, " \
                 "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, " \
                 "%97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, " \
                 "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127" \
                 "}, {%128, %129, %130, %131}, %132, 1, 1, 1, 1;" \
                 : C2C_FOUR(d[0]), C2C_FOUR(d[1]), C2C_FOUR(d[2]), C2C_FOUR(d[3]), C2C_FOUR(d[4]), C2C_FOUR(d[5]), \
                   C2C_FOUR(d[6]), C2C_FOUR(d[7]), C2C_FOUR(d[8]), C2C_FOUR(d[9]), C2C_FOUR(d[10]), C2C_FOUR(d[11]), \
                   C2C_FOUR(d[12]), C2C_FOUR(d[13]), C2C_FOUR(d[14]), C2C_FOUR(d[15]), C2C_FOUR(d[16]), \
                   C2C_FOUR(d[17]), C2C_FOUR(d[18]), C2C_FOUR(d[19]), C2C_FOUR(d[20]), C2C_FOUR(d[21]), \
                   C2C_FOUR(d[22]), C2C_FOUR(d[23]), C2C_FOUR(d[24]), C2C_FOUR(d[25]), C2C_FOUR(d[26]), \
                   C2C_FOUR(d[27]), C2C_FOUR(d[28]), C2C_FOUR(d[29]), C2C_FOUR(d[30]), C2C_FOUR(d[31]) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) \
                 : "memory"); \
  }
C2C_WGMMA_REGISTERS_256(__half, "f16")
C2C_WGMMA_REGISTERS_256(__nv_bfloat16, "bf16")

#undef C2C_FOUR

}  // namespace c2c
