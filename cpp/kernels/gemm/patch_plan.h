// Shapes for qk and av, chosen per problem on the host: patches of queries, tiles of patches, slabs of keys.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "kernels/arguments.h"
#include "kernels/gemm/plan.h"
#include "kernels/launch.h"
#include "tile/divisor.h"
#include "tile/token_tile.h"

namespace natten::gemm {

constexpr int kWarps = kThreads / 32;
constexpr int kPatch = 16;                   // queries of a warp: the rows of one mma
constexpr int kStages = 2;                   // slabs in shared memory
constexpr int kBlocksPerMultiprocessor = 8;  // in all; about four at a time

// A block owns a tile of kWarps patches, for several *items*: heads of batch elements, whose geometry is the same. The
// keys that the tile's window slots stand for are a box; a *slab* of it at a time is in shared memory. Of a patch's
// own, smaller box, each slab holds a part that is consecutive in raster order.
struct PatchPlan {
  TileGrid grid;
  int tiles;  // of one item, all dilation groups
  int items;  // heads * batch
  int items_per_block;
  Divisor by_heads, by_group_heads;  // query heads of a batch element, of a K/V head
  int patch_log2[kAxes];
  int keys[kAxes];  // extents of a patch's box of keys, the same for every patch
  int slab[kAxes];  // 1 before `split_axis`, all keys of the tile after it
  int split_axis;
  int slab_rows;  // keys of a slab
  int columns;    // most keys of a patch in a slab, a multiple of 16
  int row_words;  // 32-bit words from one query's weights in shared memory to the next's
  Divisor by_keys[kAxes], by_slots[kAxes], by_slab[kAxes];
  int channel_blocks;       // thread blocks that share out the channels of one tile
  const void* weights_end;  // of av's tensor of weights
};

// Keys that slots of the windows of consecutive queries stand for, at most.
inline int key_extent(const Axis& axis, int slots, int queries) {
  const int longest = ceil_div(axis.extent, axis.dilation);
  const int kernel_size = axis.kernel_size < 0 ? longest : axis.kernel_size;
  const int spread = ceil_div(queries - 1, axis.stride) * axis.stride;
  return slots + min_int(spread, max_int(longest - kernel_size, 0));
}

constexpr int kMostColumns = 128;  // two words of bits per thread and query, see ColumnBits

// What a block needs in shared memory beside what stays there throughout; `weight_stages` slabs of weights.
inline int64_t patch_bytes(const PatchPlan& plan, int row_bytes, int weight_stages) {
  return int64_t(kStages) * plan.slab_rows * row_bytes + int64_t(weight_stages) * kWarps * kPatch * 4 * plan.row_words +
         plan.slab_rows * int64_t(sizeof(int)) + 2 * plan.columns * int64_t(sizeof(uint16_t));
}

inline void set_slab(PatchPlan& plan, const int (&slots)[kAxes], const int (&tile_keys)[kAxes], int element_bytes,
                     int axis, int extent) {
  plan.split_axis = axis;
  int64_t rows = 1, columns = 1, inner_keys = 1, inner_slots = 1;
  for (int a = 0; a < kAxes; ++a) {
    plan.slab[a] = a < axis ? 1 : a == axis ? extent : tile_keys[a];
    rows *= plan.slab[a];
    columns *= a > axis ? plan.keys[a] : min_int(plan.slab[a], plan.keys[a]);
    inner_keys *= a > axis ? plan.keys[a] : 1;
    inner_slots *= a > axis ? slots[a] : 1;
  }
  // Far too large is refused for its size; no overflow on the way there.
  constexpr int64_t kFarTooMany = 1 << 24;
  plan.slab_rows = int(rows < kFarTooMany ? rows : kFarTooMany);
  plan.columns = int((columns < kFarTooMany ? columns : kFarTooMany) + 15) / 16 * 16;
  // Every column has a place, also those that pad the last product; one word more for the alignment of 16-bit weights.
  const int64_t places = (plan.columns + inner_keys - 1) / inner_keys * inner_slots;
  const int words = int(((places < kFarTooMany ? places : kFarTooMany) * element_bytes + 3) / 4 + 1);
  plan.row_words = (words + 3) / 8 * 8 + 4;  // the rows of an mma spread over the banks
}

// The largest slab that fits, whole axes first.
inline bool choose_slab(PatchPlan& plan, const int (&slots)[kAxes], const int (&tile_keys)[kAxes], int element_bytes,
                        int row_bytes, int weight_stages, int64_t bytes) {
  int axis = 0;
  while (axis < kAxes - 1 && tile_keys[axis] == 1) ++axis;
  for (; axis < kAxes; ++axis) {
    // Parts of a line: whole products of 16 keys, or of 8 if nothing else fits.
    const int least = axis == kAxes - 1 ? 8 : 1;
    for (int parts = 1;; ++parts) {
      int extent = ceil_div(tile_keys[axis], parts);
      if (parts > 1 && axis == kAxes - 1) extent = extent > 16 ? (extent + 15) / 16 * 16 : extent > 8 ? 16 : 8;
      set_slab(plan, slots, tile_keys, element_bytes, axis, min_int(extent, tile_keys[axis]));
      if (plan.columns <= kMostColumns && patch_bytes(plan, row_bytes, weight_stages) <= bytes) return true;
      if (extent <= least) break;
    }
  }
  return false;
}

// Instructions of a warp for its share of a problem, in units that only compare: `steps` products per 16 keys.
inline double patch_cost(const Problem& problem, const PatchPlan& plan, const int (&tile_keys)[kAxes], int steps) {
  double tiles = 1, patches = 1, loaded = 1, keys = 1;
  for (int a = 0; a < kAxes; ++a) {
    const int queries = longest_group(problem.axis[a], Side::queries);
    tiles *= ceil_div(queries, 1 << plan.grid.tile_log2[a]);
    patches *= ceil_div(queries, 1 << plan.patch_log2[a]);
    loaded *= tile_keys[a];
    keys *= plan.keys[a];
  }
  return tiles * loaded * steps + patches * (ceil_div(int(keys), kPatch) * (20.0 + 5.0 * steps) + 500);
}

// Of one patch: its products and what every slab costs it.
inline double slab_cost(const PatchPlan& plan, int steps) {
  double keys = 1, slabs = 1;
  for (int a = 0; a < kAxes; ++a) {
    keys *= plan.keys[a];
    if (a <= plan.split_axis) slabs *= 1 + double(plan.keys[a] - 1) / plan.slab[a];
  }
  return keys / kPatch * (60 + 10 * steps) + slabs * 450;
}

inline void set_queries(PatchPlan& plan, const UnfusedArguments& args, const int (&patch_log2)[kAxes],
                        const int (&tile_log2)[kAxes], int (&tile_keys)[kAxes]) {
  plan.grid = make_tile_grid(args.problem, Side::queries, tile_log2);
  for (int a = 0; a < kAxes; ++a) {
    plan.patch_log2[a] = patch_log2[a];
    plan.keys[a] = key_extent(args.problem.axis[a], args.slots[a], 1 << patch_log2[a]);
    tile_keys[a] = key_extent(args.problem.axis[a], args.slots[a], 1 << tile_log2[a]);
  }
  plan.keys[kAxes - 1] += plan.keys[kAxes - 1] % 2;  // pairs of columns are neighbours
}

inline int log2_of(int value) {
  int log2 = 0;
  while ((1 << log2) < value) ++log2;
  if ((1 << log2) != value) throw std::invalid_argument("gemm: extents of a plan are powers of two");
  return log2;
}

// As many blocks as keep the device busy to the end, and no more: each has its geometry to find out.
inline void share_out_items(PatchPlan& plan, const Problem& problem) {
  int device, multiprocessors;
  check_cuda(cudaGetDevice(&device), "gemm");
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "gemm");
  const int64_t items = problem.batch * problem.heads, tiles = tile_count(problem, plan.grid) / items;
  if (items > INT32_MAX || tiles > INT32_MAX) throw std::invalid_argument("gemm: too many heads or tiles");
  const int64_t blocks = int64_t(multiprocessors) * kBlocksPerMultiprocessor;
  plan.tiles = int(tiles);
  plan.items = int(items);
  plan.items_per_block = int(max_int(1, int(items * tiles / blocks < items ? items * tiles / blocks : items)));
}

