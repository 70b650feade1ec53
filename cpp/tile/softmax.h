// Softmax over the keys as they come (Milakov and Gimelshein 2018), on mma accumulators.
#pragma once

#include <cstdint>

#include "ptx/math.h"

namespace natten::tile {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// State of the rows that a thread shares with the other three lanes of its quad: rows group and group + 8 of
// kRowTiles tiles of 16 rows.
template <int kRowTiles>
struct OnlineSoftmax {
  // Accumulated values are rescaled only when a row's maximum grows by a factor of 2^8: the weights stay below 2^8,
  // which 16-bit floats hold as precisely as numbers below 1.
  static constexpr float kSlack = 8.f;

  float maximum[kRowTiles][2];  // of the unscaled scores; the reference of the exponentials, not always the latest
  float sum[kRowTiles][2];      // of this thread's columns

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        maximum[i][r] = -INFINITY;
        sum[i][r] = 0.f;
      }
  }

  // Replaces the scores by exp2(scale * (score - maximum)). scale_log2 > 0. Calls rescale(row tile, row, factor) for
  // what was accumulated with older maxima.
  template <int kColumnBlocks, class Rescale>
  __device__ __forceinline__ void weights(float (&s)[kRowTiles][kColumnBlocks][4], float scale_log2, Rescale rescale) {
    float latest[kRowTiles][2];
    bool grows = false;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float largest = fmaxf(s[i][0][2 * r], s[i][0][2 * r + 1]);
#pragma unroll
        for (int j = 1; j < kColumnBlocks; ++j) largest = fmaxf(largest, fmaxf(s[i][j][2 * r], s[i][j][2 * r + 1]));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
        latest[i][r] = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
        grows |= latest[i][r] * scale_log2 > maximum[i][r] * scale_log2 + kSlack;
      }
    if (__any_sync(~0u, grows)) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float next = fmaxf(maximum[i][r], latest[i][r]);
          // A row that has met no key yet: nothing to rescale, and no infinity minus infinity.
          const float factor = next == -INFINITY ? 1.f : ptx::exp2((maximum[i][r] - next) * scale_log2);
          maximum[i][r] = next;
          sum[i][r] *= factor;
          rescale(i, r, factor);
        }
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float reference = maximum[i][r] == -INFINITY ? 0.f : maximum[i][r] * scale_log2;
        float total = 0.f;
#pragma unroll
        for (int j = 0; j < kColumnBlocks; ++j) {
          s[i][j][2 * r] = ptx::exp2(fmaf(s[i][j][2 * r], scale_log2, -reference));
          s[i][j][2 * r + 1] = ptx::exp2(fmaf(s[i][j][2 * r + 1], scale_log2, -reference));
          total += s[i][j][2 * r] + s[i][j][2 * r + 1];
        }
        sum[i][r] += total;
      }
  }

  // Sums the rows over the quad, once, at the end.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        sum[i][r] += __shfl_xor_sync(~0u, sum[i][r], 1);
        sum[i][r] += __shfl_xor_sync(~0u, sum[i][r], 2);
      }
  }
  // Natural logarithm of the row that has this lane's number among the warp's rows.
  __device__ __forceinline__ float logsumexp_of_lane(int lane, float scale_log2) const {
    float row_maximum = 0.f, row_sum = 1.f;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float m = __shfl_sync(~0u, maximum[i][r], lane % 8 * 4), l = __shfl_sync(~0u, sum[i][r], lane % 8 * 4);
        if (lane / 8 == 2 * i + r) {
          row_maximum = m;
          row_sum = l;
        }
      }
    return (row_maximum * scale_log2 + log2f(row_sum)) * kLn2;
  }
};

}  // namespace natten::tile
