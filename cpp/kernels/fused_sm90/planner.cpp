#include "kernels/fused_sm90/planner.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <iterator>
#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>

#include "kernels/fused_sm90/config.h"

namespace natten::fused_sm90 {

namespace {

// One axis cut into query extents and key extents: sums over the axis's tiles. A problem's totals are products of these.
struct AxisCount {
  double tiles = 0, live = 0;    // blocks' tiles; warpgroups among them that have queries
  double loaded = 0;             // key extents brought for a tile
  double needed = 0, full = 0;   // summed over warpgroups: computed at all; without a mask
};

AxisCount count_axis(const Group& g, int query_extent, int warpgroups, int key_extent) {
  AxisCount count;
  for (int first = 0; first < g.q_count; first += query_extent * warpgroups) {
    const int last = std::min(first + query_extent * warpgroups, g.q_count) - 1;
    const Range all = window_union(g, g.q_position + first, g.q_position + last);
    const int boxes = ceil_div(all.size(), key_extent);
    count.tiles += 1;
    count.loaded += boxes;
    for (int q = first; q <= last; q += query_extent) {
      const int q_last = std::min(q + query_extent, g.q_count) - 1;
      const Range needed = window_union(g, g.q_position + q, g.q_position + q_last);
      const Range common = window_intersection(g, g.q_position + q, g.q_position + q_last);
      count.live += 1;
      const int begin = (needed.begin - all.begin) / key_extent;
      const int end = ceil_div(needed.end - all.begin, key_extent);
      count.needed += end - begin;
      const int full_begin = ceil_div(common.begin - all.begin, key_extent);
      const int full_end = (common.end - all.begin) / key_extent;
      count.full += std::max(full_end - full_begin, 0);
    }
  }
  return count;
}

class AxisCounts {
 public:
  explicit AxisCounts(const Group& group) : group_(group) {}
  const AxisCount& operator()(int query_extent, int warpgroups, int key_extent) {
    const auto key = std::make_tuple(query_extent, warpgroups, key_extent);
    auto found = counts_.find(key);
    if (found == counts_.end()) found = counts_.emplace(key, count_axis(group_, query_extent, warpgroups, key_extent)).first;
    return found->second;
  }

