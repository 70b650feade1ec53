#include "kernels/fused_sm80/patch_backward.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>

#include "kernels/fused_sm80/patch_backward_registry.h"

namespace natten::fused_sm80 {

namespace gradient {

namespace {

constexpr int kPatchForm = 2;  // first number of a plan
constexpr int kNumbersPerKernel = 7;
// Shared memory of every block: reserved (a multiprocessor has as much more than a block may ask for), and static.
constexpr int kReservedBytes = 1024, kStaticBytes = 4096;

// Patches are taken up to so many keys in a window times channels of the head dim's class: measured faster there than
// the box kernels (python/natten/_cost.py has the same rule).
constexpr int64_t kMostChannels = 200 * 64;

bool small_window(const Problem& problem, int head_dim) {
  int64_t channels = head_dim;
  for (const Axis& axis : problem.axis)
    channels *= axis.kernel_size < 0 ? ceil_div(axis.extent, axis.dilation) : axis.kernel_size;
  return channels <= kMostChannels;
}

struct PatchPlan {
  int patch[kAxes], grid[kAxes], slab_extent;

  int rows() const { return patch[0] * patch[1] * patch[2]; }
  int warps() const { return grid[0] * grid[1] * grid[2]; }
};

// What the tiles of an axis meet, for patches of `extent` and tiles of `grid` patches.
struct AxisWalk {
  double tiles = 0, patches = 0;
  // Of the union of a tile's windows; of the largest union of one of its patches; of a line of its slabs.
  double mean_size = 0, mean_extent = 0;
  int most_size = 0, most_extent = 0, most_line = 0;
};

// The same numbers as PatchBlock::locate finds. `most_tiles`: of a group, evenly sampled; 0: all.
AxisWalk simulate(const Axis& axis, Side owned, int extent, int grid, int most_tiles) {
  const bool keys = owned == Side::keys;
  AxisWalk walk;
  double sampled = 0;
  const int groups = most_tiles > 0 ? min_int(axis.dilation, 2) : axis.dilation;
  for (int group = 0; group < groups; ++group) {
    const Group g = make_group(axis, group);
    const int count = keys ? g.kv_count : g.q_count, position = keys ? g.kv_position : g.q_position;
    if (count <= 0) continue;
    auto range = [&](int row) {
      const int at = position + min_int(row, count - 1);
      if (!keys) return window(g, at);
      const Range r = inverse_window(g, at);
      const int last = g.q_position + g.q_count, begin = min_int(max_int(r.begin, g.q_position), last);
      return Range{begin, max_int(min_int(r.end, last), begin)};
    };
    const int tiles = ceil_div(count, extent * grid);
    walk.tiles += double(tiles) * axis.dilation / groups;
    walk.patches += double(ceil_div(count, extent)) * axis.dilation / groups;
    const int step = most_tiles > 0 ? max_int(tiles / most_tiles, 1) : 1;
    for (int tile = 0; tile < tiles; tile += step) {
      const int first = tile * extent * grid, end = min_int(first + extent * grid, count);
      const int size = range(end - 1).end - range(first).begin;
      int most = 0;
      for (int row = first; row < end; row += extent)
        most = max_int(most, range(min_int(row + extent, end) - 1).end - range(row).begin);
      sampled += 1;
      walk.mean_size += size;
      walk.mean_extent += most;
      walk.most_size = max_int(walk.most_size, size);
      walk.most_extent = max_int(walk.most_extent, most);
      walk.most_line = max_int(walk.most_line, most + (size - most + 7) / 8 * 8);
    }
  }
  if (sampled > 0) {
    walk.mean_size /= sampled;
    walk.mean_extent /= sampled;
  }
  return walk;
}

// The outermost axis that is one.
int slab_axis(const Problem& problem) {
  int axis = 0;
  while (axis + 1 < kAxes && problem.axis[axis].extent == 1) ++axis;
  return axis;
}

int slab_rows(const AxisWalk (&walk)[kAxes], int axis, int extent) {
  return axis == 0   ? extent * walk[1].most_size * walk[2].most_line
         : axis == 1 ? walk[0].most_size * extent * walk[2].most_line
                     : walk[0].most_size * walk[1].most_size * extent;
}

int64_t shared_bytes(const PatchEntry& entry, const AxisWalk (&walk)[kAxes], const PatchPlan& plan, int axis,
                     int stages) {
  const int64_t row_bytes = stages * kWalkedTensors * entry.row_bytes + int(sizeof(RowOffsets));
  return row_bytes * slab_rows(walk, axis, plan.slab_extent) + int64_t(plan.warps()) * entry.warp_bytes;
}

// Blocks of a plan that a multiprocessor holds.
int resident_blocks(const PatchEntry& entry, int64_t bytes, int warps) {
  return min_int(int((shared_memory_limit() + kReservedBytes) / (bytes + kStaticBytes + kReservedBytes)),
                 entry.most_warps * entry.blocks_per_sm / warps);
}

// Slabs in shared memory: two when there are several, or when the one of the next item costs no resident block.
int stages(const PatchEntry& entry, const AxisWalk (&walk)[kAxes], const PatchPlan& plan, int axis) {
  if (plan.slab_extent < walk[axis].most_size) return 2;
  return resident_blocks(entry, shared_bytes(entry, walk, plan, axis, 2), plan.warps()) >=
                 resident_blocks(entry, shared_bytes(entry, walk, plan, axis, 1), plan.warps())
             ? 2
             : 1;
}

// Steps of 16 columns, and chunks, of a patch.
void count_steps(const AxisWalk (&walk)[kAxes], int axis, int slab_extent, double& steps, double& chunks) {
  const int width = axis == 2 ? min_int(slab_extent, walk[2].most_extent) : walk[2].most_extent;
  const int lines = axis == 1 ? min_int(slab_extent, walk[1].most_extent) : walk[1].most_extent;
  steps = chunks = 0;
  if (width == 0 || lines == 0) return;
  const tile::ChunkShape shape = tile::ChunkShape::make<tile::kMostChunk>(lines, width);
  const double share = walk[0].mean_extent * (walk[1].mean_extent / lines) * (walk[2].mean_extent / width);
  const int along_y = ceil_div(lines, shape.lines), along_z = ceil_div(width, shape.width);
  chunks = share * along_y * along_z;
  const int last = lines - (along_y - 1) * shape.lines;
  steps =
      share * along_z * ((along_y - 1) * ceil_div(shape.lines * shape.width, 16) + ceil_div(last * shape.width, 16));
}

// Whether a block has room for the plan; row numbers must fit PatchBlock::divide.
bool fits(const PatchEntry& entry, const AxisWalk (&walk)[kAxes], const PatchPlan& plan, int axis) {
  return shared_bytes(entry, walk, plan, axis, stages(entry, walk, plan, axis)) <=
             shared_memory_limit() - kStaticBytes &&
         slab_rows(walk, axis, plan.slab_extent) < 1 << 16;
}

// Estimated time of a kernel in cycles of a multiprocessor, on an H200.
struct PatchCost {
  double step, chunk, patch, tile;
};
PatchCost patch_cost(int head_dim, Side owned) {
  if (head_dim == 32) return owned == Side::queries ? PatchCost{24, 60, 100, 300} : PatchCost{32, 70, 100, 300};
  return owned == Side::queries ? PatchCost{48, 60, 150, 300} : PatchCost{66, 70, 150, 300};
}

double estimate(const Problem& problem, Side owned, const PatchEntry& entry, int head_dim,
                const AxisWalk (&walk)[kAxes], const PatchPlan& plan, int axis) {
  const int warps = plan.warps(), stages_ = stages(entry, walk, plan, axis);
  const double resident = resident_blocks(entry, shared_bytes(entry, walk, plan, axis, stages_), warps) * double(warps);
  if (resident <= 0) return -1;
  double tiles = double(problem.batch) * (owned == Side::queries ? problem.heads : problem.heads_kv), patches = tiles;
  double rows = owned == Side::queries ? 1 : problem.heads / problem.heads_kv;
  for (int a = 0; a < kAxes; ++a) {
    tiles *= walk[a].tiles;
    patches *= walk[a].patches;
    rows *= walk[a].mean_size;
  }
  double steps, chunks;
  count_steps(walk, axis, plan.slab_extent, steps, chunks);
  if (owned == Side::keys) {
    steps *= problem.heads / problem.heads_kv;
    chunks *= problem.heads / problem.heads_kv;
  }
  const PatchCost cost = patch_cost(head_dim, owned);
  double compute = patches * (steps * cost.step + chunks * cost.chunk + cost.patch) * (1 + 4 / resident);
  // Warps that wait while slabs pass that they do not need; other blocks use half of that time.
  if (plan.slab_extent < walk[axis].most_size)
    compute *= (1 + walk[axis].mean_size / std::max(walk[axis].mean_extent, 1.)) / 2;
  const double load = tiles * rows * 4 * head_dim / 28;  // bytes of L2 per cycle and multiprocessor
  return tiles * cost.tile + std::max(compute, load) + (stages_ > 1 ? 0.2 : 0.4) * std::min(compute, load);
}

using AxisMemo = std::map<std::pair<int, int>, AxisWalk>;

// The cheapest plan by simulation of `most_tiles` tiles of each dilation group; false where none fits.
bool cheapest(const Problem& problem, Side owned, const PatchEntry& entry, int head_dim, int most_tiles,
              PatchPlan& best) {
  AxisMemo memo[kAxes];
  auto simulated = [&](int a, int extent, int grid) -> const AxisWalk& {
    auto [at, fresh] = memo[a].try_emplace({extent, grid});
    if (fresh) at->second = simulate(problem.axis[a], owned, extent, grid, most_tiles);
    return at->second;
  };
  int length[kAxes];
  for (int a = 0; a < kAxes; ++a) length[a] = max_int(longest_group(problem.axis[a], owned), 1);
  const int axis = slab_axis(problem);
  double best_cost = -1;
  for (int x = 1; x <= min_int(tile::kPatchRows, length[0]); ++x)
    for (int y = 1; x * y <= tile::kPatchRows && y <= length[1]; ++y) {
      const int z = min_int(tile::kPatchRows / (x * y), length[2]);
      for (int grid_x = 1; grid_x <= entry.most_warps && (grid_x - 1) * x < length[0]; ++grid_x)
        for (int grid_y = 1; grid_x * grid_y <= entry.most_warps && (grid_y - 1) * y < length[1]; ++grid_y)
          for (int grid_z = 1; grid_x * grid_y * grid_z <= entry.most_warps && (grid_z - 1) * z < length[2]; ++grid_z) {
            PatchPlan plan{{x, y, z}, {grid_x, grid_y, grid_z}, 0};
            AxisWalk walk[kAxes];
            for (int a = 0; a < kAxes; ++a) walk[a] = simulated(a, plan.patch[a], plan.grid[a]);
            plan.slab_extent = max_int(walk[axis].most_size, 1);
            while (true) {
              const double cost =
                  fits(entry, walk, plan, axis) ? estimate(problem, owned, entry, head_dim, walk, plan, axis) : -1;
              if (cost >= 0 && (best_cost < 0 || cost < best_cost)) {
                best_cost = cost;
                best = plan;
              }
              if (plan.slab_extent == 1) break;
              plan.slab_extent = ceil_div(plan.slab_extent, 2);
            }
          }
    }
  return best_cost >= 0;
}

// A plan and what its tiles meet, all of them.
struct PlannedWalk {
  bool possible;
  PatchPlan plan;
  AxisWalk walk[kAxes];
};

PlannedWalk walk_of(const Problem& problem, Side owned, const PatchEntry& entry, const PatchPlan& plan) {
  PlannedWalk result{false, plan, {}};
  for (int a = 0; a < kAxes; ++a) {
    if (plan.patch[a] < 1 || plan.grid[a] < 1) return result;
    result.walk[a] = simulate(problem.axis[a], owned, plan.patch[a], plan.grid[a], 0);
  }
  result.possible = plan.rows() <= tile::kPatchRows && plan.warps() <= entry.most_warps && plan.slab_extent >= 1 &&
                    fits(entry, result.walk, plan, slab_axis(problem));
  return result;
}

PlannedWalk choose(const Problem& problem, Side owned, const PatchEntry& entry, int head_dim) {
  constexpr int kSampledTiles = 24;
  PatchPlan plan;
  // Tiles that were not sampled may need more room.
  for (int most_tiles : {kSampledTiles, 0})
    if (cheapest(problem, owned, entry, head_dim, most_tiles, plan)) {
      const PlannedWalk result = walk_of(problem, owned, entry, plan);
      if (result.possible) return result;
    }
  return {};
}

// Plans of the last problems of this thread.
struct PlanCache {
  static constexpr int kEntries = 16;
  struct Entry {
    Axis axes[kAxes];
    Side owned;
    int64_t batch;
    int heads, heads_kv, limit;
    void (*kernel)(const PatchParameters);  // null while the entry is free
    PlannedWalk plan;
  } entry[kEntries];
  int next;
};

const PlannedWalk& cached_choice(const Problem& problem, Side owned, const PatchEntry& entry, int head_dim) {
  thread_local PlanCache cache{};
  const int limit = shared_memory_limit();
  for (const PlanCache::Entry& e : cache.entry)
    if (e.kernel == entry.function && e.owned == owned && e.batch == problem.batch && e.heads == problem.heads &&
        e.heads_kv == problem.heads_kv && e.limit == limit && std::memcmp(e.axes, problem.axis, sizeof e.axes) == 0)
      return e.plan;
  PlanCache::Entry& e = cache.entry[cache.next++ % PlanCache::kEntries];
  std::memcpy(e.axes, problem.axis, sizeof e.axes);
  e.owned = owned;
  e.batch = problem.batch;
  e.heads = problem.heads;
  e.heads_kv = problem.heads_kv;
  e.limit = limit;
  e.kernel = entry.function;
  e.plan = choose(problem, owned, entry, head_dim);
  return e.plan;
}

bool make_patch_tensor(const Tensor& t, PatchTensor& result) {
  result = {t.data, t.batch, t.head, {t.axis[0], t.axis[1], t.axis[2]}, {}};
  for (int a = 0; a < kAxes; ++a) {
    if (std::abs(t.step[a]) > INT32_MAX) return false;
    result.step[a] = int(t.step[a]);
  }
  return true;
}

bool make_patch_parameters(const Parameters& p, PatchParameters& result) {
  result = {};
  for (int a = 0; a < kAxes; ++a) {
    result.axis[a] = p.axis[a];
    result.dense[a] = p.dense[a];
    result.groups[a] = p.groups[a];
  }
  result.heads_per_kv = p.heads_per_kv;
  result.head_dim = p.head_dim;
  result.head_dim_v = p.head_dim_v;
  result.scale = p.scale;
  result.scale_log2 = p.scale_log2;
  const std::pair<Tensors, const Tensor*> tensors[] = {
      {kQuery, &p.query},           {kOut, &p.out},
      {kLogsumexp, &p.logsumexp},   {kGradOut, &p.grad_out},
      {kStatistics, &p.statistics}, {kGradLogsumexp, &p.grad_logsumexp},
      {kGradQuery, &p.grad_query},  {kKey, &p.key},
      {kValue, &p.value},           {kGradKey, &p.grad_key},
      {kGradValue, &p.grad_value}};
  return std::all_of(std::begin(tensors), std::end(tensors),
                     [&](const auto& t) { return make_patch_tensor(*t.second, result.tensor[t.first]); });
}

// Whether the rows of a tile, and those of its union, lie within 2^31 bytes of each other in every tensor.
bool offsets_fit(const PatchParameters& p, const PlannedWalk& planned) {
  return std::all_of(std::begin(p.tensor), std::end(p.tensor), [&](const PatchTensor& t) {
    int64_t bytes = 0;
    for (int a = 0; a < kAxes; ++a)
      bytes += std::abs(int64_t(t.step[a])) *
               max_int(planned.plan.patch[a] * planned.plan.grid[a], planned.walk[a].most_size);
    return bytes <= INT32_MAX;
  });
}

int multiprocessors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDevAttrMultiProcessorCount");
  return count;
}

void launch_patches(const PatchEntry& entry, PatchParameters& p, const Problem& problem, Side owned,
                    const PlannedWalk& planned, cudaStream_t stream, const char* name) {
  const PatchPlan& plan = planned.plan;
  const int axis = slab_axis(problem), heads = owned == Side::queries ? problem.heads : problem.heads_kv;
  int64_t tiles = 1;
  for (int a = 0; a < kAxes; ++a) {
    p.grid[a] = plan.grid[a];
    const int count = ceil_div(longest_group(problem.axis[a], owned), plan.patch[a] * plan.grid[a]);
    if (count == 0) return;
    p.tiles[a] = Divisor(count);
    tiles *= int64_t(count) * problem.axis[a].dilation;
  }
  if (problem.batch == 0) return;
  p.patch = tile::make_patch(plan.patch);
  p.grid_y = Divisor(plan.grid[1]);
  p.grid_z = Divisor(plan.grid[2]);
  p.slab_axis = axis;
  p.slab_extent = plan.slab_extent;
  p.slab_rows = slab_rows(planned.walk, axis, plan.slab_extent);
  p.stages = stages(entry, planned.walk, plan, axis);
  p.heads = Divisor(heads);
  p.items = int(problem.batch * heads);
  const int64_t bytes = shared_bytes(entry, planned.walk, plan, axis, p.stages);
  // As many items to a block as leave each multiprocessor some turns of blocks.
  constexpr int kTurns = 6, kMostItems = 64;
  const int64_t resident = int64_t(multiprocessors()) * max_int(resident_blocks(entry, bytes, plan.warps()), 1);
  p.items_per_block = int(std::clamp<int64_t>(tiles * p.items / (kTurns * resident), 1, min_int(p.items, kMostItems)));
  const int64_t blocks = tiles * ceil_div(p.items, p.items_per_block);
  allow_shared_memory(entry.function, int(bytes), name);
  entry.function<<<grid_size(blocks, name), 32 * unsigned(plan.warps()), size_t(bytes), stream>>>(p);
  check_launch(name);
}

}  // namespace

}  // namespace gradient