inline int64_t block_count(const PatchPlan& plan) {
  return int64_t(plan.tiles) * ceil_div(plan.items, plan.items_per_block) * plan.channel_blocks;
}

// `row_bytes` of a key, and what the kernel keeps in shared memory beside slabs and dense matrices.
inline PatchPlan plan_patches(const UnfusedArguments& args, int element_bytes, int row_bytes, int weight_stages,
                              int resident_bytes, int channel_blocks) {
  constexpr int kPatchLog2 = 4, kTileLog2 = 6;
  static_assert(1 << kPatchLog2 == kPatch && 1 << kTileLog2 == kPatch * kWarps);
  const Problem& problem = args.problem;
  const natten::Plan& given = problem.plan;
  PatchPlan plan{};
  int tile_keys[kAxes] = {};
  bool fits = false;
  if (given.size != 0) {
    // A caller's plan: extents of the patch, of the tile, of the slab (0: chosen here).
    if (given.size != 9) throw std::invalid_argument("gemm: a plan is nine extents: of the patch, the tile, the slab");
    int patch_log2[kAxes], tile_log2[kAxes], patch_sum = 0, tile_sum = 0;
    for (int a = 0; a < kAxes; ++a) {
      patch_sum += patch_log2[a] = log2_of(given.values[a]);
      tile_sum += tile_log2[a] = log2_of(given.values[kAxes + a]);
      if (patch_log2[a] > tile_log2[a]) throw std::invalid_argument("gemm: a plan's patch is larger than its tile");
    }
    if (patch_sum != kPatchLog2 || tile_sum != kTileLog2) {
      throw std::invalid_argument("gemm: a patch has 16 queries, a tile 64");
    }
    set_queries(plan, args, patch_log2, tile_log2, tile_keys);
    int axis = 0;
    while (axis < kAxes - 1 && given.values[2 * kAxes + axis] == 1) ++axis;
    if (given.values[2 * kAxes + axis] > 0) {
      set_slab(plan, args.slots, tile_keys, element_bytes, axis,
               min_int(given.values[2 * kAxes + axis], tile_keys[axis]));
      fits = plan.columns <= kMostColumns &&
             resident_bytes + patch_bytes(plan, row_bytes, weight_stages) <= kMostSharedBytes;
    }
  } else {
    double best = -1;
    for (int p0 = 0; p0 <= kPatchLog2; ++p0) {
      for (int p1 = 0; p0 + p1 <= kPatchLog2; ++p1) {
        for (int w0 = 0; p0 + w0 <= kTileLog2 && w0 <= kTileLog2 - kPatchLog2; ++w0) {
          for (int w1 = 0; w0 + w1 <= kTileLog2 - kPatchLog2; ++w1) {
            const int p2 = kPatchLog2 - p0 - p1, w2 = kTileLog2 - kPatchLog2 - w0 - w1;
            PatchPlan candidate{};
            int keys[kAxes];
            set_queries(candidate, args, {p0, p1, p2}, {p0 + w0, p1 + w1, p2 + w2}, keys);
            const double cost = patch_cost(problem, candidate, keys, row_bytes / 32);
            if (best >= 0 && cost >= best * 0.999) continue;
            best = cost;
            plan = candidate;
            for (int a = 0; a < kAxes; ++a) tile_keys[a] = keys[a];
          }
        }
      }
    }
  }
  // Larger slabs are fewer, and each has its fixed work; but they leave room for fewer blocks, which hide less latency.
  struct Budget {
    int bytes;
    double speed;
  };
  double best = -1;
  for (const Budget budget : {Budget{kFourBlocksBytes, 1.0}, {kGoodSharedBytes, 0.85}, {kMostSharedBytes, 0.65}}) {
    if (fits && best < 0) break;  // given
    PatchPlan candidate = plan;
    if (!choose_slab(candidate, args.slots, tile_keys, element_bytes, row_bytes, weight_stages,
                     budget.bytes - resident_bytes)) {
      continue;
    }
    const double cost = slab_cost(candidate, row_bytes / 32) / budget.speed;
    if (fits && cost >= best * 0.999) continue;
    fits = true;
    best = cost;
    plan = candidate;
  }
  if (!fits) throw std::invalid_argument("gemm: the problem does not fit shared memory");
  for (int a = 0; a < kAxes; ++a) {
    plan.by_keys[a] = Divisor(uint32_t(plan.keys[a]));
    plan.by_slots[a] = Divisor(uint32_t(args.slots[a]));
    plan.by_slab[a] = Divisor(uint32_t(plan.slab[a]));
  }
  plan.by_heads = Divisor(uint32_t(problem.heads));
  plan.by_group_heads = Divisor(uint32_t(problem.heads / problem.heads_kv));
  plan.channel_blocks = channel_blocks;
  share_out_items(plan, problem);
  return plan;
}

}  // namespace natten::gemm
