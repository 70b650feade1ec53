// Online softmax over the rows of a warpgroup's score tile: each thread holds two rows, shared with three neighbours.
#pragma once

#include "ptx/math.h"

namespace natten::fused_sm90 {

struct Softmax {
  float maximum[2];  // of the raw scores; may lag behind by `slack`
  float sum[2];      // this thread's part
  float correction[2];
  bool grown;  // by the last update: earlier outputs have to be multiplied by `correction`

  // `lowest`: below every score and far above every masked one, so that rows that have seen no key yet need no branch.
  __device__ __forceinline__ void begin(float lowest) {
    maximum[0] = maximum[1] = lowest;
    sum[0] = sum[1] = 0.f;
  }

  // Replaces raw scores by exp2((score - maximum) * scale_log2). The maximum follows only when it grew by more than
  // `slack` (in raw scores) in some row of the warp: until then the exponentials stay below 2^8, which fp32 sums and
  // both 16-bit types hold without loss.
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
        correction[r] = ptx::exp2((maximum[r] - next) * scale_log2);
        maximum[r] = next;
        sum[r] *= correction[r];
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float shift = maximum[r] * scale_log2;
      float even = 0.f, odd = 0.f;
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j) {
        float& a = scores[4 * j + 2 * r];
        float& b = scores[4 * j + 2 * r + 1];
        a = ptx::exp2(fmaf(a, scale_log2, -shift));
        b = ptx::exp2(fmaf(b, scale_log2, -shift));
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
      reciprocal[r] = sum[r] > 0.f ? ptx::reciprocal(sum[r]) : 0.f;
    }
  }

  // Natural logarithm of the row's sum of exponentials, after finish().
  __device__ __forceinline__ float logsumexp(int r, float scale_log2) const {
    constexpr float kLn2 = 0.693147180559945f;
    return (maximum[r] * scale_log2 + __log2f(sum[r])) * kLn2;
  }
};

}  // namespace natten::fused_sm90
