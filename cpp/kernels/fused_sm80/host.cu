#include "kernels/fused_sm80/host.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <mutex>

namespace natten::fused_sm80 {

namespace {

constexpr int kAlignment = 16;  // of every row, in bytes: cp.async copies 16-byte chunks

// Cost of masking a box, as a share of computing it.
constexpr double kPartialCharge = 0.25;

}  // namespace

void check_problem(const Problem& problem) {
  if (problem.type == ScalarType::float64) throw std::invalid_argument("fused_sm80: does not support float64");
  if (problem.additional > INT32_MAX / 2) throw std::invalid_argument("fused_sm80: too many additional keys");
}

void check_rows(const TensorView& view, const Problem& problem, int channels, const char* name) {
  auto fail = [&](const std::string& what) {
    throw std::invalid_argument("fused_sm80: " + std::string(name) + " " + what);
  };
  if (channels % 8 != 0) fail("has a head dim that is not a multiple of 8");
  if (reinterpret_cast<uintptr_t>(view.data) % kAlignment != 0) fail("is not aligned to 16 bytes");
  auto check_stride = [&](int64_t stride, int64_t extent, const char* axis) {
    if (extent > 1 && stride * element_bytes(problem) % kAlignment != 0)
      fail(std::string("has a ") + axis + " stride that is not a multiple of 16 bytes");
  };
  check_stride(view.batch_stride, problem.batch, "batch");
  check_stride(view.head_stride, problem.heads, "head");
  for (int a = 0; a < kAxes; ++a) check_stride(view.axis_stride[a], problem.axis[a].extent, "token");
}

Tensor make_tensor(const TensorView& view, const Problem& problem, int element_bytes) {
  Tensor t{static_cast<char*>(view.data), view.batch_stride * element_bytes, view.head_stride * element_bytes, {}, {}};
  for (int a = 0; a < kAxes; ++a) {
    t.axis[a] = view.axis_stride[a] * element_bytes;
    t.step[a] = t.axis[a] * problem.axis[a].dilation;
  }
  return t;
}

Tensor make_additional(const TensorView& view, int element_bytes) {
  Tensor t{static_cast<char*>(view.data), view.batch_stride * element_bytes, view.head_stride * element_bytes, {}, {}};
  t.axis[2] = t.step[2] = view.axis_stride[2] * element_bytes;
  return t;
}

Parameters make_parameters(const Problem& problem) {
  Parameters p{};
  for (int a = 0; a < kAxes; ++a) {
    p.axis[a] = problem.axis[a];
    p.dense[a] = make_group(problem.axis[a], 0);
    p.groups[a] = Divisor(problem.axis[a].dilation);
  }
  p.heads_per_kv = problem.heads / problem.heads_kv;
  p.head_dim = problem.head_dim;
  p.head_dim_v = problem.head_dim_v;
  p.columns = problem.head_dim * element_bytes(problem) / 2;
  p.columns_v = problem.head_dim_v * element_bytes(problem) / 2;
  p.additional = int(problem.additional);
  p.scale = float(problem.scale);
  p.scale_log2 = float(problem.scale * 1.4426950408889634);
  return p;
}

int head_dim_class(const Problem& problem) {
  const int largest = max_int(problem.head_dim, problem.head_dim_v);
  const bool is_float32 = problem.type == ScalarType::float32;
  const int* classes = is_float32 ? kFloat32HeadDimClasses : kHeadDimClasses;
  const int* end = is_float32 ? std::end(kFloat32HeadDimClasses) : std::end(kHeadDimClasses);
  const int* found = std::lower_bound(classes, end, largest);
  if (found != end) return *found;
  throw std::invalid_argument("fused_sm80: head dim " + std::to_string(largest) + " is larger than " +
                              std::to_string(end[-1]));
}

int shared_memory_limit() {
  constexpr int kMostDevices = 64;
  static std::once_flag once[kMostDevices];
  static int limit[kMostDevices];
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  if (device >= kMostDevices) throw std::runtime_error("fused_sm80: device index above 63");
  std::call_once(once[device], [&] {
    check_cuda(cudaDeviceGetAttribute(&limit[device], cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
               "cudaDevAttrMaxSharedMemoryPerBlockOptin");
  });
  return limit[device];
}

namespace {

// The same problem with the roles of queries and keys exchanged: what a tile of keys meets is, up to the borders, what
// a tile of queries would meet.
void planner_axes(const Problem& problem, Side owned, Axis (&axes)[kAxes]) {
  for (int a = 0; a < kAxes; ++a) {
    axes[a] = problem.axis[a];
    if (owned == Side::keys) {
      axes[a].q_start = axes[a].kv_start;
      axes[a].q_length = axes[a].kv_length;
    }
  }
}

// Scores computed, masked boxes charged extra.
double cost(const Axis (&axes)[kAxes], const TileShape& shape) {
  double all = 1, full = 1, scores = 1;
  for (int a = 0; a < kAxes; ++a) {
    const AxisPairs pairs = simulate_axis(axes[a], shape.q[a], shape.kv[a]);
    all *= pairs.all;
    full *= pairs.full;
    scores *= double(shape.q[a]) * shape.kv[a];
  }
  return scores * (all + kPartialCharge * (all - full));
}

// A wide tile computes a score in this share of the time that a narrow one takes.
constexpr double kWideShare = 0.8;

struct PlanCache {
  static constexpr int kEntries = 16;
  struct Entry {
    Axis axes[kAxes];
    Side owned;
    int only, limit;
    void (*kernel)(const Parameters);  // the wide one; null while the entry is free
    TilePlan plan;
  } entry[kEntries];
  int next;
};

// Boxes that a sub-box of `extent` rows along an axis needs, averaged over the sub-boxes of a tile in the middle.
double needed_boxes(const Axis& axis, Side owned, int tile, int extent, int box) {
  const Group g = make_group(axis, 0);
  const bool keys = owned == Side::keys;
  const int count = keys ? g.kv_count : g.q_count, first = (ceil_div(count, tile) - 1) / 2 * tile;
  const int position = (keys ? g.kv_position : g.q_position) + first, rows = min_int(tile, count - first);
  auto range = [&](int a, int b) { return keys ? inverse_union(g, a, b) : window_union(g, a, b); };
  if (rows <= 0) return 1;
  const int origin = range(position, position + rows - 1).begin;
  double boxes = 0;
  for (int r = 0; r < rows; r += extent) {
    const Range needed = range(position + r, position + min_int(r + extent, rows) - 1);
    if (needed.size() > 0) boxes += (needed.end - 1 - origin) / box - (needed.begin - origin) / box + 1;
  }
  return boxes / (tile / extent);
}

// How a tile is cut into equal sub-boxes for `warps` warps, so that they need few boxes.
void cut_tile(TilePlan& plan, const Problem& problem, Side owned, int warps) {
  double best = -1;
  for (int x = 1; x <= min_int(plan.owned[0], warps); x *= 2)
    for (int y = 1; y <= plan.owned[1] && x * y <= warps; y *= 2) {
      const int cuts[kAxes] = {x, y, warps / (x * y)};
      if (cuts[2] > plan.owned[2]) continue;
      double boxes = 1;
      for (int a = 0; a < kAxes; ++a)
        boxes *= needed_boxes(problem.axis[a], owned, plan.owned[a], plan.owned[a] / cuts[a], plan.walked[a]);
      if (best >= 0 && boxes >= best) continue;
      best = boxes;
      for (int a = 0; a < kAxes; ++a) plan.warp[a] = plan.owned[a] / cuts[a];
    }
}

}  // namespace

TilePlan read_plan(const int* values, const Problem& problem, Side owned, const KernelEntry (&entries)[kVariants]) {
  auto fail = [] { throw std::invalid_argument("fused_sm80: the plan does not fit the kernel"); };
  if (values[0] < 0 || values[0] >= kVariants) fail();
  TilePlan plan{static_cast<Variant>(values[0]), {}, {}, {}};
  int owned_rows = 1, walked_rows = 1;
  for (int a = 0; a < kAxes; ++a) {
    plan.owned[a] = values[1 + a];
    plan.walked[a] = values[4 + a];
    for (int extent : {plan.owned[a], plan.walked[a]})
      if (extent < 1 || extent > 256 || (extent & (extent - 1)) != 0) fail();
    owned_rows *= plan.owned[a];
    walked_rows *= plan.walked[a];
  }
  const KernelEntry& entry = entries[values[0]];
  if (owned_rows != entry.owned_rows || walked_rows != entry.walked_rows || plan.walked[2] % tile::kRun != 0) fail();
  if (entry.shared_bytes > shared_memory_limit()) fail();
  cut_tile(plan, problem, owned, entry.owned_warps);
  return plan;
}

TilePlan plan(const Problem& problem, Side owned, const KernelEntry (&entries)[kVariants], int only) {
  thread_local PlanCache cache{};
  const int limit = shared_memory_limit();
  for (const PlanCache::Entry& e : cache.entry)
    if (e.kernel == entries[0].function && e.owned == owned && e.only == only && e.limit == limit &&
        std::memcmp(e.axes, problem.axis, sizeof e.axes) == 0)
      return e.plan;
  Axis axes[kAxes];
  planner_axes(problem, owned, axes);
  TilePlan best{};
  double best_cost = -1;
  for (int v = 0; v < kVariants; ++v) {
    const KernelEntry& entry = entries[v];
    if (entry.shared_bytes > limit || (only >= 0 && only != v)) continue;
    const TileShape shape = plan_tiles(axes, {entry.owned_rows, entry.walked_rows, tile::kRun, kPartialCharge});
    const double cost_ = cost(axes, shape) * (v == int(Variant::wide) ? kWideShare : 1);
    if (best_cost >= 0 && cost_ >= best_cost) continue;
    best_cost = cost_;
    best.variant = static_cast<Variant>(v);
    best.scores = cost_;
    for (int a = 0; a < kAxes; ++a) {
      best.owned[a] = shape.q[a];
      best.walked[a] = shape.kv[a];
    }
  }
  if (best_cost < 0) throw std::invalid_argument("fused_sm80: this device has too little shared memory");
  cut_tile(best, problem, owned, entries[int(best.variant)].owned_warps);
  PlanCache::Entry& e = cache.entry[cache.next++ % PlanCache::kEntries];
  std::memcpy(e.axes, problem.axis, sizeof e.axes);
  e.kernel = entries[0].function;
  e.owned = owned;
  e.only = only;
  e.limit = limit;
  e.plan = best;
  return best;
}

void launch(const KernelEntry& entry, Parameters& p, const Problem& problem, Side owned, const TilePlan& tiles,
            int parts, cudaStream_t stream, const char* name) {
  const int heads = owned == Side::queries ? problem.heads : problem.heads_kv;
  int64_t blocks = problem.batch * heads * parts;
  double needed = 1;
  for (int a = 0; a < kAxes; ++a) {
    const Axis& axis = p.axis[a];
    const int count = ceil_div(longest_group(axis, owned), tiles.owned[a]);
    if (count == 0) return;
    p.tiles[a] = Divisor(count);
    blocks *= int64_t(count) * axis.dilation;
    needed *= tiles.owned[a] + p.dense[a].kernel_size - 1;
  }
  if (blocks == 0) return;
  p.parts = Divisor(parts);
  p.heads = Divisor(heads);
  p.heads_innermost =
      needed * heads * (problem.head_dim + problem.head_dim_v) * element_bytes(problem) < kHeadsInnermostBytes;
  p.owned = tile::make_owned_tile(tiles.owned, tiles.warp);
  p.box = tile::make_box_shape(tiles.walked);
  allow_shared_memory(entry.function, entry.shared_bytes, name);
  entry.function<<<grid_size(blocks, name), entry.threads, entry.shared_bytes, stream>>>(p);
  check_launch(name);
}

}  // namespace natten::fused_sm80
