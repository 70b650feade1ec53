// Spatial boxes of tokens as rows of a tile, and the masks of a box as words of bits.
//
// A box has power-of-two extents (x, y, z), z fastest; its innermost extent is 8 m. Rows come in runs of 8 along z, and
// the index of a run is a mixed-radix number (x * Y + y) * m + z / 8. A range of positions per axis is then a range in
// each digit, and the runs inside a window are the AND of three words, two of them replicated by one multiplication.
#pragma once

#include <vector_types.h>

#include <cstdint>

#include "window/axis.h"

namespace natten::tile {

constexpr int kRun = 8;        // tokens of a run, consecutive along z
constexpr int kMostRuns = 16;  // of a box: words of even and odd columns share a 32-bit register

struct BoxShape {
  int log[kAxes];        // of the extents
  int log_m, log_ym;     // of the runs in a row, and in a plane
  uint32_t replicate_y;  // multiplier that copies a plane's word to all planes
  uint32_t replicate_z;  // multiplier that copies a row's word to all rows

  NATTEN_HOST_DEVICE int extent(int axis) const { return 1 << log[axis]; }
};

inline BoxShape make_box_shape(const int (&extent)[kAxes]) {
  BoxShape shape{};
  for (int a = 0; a < kAxes; ++a)
    while ((1 << shape.log[a]) < extent[a]) ++shape.log[a];
  shape.log_m = shape.log[2] - 3;
  shape.log_ym = shape.log[1] + shape.log_m;
  for (int x = 0; x < extent[0]; ++x) {
    shape.replicate_y |= 1u << (x << shape.log_ym);
    for (int y = 0; y < extent[1]; ++y) shape.replicate_z |= 1u << ((x << shape.log_ym) + (y << shape.log_m));
  }
  return shape;
}

#if defined(__CUDACC__)

__device__ __forceinline__ int clamp(int value, int low, int high) { return min(max(value, low), high); }

// Bits [begin, end), 0 <= begin <= end < 32.
__device__ __forceinline__ uint32_t bit_range(int begin, int end) { return (1u << end) - (1u << begin); }

// Number of z / 8 for which 8 (z / 8) + within < bound.
__device__ __forceinline__ int runs_below(int bound, int within) { return (bound - within + kRun - 1) >> 3; }

// What a row attends of a box whose origin is `origin`: the runs along x and y as a word, the range along z.
// One lane prepares this for one row; the lanes that hold the row's scores finish it with `column_words`.
struct RowMask {
  uint32_t planes;
  uint32_t z_range;  // begin | end << 16, clamped to the box
};

__device__ __forceinline__ RowMask row_mask(const BoxShape& shape, const int3& origin, Range x, Range y, Range z) {
  const int extent_x = 1 << shape.log[0], extent_y = 1 << shape.log[1], extent_z = 1 << shape.log[2];
  const uint32_t word_x = bit_range(clamp(x.begin - origin.x, 0, extent_x) << shape.log_ym,
                                    clamp(x.end - origin.x, 0, extent_x) << shape.log_ym);
  const uint32_t word_y = bit_range(clamp(y.begin - origin.y, 0, extent_y) << shape.log_m,
                                    clamp(y.end - origin.y, 0, extent_y) << shape.log_m);
  return {word_x & (word_y * shape.replicate_y),
          uint32_t(clamp(z.begin - origin.z, 0, extent_z) | clamp(z.end - origin.z, 0, extent_z) << 16)};
}

// Bit j: the row attends column 8 j + 2 quad; bit j + 16: column 8 j + 2 quad + 1. (Columns as mma accumulators hold
// them.)
__device__ __forceinline__ uint32_t column_words(RowMask mask, uint32_t replicate_z, int quad) {
  const int begin = mask.z_range & 0xffff, end = mask.z_range >> 16;
  const uint32_t even = bit_range(runs_below(begin, 2 * quad), runs_below(end, 2 * quad));
  const uint32_t odd = bit_range(runs_below(begin, 2 * quad + 1), runs_below(end, 2 * quad + 1));
  return (mask.planes * 0x10001u) & ((even | odd << 16) * replicate_z);
}

__device__ __forceinline__ bool keeps(uint32_t words, int column_block, int odd) {
  return (words >> (column_block + 16 * odd)) & 1;
}

#endif

// The tile that a block owns: power-of-two extents, cut into equal compact sub-boxes, one per warp, so that a warp's
// rows need few boxes. Row r of the tile is row r % rows of warp r / rows.
struct OwnedTile {
  int log[kAxes];
  int warp_log[kAxes];

  NATTEN_HOST_DEVICE int3 coordinates(int warp, int row) const {
    const int across_z = log[2] - warp_log[2], across_y = log[1] - warp_log[1];
    const int x = row >> (warp_log[1] + warp_log[2]);
    const int y = (row >> warp_log[2]) & ((1 << warp_log[1]) - 1);
    const int z = row & ((1 << warp_log[2]) - 1);
    const int warp_x = warp >> (across_y + across_z);
    const int warp_y = (warp >> across_z) & ((1 << across_y) - 1);
    const int warp_z = warp & ((1 << across_z) - 1);
    return int3{x + (warp_x << warp_log[0]), y + (warp_y << warp_log[1]), z + (warp_z << warp_log[2])};
  }
};

inline OwnedTile make_owned_tile(const int (&extent)[kAxes], const int (&warp_extent)[kAxes]) {
  OwnedTile tile{};
  for (int a = 0; a < kAxes; ++a) {
    while ((1 << tile.log[a]) < extent[a]) ++tile.log[a];
    while ((1 << tile.warp_log[a]) < warp_extent[a]) ++tile.warp_log[a];
  }
  return tile;
}

}  // namespace natten::tile
