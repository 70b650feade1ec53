// Arithmetic on single values.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace natten::ptx {

// 2^x, about two units in the last place; 0 for -infinity.
__device__ __forceinline__ float exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
  return result;
}

// 1 / x, within one unit in the last place.
__device__ __forceinline__ float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
  return result;
}

// The four bytes that the nibbles of `selector` name, of eight: 0-3 of `low`, 4-7 of `high`; with bit 3 set, the byte's
// sign in all eight bits.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;\n" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
  return result;
}

// Two floats rounded to a pair of 16-bit elements, `low` in the low half.
__device__ __forceinline__ uint32_t pack(float low, float high, __half) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
__device__ __forceinline__ uint32_t pack(float low, float high, __nv_bfloat16) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

// The inverse.
__device__ __forceinline__ float2 unpack(uint32_t pair, __nv_bfloat16) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
}
__device__ __forceinline__ float2 unpack(uint32_t pair, __half) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

}  // namespace natten::ptx
