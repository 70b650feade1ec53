// Walking boxes of tokens: which of a box's 64 tokens lie in a range of positions, and loading them.
#pragma once

#include "kernels/gemm/products.h"

namespace natten::gemm {

static_assert(kThreads == 2 * kTokens, "two threads make the mask of a token");

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

// Bit t of a mask stands for token t of a box; in halves, since threads work on words.
struct Mask {
  uint32_t half[2];
};

// What the shape of a box says about its tokens, in shared memory.
struct BoxTokens {
  Mask below[kAxes][kTokens + 1];  // tokens whose coordinate on the axis is below v

  // One half of the mask of tokens whose positions on an axis are in [begin, end), for a box that starts at `origin`.
  __device__ __forceinline__ uint32_t inside(const Plan& plan, int axis, int origin, int begin, int end,
                                             int half) const {
    const int low = min_int(max_int(begin - origin, 0), plan.box(axis));
    const int high = min_int(max_int(end - origin, low), plan.box(axis));
    return below[axis][high].half[half] ^ below[axis][low].half[half];
  }
};

// Tokens of the first `count` steps of an axis, in a box of `total` tokens of which a step of the axis spans `width`
// and the whole axis spans `period`.
__device__ inline Mask tokens_below(int count, int width, int period, int total) {
  uint64_t mask = count * width >= 64 ? ~uint64_t(0) : (uint64_t(1) << (count * width)) - 1;
  for (; period < total; period *= 2) mask |= mask << period;
  return {{uint32_t(mask), uint32_t(mask >> 32)}};
}

// By the whole block; the caller synchronises.
__device__ inline void make_box_tokens(BoxTokens& tokens, const Plan& plan) {
  int width = 1;
#pragma unroll
  for (int a = kAxes - 1; a >= 0; --a) {
    for (int v = threadIdx.x; v <= plan.box(a); v += kThreads) {
      tokens.below[a][v] = tokens_below(v, width, width * plan.box(a), plan.box_tokens());
    }
    width *= plan.box(a);
  }
}

// Coordinate of a box's token along an axis.
__device__ __forceinline__ int box_coordinate(const Plan& plan, int token, int axis) {
  const int shift = axis == 2 ? 0 : axis == 1 ? plan.box_log2[2] : plan.box_log2[1] + plan.box_log2[2];
  return token >> shift & (plan.box(axis) - 1);
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

// Where the boxes of a region of positions lie in a tensor, in shared memory.
struct BoxSource {
  int64_t first_bytes;           // of the token at the region's begin
  int64_t step_bytes[kAxes];     // from position to position
  int64_t token_bytes[kTokens];  // from a box's first token to its others

  __device__ __forceinline__ int64_t offset_bytes(const int (&origin)[kAxes], const int (&begin)[kAxes]) const {
    return first_bytes + (origin[0] - begin[0]) * step_bytes[0] + (origin[1] - begin[1]) * step_bytes[1] +
           (origin[2] - begin[2]) * step_bytes[2];
  }
};

// By the whole block, once `region` is known; the caller synchronises.
__device__ inline void make_box_source(BoxSource& source, const TokenTile& tile, const Plan& plan,
                                       const Problem& problem, const TensorView& view, Side side, int element_bytes,
                                       const Range (&region)[kAxes]) {
  int64_t steps[kAxes];
#pragma unroll
  for (int a = 0; a < kAxes; ++a) steps[a] = view.axis_stride[a] * problem.axis[a].dilation * element_bytes;
  if (threadIdx.x == 0) {
    const int begin[kAxes] = {region[0].begin, region[1].begin, region[2].begin};
    source.first_bytes = token_offset(tile, problem, view, side, begin) * element_bytes;
#pragma unroll
    for (int a = 0; a < kAxes; ++a) source.step_bytes[a] = steps[a];
  }
  for (int t = threadIdx.x; t < kTokens; t += kThreads) {
    source.token_bytes[t] = box_coordinate(plan, t, 0) * steps[0] + box_coordinate(plan, t, 1) * steps[1] +
                            box_coordinate(plan, t, 2) * steps[2];
  }
}

// Starts copying slices of the box's tokens that lie before `end`; its other tokens, and channels past the end, become
// zeros. `chunks` is the number of 16-byte chunks of a token; those from `first_chunk` on go into the slices.
template <int kSlices>
__device__ __forceinline__ void load_box(char* slices, const char* first_token, const BoxSource& source,
                                         const BoxTokens& tokens, const Plan& plan, const int (&origin)[kAxes],
                                         const Range (&region)[kAxes], int first_chunk, int chunks) {
  const int chunk = threadIdx.x % 8;
  Mask mask{{~0u, ~0u}};
#pragma unroll
  for (int a = 0; a < kAxes; ++a) {
    if (a < plan.first_axis) continue;
    const Mask& below = tokens.below[a][min_int(max_int(region[a].end - origin[a], 0), plan.box(a))];
    mask.half[0] &= below.half[0];
    mask.half[1] &= below.half[1];
  }
  // An mma takes two chunks of channels at a time: the second of an odd pair must be zero, later ones are never read.
  const int needed_chunks = (chunks + 1) / 2 * 2;
  const char* source_chunk = first_token + (first_chunk + chunk) * 16;
  const uint32_t target = ptx::shared_address(slices);
#pragma unroll
  for (int i = 0; i < kTokens / (kThreads / 8); ++i) {
    const int row = threadIdx.x / 8 + i * (kThreads / 8);
    const bool valid = mask.half[i * (kThreads / 8) / 32] >> row % 32 & 1;
    const char* token = source_chunk + source.token_bytes[row];
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      const int c = first_chunk + s * 8 + chunk;
      if (c >= needed_chunks) continue;
      ptx::cp_async_16(target + s * kTileBytes + Slice::offset(row, chunk), token + s * kSliceBytes,
                       valid && c < chunks);
    }
  }
}

}  // namespace natten::gemm
