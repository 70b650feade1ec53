// Which tokens a thread block works on: a box of queries, or of keys, of one dilation group, batch item and head.
#pragma once

#include "kernels/arguments.h"

namespace natten {

enum class Side { queries, keys };

// A one-dimensional grid of thread blocks over all tiles. Tile extents are powers of two.
struct TileGrid {
  int tile_log2[kAxes];
  int tiles[kAxes];  // of the longest group; blocks past a shorter group's end have nothing to do
  int heads;

  NATTEN_HOST_DEVICE int tile(int axis) const { return 1 << tile_log2[axis]; }
  NATTEN_HOST_DEVICE int tokens() const { return 1 << (tile_log2[0] + tile_log2[1] + tile_log2[2]); }
  // Coordinate of the tile's n-th token; the last axis runs fastest.
  NATTEN_HOST_DEVICE int coordinate(int n, int axis) const {
    const int shift = axis == 2 ? 0 : axis == 1 ? tile_log2[2] : tile_log2[1] + tile_log2[2];
    return (n >> shift) & ((1 << tile_log2[axis]) - 1);
  }
};

inline int longest_group(const Axis& axis, Side side) {
  return ceil_div(side == Side::queries ? axis.q_length : axis.kv_length, axis.dilation);
}

inline TileGrid make_tile_grid(const Problem& problem, Side side, const int (&tile_log2)[kAxes]) {
  TileGrid grid;
  for (int a = 0; a < kAxes; ++a) {
    grid.tile_log2[a] = tile_log2[a];
    grid.tiles[a] = ceil_div(longest_group(problem.axis[a], side), 1 << tile_log2[a]);
  }
  grid.heads = side == Side::queries ? problem.heads : problem.heads_kv;
  return grid;
}

inline int64_t tile_count(const Problem& problem, const TileGrid& grid) {
  int64_t count = problem.batch * grid.heads;
  for (int a = 0; a < kAxes; ++a) count *= int64_t(grid.tiles[a]) * problem.axis[a].dilation;
  return count;
}

struct TokenTile {
  Group group[kAxes];
  int first[kAxes];  // the tile's first token, counted among the group's tokens
  int count[kAxes];  // tokens of the tile that exist
  int batch, head;

  NATTEN_HOST_DEVICE bool empty() const { return count[0] <= 0 || count[1] <= 0 || count[2] <= 0; }
};

#if defined(__CUDACC__)
// The tile of thread block `block`, written to shared memory by three threads; the caller synchronises. Neighbouring
// blocks take neighbouring tiles, so that they share keys in L2.
__device__ inline void locate_tile(TokenTile& tile, const Problem& problem, const TileGrid& grid, Side side,
                                   unsigned block) {
  if (threadIdx.x >= kAxes) return;
  const int own = threadIdx.x;
  unsigned rest = block;
  int index = 0, group = 0;
  for (int a = kAxes - 1; a >= 0; --a) {
    if (a == own) index = rest % grid.tiles[a];
    rest /= grid.tiles[a];
  }
  for (int a = kAxes - 1; a >= 0; --a) {
    if (a == own) group = rest % problem.axis[a].dilation;
    rest /= problem.axis[a].dilation;
  }
  if (own == 0) {
    tile.head = rest % grid.heads;
    tile.batch = rest / grid.heads;
  }
  const Group g = make_group(problem.axis[own], group);
  tile.group[own] = g;
  tile.first[own] = index << grid.tile_log2[own];
  tile.count[own] =
      min_int(1 << grid.tile_log2[own], (side == Side::queries ? g.q_count : g.kv_count) - tile.first[own]);
}
#endif

}  // namespace natten