bool patch_backward(const Problem& problem, const Parameters& parameters, cudaStream_t stream) {
  using namespace gradient;
  const bool asked = problem.plan.size > 0 && problem.plan.values[0] == kPatchForm;
  const int head_dim = max_int(problem.head_dim, problem.head_dim_v) <= 32 ? 32 : 64;
  PatchParameters p;
  const bool applies = problem.type != ScalarType::float32 && problem.additional == 0 &&
                       max_int(problem.head_dim, problem.head_dim_v) <= 64 &&
                       problem.batch * problem.heads <= INT32_MAX && make_patch_parameters(parameters, p);
  if (asked && (!applies || (problem.plan.size != 1 && problem.plan.size != 1 + 2 * kNumbersPerKernel)))
    throw std::invalid_argument("fused_sm80: the plan does not fit the patch kernels");
  if (!applies || (!asked && (problem.plan.size > 0 || !small_window(problem, head_dim)))) return false;
  PatchEntry query_entry, key_entry;
  auto entries = [&](auto element) {
    using Element = decltype(element);
    query_entry =
        head_dim == 32 ? patch_query_gradient_entry<Element, 32>() : patch_query_gradient_entry<Element, 64>();
    key_entry = head_dim == 32 ? patch_key_gradient_entry<Element, 32>() : patch_key_gradient_entry<Element, 64>();
  };
  if (problem.type == ScalarType::float16)
    entries(__half());
  else
    entries(__nv_bfloat16());
  auto planned = [&](Side owned, const PatchEntry& entry, const int* values) {
    if (problem.plan.size <= 1) return cached_choice(problem, owned, entry, head_dim);
    return walk_of(problem, owned, entry,
                   {{values[0], values[1], values[2]}, {values[3], values[4], values[5]}, values[6]});
  };
  const PlannedWalk query_plan = planned(Side::queries, query_entry, problem.plan.values + 1);
  const PlannedWalk key_plan = planned(Side::keys, key_entry, problem.plan.values + 1 + kNumbersPerKernel);
  if (!query_plan.possible || !key_plan.possible || !offsets_fit(p, query_plan) || !offsets_fit(p, key_plan)) {
    if (asked) throw std::invalid_argument("fused_sm80: the plan does not fit the patch kernels");
    return false;
  }
  launch_patches(query_entry, p, problem, Side::queries, query_plan, stream, "fused_sm80 query gradient by patches");
  launch_patches(key_entry, p, problem, Side::keys, key_plan, stream, "fused_sm80 key gradient by patches");
  return true;
}

}  // namespace natten::fused_sm80
