// Patches: a warp owns a box of at most 16 rows (queries, or keys in the key gradient), the M of mma.m16n8k16, and
// walks exactly the columns (keys, or queries) of the union of its rows' windows. Extents are any numbers, not only
// powers of two: ldmatrix takes one address per row of a matrix, so columns need no alignment in shared memory.
//
// The columns of a tile of patches lie in a *slab*, a box of rows in shared memory. A patch walks its union in
// *chunks*: `lines` lines of `width` columns of one plane, packed without gaps: column j of a chunk is
// (y + j / width, z + j % width). Columns past the chunk's end repeat the last one and are masked.
//
// The mask of a chunk is one bit per (row, column). Along z it is periodic with the width, the same for all chunks of
// equal z and width; lines inside a row's window are a contiguous range of columns.
#pragma once

#include <cstdint>

#include "window/axis.h"

#if defined(__CUDACC__)
#include "ptx/math.h"
#endif

namespace natten::tile {

constexpr int kPatchRows = 16;
constexpr int kMostChunk = 128;  // columns of a chunk

// Quotients of numbers below 128 by a divisor of at most 128.
struct SmallDivisor {
  uint32_t multiplier;

  // 2^16 / divisor, rounded up, and at most two more: 127 * 3 / 2^16 < 1 / 128.
  NATTEN_HOST_DEVICE static SmallDivisor make(int divisor) {
#if defined(__CUDA_ARCH__)
    return {uint32_t(65536.f * ptx::reciprocal(float(divisor))) + 2};
#else
    return {65536u / uint32_t(divisor) + 2};
#endif
  }
  NATTEN_HOST_DEVICE int quotient(int numerator) const { return int(uint32_t(numerator) * multiplier >> 16); }
};

// A box of at most kPatchRows rows, z fastest. Filled on the host by make_patch.
struct Patch {
  int extent[kAxes];
  uint32_t by_plane, by_line;  // 256 / (extent[1] * extent[2]) and 256 / extent[2], rounded up: exact for 16 rows

  NATTEN_HOST_DEVICE int rows() const { return extent[0] * extent[1] * extent[2]; }
  // Coordinates of row r < 16. Rows past the end repeat the last one; they are not to be stored.
  NATTEN_HOST_DEVICE void coordinates(int r, int (&c)[kAxes]) const {
    const uint32_t row = uint32_t(min_int(r, rows() - 1));
    c[0] = int((row * by_plane) >> 8);
    const uint32_t rest = row - c[0] * extent[1] * extent[2];
    c[1] = int((rest * by_line) >> 8);
    c[2] = int(rest) - c[1] * extent[2];
  }
};

inline Patch make_patch(const int (&extent)[kAxes]) {
  return {{extent[0], extent[1], extent[2]},
          uint32_t(ceil_div(256, extent[1] * extent[2])),
          uint32_t(ceil_div(256, extent[2]))};
}

// A box of rows in shared memory; distances in rows. Eight columns that are consecutive in a chunk are read without
// bank conflicts when line - width is a multiple of 8 and a row is an odd number of 16-byte chunks.
struct Slab {
  int line, plane;
  NATTEN_HOST_DEVICE int row(int x, int y, int z) const { return x * plane + y * line + z; }
};

struct Chunk {
  int x, y, z;  // of its first column, in the slab
  int lines, width;
  NATTEN_HOST_DEVICE int columns() const { return lines * width; }
};

// The slab row of every column of a chunk, times `unit`: with the bytes of a row, offsets in shared memory.
struct ChunkRows {
  SmallDivisor by_width;
  int unit, first, skip, last;  // column 0, what lies between the end of a line and the next, the last column

  NATTEN_HOST_DEVICE ChunkRows(const Slab& slab, const Chunk& chunk, int unit_ = 1)
      : by_width(SmallDivisor::make(chunk.width)),
        unit(unit_),
        first(slab.row(chunk.x, chunk.y, chunk.z) * unit),
        skip((slab.line - chunk.width) * unit),
        last(slab.row(chunk.x, chunk.y + chunk.lines - 1, chunk.z + chunk.width - 1) * unit) {}
  NATTEN_HOST_DEVICE int row(int column) const {
    return min_int(first + column * unit + by_width.quotient(column) * skip, last);
  }
};

// How a box of `extent` columns is cut into chunks of at most `most` columns: evenly, whole lines when they fit.
struct ChunkShape {
  int lines, width;

