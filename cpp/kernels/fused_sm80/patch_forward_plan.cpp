#include "kernels/fused_sm80/patch_forward_plan.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "tile/patch.cuh"
#include "tile/token_tile.h"

namespace natten::fused_sm80 {

namespace {

constexpr int kSlabRowBytes = 8;              // of the table of a slab's rows
constexpr int kStaticSharedBytes = 4 * 1024;  // of a block, and what the system reserves
constexpr int kWarpsPerSm = 16;               // registers

// The most positions that the windows of `rows` consecutive rows span, for rows that begin at multiples of `rows`.
int most_needed(const Axis& axis, int rows) {
  const int length = ceil_div(axis.extent, axis.dilation);
  if (axis.kernel_size < 0) return length;
  int steps = rows - 1;  // by how much the window of the last row may be ahead of the first row's
  if (!axis.causal && axis.stride > 1) {
    if (axis.q_start == 0 && axis.stride % rows == 0)
      steps = 0;
    else if (axis.q_start == 0 && rows % axis.stride == 0)
      steps = rows - axis.stride;
    else
      steps = ceil_div(rows - 1, axis.stride) * axis.stride;
  }
  return min_int(axis.kernel_size + steps, length);
}

// How many positions patches of an axis need: a few different numbers, each with the number of patches that need it.
struct Needed {
  static constexpr int kMost = 6;
  struct Count {
    int needed;
    double patches;
  };
  std::array<Count, kMost> count;
  int counts = 0;
  double patches = 0, sum = 0;  // over one dilation group

