// The window of one axis: the only place in C++ where its definition stands.
//
// A dilated axis falls apart into `dilation` groups, each a dense axis of its own. Kernels therefore work on a
// `Group`, in positions inside the group, and never see dilation again: it is only a longer memory stride.
// The definition is docs/semantics.md; python/natten/reference.py holds it once more, independently, as the oracle.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define NATTEN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define NATTEN_HOST_DEVICE inline
#endif

namespace natten {

// Inside C++ every problem has three axes; problems of lower rank have leading axes of extent 1.
constexpr int kAxes = 3;

NATTEN_HOST_DEVICE int min_int(int a, int b) { return a < b ? a : b; }
NATTEN_HOST_DEVICE int max_int(int a, int b) { return a > b ? a : b; }
NATTEN_HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Half-open range of positions.
struct Range {
  int begin, end;
  NATTEN_HOST_DEVICE int size() const { return end - begin; }
  NATTEN_HOST_DEVICE bool contains(int i) const { return i >= begin && i < end; }
};

// Parameters of one axis. Local query `a` stands at global coordinate q_start + a, local key `b` at kv_start + b;
// windows are defined in global coordinates.
struct Axis {
  int kernel_size;  // -1: the whole dilation group
  int stride;
  int dilation;
  int causal;
  int extent;  // global
  int q_start, q_length;
  int kv_start, kv_length;
};

// One dilation group of an axis, as a dense axis of `length` positions.
// Position p of the group is global coordinate p * dilation + group.
struct Group {
  int length;
  int kernel_size;  // resolved: 1 <= kernel_size <= length
  int stride;
  int causal;
  int q_first;     // local index of the group's first query
  int q_position;  // and its position
  int q_count;     // queries of the group that were passed; consecutive in position
  int kv_first, kv_position, kv_count;
};

NATTEN_HOST_DEVICE Group make_group(const Axis& axis, int group) {
  const int d = axis.dilation;
  Group g;
  g.length = (axis.extent - group + d - 1) / d;
  g.kernel_size = axis.kernel_size < 0 ? g.length : axis.kernel_size;
  g.stride = axis.stride;
  g.causal = axis.causal;
  g.q_first = ((group - axis.q_start) % d + d) % d;
  g.q_position = (axis.q_start + g.q_first) / d;
  g.q_count = g.q_first < axis.q_length ? (axis.q_length - g.q_first + d - 1) / d : 0;
  g.kv_first = ((group - axis.kv_start) % d + d) % d;
  g.kv_position = (axis.kv_start + g.kv_first) / d;
  g.kv_count = g.kv_first < axis.kv_length ? (axis.kv_length - g.kv_first + d - 1) / d : 0;
  return g;
}

// Key positions that the query at position p attends. Both ends are non-decreasing in p.
NATTEN_HOST_DEVICE Range window(const Group& g, int p) {
  const int block = g.stride == 1 ? p : p / g.stride * g.stride;  // a division costs kernels more than the branch
  if (g.causal) {
    const int leader = min_int(block + g.stride - 1, g.length - 1);
    return {max_int(leader - g.kernel_size + 1, 0), p + 1};
  }
  const int leader = min_int(block + g.stride / 2, g.length - 1);
  const int begin = min_int(max_int(leader - g.kernel_size / 2, 0), g.length - g.kernel_size);
  return {begin, begin + g.kernel_size};
}

// First position whose stride block has its leader (before clipping to the group) at or after `target`.
NATTEN_HOST_DEVICE int first_with_leader(const Group& g, int target, int leader_offset) {
  const int blocks = max_int(target - leader_offset + g.stride - 1, 0) / g.stride;
  return min_int(blocks * g.stride, g.length);
}

// First query position whose window begins at or after key position t (`length` if there is none).
NATTEN_HOST_DEVICE int first_window_from(const Group& g, int t) {
  if (t <= 0) return 0;
  if (g.causal) {
    const int target = t + g.kernel_size - 1;
    return target > g.length - 1 ? g.length : first_with_leader(g, target, g.stride - 1);
  }
  if (t > g.length - g.kernel_size) return g.length;
  return first_with_leader(g, t + g.kernel_size / 2, g.stride / 2);
}

// Query positions whose windows contain key position t: the inverse of `window`, a range because both ends are
// monotone.
NATTEN_HOST_DEVICE Range inverse_window(const Group& g, int t) {
  const int begin = g.causal ? t : first_window_from(g, t - g.kernel_size + 1);
  return {begin, first_window_from(g, t + 1)};
}

// Keys that some, and keys that all, of the queries at positions [first, last] attend.
NATTEN_HOST_DEVICE Range window_union(const Group& g, int first, int last) {
  return {window(g, first).begin, window(g, last).end};
}
NATTEN_HOST_DEVICE Range window_intersection(const Group& g, int first, int last) {
  return {window(g, last).begin, window(g, first).end};
}

// Queries that attend some of the keys at positions [first, last].
NATTEN_HOST_DEVICE Range inverse_union(const Group& g, int first, int last) {
  return {inverse_window(g, first).begin, inverse_window(g, last).end};
}

}  // namespace natten
