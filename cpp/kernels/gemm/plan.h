// Shapes of the tiles and boxes of the GEMM kernels, chosen per problem on the host.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "kernels/arguments.h"
#include "tile/token_tile.h"
#include "window/planner.h"

namespace natten::gemm {

constexpr int kThreads = 128;
constexpr int kTokens = 64;  // rows of a tile, and at most as many tokens in a box
constexpr int kRun = 8;      // the innermost extent of a box of keys is a multiple: columns of one mma

// Shared memory holds tokens as slices: 128 bytes of channels of each of 64 tokens.
constexpr int kSliceBytes = 128;
constexpr int kTileBytes = kTokens * kSliceBytes;

// Every sm_80 and later part grants 99 KB to a block; at 72 KB three blocks fit a multiprocessor of sm_90.
constexpr int kMostSharedBytes = 99 * 1024;
constexpr int kGoodSharedBytes = 72 * 1024;

struct Plan {
  TileGrid grid;
  int first_axis;  // axes before it have extent 1: no mask depends on them
  int box_log2[kAxes];
  // Of each query's attention weights, qk and av hold one contiguous stretch ("slab") in shared memory at a time: those
  // of one box extent along `slab_axis` and of the whole window along later axes; of everything if slab_axis is -1.
  int slab_axis;
  int slab_pitch_bytes;  // of a query's row; 16 bytes more than its weights need, for their alignment
  int channel_blocks;    // thread blocks that share out the channels of one tile

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

// The outermost slab axis (most weights held at once, longest stretches) for which the slab fits, if any does.
inline bool plan_slab(const UnfusedArguments& args, const Shapes& shapes, int element_bytes, int bytes, Plan& plan) {
  int64_t inner = int64_t(args.slots[0]) * args.slots[1] * args.slots[2];
  for (int axis = -1; axis < kAxes; ++axis) {
    int64_t slots = inner;
    if (axis >= 0) {
      if (axis > 0 && shapes.box_log2[axis - 1] > 0) return false;  // a slab would not be one stretch
      inner /= args.slots[axis];
      slots = inner << shapes.box_log2[axis];
    }
    const int64_t pitch = (slots * element_bytes + 15) / 16 * 16 + 16;
    if (pitch * kTokens > bytes) continue;
    plan.slab_axis = axis;
    plan.slab_pitch_bytes = int(pitch);
    return true;
  }
  return false;
}

inline void set_shapes(Plan& plan, const Problem& problem, Side side, const Shapes& shapes) {
  plan.grid = make_tile_grid(problem, side, shapes.tile_log2);
  plan.first_axis = kAxes - problem.rank;
  for (int a = 0; a < kAxes; ++a) plan.box_log2[a] = shapes.box_log2[a];
}

// qk and av: tiles of queries, boxes of keys. `resident_bytes` is what the kernel keeps in shared memory beside a slab.
inline Plan plan_query_tiles(const UnfusedArguments& args, int element_bytes, int resident_bytes) {
  Plan plan{};
  plan.channel_blocks = 1;
  Shapes given;
  if (read_shapes(args.problem, given)) {
    if (given.box_log2[2] < 3) throw std::invalid_argument("gemm: the innermost extent of a box is a multiple of 8");
    if (!plan_slab(args, given, element_bytes, kMostSharedBytes - resident_bytes, plan)) {
      throw std::invalid_argument("gemm: the plan's box does not fit shared memory");
    }
    set_shapes(plan, args.problem, Side::queries, given);
    return plan;
  }
  // Boxes are halved only where shared memory is short.
  for (int box_tokens_log2 = 6; box_tokens_log2 >= 3; --box_tokens_log2) {
    for (const int bytes : {kGoodSharedBytes, kMostSharedBytes}) {
      double best = -1;
      for_shapes(args.problem, box_tokens_log2, 3, [&](const Shapes& shapes, double boxes) {
        Plan candidate = plan;
        if (!plan_slab(args, shapes, element_bytes, bytes - resident_bytes, candidate)) return;
        // Short stretches of weights waste memory transactions: charge them as one part in (stretch / 32 bytes).
        const double cost = boxes * (1 + 32.0 / candidate.slab_pitch_bytes);
        if (best >= 0 && cost >= best * 0.999) return;
        best = cost;
        set_shapes(candidate, args.problem, Side::queries, shapes);
        plan = candidate;
      });
      if (best >= 0) return plan;
    }
  }
  throw std::invalid_argument("gemm: the problem does not fit shared memory");
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