  void add(int needed, double weight) {
    patches += weight;
    sum += weight * needed;
    int nearest = 0;
    for (int i = 0; i < counts; ++i) {
      if (count[i].needed == needed) {
        count[i].patches += weight;
        return;
      }
      if (std::abs(count[i].needed - needed) < std::abs(count[nearest].needed - needed)) nearest = i;
    }
    if (counts < kMost)
      count[counts++] = {needed, weight};
    else
      count[nearest].patches += weight;
  }
};

Needed count_needed(const Axis& axis, int rows) {
  constexpr int kMostPatches = 32;  // looked at
  Needed needed;
  const Group g = make_group(axis, ((axis.q_start % axis.dilation) + axis.dilation) % axis.dilation);
  const int patches = ceil_div(g.q_count, rows), step = max_int(patches / kMostPatches, 1);
  for (int i = 0; i < patches; i += step) {
    const int first = g.q_position + i * rows, last = g.q_position + min_int((i + 1) * rows, g.q_count) - 1;
    needed.add(window_union(g, first, last).size(), min_int(step, patches - i));
  }
  return needed;
}

// Rows of an axis in its longest dilation group.
int longest(const Axis& axis) { return longest_group(axis, Side::queries); }

// Average groups of 16 keys, and chunks, of a patch.
struct Walk {
  double groups = 0, chunks = 0;
};
Walk count_groups(const Needed (&needed)[kAxes], int most_groups) {
  Walk walk;
  for (int i = 0; i < needed[1].counts; ++i)
    for (int j = 0; j < needed[2].counts; ++j) {
      const auto [y, patches_y] = needed[1].count[i];
      const auto [z, patches_z] = needed[2].count[j];
      if (y <= 0 || z <= 0) continue;
      const tile::ChunkShape shape = tile::ChunkShape::make(16 * most_groups, y, z);
      const int along_y = ceil_div(y, shape.lines), along_z = ceil_div(z, shape.width);
      const int last = y - (along_y - 1) * shape.lines;
      const double groups =
          along_z * ((along_y - 1) * ceil_div(shape.lines * shape.width, 16) + ceil_div(last * shape.width, 16));
      walk.groups += groups * patches_y * patches_z;
      walk.chunks += double(along_y) * along_z * patches_y * patches_z;
    }
  const double share = needed[0].sum / (needed[0].patches * needed[1].patches * needed[2].patches);
  walk.groups *= share;
  walk.chunks *= share;
  return walk;
}

// Instructions of a warp, and what a multiprocessor makes of them, fitted to measurements on an H200.
constexpr double kChunkInstructions = 110, kStepInstructions = 70, kHeadInstructions = 230, kBlockInstructions = 500;
constexpr double kLoadInstructions = 16;  // of 32 copies of 16 bytes
constexpr int kMultiprocessors = 132;
constexpr double kClock = 1.75e6;        // per millisecond
constexpr double kSchedulers = 4;        // of a multiprocessor
constexpr double kL2BytesPerCycle = 34;  // of a multiprocessor
constexpr double kLaunchMilliseconds = 0.004;

double group_instructions(int head_dim) { return head_dim == 32 ? 76 : 110; }

double estimate(const PatchPlan& plan, const Problem& problem, const PatchKernels& kernels, const Walk& walk) {
  const double heads = double(problem.batch) * problem.heads;
  double tiles = heads, patches = heads, tokens = 1, steps = 1;
  for (int a = 0; a < kAxes; ++a) {
    const Axis& axis = problem.axis[a];
    const int extent = plan.patch[a] * plan.patches[a];
    tiles *= double(ceil_div(longest(axis), extent)) * axis.dilation;
    patches *= double(ceil_div(longest(axis), plan.patch[a])) * axis.dilation;
    const double most = most_needed(axis, min_int(extent, longest(axis)));
    tokens *= most;
    if (a == plan.slab_axis && !plan.single) steps = std::ceil(most / plan.slab_step);
  }
  const int warps = plan.warps(), bytes = patch_shared_bytes(plan, kernels, true) + kStaticSharedBytes;
  const int blocks_per_sm = min_int(kernels.most_shared_bytes / bytes, kWarpsPerSm / warps);
  if (blocks_per_sm == 0) return -1;
  const double resident = blocks_per_sm * warps;
  const double copies = 2 * tokens * kernels.head_dim / 8 / 32;  // of 32 lanes
  double instructions = patches * (kHeadInstructions + walk.groups * group_instructions(kernels.head_dim) +
                                   (plan.single ? 0 : walk.chunks * kChunkInstructions));
  if (!plan.single && kernels.head_dim > 32) instructions *= 1.45;  // registers are short
  instructions += tiles * (copies * kLoadInstructions + warps * (kBlockInstructions / plan.set_heads +
                                                                 (plan.single ? 0 : steps * kStepInstructions)));
  // More warps hide more of the latency; a single block waits for its own loads.
  double rate = kSchedulers * 0.78 * resident / (resident + 7);
  if (blocks_per_sm == 1) rate *= 0.85;
  // The last wave of blocks is not full.
  const double blocks = tiles / plan.set_heads, slots = double(blocks_per_sm) * kMultiprocessors;
  const double waves = blocks / slots, ragged = waves < 8 ? std::ceil(waves) / waves : 1;
  const double compute = instructions / rate * ragged;
  const double load = tiles * tokens * 4 * kernels.head_dim / kL2BytesPerCycle;
  return (compute + 0.3 * load) / kMultiprocessors / kClock + kLaunchMilliseconds;
}

}  // namespace

int patch_shared_bytes(const PatchPlan& plan, const PatchKernels& kernels, bool same_steps) {
  return plan.warps() * kernels.own_bytes + plan.slabs * 2 * plan.slab_rows() * kernels.row_bytes +
         plan.slab_tokens() * kSlabRowBytes * (same_steps ? 1 : 2);
}

bool complete_patch_plan(PatchPlan& plan, const Problem& problem, const PatchKernels& kernels) {
  int rows = 1, warps = 1, keys = 1;
  for (int a = 0; a < kAxes; ++a) {
    const Axis& axis = problem.axis[a];
    if (plan.patch[a] < 1 || plan.patches[a] < 1 || plan.patch[a] > tile::kPatchRows || plan.patches[a] > kMostPatches)
      return false;
    rows *= plan.patch[a];
    warps *= plan.patches[a];
    keys *= most_needed(axis, plan.patch[a]);
    plan.slab[a] = most_needed(axis, plan.patch[a] * plan.patches[a]);
  }
  if (rows > tile::kPatchRows || warps > kMostPatches) return false;
  plan.slab_axis = plan.slab[0] > 1 ? 0 : plan.slab[1] > 1 ? 1 : 2;
  const int most = plan.slab[plan.slab_axis];
  plan.slab_step = plan.slab_step < 1 ? most : min_int(plan.slab_step, most);
  plan.set_heads = min_int(max_int(plan.set_heads, 1), problem.heads);
  plan.single =
      plan.slab_step == most && most_needed(problem.axis[0], plan.patch[0]) == 1 && keys <= 16 * kSingleGroups;
  plan.slabs = plan.single || (plan.slab_step == most && plan.set_heads == 1) ? 1 : 2;
  plan.slab[plan.slab_axis] = plan.slab_step;
  const auto fits = [&] {
    return patch_shared_bytes(plan, kernels, false) + kStaticSharedBytes <= kernels.most_shared_bytes;
  };
  plan.slab_line = plan.slab[2];
  if (plan.single && plan.slab[0] * plan.slab[1] > 1) {  // lines so far apart that eight columns never share banks
    plan.slab_line += (most_needed(problem.axis[2], plan.patch[2]) + 7 * plan.slab[2]) % 8;
    if (!fits()) plan.slab_line = plan.slab[2];
  }
  return fits();
}

double choose_patch_plan(PatchPlan& best, const Problem& problem, const PatchKernels& kernels) {
  static constexpr int kExtents[] = {1, 2, 3, 4, 5, 6, 7, 8, 16};
  constexpr int kKept = 4;
  // Patches by their groups of keys: those of several chunks pay for each.
  struct Ranked {
    double cost;
    int extent[kAxes];
    Walk walk;
  } kept[kKept];
  int count = 0;
  Needed needed[kAxes][std::size(kExtents)];
  for (int a = 0; a < kAxes; ++a)
    for (size_t i = 0; i < std::size(kExtents); ++i)
      if (i == 0 || kExtents[i] <= longest(problem.axis[a])) needed[a][i] = count_needed(problem.axis[a], kExtents[i]);
  for (size_t i = 0; i < std::size(kExtents); ++i)
    for (size_t j = 0; j < std::size(kExtents); ++j)
      for (size_t k = 0; k < std::size(kExtents); ++k) {
        const int rows = kExtents[i] * kExtents[j] * kExtents[k];
        const Needed* own[kAxes] = {&needed[0][i], &needed[1][j], &needed[2][k]};
        if (rows > tile::kPatchRows || own[0]->counts == 0 || own[1]->counts == 0 || own[2]->counts == 0) continue;
        const Needed counts[kAxes] = {*own[0], *own[1], *own[2]};
        const int extent[kAxes] = {kExtents[i], kExtents[j], kExtents[k]};
        bool single = true;
        int keys = 1;
        for (int a = 0; a < kAxes; ++a) keys *= most_needed(problem.axis[a], extent[a]);
        single = most_needed(problem.axis[0], extent[0]) == 1 && keys <= 16 * kSingleGroups;
        Ranked ranked{
            0, {extent[0], extent[1], extent[2]}, count_groups(counts, single ? kSingleGroups : kSeveralGroups)};
        const double patches = counts[0].patches * counts[1].patches * counts[2].patches;
        ranked.cost = patches * (kHeadInstructions + ranked.walk.groups * group_instructions(kernels.head_dim) +
                                 (single ? 0 : ranked.walk.chunks * kChunkInstructions));
        int at = count < kKept ? count++ : kKept;
        while (at > 0 && ranked.cost < kept[at - 1].cost) {
          if (at < kKept) kept[at] = kept[at - 1];
          --at;
        }
        if (at < kKept) kept[at] = ranked;
      }

  double best_time = -1;
  auto consider = [&](const Ranked& patch, const int (&tile)[kAxes], int slab_step, int set_heads) {
    PatchPlan plan{};
    for (int a = 0; a < kAxes; ++a) {
      plan.patch[a] = patch.extent[a];
      plan.patches[a] = tile[a];
    }
    plan.slab_step = slab_step;
    plan.set_heads = set_heads;
    if (!complete_patch_plan(plan, problem, kernels)) return;
    const double time = estimate(plan, problem, kernels, patch.walk);
    if (time < 0 || (best_time >= 0 && time >= best_time)) return;
    best_time = time;
    best = plan;
  };
  for (int n = 0; n < count; ++n) {
    int most[kAxes];
    for (int a = 0; a < kAxes; ++a)
      most[a] = min_int(ceil_div(longest(problem.axis[a]), kept[n].extent[a]), kMostPatches);
    for (int x = 1; x <= most[0]; x *= 2)
      for (int y = 1; y <= most[1] && x * y <= kMostPatches; ++y)
        for (int z = 1; z <= most[2] && x * y * z <= kMostPatches; ++z) {
          if (x * y * z < 4 && (y < most[1] || z < most[2])) continue;
          const int tile[kAxes] = {x, y, z};
          const int set_heads = min_int(problem.heads, 2);
          consider(kept[n], tile, 0, 1);
          consider(kept[n], tile, 0, set_heads);
          for (int step : {1, 2, 4, 8}) consider(kept[n], tile, step, set_heads);
        }
  }
  if (best_time < 0) return best_time;
  Ranked chosen{};
  for (int n = 0; n < count; ++n)
    if (std::equal(best.patch, best.patch + kAxes, kept[n].extent)) chosen = kept[n];
  const PatchPlan base = best;
  const bool one_slab =
      base.single || base.slab_step >= most_needed(problem.axis[base.slab_axis],
                                                   base.patch[base.slab_axis] * base.patches[base.slab_axis]);
  for (int set_heads : {1, 4, 8, 16, problem.heads})
    if (set_heads <= problem.heads) consider(chosen, base.patches, one_slab ? 0 : base.slab_step, set_heads);
  return best_time;
}

}  // namespace natten::fused_sm80
