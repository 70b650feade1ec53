// Chooses the shapes of query tiles and key boxes for a problem from the simulated share of useful scores.
//
// A kernel that gives a block `q_tokens` queries (a box in the grid) and walks the keys in boxes of `kv_tokens`
// computes q_tokens * kv_tokens scores per box, useful or not. How many boxes a tile meets along one axis depends on
// that axis alone, so the number of (tile, box) pairs is a product over axes, and so is the number of full ones.
#pragma once

#include <array>

#include "window/axis.h"

namespace natten {

struct TileShape {
  int q[kAxes];
  int kv[kAxes];
};

// (tile, box) pairs along one axis, in units of one dilation group.
struct AxisPairs {
  double all;   // boxes that some query of the tile needs
  double full;  // boxes that every query of the tile attends entirely: no mask
};

// Box origins are free: the first box of a tile starts at the first key that the tile needs.
inline AxisPairs simulate_axis(const Axis& axis, int q_tile, int kv_tile, int most_tiles = 24) {
  const Group g = make_group(axis, ((axis.q_start % axis.dilation) + axis.dilation) % axis.dilation);
  AxisPairs pairs{0, 0};
  if (g.q_count <= 0) return pairs;
  const int tiles = ceil_div(g.q_count, q_tile);
  const int step = max_int(ceil_div(tiles, most_tiles), 1);
  int sampled = 0;
  for (int t = 0; t < tiles; t += step, ++sampled) {
    const int first = g.q_position + t * q_tile;
    const int last = g.q_position + min_int((t + 1) * q_tile, g.q_count) - 1;
    const Range needed = window_union(g, first, last), common = window_intersection(g, first, last);
    pairs.all += ceil_div(needed.size(), kv_tile);
    const int first_full = max_int(ceil_div(common.begin - needed.begin, kv_tile), 0);
    pairs.full += max_int((common.end - needed.begin) / kv_tile - first_full, 0);
  }
  pairs.all *= double(tiles) / sampled;
  pairs.full *= double(tiles) / sampled;
  return pairs;
}

struct PlannerLimits {
  int q_tokens;           // product of the query tile
  int kv_tokens;          // product of the key box
  int kv_innermost;       // the key box's innermost extent is a multiple of this power of two
  double partial_charge;  // cost of masking a box, as a share of computing it
};

// All tokens counts are powers of two. Returns the cheapest shape; ties go to the longer innermost extent (longer
// contiguous runs).
inline TileShape plan_tiles(const Axis (&axes)[kAxes], const PlannerLimits& limits) {
  constexpr int kMostLog = 9;  // tiles of up to 256 tokens per axis
  std::array<std::array<std::array<AxisPairs, kMostLog>, kMostLog>, kAxes> pairs;
  std::array<bool, kAxes> trivial;
  for (int a = 0; a < kAxes; ++a) {
    trivial[a] = axes[a].extent == 1;
    for (int q = 0; (1 << q) <= limits.q_tokens && q < kMostLog; ++q)
      for (int k = 0; (1 << k) <= limits.kv_tokens && k < kMostLog; ++k)
        if (!trivial[a] || (q == 0 && k == 0)) pairs[a][q][k] = simulate_axis(axes[a], 1 << q, 1 << k);
  }
  TileShape best{{1, 1, limits.q_tokens}, {1, 1, limits.kv_tokens}};
  double best_cost = -1;
  // A leading axis of extent 1 keeps tile extent 1; the innermost axis takes what is left even when its extent is 1.
  for (int q0 = 1; q0 <= limits.q_tokens && (q0 == 1 || !trivial[0]); q0 *= 2)
    for (int q1 = 1; q0 * q1 <= limits.q_tokens && (q1 == 1 || !trivial[1]); q1 *= 2)
      for (int k0 = 1; k0 <= limits.kv_tokens && (k0 == 1 || !trivial[0]); k0 *= 2)
        for (int k1 = 1; k0 * k1 <= limits.kv_tokens && (k1 == 1 || !trivial[1]); k1 *= 2) {
          const int q[kAxes] = {q0, q1, limits.q_tokens / (q0 * q1)};
          const int kv[kAxes] = {k0, k1, limits.kv_tokens / (k0 * k1)};
          if (kv[2] % limits.kv_innermost != 0) continue;
          double all = 1, full = 1;
          for (int a = 0; a < kAxes; ++a) {
            int lq = 0, lk = 0;
            while ((1 << lq) < q[a]) ++lq;
            while ((1 << lk) < kv[a]) ++lk;
            if (lq >= kMostLog || lk >= kMostLog) {
              all = -1;
              break;
            }
            const AxisPairs p = trivial[a] ? AxisPairs{1, q[a] == 1 && kv[a] == 1 ? 1. : 0.} : pairs[a][lq][lk];
            all *= p.all;
            full *= p.full;
          }
          if (all < 0) continue;
          const double cost = all + limits.partial_charge * (all - full);
          if (best_cost < 0 || cost < best_cost * 0.999 || (cost <= best_cost * 1.001 && kv[2] > best.kv[2])) {
            best_cost = cost;
            best = {{q[0], q[1], q[2]}, {kv[0], kv[1], kv[2]}};
          }
        }
  return best;
}

}  // namespace natten
