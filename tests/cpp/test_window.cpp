// Brute force against the definition: windows, inverses, unions, intersections and the planner's simulation.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "window/planner.h"

using namespace natten;

static int failures = 0;
#define EXPECT(condition, ...)                  \
  do {                                          \
    if (!(condition)) {                         \
      if (++failures <= 10) {                   \
        std::printf("FAILED %s: ", #condition); \
        std::printf(__VA_ARGS__);               \
        std::printf("\n");                      \
      }                                         \
    }                                           \
  } while (0)

// The definition, written on global coordinates and sharing nothing with window/axis.h.
static bool attends(const Axis& a, int i, int j) {
  const int d = a.dilation;
  if (i % d != j % d) return false;
  const int g = i % d, p = i / d, t = j / d, length = (a.extent - g + d - 1) / d;
  const int k = a.kernel_size < 0 ? length : a.kernel_size;
  if (a.causal) {
    int leader = p / a.stride * a.stride + a.stride - 1;
    if (leader > length - 1) leader = length - 1;
    return t >= leader - k + 1 && t <= p;
  }
  int leader = p / a.stride * a.stride + a.stride / 2;
  if (leader > length - 1) leader = length - 1;
  int begin = leader - k / 2;
  if (begin > length - k) begin = length - k;
  if (begin < 0) begin = 0;
  return t >= begin && t < begin + k;
}

static Axis random_axis(std::mt19937& rng) {
  auto pick = [&](int lo, int hi) { return std::uniform_int_distribution<int>(lo, hi)(rng); };
  Axis a{};
  a.extent = pick(1, 40);
  a.dilation = pick(1, a.extent < 6 ? a.extent : 6);
  a.kernel_size = pick(1, a.extent / a.dilation);
  a.stride = pick(1, a.kernel_size);
  if (pick(0, 7) == 0) a.kernel_size = -1;
  a.causal = pick(0, 1);
  a.q_start = pick(0, a.extent - 1);
  a.q_length = pick(1, a.extent - a.q_start);
  a.kv_start = pick(0, a.extent - 1);
  a.kv_length = pick(1, a.extent - a.kv_start);
  return a;
}

static void check_axis(const Axis& a) {
  int queries = 0, keys = 0;
  for (int group = 0; group < a.dilation; ++group) {
    const Group g = make_group(a, group);
    queries += g.q_count;
    keys += g.kv_count;
    for (int u = 0; u < g.q_count; ++u) {
      const int local = g.q_first + u * a.dilation, global = a.q_start + local;
      EXPECT(local < a.q_length && global % a.dilation == group && global / a.dilation == g.q_position + u, "query %d",
             u);
    }
    for (int u = 0; u < g.kv_count; ++u) {
      const int local = g.kv_first + u * a.dilation, global = a.kv_start + local;
      EXPECT(local < a.kv_length && global % a.dilation == group && global / a.dilation == g.kv_position + u, "key %d",
             u);
    }
    Range last{0, 0};
    for (int p = 0; p < g.length; ++p) {
      const Range w = window(g, p);
      EXPECT(w.begin >= last.begin && w.end >= last.end && w.size() >= 1, "monotone at %d", p);
      last = w;
      for (int t = 0; t < g.length; ++t) {
        const bool expected = attends(a, p * a.dilation + group, t * a.dilation + group);
        EXPECT(w.contains(t) == expected, "window L %d k %d s %d d %d causal %d p %d t %d", a.extent, a.kernel_size,
               a.stride, a.dilation, a.causal, p, t);
        EXPECT(inverse_window(g, t).contains(p) == expected, "inverse L %d k %d s %d d %d causal %d p %d t %d",
               a.extent, a.kernel_size, a.stride, a.dilation, a.causal, p, t);
      }
    }
    for (int first = 0; first < g.length; ++first)
      for (int end = first + 1; end <= g.length && end <= first + 9; ++end) {
        const Range u = window_union(g, first, end - 1), n = window_intersection(g, first, end - 1);
        const Range inverse = inverse_union(g, first, end - 1);
        for (int t = 0; t < g.length; ++t) {
          bool some = false, all = true, seen = false;
          for (int p = first; p < end; ++p) {
            const bool yes = window(g, p).contains(t);
            some |= yes;
            all &= yes;
          }
          for (int key = first; key < end; ++key) seen |= window(g, t).contains(key);
          EXPECT(!some || u.contains(t), "union misses %d", t);
          EXPECT(all == n.contains(t), "intersection at %d", t);
          EXPECT(!seen || inverse.contains(t), "inverse union misses %d", t);
        }
      }
  }
  EXPECT(queries == a.q_length && keys == a.kv_length, "groups cover the axis");
}

static void check_simulation(const Axis& axis, int q_tile, int kv_tile) {
  Axis a = axis;
  a.q_start = a.kv_start = 0;
  a.q_length = a.kv_length = a.extent;
  const Group g = make_group(a, 0);
  double all = 0, full = 0;
  for (int q = 0; q < g.q_count; q += q_tile) {
    const int end = q + q_tile < g.q_count ? q + q_tile : g.q_count;
    int first = g.length, last = 0;
    for (int p = q; p < end; ++p)
      for (int t = 0; t < g.length; ++t)
        if (window(g, p).contains(t)) {
          if (t < first) first = t;
          if (t >= last) last = t + 1;
        }
    for (int box = first; box < last; box += kv_tile) {
      bool every = true;
      for (int p = q; p < end; ++p)
        for (int t = box; t < box + kv_tile; ++t) every &= window(g, p).contains(t);
      all += 1;
      full += every;
    }
  }
  const AxisPairs pairs = simulate_axis(a, q_tile, kv_tile, 1 << 20);
  EXPECT(pairs.all == all && pairs.full == full, "simulated %g %g, counted %g %g", pairs.all, pairs.full, all, full);
}

static void check_planner(std::mt19937& rng) {
  const Axis trivial{1, 1, 1, 0, 1, 0, 1, 0, 1};
  for (int rank = 1; rank <= 3; ++rank) {
    Axis axes[kAxes] = {trivial, trivial, trivial};
    for (int a = 3 - rank; a < 3; ++a) axes[a] = random_axis(rng);
    const TileShape shape = plan_tiles(axes, {64, 64, 8, 0.25});
    EXPECT(shape.q[0] * shape.q[1] * shape.q[2] == 64 && shape.kv[0] * shape.kv[1] * shape.kv[2] == 64, "token counts");
    EXPECT(shape.kv[2] % 8 == 0, "innermost extent");
    for (int a = 0; a < 3 - rank; ++a) EXPECT(shape.q[a] == 1 && shape.kv[a] == 1, "trivial axis tiled");
  }
}

int main(int count, char** arguments) {
  const int axes = count > 1 ? std::atoi(arguments[1]) : 4000;
  std::mt19937 rng(count > 2 ? std::atoi(arguments[2]) : 1);
  for (int i = 0; i < axes; ++i) {
    const Axis a = random_axis(rng);
    check_axis(a);
    check_simulation(a, 1 + i % 9, 1 + i / 9 % 9);
    check_planner(rng);
  }
  std::printf("%d axes, %d failures\n", axes, failures);
  return failures != 0;
}