  NATTEN_HOST_DEVICE static ChunkShape make(int most, int extent_y, int extent_z) {
    if (extent_z > most) return {1, ceil_div(extent_z, ceil_div(extent_z, most))};
    return {ceil_div(extent_y, ceil_div(extent_y, most / extent_z)), extent_z};
  }
  template <int kMost>
  NATTEN_HOST_DEVICE static ChunkShape make(int extent_y, int extent_z) {
    static_assert(kMost <= kMostChunk);
    return make(kMost, extent_y, extent_z);
  }
};

// ---- masks

// Shift that yields 0 from 64 on.
NATTEN_HOST_DEVICE uint64_t shift_left(uint64_t value, int by) {
#if defined(__CUDA_ARCH__)
  uint64_t result;
  asm("shl.b64 %0, %1, %2;" : "=l"(result) : "l"(value), "r"(by));
  return result;
#else
  return by >= 64 ? 0 : value << by;
#endif
}

// Bits [begin, end) of 64, after clamping both to 0..64.
NATTEN_HOST_DEVICE uint64_t bits_between(int begin, int end) {
  const int low = max_int(begin, 0), high = max_int(end, 0);
  return shift_left(~uint64_t{0}, low) & ~shift_left(~uint64_t{0}, high);
}

// The z part of a row's mask: of columns [64 half, 64 half + 64) of a chunk, those whose j % width lies in `range`.
NATTEN_HOST_DEVICE uint64_t column_pattern(Range range, int width, SmallDivisor by_width, int half) {
  const int into = half == 0 ? 0 : 64 - by_width.quotient(64) * width;  // where in a line the half begins
  uint64_t lines = bits_between(range.begin, range.end);
  for (int period = width; period < 64; period *= 2) lines |= lines << period;
  return bits_between(range.begin - into, range.end - into) | shift_left(lines, width - into);
}

// The line part: columns of lines in `range`, counted from the chunk's first.
NATTEN_HOST_DEVICE uint64_t line_bits(Range range, int width, int half) {
  return bits_between(range.begin * width - 64 * half, range.end * width - 64 * half);
}

// The mask of a chunk as a thread holds its accumulators: columns 8 j + 2 (lane % 4) + {0, 1} of rows lane / 4 and
// lane / 4 + 8.
struct PatchMask {
  uint32_t word[kMostChunk / 64];

  // `element`: 0, 1 of the first row, 2, 3 of the second.
  NATTEN_HOST_DEVICE bool keeps(int column_block, int element) const {
    return (word[column_block / 8] >> (8 * (column_block % 4) + 4 * (column_block / 4 % 2) + element)) & 1;
  }
  // The mask of a plane that only some of the thread's two rows attend.
  NATTEN_HOST_DEVICE PatchMask rows(bool first, bool second) const {
    const uint32_t kept = (first ? 0x33333333u : 0u) | (second ? 0xccccccccu : 0u);
    return {{word[0] & kept, word[1] & kept}};
  }
  // What the thread needs of a half of its rows' bits.
  NATTEN_HOST_DEVICE static uint32_t pick(uint64_t first_row, uint64_t second_row, int quad) {
    const uint32_t low =
        (uint32_t(first_row) >> (2 * quad) & 0x03030303u) | (uint32_t(second_row) >> (2 * quad) & 0x03030303u) << 2;
    const uint32_t high = (uint32_t(first_row >> 32) >> (2 * quad) & 0x03030303u) |
                          (uint32_t(second_row >> 32) >> (2 * quad) & 0x03030303u) << 2;
    return low | high << 4;
  }

#if defined(__CUDACC__)
  // `bits`: lane l passes those of row l % 16, half l / 16. To be called by whole warps. Two lanes prepare the words of
  // the four that hold a pair of rows; words that come out of a shuffle are also tested seven bits at a time.
  __device__ static __forceinline__ PatchMask distribute(uint64_t bits, int lane) {
    const bool upper = lane & 8;
    const uint64_t other = __shfl_xor_sync(~0u, bits, 8);
    const uint64_t first_row = upper ? other : bits, second_row = upper ? bits : other;
    const uint32_t even = pick(first_row, second_row, upper ? 2 : 0), odd = pick(first_row, second_row, upper ? 3 : 1);
    PatchMask mask;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int source = 16 * half + lane / 4 + 4 * (lane & 2);
      const uint32_t a = __shfl_sync(~0u, even, source), b = __shfl_sync(~0u, odd, source);
      mask.word[half] = lane & 1 ? b : a;
    }
    return mask;
  }
#endif
};

}  // namespace natten::tile
