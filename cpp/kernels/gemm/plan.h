// Shapes of the tiles and boxes of inverse_av, chosen per problem on the host, and what all GEMM kernels share.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "kernels/arguments.h"
#include "tile/token_tile.h"
#include "window/planner.h"

namespace natten::gemm {

constexpr int kThreads = 128;
constexpr int kTokens = 64;  // of a tile, and at most as many of a box

// Shared memory holds tokens as slices: 128 bytes of channels of each of 64 tokens.
constexpr int kSliceBytes = 128;
constexpr int kTileBytes = kTokens * kSliceBytes;

// Every sm_80 and later part grants 99 KB to a block; four blocks of 56 KB, or three of 74 KB, fit a multiprocessor of
// sm_90.
constexpr int kMostSharedBytes = 99 * 1024;
constexpr int kGoodSharedBytes = 74 * 1024;
constexpr int kFourBlocksBytes = 56 * 1024;

struct Plan {
  TileGrid grid;
  int first_axis;  // axes before it have extent 1: no mask depends on them
  int box_log2[kAxes];
  int channel_blocks;  // thread blocks that share out the channels of one tile

  NATTEN_HOST_DEVICE int box(int axis) const { return 1 << box_log2[axis]; }
  NATTEN_HOST_DEVICE int box_tokens() const { return 1 << (box_log2[0] + box_log2[1] + box_log2[2]); }
};

// Extents of a tile and of the boxes that it meets; all powers of two.
struct Shapes {
  int tile_log2[kAxes], box_log2[kAxes];
};

// Calls visit(shapes, boxes) for all shapes worth considering, with the number of (tile, box) pairs that they lead to.
// A leading axis of extent 1 keeps extent 1.
template <class Visit>
void for_shapes(const Problem& problem, int box_tokens_log2, int innermost_log2, const Visit& visit) {
  constexpr int kLog = 6;
  constexpr int kSampledTiles = 6;
  AxisPairs pairs[kAxes][kLog + 1][kLog + 1];
  int most[kAxes];
  for (int a = 0; a < kAxes; ++a) {
    most[a] = problem.axis[a].extent == 1 && a < kAxes - 1 ? 0 : kLog;
    for (int t = 0; t <= most[a]; ++t) {
      for (int b = 0; b <= most[a]; ++b) {
        pairs[a][t][b] = simulate_axis(problem.axis[a], 1 << t, 1 << b, kSampledTiles);
      }
    }
  }
  for (int t0 = 0; t0 <= most[0]; ++t0) {
    for (int t1 = 0; t1 <= most[1] && t0 + t1 <= kLog; ++t1) {
      const int t2 = kLog - t0 - t1;
      for (int b0 = 0; b0 <= most[0] && b0 <= box_tokens_log2; ++b0) {
        for (int b1 = 0; b1 <= most[1] && b0 + b1 + innermost_log2 <= box_tokens_log2; ++b1) {
          const int b2 = box_tokens_log2 - b0 - b1;
          visit(Shapes{{t0, t1, t2}, {b0, b1, b2}}, pairs[0][t0][b0].all * pairs[1][t1][b1].all * pairs[2][t2][b2].all);
        }
      }
    }
  }
}

// A caller's plan: extents of the tile, then of the box.
inline bool read_shapes(const Problem& problem, Shapes& shapes) {
  const natten::Plan& given = problem.plan;
  if (given.size == 0) return false;
  if (given.size != 6) throw std::invalid_argument("gemm: a plan is six extents: of the tile, of the box");
  int logs[6], sums[2] = {0, 0};
  for (int i = 0; i < 6; ++i) {
    logs[i] = 0;
    while ((1 << logs[i]) < given.values[i]) ++logs[i];
    if ((1 << logs[i]) != given.values[i]) throw std::invalid_argument("gemm: extents of a plan are powers of two");
    if (logs[i] > 0 && i % kAxes < kAxes - problem.rank) {
      throw std::invalid_argument("gemm: leading axes of a plan have extent 1");
    }
    sums[i / kAxes] += logs[i];
  }
  if (sums[0] != 6 || sums[1] > 6) throw std::invalid_argument("gemm: a tile has 64 tokens, a box at most 64");
  for (int a = 0; a < kAxes; ++a) shapes.tile_log2[a] = logs[a], shapes.box_log2[a] = logs[a + kAxes];
  return true;
}

inline void set_shapes(Plan& plan, const Problem& problem, Side side, const Shapes& shapes) {
  plan.grid = make_tile_grid(problem, side, shapes.tile_log2);
  plan.first_axis = kAxes - problem.rank;
  for (int a = 0; a < kAxes; ++a) plan.box_log2[a] = shapes.box_log2[a];
}

// inverse_av: tiles of keys, boxes of queries. Windows and inverse windows are as long on average, so the simulation of
// key boxes serves for query boxes. Weights are read in runs as long as the tile's innermost extent.
inline Plan plan_key_tiles(const UnfusedArguments& args, int element_bytes) {
  Plan plan{};
  plan.channel_blocks = 1;
  Shapes shapes;
  if (!read_shapes(args.problem, shapes)) {
    double best = -1;
    for_shapes(args.problem, 6, 0, [&](const Shapes& candidate, double boxes) {
      const double cost = boxes * (1 + 2.0 / (element_bytes << candidate.tile_log2[2]));
      if (best >= 0 && cost >= best * 0.999) return;
      best = cost;
      shapes = candidate;
    });
  }
  set_shapes(plan, args.problem, Side::keys, shapes);
  return plan;
}

}  // namespace natten::gemm
