// Matrix products of a warpgroup (wgmma, sm_90a): D[64, N] (+)= A[64, 16] B[16, N], fp32 accumulators.
//
// Thread t of the warpgroup (warp w = t / 32, lane l = t % 32) holds of D, and of A in registers, the rows
// 16 w + l / 4 and 8 below; accumulator 4 j + 2 r + c stands at row + 8 r, column 8 j + 2 (l % 4) + c.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace natten::ptx {

// Must precede the first product that touches registers or shared memory written since the last group.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending committed groups are in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// An asynchronous product writes its registers behind the compiler's back. Pinning them after the wait (and before they
// are operands again) keeps every other access on the right side.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void pin(uint32_t (&registers)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    asm volatile(""
                 : "+r"(registers[i][0]), "+r"(registers[i][1]), "+r"(registers[i][2]),
                   "+r"(registers[i][3])::"memory");
  }
}

// Shared-memory matrix descriptor of swizzled tiles whose rows are `kRowBytes` (64 or 128) long, as the copy engine
// writes them; 16: no swizzle, 8 x 16-byte blocks one after another. Low word: address and leading offset; high word:
// distance of 8-row groups and the swizzle mode.
template <int kRowBytes>
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t low) {
  static_assert(kRowBytes == 16 || kRowBytes == 64 || kRowBytes == 128);
  constexpr uint32_t kMode = kRowBytes == 128 ? 1 : kRowBytes == 64 ? 2 : 0;
  constexpr uint32_t kHigh = kMode << 30 | (8 * kRowBytes) >> 4;
  return static_cast<uint64_t>(kHigh) << 32 | low;
}
__device__ __forceinline__ uint32_t matrix_descriptor_low(uint32_t address, int leading_bytes) {
  return (address & 0x3FFFF) >> 4 | static_cast<uint32_t>(leading_bytes >> 4) << 16;
}

// clang-format off
#define NATTEN_D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define NATTEN_D16(i) NATTEN_D8(i), NATTEN_D8(i + 8)
#define NATTEN_D32(i) NATTEN_D16(i), NATTEN_D16(i + 16)
#define NATTEN_R16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NATTEN_R32 NATTEN_R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NATTEN_R40 NATTEN_R32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define NATTEN_R48 NATTEN_R40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define NATTEN_R64 NATTEN_R48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NATTEN_R96 NATTEN_R64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NATTEN_R128 NATTEN_R96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// Operands after the accumulators: A descriptor, B descriptor, accumulate?  /  four A registers, B descriptor, transpose B.
#define NATTEN_WGMMA_SHARED(n, type, transpose, registers, a, b, accumulate_, ...)                                        \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " accumulate_ ", 0;\n wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type \
               " {" registers "}, " a ", " b ", p, 1, 1, 0, " transpose "; }" : __VA_ARGS__ : "l"(a_descriptor), "l"(b_descriptor), "r"(accumulate))
#define NATTEN_WGMMA_REGISTERS(n, type, registers, a0, a1, a2, a3, b, ...)                                                \
  asm volatile("{ .reg .pred p; setp.eq.b32 p, 0, 0;\n wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type       \
               " {" registers "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b ", p, 1, 1, 1; }" : __VA_ARGS__                        \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor))
// clang-format on

// D (+)= A B^T with A [64, 16] and B [N, 16] in shared memory, both with contiguous rows (K-major); or
// D (+)= A B with B [16, N], its rows contiguous as well (transposed by the instruction).
template <typename Element, int N, bool kTransposed = false>
__device__ __forceinline__ void wgmma_shared(float (&d)[N / 2], uint64_t a_descriptor, uint64_t b_descriptor,
                                             int accumulate) {
#define NATTEN_CASE(n, registers, a, b, accumulate_, ...)                               \
  if constexpr (N == n) {                                                               \
    if constexpr (std::is_same_v<Element, __nv_bfloat16>) {                             \
      if constexpr (kTransposed) {                                                      \
        NATTEN_WGMMA_SHARED(n, "bf16", "1", registers, a, b, accumulate_, __VA_ARGS__); \
      } else {                                                                          \
        NATTEN_WGMMA_SHARED(n, "bf16", "0", registers, a, b, accumulate_, __VA_ARGS__); \
      }                                                                                 \
    } else {                                                                            \
      if constexpr (kTransposed) {                                                      \
        NATTEN_WGMMA_SHARED(n, "f16", "1", registers, a, b, accumulate_, __VA_ARGS__);  \
      } else {                                                                          \
        NATTEN_WGMMA_SHARED(n, "f16", "0", registers, a, b, accumulate_, __VA_ARGS__);  \
      }                                                                                 \
    }                                                                                   \
  }
  static_assert(N == 64 || N == 80 || N == 96 || N == 128);
  NATTEN_CASE(64, NATTEN_R32, "%32", "%33", "%34", NATTEN_D32(0))
  NATTEN_CASE(80, NATTEN_R40, "%40", "%41", "%42", NATTEN_D32(0), NATTEN_D8(32))
  NATTEN_CASE(96, NATTEN_R48, "%48", "%49", "%50", NATTEN_D32(0), NATTEN_D16(32))
  NATTEN_CASE(128, NATTEN_R64, "%64", "%65", "%66", NATTEN_D32(0), NATTEN_D32(32))
#undef NATTEN_CASE
}

// D += A B with A [64, 16] in registers and B [16, N] in shared memory, N contiguous (transposed by the instruction).
template <typename Element, int N>
__device__ __forceinline__ void wgmma_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b_descriptor) {
#define NATTEN_CASE(n, registers, a0, a1, a2, a3, b, ...)                           \
  if constexpr (N == n) {                                                           \
    if constexpr (std::is_same_v<Element, __nv_bfloat16>) {                         \
      NATTEN_WGMMA_REGISTERS(n, "bf16", registers, a0, a1, a2, a3, b, __VA_ARGS__); \
    } else {                                                                        \
      NATTEN_WGMMA_REGISTERS(n, "f16", registers, a0, a1, a2, a3, b, __VA_ARGS__);  \
    }                                                                               \
  }
  static_assert(N == 32 || N == 64 || N == 96 || N == 128 || N == 192 || N == 256);
  NATTEN_CASE(32, NATTEN_R16, "%16", "%17", "%18", "%19", "%20", NATTEN_D16(0))
  NATTEN_CASE(64, NATTEN_R32, "%32", "%33", "%34", "%35", "%36", NATTEN_D32(0))
  NATTEN_CASE(96, NATTEN_R48, "%48", "%49", "%50", "%51", "%52", NATTEN_D32(0), NATTEN_D16(32))
  NATTEN_CASE(128, NATTEN_R64, "%64", "%65", "%66", "%67", "%68", NATTEN_D32(0), NATTEN_D32(32))
  NATTEN_CASE(192, NATTEN_R96, "%96", "%97", "%98", "%99", "%100", NATTEN_D32(0), NATTEN_D32(32), NATTEN_D32(64))
  NATTEN_CASE(256, NATTEN_R128, "%128", "%129", "%130", "%131", "%132", NATTEN_D32(0), NATTEN_D32(32), NATTEN_D32(64),
              NATTEN_D32(96))
#undef NATTEN_CASE
}

#undef NATTEN_WGMMA_SHARED
#undef NATTEN_WGMMA_REGISTERS
#undef NATTEN_D8
#undef NATTEN_D16
#undef NATTEN_D32
#undef NATTEN_R16
#undef NATTEN_R32
#undef NATTEN_R40
#undef NATTEN_R48
#undef NATTEN_R64
#undef NATTEN_R96
#undef NATTEN_R128

}  // namespace natten::ptx
