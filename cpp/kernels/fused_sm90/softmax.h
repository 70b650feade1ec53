// Online softmax over the rows of a warpgroup's score tile: each thread holds two rows, shared with three neighbours.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

namespace natten::fused_sm90 {

__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two values, rounded to the element type, the first in the low half.
template <typename Element>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

struct Softmax {
  float maximum[2] = {-INFINITY, -INFINITY};  // of the raw scores; may lag behind by `slack`
  float sum[2] = {0.f, 0.f};                  // this thread's part
  float correction[2];
  bool grown;  // by the last update: earlier outputs have to be multiplied by `correction`

  // Replaces raw scores by exp2((score - maximum) * scale_log2). The maximum follows only when it grew by more than
  // `slack` (in raw scores) in some row of the warp: until then the exponentials stay below 2^8, which fp32 sums and both
  // 16-bit types hold without loss.
  template <int kCount>
  __device__ __forceinline__ void update(float (&scores)[kCount], float scale_log2, float slack) {
    float step_maximum[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float even = scores[2 * r], odd = scores[2 * r + 1];
#pragma unroll
      for (int j = 1; j < kCount / 4; ++j) {
        even = fmaxf(even, scores[4 * j + 2 * r]);
        odd = fmaxf(odd, scores[4 * j + 2 * r + 1]);
      }
      const float both = fmaxf(even, odd);
      const float pair = fmaxf(both, __shfl_xor_sync(0xFFFFFFFFu, both, 1));
      step_maximum[r] = fmaxf(pair, __shfl_xor_sync(0xFFFFFFFFu, pair, 2));
    }
    grown = __any_sync(0xFFFFFFFFu, step_maximum[0] > maximum[0] + slack || step_maximum[1] > maximum[1] + slack);
    correction[0] = correction[1] = 1.f;
    if (grown) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float next = fmaxf(maximum[r], step_maximum[r]);
        correction[r] = exp2_approximate(maximum[r] * scale_log2 - shift_of(next, scale_log2));
        maximum[r] = next;
        sum[r] *= correction[r];
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float shift = shift_of(maximum[r], scale_log2);
      float even = 0.f, odd = 0.f;
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j) {
        float& a = scores[4 * j + 2 * r];
        float& b = scores[4 * j + 2 * r + 1];
        a = exp2_approximate(fmaf(a, scale_log2, -shift));
        b = exp2_approximate(fmaf(b, scale_log2, -shift));
        even += a;
        odd += b;
      }
      sum[r] += even + odd;
    }
  }

  template <int kCount>
  __device__ __forceinline__ void rescale(float (&out)[kCount]) const {
    if (!grown) return;
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      out[4 * j] *= correction[0];
      out[4 * j + 1] *= correction[0];
      out[4 * j + 2] *= correction[1];
      out[4 * j + 3] *= correction[1];
    }
  }

  // Completes the row sums; returns nothing a row without keys would divide by.
  __device__ __forceinline__ void finish(float (&reciprocal)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(0xFFFFFFFFu, sum[r], 1);
      sum[r] += __shfl_xor_sync(0xFFFFFFFFu, sum[r], 2);
      reciprocal[r] = sum[r] > 0.f ? 1.f / sum[r] : 0.f;
    }
  }

  // Natural logarithm of the row's sum of exponentials, after finish().
  __device__ __forceinline__ float logsumexp(int r, float scale_log2) const {
    constexpr float kLn2 = 0.693147180559945f;
    return (maximum[r] * scale_log2 + log2f(sum[r])) * kLn2;
  }

 private:
  // Rows that have seen no key yet have maximum -inf, and need a shift that keeps exp2(-inf - shift) at 0.
  static __device__ __forceinline__ float shift_of(float maximum, float scale_log2) {
    return maximum == -INFINITY ? 0.f : maximum * scale_log2;
  }
};

}  // namespace natten::fused_sm90
