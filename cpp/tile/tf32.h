// float32 on tensor cores, which multiply tf32 numbers: the sign, the exponent and the first 10 bits of a float's
// mantissa. What follows those is ignored, so that an operand is truncated.
#pragma once

#include <cstdint>

#include "ptx/mma.h"

namespace natten {

// Element types of kernels for float32, one for each way to multiply.
struct Tf32 {  // one product of rounded operands
  float value;
};
struct Tf32x3 {  // operands as sums of two tf32 numbers; of the four partial products the least is dropped
  float value;
};

namespace tile {

#if defined(__CUDACC__)

// Multiplied by this, truncated numbers are right on average: mantissas grow by 0.35 to 0.7 of the last place that is
// kept. The error has 1.06 times the standard deviation of rounding's, numbers that fit stay as they are, and so do
// infinities and NaN; rounding takes three instructions.
constexpr float kAgainstTruncation = 1.f + 0.7f / 2048;

// Registers of an operand as products take them.
template <class Element, int kRegisters>
struct Tf32Operand {
  uint32_t big[kRegisters];

  __device__ __forceinline__ void set(int i, float x) { big[i] = __float_as_uint(x * kAgainstTruncation); }
};
template <int kRegisters>
struct Tf32Operand<Tf32x3, kRegisters> {
  uint32_t big[kRegisters], small[kRegisters];

  __device__ __forceinline__ void set(int i, float x) {
    big[i] = __float_as_uint(x * kAgainstTruncation) & 0xffffe000u;
    small[i] = __float_as_uint(x - __uint_as_float(big[i]));
  }
};

// d[i][first + j] += a[i] b[j] for tiles of 16 rows and two blocks of 8 columns: b holds block j in registers j, j + 2.
template <int kRowTiles, int kBlocks>
__device__ __forceinline__ void multiply(float (&d)[kRowTiles][kBlocks][4], int first,
                                         const Tf32Operand<Tf32, 4> (&a)[kRowTiles], const Tf32Operand<Tf32, 4>& b) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j) ptx::mma_m16n8k8_tf32(d[i][first + j], a[i].big, b.big[j], b.big[j + 2]);
}
template <int kRowTiles, int kBlocks>
__device__ __forceinline__ void multiply(float (&d)[kRowTiles][kBlocks][4], int first,
                                         const Tf32Operand<Tf32x3, 4> (&a)[kRowTiles],
                                         const Tf32Operand<Tf32x3, 4>& b) {
  auto add = [&](auto half_of_a, const uint32_t (&b_half)[4]) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) ptx::mma_m16n8k8_tf32(d[i][first + j], a[i].*half_of_a, b_half[j], b_half[j + 2]);
  };
  using Operand = Tf32Operand<Tf32x3, 4>;
  add(&Operand::small, b.big);
  add(&Operand::big, b.small);
  add(&Operand::big, b.big);
}

#endif

}  // namespace tile
}  // namespace natten
