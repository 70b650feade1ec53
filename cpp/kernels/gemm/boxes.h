// Walking boxes of tokens: which of a box's 64 tokens lie in a range of positions, and loading them.
#pragma once

#include "kernels/gemm/products.h"

namespace natten::gemm {

// Visits the boxes of a region of positions, the last axis fastest.
struct Walk {
  int origin[kAxes], begin[kAxes], end[kAxes];

  __device__ __forceinline__ void start(const Range (&region)[kAxes]) {
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      begin[a] = origin[a] = region[a].begin;
      end[a] = region[a].end;
    }
  }
  // False after the last box; `turned` is then or otherwise the outermost axis whose origin changed.
  __device__ __forceinline__ bool next(const Plan& plan, int& turned) {
#pragma unroll
    for (int a = kAxes - 1; a >= 0; --a) {
      turned = a;
      origin[a] += plan.box(a);
      if (origin[a] < end[a]) return true;
      origin[a] = begin[a];
    }
    return false;
  }
};

// What the shape of a box says about its tokens, in shared memory. Bit t of a mask stands for token t of the box.
struct BoxTokens {
  uint64_t below[kAxes][kTokens + 1];  // tokens whose coordinate on the axis is below v
  int64_t offset_bytes[kTokens];       // in the loaded tensor, from the box's first token

  // Tokens of the box at `origin` whose positions lie in the ranges.
  template <class Bounds>
  __device__ __forceinline__ uint64_t inside(const Plan& plan, const int (&origin)[kAxes],
                                             const Bounds& bounds) const {
    uint64_t mask = ~uint64_t(0);
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      const Range range = bounds(a);
      const int low = min_int(max_int(range.begin - origin[a], 0), plan.box(a));
      const int high = min_int(max_int(range.end - origin[a], low), plan.box(a));
      mask &= below[a][high] ^ below[a][low];
    }
    return mask;
  }
};

// By the whole block; the caller synchronises.
__device__ inline void make_box_tokens(BoxTokens& tokens, const Plan& plan, const Problem& problem,
                                       const TensorView& view, int element_bytes) {
  const int total = plan.box_tokens();
#pragma unroll
  for (int a = 0; a < kAxes; ++a) {
    const int width = a == 2 ? 1 : a == 1 ? plan.box(2) : plan.box(1) * plan.box(2);  // tokens per step of the axis
    for (int v = threadIdx.x; v <= plan.box(a); v += kThreads) {
      uint64_t mask = v * width >= 64 ? ~uint64_t(0) : (uint64_t(1) << (v * width)) - 1;
      for (int period = width * plan.box(a); period < total; period *= 2) mask |= mask << period;
      tokens.below[a][v] = mask;
    }
  }
  for (int t = threadIdx.x; t < total; t += kThreads) {
    const int z = t & (plan.box(2) - 1), y = (t >> plan.box_log2[2]) & (plan.box(1) - 1),
              x = t >> (plan.box_log2[1] + plan.box_log2[2]);
    tokens.offset_bytes[t] = (x * view.axis_stride[0] * problem.axis[0].dilation +
                              y * view.axis_stride[1] * problem.axis[1].dilation +
                              z * view.axis_stride[2] * problem.axis[2].dilation) *
                             element_bytes;
  }
}

// Sum over axes of coordinate * stride, for the first token of run j (eight tokens along z) of a box.
__device__ __forceinline__ int run_offset(const Plan& plan, int run, const int (&strides)[kAxes]) {
  const int t = run * kRun;
  const int z = t & (plan.box(2) - 1), y = (t >> plan.box_log2[2]) & (plan.box(1) - 1),
            x = t >> (plan.box_log2[1] + plan.box_log2[2]);
  return x * strides[0] + y * strides[1] + z * strides[2];
}

// Element offset of the token at `position` of the tile's dilation group, on one side of the problem.
__device__ __forceinline__ int64_t token_offset(const TokenTile& tile, const Problem& problem, const TensorView& view,
                                                Side side, const int (&position)[kAxes]) {
  int64_t offset = 0;
#pragma unroll
  for (int a = 0; a < kAxes; ++a) {
    const Group& group = tile.group[a];
    const int first = side == Side::queries ? group.q_first : group.kv_first;
    const int first_position = side == Side::queries ? group.q_position : group.kv_position;
    offset += (first + (position[a] - first_position) * problem.axis[a].dilation) * view.axis_stride[a];
  }
  return offset;
}

