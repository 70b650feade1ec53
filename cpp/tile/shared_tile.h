// A matrix of 16-bit elements in shared memory, and the mma.m16n8k16 fragments read from it.
#pragma once

#include <cstdint>

#include "ptx/memory.h"

namespace natten::tile {

// [rows, kColumns], row-major, 16-byte chunks swizzled so that the eight rows of an ldmatrix matrix fall into
// different banks. The base must be 128-byte aligned. Every function takes first rows that are multiples of 8.
template <int kColumns_>
struct SharedTile {
  static_assert(kColumns_ % 32 == 0, "a row is a multiple of 64 bytes");
  static constexpr int kColumns = kColumns_;
  static constexpr int kRowBytes = kColumns * 2;
  static constexpr int kChunks = kColumns / 8;

  __device__ static __forceinline__ uint32_t offset(int row, int chunk) {
    const int key = kColumns % 64 == 0 ? row & 7 : (row >> 1) & 3;
    return row * kRowBytes + ((chunk ^ key) << 4);
  }

  // Address of the same chunk `rows` rows further down. What `rows` has in common with the first row, in bits, must be
  // nothing; the key of their sum is then the exclusive or of the keys.
  __device__ static __forceinline__ uint32_t down(uint32_t address, int rows) {
    const int key = kColumns % 64 == 0 ? rows & 7 : (rows >> 1) & 3;
    return (address ^ (key << 4)) + rows * kRowBytes;
  }

  // a[16, 16] at (row, column 16 k), rows along m.
  __device__ static __forceinline__ void load_a(uint32_t (&a)[4], uint32_t base, int row, int k, int lane) {
    ptx::ldmatrix_x4(a, base + offset(row + (lane & 15), 2 * k + (lane >> 4)));
  }
  // The transpose of the [16, 16] block at (row, column 16 m): a[m, k] from a matrix stored [k, m].
  __device__ static __forceinline__ void load_a_transposed(uint32_t (&a)[4], uint32_t base, int row, int m, int lane) {
    ptx::ldmatrix_x4_transposed(a, base + offset(row + (lane & 7) + ((lane >> 4) << 3), 2 * m + ((lane >> 3) & 1)));
  }
  // b[k 16, n 16] from a matrix stored [n, k] at (row n, column 16 k): b[0], b[1] for the first 8 n, b[2], b[3] after.
  __device__ static __forceinline__ void load_b(uint32_t (&b)[4], uint32_t base, int row, int k, int lane) {
    ptx::ldmatrix_x4(b, base + offset(row + (lane & 7) + ((lane >> 4) << 3), 2 * k + ((lane >> 3) & 1)));
  }
  // b[k 16, n 16] from a matrix stored [k, n] at (row k, column 16 n).
  __device__ static __forceinline__ void load_b_transposed(uint32_t (&b)[4], uint32_t base, int row, int n, int lane) {
    ptx::ldmatrix_x4_transposed(b, base + offset(row + (lane & 15), 2 * n + (lane >> 4)));
  }
};

}  // namespace natten::tile
