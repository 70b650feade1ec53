#include "kernels/fused_sm90/backward_planner.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <tuple>

namespace natten::fused_sm90 {

namespace {

// One axis cut into owned and walked extents: sums over the axis's tiles. A problem's totals are products of these.
struct AxisSteps {
  double tiles = 0;
  double loaded = 0;            // boxes brought for a tile
  double needed = 0, full = 0;  // summed over warpgroups: computed at all; without a mask
};

template <Side kOwned>
AxisSteps count_axis(const Group& g, int own_extent, int warpgroups, int walked_extent) {
  constexpr bool kOwnsKeys = kOwned == Side::keys;
  const int count = kOwnsKeys ? g.kv_count : g.q_count, position = kOwnsKeys ? g.kv_position : g.q_position;
  AxisSteps steps;
  for (int first = 0; first < count; first += own_extent * warpgroups) {
    const int last = std::min(first + own_extent * warpgroups, count) - 1;
    const int begin = related<kOwned>(g, position + first).begin, end = related<kOwned>(g, position + last).end;
    steps.tiles += 1;
    steps.loaded += ceil_div(std::max(end - begin, 0), walked_extent);
    for (int own = first; own <= last; own += own_extent) {
      const Range low = related<kOwned>(g, position + own);
      const Range high = related<kOwned>(g, position + std::min(own + own_extent - 1, last));
      if (high.end > low.begin) {
        steps.needed += ceil_div(high.end - begin, walked_extent) - (low.begin - begin) / walked_extent;
      }
      steps.full += std::max((low.end - begin) / walked_extent - ceil_div(high.begin - begin, walked_extent), 0);
    }
  }
  return steps;
}

class AxisStepsCache {
 public:
  AxisStepsCache(const Group& group, Side owned) : group_(group), owned_(owned) {}
  const AxisSteps& operator()(int own_extent, int warpgroups, int walked_extent) {
    const auto [found, is_new] = steps_.try_emplace(std::make_tuple(own_extent, warpgroups, walked_extent));
    if (is_new) {
      found->second = owned_ == Side::keys ? count_axis<Side::keys>(group_, own_extent, warpgroups, walked_extent)
                                           : count_axis<Side::queries>(group_, own_extent, warpgroups, walked_extent);
    }
    return found->second;
  }

 private:
  Group group_;
  Side owned_;
  std::map<std::tuple<int, int, int>, AxisSteps> steps_;
};

// Relative cost of a warpgroup's step, without and with a mask; of a step that it skips; of a tile besides its steps.
constexpr double kFullStep = 1, kMaskedStep = 1.12, kSkippedStep = 0.1, kTile = 4;

double cost(const AxisSteps (&axis)[kAxes], double copies, int warpgroups, int multiprocessors) {
  double tiles = copies, needed = copies, full = copies, loaded = copies;
  for (const AxisSteps& a : axis) {
    tiles *= a.tiles;
    needed *= a.needed;
    full *= a.full;
    loaded *= a.loaded;
  }
  const double skipped = loaded * warpgroups - needed;
  const double total = full * kFullStep + (needed - full) * kMaskedStep + skipped * kSkippedStep + tiles * kTile;
  const double waves = tiles / multiprocessors;  // the last one is rarely full
  return total / waves * (waves < 8 ? std::ceil(waves) : waves + 0.5);
}

bool fits(int extent, int length) { return extent == 1 || extent < 2 * length; }

GradientSchedule search(const Problem& problem, Pass pass, int head_dim_class, int multiprocessors) {
  const GradientShape shape = gradient_shape(head_dim_class, pass);
  const Side owned = owned_side(pass);
  const bool owns_keys = owned == Side::keys;
  // The group of the first row along each axis, which has most rows, stands for all.
  Group group[kAxes];
  double copies = static_cast<double>(problem.batch) * (owns_keys ? problem.heads_kv : problem.heads);
  for (int a = 0; a < kAxes; ++a) {
    const Axis& axis = problem.axis[a];
    group[a] = make_group(axis, (owns_keys ? axis.kv_start : axis.q_start) % axis.dilation);
    copies *= axis.dilation;
  }
  const auto own_count = [&](int a) { return owns_keys ? group[a].kv_count : group[a].q_count; };
  const auto walked_count = [&](int a) { return owns_keys ? group[a].q_count : group[a].kv_count; };
  AxisStepsCache steps[kAxes] = {{group[0], owned}, {group[1], owned}, {group[2], owned}};
  GradientSchedule best{};
  double best_cost = -1;
  for (int ox = 1; ox <= kQueries; ox *= 2) {
    for (int oy = 1; ox * oy <= kQueries; oy *= 2) {
      const int own[kAxes] = {ox, oy, kQueries / (ox * oy)};
      if (!fits(ox, own_count(0)) || !fits(oy, own_count(1))) continue;
      for (int wz = 8; wz <= shape.walked; wz += 8) {
        if (shape.walked % wz != 0 || (wz > 8 && !fits(wz, walked_count(2)))) continue;
        for (int wy = 1; wy <= shape.walked / wz; ++wy) {
          const int walked[kAxes] = {shape.walked / wz / wy, wy, wz};
          if (shape.walked / wz % wy != 0 || !fits(wy, walked_count(1))) continue;
          for (int pair = 0; pair < kAxes; ++pair) {
            if (pair < 2 && own_count(pair) <= own[pair]) continue;
            AxisSteps axis[kAxes];
            for (int a = 0; a < kAxes; ++a) axis[a] = steps[a](own[a], a == pair ? shape.warpgroups : 1, walked[a]);
            const double cost_ = cost(axis, copies, shape.warpgroups, multiprocessors);
            if (best_cost >= 0 && cost_ >= best_cost) continue;
            best_cost = cost_;
            best = {{own[0], own[1], own[2]}, {walked[0], walked[1], walked[2]}, pair};
          }
        }
      }
    }
  }
  return best;
}

// Everything that a schedule depends on.
struct Geometry {
  Axis axis[kAxes];
  int64_t batch;
  int heads, heads_kv, head_dim_class, multiprocessors, pass;
};

}  // namespace

GradientSchedule choose_gradient_schedule(const Problem& problem, Pass pass, int head_dim_class, int multiprocessors) {
  constexpr size_t kRemembered = 64;
  static std::mutex mutex;
  static std::deque<std::pair<Geometry, GradientSchedule>> remembered;
  Geometry geometry;
  std::memset(&geometry, 0, sizeof(geometry));  // compared byte by byte
  std::copy(std::begin(problem.axis), std::end(problem.axis), geometry.axis);
  geometry.batch = problem.batch;
  geometry.heads = problem.heads;
  geometry.heads_kv = problem.heads_kv;
  geometry.head_dim_class = head_dim_class;
  geometry.multiprocessors = multiprocessors;
  geometry.pass = static_cast<int>(pass);
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& [known, schedule] : remembered) {
    if (std::memcmp(&known, &geometry, sizeof(geometry)) == 0) return schedule;
  }
  const GradientSchedule schedule = search(problem, pass, head_dim_class, multiprocessors);
  remembered.emplace_front(geometry, schedule);
  if (remembered.size() > kRemembered) remembered.pop_back();
  return schedule;
}

}  // namespace natten::fused_sm90