// Starts copying one slice of the tokens in `mask`; the box's other tokens, and channels past the end, become zeros.
// `chunks` is the number of 16-byte chunks of a token; those from `first_chunk` on go into the slice.
__device__ __forceinline__ void load_slice(char* slice, const char* origin, const int64_t* offset_bytes, uint64_t mask,
                                           int tokens, int first_chunk, int chunks) {
  const int chunk = threadIdx.x % 8;
  // An mma takes two chunks of channels at a time: the second of an odd pair must be zero, later ones are never read.
  if (first_chunk + chunk >= (chunks + 1) / 2 * 2) return;
  const bool exists = first_chunk + chunk < chunks;
  const char* source = origin + (first_chunk + chunk) * 16;
  const uint32_t target = ptx::shared_address(slice);
#pragma unroll
  for (int row = threadIdx.x / 8; row < kTokens; row += kThreads / 8) {
    if (row < tokens) {
      const bool valid = exists && (mask >> row & 1);
      ptx::cp_async_16(target + Slice::offset(row, chunk), valid ? source + offset_bytes[row] : origin, valid);
    }
  }
}

// ---- The queries of a tile and their attention weights (qk, av) ----------------------------------------------------

struct QueryTile {
  TokenTile tile;
  Range needed[kAxes];  // key positions that some query attends
  Range walked[kAxes];  // and, on axes up to the slab's, all positions that window slots stand for
  int begin[kAxes][kTokens], end[kAxes][kTokens];  // each query's window; empty where the tile has no query
  int position[kAxes][kTokens];
  int64_t attention[kTokens];  // element offset of a query's weights; -1: no such query
  uint64_t attended[2][kTokens];  // of the current box, by parity of boxes
  BoxTokens box;

  __device__ __forceinline__ void find_attended(const Plan& plan, const int (&origin)[kAxes], int parity) {
    if (threadIdx.x >= kTokens) return;
    const int row = threadIdx.x;
    attended[parity][row] = box.inside(plan, origin, [&](int a) { return Range{begin[a][row], end[a][row]}; });
  }
};

// By the whole block; synchronises. False if the tile is empty.
__device__ inline bool make_query_tile(QueryTile& queries, const UnfusedArguments& args, const Plan& plan,
                                       const TensorView& attention, const TensorView& keys, int element_bytes,
                                       unsigned block) {
  const Problem& problem = args.problem;
  locate_tile(queries.tile, problem, plan.grid, Side::queries, block);
  make_box_tokens(queries.box, plan, problem, keys, element_bytes);
  __syncthreads();
  const TokenTile& tile = queries.tile;
  if (tile.empty()) return false;
  if (threadIdx.x < kAxes) {
    const int a = threadIdx.x;
    const Group& group = tile.group[a];
    const int first = group.q_position + tile.first[a], last = first + tile.count[a] - 1;
    queries.needed[a] = window_union(group, first, last);
    queries.walked[a] = queries.needed[a];
    if (a <= plan.slab_axis) queries.walked[a].end = window(group, last).begin + args.slots[a];
  }
  if (threadIdx.x < kTokens) {
    const int row = threadIdx.x;
    int position[kAxes];
    bool exists = true;
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      const int index = plan.grid.coordinate(row, a);
      exists = exists && index < tile.count[a];
      position[a] = tile.group[a].q_position + tile.first[a] + min_int(index, tile.count[a] - 1);
    }
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      const Range range = window(tile.group[a], position[a]);
      queries.position[a][row] = position[a];
      queries.begin[a][row] = range.begin;
      queries.end[a][row] = exists ? range.end : range.begin;
    }
    queries.attention[row] = exists ? tile.batch * attention.batch_stride + tile.head * attention.head_stride +
                                          token_offset(tile, problem, attention, Side::queries, position)
                                    : -1;
  }
  __syncthreads();
  return true;
}

// Where the weights of a slab lie. Slot (x, y, z) of a query's window is number x * stride[0] + y * stride[1] + z of its
// weights. In shared memory the weight of the key at position p lies at the query's slab_row, plus `shift_bytes`, plus
// the elements sum over axes after the slab axis of (p - begin) * stride, and on the slab axis of (p - origin) * stride.
struct SlabLayout {
  int strides[kAxes];
  int slab_axis;