 private:
  Group group_;
  std::map<std::tuple<int, int, int>, AxisCount> counts_;
};

// Measured on an H200, in cycles (docs/kernels/fused-hopper.md). A multiprocessor's time for a step of one warpgroup is
// its product time over an efficiency, or the exponentials', whichever is longer; partial boxes pay for their masks.
// A tile cannot take less than its chain of latencies, which the blocks of a multiprocessor overlap.
struct StepCost {
  double full, partial, step_latency, tile_latency;
};
StepCost step_cost(const Variant& v, bool bias) {
  const double product = v.keys * v.head_dim / 16.0;
  const double exponentials = v.keys * 4.6;  // 16 exp2 per cycle: 4 per key and row of 64, plus the rest of softmax
  const double efficiency = v.keys == 128 ? 0.90 : 0.85;
  const double full = std::max(product / efficiency, exponentials);
  const double mask = bias ? v.keys + 16 : v.keys * 1.2 + 25;
  return {full, full + mask, 300 + 1.6 * full, 2500};
}

double cost(const Problem& problem, int multiprocessors, const Variant& v, bool bias, int pair_axis,
            const AxisCount (&axis)[kAxes], double copies) {
  double tiles = copies, needed = copies, full = copies, loaded = copies;
  for (const AxisCount& a : axis) {
    tiles *= a.tiles;
    needed *= a.needed;
    full *= a.full;
    loaded *= a.loaded;
  }
  const StepCost step = step_cost(v, bias);
  const double additional = static_cast<double>(ceil_div(static_cast<int>(problem.additional), v.keys));
  const double throughput = full * step.full + (needed - full) * step.partial + tiles * v.warpgroups * additional * step.full;
  // Boxes that some warpgroups skip leave the others alone with the tensor cores, for whole runs of boxes if the
  // warpgroups lie along the slowest axis.
  const double idle = loaded * v.warpgroups / std::max(needed, 1.0) - 1;
  const double imbalance = 1 + idle * (pair_axis == 2 ? 0.4 : 0.15);
  const double latency = (loaded + tiles * additional) * step.step_latency + tiles * step.tile_latency;
  // The last wave is rarely full.
  const double waves = tiles / (static_cast<double>(multiprocessors) * v.blocks);
  const double whole_waves = std::max(1.0, waves < 8 ? static_cast<double>(static_cast<int64_t>(waves + 0.999999)) : waves + 0.3);
  return std::max(throughput * imbalance, latency / v.blocks) / std::max(waves, 1e-9) * whole_waves;
}

// Few enough query coordinates for the slots, key coordinates for the table of vectors, and enough boxes to a tile for
// the table to pay.
bool bias_fits(const Group (&group)[kAxes], const Variant& v, const Schedule& s) {
  constexpr int kLeastBoxes = 16;
  const int* box = s.warpgroup_box;
  const int slots_x = box[0] > 1 ? box[0] : 0, slots_y = box[1] > 1 ? box[1] : 0;
  if (!masks_by_bias(v) || box[2] > 8 || slots_x + slots_y > 8) return false;
  int vectors = 0, boxes = 1;
  for (int a = 0; a < kAxes; ++a) {
    const int copies = a == s.pair_axis ? s.warpgroups : 1;
    const int keys = std::min(group[a].kernel_size + box[a] * copies + group[a].stride, group[a].kv_count);
    vectors += ceil_div(keys, s.key_box[a]) * s.key_box[a] * copies;
    boxes *= ceil_div(keys, s.key_box[a]);
  }
  return vectors <= kKeyVectors && boxes >= kLeastBoxes;
}

bool fits(int extent, int length) { return extent == 1 || extent < 2 * length; }

template <class Function>
void for_each_query_box(const Group (&group)[kAxes], Function f) {
  for (int x = 1; x <= kQueries; x *= 2) {
    if (!fits(x, group[0].q_count)) continue;
    for (int y = 1; x * y <= kQueries; y *= 2) {
      if (fits(y, group[1].q_count)) f(x, y, kQueries / (x * y));
    }
  }
}

template <class Function>
void for_each_key_box(const Group (&group)[kAxes], int keys, Function f) {
  for (int z = 8; z <= keys; z += 8) {
    if (keys % z != 0 || (z > 8 && !fits(z, group[2].kv_count))) continue;
    for (int y = 1; y <= keys / z; ++y) {
      if (keys / z % y != 0 || !fits(y, group[1].kv_count)) continue;
      f(keys / (z * y), y, z);
    }
  }
}

// The dilation group of the first query along each axis, which has most queries, stands for all.
void longest_groups(const Problem& problem, Group (&group)[kAxes]) {
  for (int a = 0; a < kAxes; ++a) group[a] = make_group(problem.axis[a], problem.axis[a].q_start % problem.axis[a].dilation);
}

Schedule search(const Problem& problem, int multiprocessors) {
  const int head_dim = head_dim_class(std::max(problem.head_dim, problem.head_dim_v));
  Group group[kAxes];
  longest_groups(problem, group);
  double copies = static_cast<double>(problem.batch) * problem.heads;
  for (const Axis& axis : problem.axis) copies *= axis.dilation;
  AxisCounts counts[kAxes] = {AxisCounts(group[0]), AxisCounts(group[1]), AxisCounts(group[2])};
  Schedule best{};
  double best_cost = -1;
  for (const Variant& v : kVariants) {
    if (v.head_dim != head_dim) continue;
    for_each_query_box(group, [&](int qx, int qy, int qz) {
      const int query[kAxes] = {qx, qy, qz};
      for_each_key_box(group, v.keys, [&](int kx, int ky, int kz) {
        const int key[kAxes] = {kx, ky, kz};
        for (int pair = 0; pair < kAxes; ++pair) {
          if (pair < 2 && group[pair].q_count <= query[pair]) continue;
          const Schedule schedule = {v.keys, v.warpgroups, v.blocks, {qx, qy, qz}, {kx, ky, kz}, pair};
          const bool bias = bias_fits(group, v, schedule);
          AxisCount axis[kAxes];
          for (int a = 0; a < kAxes; ++a) axis[a] = counts[a](query[a], a == pair ? v.warpgroups : 1, key[a]);
          const double c = cost(problem, multiprocessors, v, bias, pair, axis, copies);
          if (best_cost >= 0 && c >= best_cost) continue;
          best_cost = c;
          best = schedule;
        }
      });
    });
  }
  return best;
}

int product(const int (&extent)[kAxes]) { return extent[0] * extent[1] * extent[2]; }

bool is_power_of_two(int x) { return x > 0 && (x & (x - 1)) == 0; }

Schedule from_plan(const Problem& problem) {
  const int* v = problem.plan.values;
  const Schedule s = {v[0], v[1], v[2], {v[3], v[4], v[5]}, {v[6], v[7], v[8]}, v[9]};
  bool good = problem.plan.size == kScheduleValues && s.pair_axis >= 0 && s.pair_axis < kAxes &&
              variant_index(head_dim_class(std::max(problem.head_dim, problem.head_dim_v)), s) >= 0 &&
              product(s.warpgroup_box) == kQueries && product(s.key_box) == s.keys && s.key_box[2] % 8 == 0;
  for (int a = 0; a < kAxes; ++a) good = good && is_power_of_two(s.warpgroup_box[a]) && s.key_box[a] > 0;
  if (!good) throw std::invalid_argument("natten: the plan does not describe tiles that the Hopper kernel can run");
  return s;
}

// Everything a schedule depends on.
struct Geometry {
  std::array<int, kAxes * sizeof(Axis) / sizeof(int)> axis;
  int64_t batch, additional;
  int heads, head_dim, multiprocessors;

