// The matrix products of a warp on tiles in shared memory, for every element type: 16-bit types, and float32 as tf32.
#pragma once

#include <type_traits>

#include "ptx/math.h"
#include "ptx/mma.h"
#include "tile/shared_tile.h"
#include "tile/tf32.h"

namespace natten::fused_sm80 {

template <class Element>
constexpr bool kIsFloat32 = sizeof(Element) == 4;

// Tiles count columns of 16 bits; a float32 takes two.
template <class Element>
constexpr int kColumnsPerElement = sizeof(Element) / 2;
template <class Element, int kChannels>
using RowTile = tile::SharedTile<kChannels * kColumnsPerElement<Element>>;

// Tf32x3: tensor cores add up the terms of this many steps of 8, and the sum is added to the accumulators. They
// truncate what they accumulate: long sums there would cost the digits that the small halves bring.
template <class Element>
constexpr int kChain = std::is_same_v<Element, Tf32x3> ? 2 : 1;

// d[i][first], d[i][first + 1] += the sum over a chain of a[c][i] load_b(c).
template <class Element, int kRowTiles, int kBlocks, class LoadB>
__device__ __forceinline__ void chain_of_products(float (&d)[kRowTiles][kBlocks][4], int first,
                                                  const tile::Tf32Operand<Element, 4> (&a)[kChain<Element>][kRowTiles],
                                                  LoadB load_b) {
  if constexpr (std::is_same_v<Element, Tf32>) {
    tile::multiply(d, first, a[0], load_b(0));
  } else {
    float sum[kRowTiles][2][4] = {};
#pragma unroll
    for (int c = 0; c < kChain<Element>; ++c) tile::multiply(sum, 0, a[c], load_b(c));
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) d[i][first + j][e] += sum[i][j][e];
  }
}

// s += A B^T, of kRowTiles * 16 rows of one tile and kBlocks * 8 rows of another, over all channels.
template <class Element, int kChannels, int kRowTiles, int kBlocks>
__device__ __forceinline__ void multiply_rows(float (&s)[kRowTiles][kBlocks][4], uint32_t a_tile, int a_row,
                                              uint32_t b_tile, int b_row, int lane) {
  using Tile = RowTile<Element, kChannels>;
  if constexpr (!kIsFloat32<Element>) {
#pragma unroll
    for (int k = 0; k < kChannels / 16; ++k) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) Tile::load_a(a[i], a_tile, a_row + 16 * i, k, lane);
#pragma unroll
      for (int n = 0; n < kBlocks / 2; ++n) {
        uint32_t b[4];
        Tile::load_b(b, b_tile, b_row + 16 * n, k, lane);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          ptx::mma_m16n8k16(s[i][2 * n], a[i], b[0], b[1], Element());
          ptx::mma_m16n8k16(s[i][2 * n + 1], a[i], b[2], b[3], Element());
        }
      }
    }
  } else {
    // ldmatrix hands out words: of a row of 8 channels, lane `quad` gets channels quad and quad + 4, as tf32 products
    // want them.
    constexpr int kSteps = kChannels / 8;
#pragma unroll
    for (int chain = 0; chain < kSteps; chain += kChain<Element>) {
      tile::Tf32Operand<Element, 4> a[kChain<Element>][kRowTiles];
#pragma unroll
      for (int c = 0; c < kChain<Element>; ++c)
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          uint32_t raw[4];
          Tile::load_a(raw, a_tile, a_row + 16 * i, chain + c, lane);
#pragma unroll
          for (int e = 0; e < 4; ++e) a[c][i].set(e, __uint_as_float(raw[e]));
        }
#pragma unroll
      for (int n = 0; n < kBlocks / 2; ++n) {
        chain_of_products<Element>(s, 2 * n, a, [&](int c) {
          uint32_t raw[4];
          Tile::load_b(raw, b_tile, b_row + 16 * n, chain + c, lane);
          tile::Tf32Operand<Element, 4> b;
#pragma unroll
          for (int e = 0; e < 4; ++e) b.set(e / 2 + 2 * (e % 2), __uint_as_float(raw[e]));
          return b;
        });
      }
    }
  }
}