  __device__ SlabLayout(const int (&slots)[kAxes], int axis)
      : strides{slots[1] * slots[2], slots[2], 1}, slab_axis(axis) {}

  // Contributions of a box's origin and of a query's window to that sum. Unsigned, since positions may be so large that
  // only the difference of two contributions is small.
  __device__ __forceinline__ unsigned box_offset(const int (&origin)[kAxes]) const {
    unsigned sum = 0;
#pragma unroll
    for (int a = 0; a < kAxes; ++a) sum += a > slab_axis ? unsigned(origin[a]) * strides[a] : 0;
    return sum;
  }
  __device__ __forceinline__ unsigned query_offset(const QueryTile& queries, int row) const {
    unsigned sum = 0;
#pragma unroll
    for (int a = 0; a < kAxes; ++a) sum += a > slab_axis ? unsigned(queries.begin[a][row]) * strides[a] : 0;
    return sum;
  }
};

// The stretch of a query's weights that a slab holds: weights [begin, end), the first weight's place in shared memory
// being that of number `base`.
struct Stretch {
  int64_t base;
  int begin, end;  // relative to base; empty if the query has none in the slab
};

__device__ __forceinline__ Stretch find_stretch(const QueryTile& queries, const SlabLayout& layout, const Plan& plan,
                                                const int (&slots)[kAxes], const int (&origin)[kAxes], int row) {
  Stretch stretch{0, 0, slots[0] * slots[1] * slots[2]};
  bool present = queries.attention[row] >= 0;
#pragma unroll
  for (int a = 0; a < kAxes; ++a) {
    if (a > layout.slab_axis) continue;
    const int slot = origin[a] - queries.begin[a][row];
    stretch.base += int64_t(slot) * layout.strides[a];
    if (a < layout.slab_axis) {
      present = present && slot >= 0 && slot < slots[a];
    } else {
      stretch.begin = max_int(-slot, 0) * layout.strides[a];
      stretch.end = min_int(slots[a] - slot, plan.box(a)) * layout.strides[a];
    }
  }
  if (!present) stretch.end = stretch.begin;
  return stretch;
}

// A query's weights keep their address modulo 16 in shared memory, so that both sides of a copy are aligned alike.
template <class T>
__device__ __forceinline__ int shift_bytes(const T* attention, const QueryTile& queries, const Stretch& stretch,
                                           int row) {
  return int(reinterpret_cast<uintptr_t>(attention + queries.attention[row] + stretch.base) % 16);
}

// Calls chunk(shared, global) for the aligned 16-byte chunks of the slab's weights and element(shared, global) for the
// single elements at the stretches' ends. Eight lanes share a query.
template <class T, class Chunk, class Element>
__device__ __forceinline__ void for_slab(char* slab, T* attention, const QueryTile& queries, const SlabLayout& layout,
                                         const Plan& plan, const int (&slots)[kAxes], const int (&origin)[kAxes],
                                         const Chunk& chunk, const Element& element) {
  constexpr int kLanes = 8;
  for (int row = threadIdx.x / kLanes; row < kTokens; row += kThreads / kLanes) {
    const Stretch stretch = find_stretch(queries, layout, plan, slots, origin, row);
    if (stretch.begin >= stretch.end) continue;
    char* global = reinterpret_cast<char*>(const_cast<std::remove_const_t<T>*>(attention) + queries.attention[row] +
                                           stretch.base);
    const int shift = shift_bytes(attention, queries, stretch, row);
    char* shared = slab + row * plan.slab_pitch_bytes + shift;
    const int begin = stretch.begin * int(sizeof(T)), end = stretch.end * int(sizeof(T));
    for (int at = ((begin + shift) & ~15) - shift + threadIdx.x % kLanes * 16; at < end; at += kLanes * 16) {
      if (at >= begin && at + 16 <= end) {
        chunk(shared + at, global + at);
      } else {
#pragma unroll
        for (int e = 0; e < 16; e += sizeof(T)) {
          if (at + e >= begin && at + e < end) element(shared + at + e, global + at + e);
        }
      }
    }
  }
}

}  // namespace natten::gemm
