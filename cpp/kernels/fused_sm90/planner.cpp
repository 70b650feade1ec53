#include "kernels/fused_sm90/planner.h"

#include <algorithm>
#include <array>
#include <cmath>
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

// One axis cut into query extents and key extents: sums over the axis's tiles. A problem's totals are products of
// these.
struct AxisCount {
  double tiles = 0, live = 0;   // blocks' tiles; warpgroups among them that have queries
  double loaded = 0;            // key extents brought for a tile
  double needed = 0, full = 0;  // summed over warpgroups: computed at all; without a mask
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
    if (found == counts_.end())
      found = counts_.emplace(key, count_axis(group_, query_extent, warpgroups, key_extent)).first;
    return found->second;
  }

 private:
  Group group_;
  std::map<std::tuple<int, int, int>, AxisCount> counts_;
};

// A multiprocessor's cycles, per warpgroup, for a step without and with a mask; for one that the warpgroup skips, alone
// or in a long row of such steps; for a run of steps that it needs between others that it skips; and per block for a
// tile besides its steps. One entry per variant: least squares over 200 timings on an H200, with a factor for each
// problem because of the power limit (docs/kernels/fused-hopper.md), off by 3 % (rms) and at most 9 %; head dims 32,
// 96, 192 and 256 by proportion.
struct Cost {
  double full, masked, skipped, skipped_in_row, run, tile;
};
constexpr Cost kCosts[] = {
    {720, 830, 40, 160, 130, 4700},     // 32: 128 keys, 3 warpgroups
    {420, 500, 40, 160, 130, 1950},     //     64, 2, two blocks
    {844, 991, 73, 169, 138, 3740},     // 64: 128, 3
    {445, 509, 54, 215, 251, 4520},     //     64, 3
    {484, 561, 48, 162, 133, 2300},     //     64, 2, two blocks
    {1010, 1060, 90, 230, 150, 2500},   // 96: 128, 2
    {550, 570, 130, 280, 100, 5800},    //     64, 3
    {1347, 1377, 103, 293, 162, 2680},  // 128: 128, 2
    {660, 675, 179, 358, 98, 6550},     //      64, 3
    {900, 980, 100, 290, 160, 2000},    // 192
    {1145, 1240, 100, 290, 160, 2000},  // 256
};
static_assert(std::size(kCosts) == std::size(kVariants));

double cost(const Cost& unit, const Variant& v, int multiprocessors, int pair_axis, const AxisCount (&axis)[kAxes],
            double copies, int64_t additional) {
  double tiles = copies, needed = copies, full = copies, loaded = copies, runs = copies, faster_boxes = 1;
  for (int a = 0; a < kAxes; ++a) {
    tiles *= axis[a].tiles;
    needed *= axis[a].needed;
    full *= axis[a].full;
    loaded *= axis[a].loaded;
    runs *= a == pair_axis ? axis[a].live : axis[a].needed;
    if (a != pair_axis) faster_boxes *= axis[a].loaded / axis[a].tiles;
  }
  const double skipped = loaded * v.warpgroups - needed;
  const double additional_steps = tiles * v.warpgroups * static_cast<double>((additional + v.keys - 1) / v.keys);
  double cycles = (full + additional_steps) * unit.full + (needed - full) * unit.masked + tiles * unit.tile;
  // Boxes are walked fastest along the pair axis, unless that is z: then slowest, and a box that a warpgroup skips
  // stands for all boxes along the other axes.
  if (pair_axis == 2) {
    cycles += skipped * (faster_boxes > 1 ? unit.skipped_in_row : unit.skipped);
  } else if (skipped > 0) {
    cycles += skipped * unit.skipped + runs * unit.run;
  }
  // Blocks take tiles in turn: the last wave is rarely full.
  const double waves = tiles / (static_cast<double>(multiprocessors) * v.blocks);
  return cycles / waves * std::ceil(waves);
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
    // Other groups may have one key more.
    const int keys = std::min(group[a].kernel_size + box[a] * copies + group[a].stride, group[a].kv_count) + 1;
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
  for (int a = 0; a < kAxes; ++a)
    group[a] = make_group(problem.axis[a], problem.axis[a].q_start % problem.axis[a].dilation);
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
  for (size_t i = 0; i < std::size(kVariants); ++i) {
    const Variant& v = kVariants[i];
    if (v.head_dim != head_dim) continue;
    for_each_query_box(group, [&](int qx, int qy, int qz) {
      const int query[kAxes] = {qx, qy, qz};
      for_each_key_box(group, v.keys, [&](int kx, int ky, int kz) {
        const int key[kAxes] = {kx, ky, kz};
        for (int pair = 0; pair < kAxes; ++pair) {
          if (pair < 2 && group[pair].q_count <= query[pair]) continue;
          AxisCount axis[kAxes];
          for (int a = 0; a < kAxes; ++a) axis[a] = counts[a](query[a], a == pair ? v.warpgroups : 1, key[a]);
          const double c = cost(kCosts[i], v, multiprocessors, pair, axis, copies, problem.additional);
          if (best_cost >= 0 && c >= best_cost) continue;
          best_cost = c;
          best = {v.keys, v.warpgroups, v.blocks, {qx, qy, qz}, {kx, ky, kz}, pair};
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

  Geometry geometry = {{},
                       problem.batch,
                       problem.additional,
                       problem.heads,
                       std::max(problem.head_dim, problem.head_dim_v),
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