// Channels of accumulators: float32 products take the 16 channels of two blocks in an order of their own, so that a
// lane reads pairs of a row, and ends up with four neighbours of it:
//   16 bits: d[j][2 r + e] is channel 8 j + 2 quad + e,   float32: d[2 n + m][2 r + e] is 16 n + 4 quad + 2 e + m.

// d += W B: weights as accumulators of multiply_rows hold them, and kBlocks * 8 rows of a tile.
template <class Element, int kChannels, int kRowTiles, int kBlocks>
__device__ __forceinline__ void multiply_weights(float (&d)[kRowTiles][kChannels / 8][4],
                                                 const float (&weights)[kRowTiles][kBlocks][4], uint32_t b_tile,
                                                 int lane) {
  using Tile = RowTile<Element, kChannels>;
  if constexpr (!kIsFloat32<Element>) {
#pragma unroll
    for (int k = 0; k < kBlocks / 2; ++k) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float* pair = &weights[i][2 * k + e / 2][2 * (e % 2)];
          a[i][e] = ptx::pack(pair[0], pair[1], Element());
        }
#pragma unroll
      for (int n = 0; n < kChannels / 16; ++n) {
        uint32_t b[4];
        Tile::load_b_transposed(b, b_tile, 16 * k, n, lane);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          ptx::mma_m16n8k16(d[i][2 * n], a[i], b[0], b[1], Element());
          ptx::mma_m16n8k16(d[i][2 * n + 1], a[i], b[2], b[3], Element());
        }
      }
    }
  } else {
    // A product takes the 8 rows of a block in the order 0, 2, 4, 6, 1, 3, 5, 7, in which a lane's weights are already
    // where they belong. A lane reads rows 2 quad and 2 quad + 1; the swizzle keeps all lanes in different banks.
    const int group = lane / 4, quad = lane % 4;
#pragma unroll
    for (int chain = 0; chain < kBlocks; chain += kChain<Element>) {
      tile::Tf32Operand<Element, 4> a[kChain<Element>][kRowTiles];
#pragma unroll
      for (int c = 0; c < kChain<Element>; ++c)
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) a[c][i].set(e, weights[i][chain + c][e / 2 + 2 * (e % 2)]);
#pragma unroll
      for (int n = 0; n < kChannels / 16; ++n) {
        chain_of_products<Element>(d, 2 * n, a, [&](int c) {
          tile::Tf32Operand<Element, 4> b;
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int row = 8 * (chain + c) + 2 * quad + r;
            const float2 pair = ptx::load_shared_float2(b_tile + Tile::offset(row, 4 * n + group / 2) + group % 2 * 8);
            b.set(2 * r, pair.x);
            b.set(2 * r + 1, pair.y);
          }
          return b;
        });
      }
    }
  }
}

// Row r of the two rows that a lane holds of each 16, times `factor`, into a row of a tile.
template <class Element, int kChannels>
__device__ __forceinline__ void put_row(char* tile, int row, const float (&d)[kChannels / 8][4], int r, float factor,
                                        int quad) {
  using Tile = RowTile<Element, kChannels>;
  if constexpr (!kIsFloat32<Element>) {
#pragma unroll
    for (int j = 0; j < kChannels / 8; ++j)
      *reinterpret_cast<uint32_t*>(tile + Tile::offset(row, j) + 4 * quad) =
          ptx::pack(d[j][2 * r] * factor, d[j][2 * r + 1] * factor, Element());
  } else {
#pragma unroll
    for (int n = 0; n < kChannels / 16; ++n)
      *reinterpret_cast<float4*>(tile + Tile::offset(row, 4 * n + quad)) =
          make_float4(d[2 * n][2 * r] * factor, d[2 * n + 1][2 * r] * factor, d[2 * n][2 * r + 1] * factor,
                      d[2 * n + 1][2 * r + 1] * factor);
  }
}

}  // namespace natten::fused_sm80
