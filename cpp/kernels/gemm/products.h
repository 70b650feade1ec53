// Matrix products of a warp on slices in shared memory, for every arithmetic that the GEMM kernels offer.
#pragma once

#include "kernels/gemm/plan.h"
#include "ptx/memory.h"
#include "ptx/mma.h"
#include "tile/scalar.h"
#include "tile/shared_tile.h"

namespace natten::gemm {

struct Float16 {
  using Element = __half;
  static constexpr bool kSplit = false;
};
struct BFloat16 {
  using Element = __nv_bfloat16;
  static constexpr bool kSplit = false;
};
// float32 operands rounded to tf32.
struct Tf32 {
  using Element = float;
  static constexpr bool kSplit = false;
};
// float32 operands as sums of two tf32 numbers; of the four partial products the least is dropped: nearly float32.
struct Tf32x3 {
  using Element = float;
  static constexpr bool kSplit = true;
};

// Terms of the sum that one mma takes: 32 bytes of operands.
template <class P>
constexpr int kDepth = 32 / sizeof(typename P::Element);

template <class P>
constexpr bool kIs16Bit = sizeof(typename P::Element) == 2;

template <class P>
struct Operand {
  uint32_t big[4];
  uint32_t small[P::kSplit ? 4 : 1];
};

// The tensor cores ignore the last 13 bits of a tf32 operand. Multiplied by this, truncated numbers are right on
// average: mantissas grow by 0.35 to 0.7 of the last place that is kept. Rounding takes three instructions.
constexpr float kAgainstTruncation = 1.f + 0.7f / 2048;

template <class P>
__device__ __forceinline__ Operand<P> make_operand(const uint32_t (&raw)[4]) {
  Operand<P> operand;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kIs16Bit<P>) {
      operand.big[i] = raw[i];
    } else {
      const float x = __uint_as_float(raw[i]);
      operand.big[i] = __float_as_uint(x * kAgainstTruncation);
      if constexpr (P::kSplit) {
        operand.big[i] &= 0xffffe000u;
        operand.small[i] = __float_as_uint(x - __uint_as_float(operand.big[i]));
      }
    }
  }
  return operand;
}

// d += a b; registers kFirst and kSecond of b. Tensor cores truncate what they accumulate: with Tf32x3, sum in short
// chains that start from zero, and add those up with rounding.
template <class P, int kFirst, int kSecond>
__device__ __forceinline__ void multiply(float (&d)[4], const Operand<P>& a, const Operand<P>& b) {
  if constexpr (kIs16Bit<P>) {
    ptx::mma_m16n8k16(d, a.big, b.big[kFirst], b.big[kSecond], typename P::Element());
  } else {
    if constexpr (P::kSplit) {
      ptx::mma_m16n8k8_tf32(d, a.small, b.big[kFirst], b.big[kSecond]);
      ptx::mma_m16n8k8_tf32(d, a.big, b.small[kFirst], b.small[kSecond]);
    }
    ptx::mma_m16n8k8_tf32(d, a.big, b.big[kFirst], b.big[kSecond]);
  }
}

// Slices are laid out as 16-bit tiles whatever their elements are: only 16-byte chunks matter to the swizzle.
using Slice = tile::SharedTile<kSliceBytes / 2>;

// Address of element `column` of row `row`, of consecutive slices.
template <class T>
__device__ __forceinline__ uint32_t slice_offset(int row, int column) {
  constexpr int kColumns = kSliceBytes / sizeof(T);
  constexpr int kChunk = 16 / sizeof(T);
  const int within = column % kColumns;
  return column / kColumns * kTileBytes + Slice::offset(row, within / kChunk) + within % kChunk * sizeof(T);
}

// b[k, n] = slices[row + k, channel + n], kDepth by 16: b[0], b[1] for the first eight n, b[2], b[3] for the others.
// 32-bit elements have no transposing load. They take the k of an mma in the order 0, 2, 4, 6, 1, 3, 5, 7, which
// spreads the rows over all banks; the other operand must do the same.
template <class P>
__device__ __forceinline__ void load_rows(uint32_t (&b)[4], const char* slices, int row, int channel, int lane) {
  using T = typename P::Element;
  if constexpr (kIs16Bit<P>) {
    constexpr int kColumns = kSliceBytes / sizeof(T);
    Slice::load_b_transposed(b, ptx::shared_address(slices) + channel / kColumns * kTileBytes, row,
                             channel % kColumns / 16, lane);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t offset = slice_offset<T>(row + 2 * (lane % 4) + i % 2, channel + i / 2 * 8 + lane / 4);
      b[i] = *reinterpret_cast<const uint32_t*>(slices + offset);
    }
  }
}

// a[m, k] = slices[row + k, column + m], 16 by kDepth, in the same order of k.
template <class P>
__device__ __forceinline__ void load_rows_transposed(uint32_t (&a)[4], const char* slices, int row, int column,
                                                     int lane) {
  using T = typename P::Element;
  if constexpr (kIs16Bit<P>) {
    constexpr int kColumns = kSliceBytes / sizeof(T);
    Slice::load_a_transposed(a, ptx::shared_address(slices) + column / kColumns * kTileBytes, row,
                             column % kColumns / 16, lane);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t offset = slice_offset<T>(row + 2 * (lane % 4) + i / 2, column + i % 2 * 8 + lane / 4);
      a[i] = *reinterpret_cast<const uint32_t*>(slices + offset);
    }
  }
}

}  // namespace natten::gemm