  bool operator==(const Geometry&) const = default;
};

}  // namespace

bool masks_by_bias(const Problem& problem, const Schedule& schedule) {
  Group group[kAxes];
  longest_groups(problem, group);
  const int head_dim = head_dim_class(std::max(problem.head_dim, problem.head_dim_v));
  return bias_fits(group, kVariants[variant_index(head_dim, schedule)], schedule);
}

int variant_index(int head_dim, const Schedule& schedule) {
  const Variant wanted = {head_dim, schedule.keys, schedule.warpgroups, schedule.blocks};
  const auto found = std::find(std::begin(kVariants), std::end(kVariants), wanted);
  return found == std::end(kVariants) ? -1 : static_cast<int>(found - std::begin(kVariants));
}

Schedule choose_schedule(const Problem& problem, int multiprocessors) {
  if (problem.plan.size != 0) return from_plan(problem);
  constexpr size_t kRemembered = 64;
  static std::mutex mutex;
  static std::deque<std::pair<Geometry, Schedule>> remembered;

  Geometry geometry = {{}, problem.batch, problem.additional, problem.heads, std::max(problem.head_dim, problem.head_dim_v),
                       multiprocessors};
  static_assert(sizeof(geometry.axis) == sizeof(problem.axis));
  std::memcpy(geometry.axis.data(), problem.axis, sizeof(problem.axis));

  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& [known, schedule] : remembered) {
    if (known == geometry) return schedule;
  }
  const Schedule schedule = search(problem, multiprocessors);
  remembered.emplace_front(geometry, schedule);
  if (remembered.size() > kRemembered) remembered.pop_back();
  return schedule;
}

}  // namespace natten::fused_sm90
