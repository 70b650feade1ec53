// How the naive kernels spread work: a token belongs to kLanes neighbouring lanes of a warp, each of which holds eight
// of its channels ("slice") in registers. Rows of the other operand are taken kKeys at a time, so that their loads
// overlap and one reduction serves them all.
#pragma once

#include "kernels/launch.h"
#include "ptx/select.h"
#include "tile/scalar.h"
#include "tile/token_tile.h"

namespace natten::naive {

constexpr int kThreads = 128;
constexpr int kSliceChannels = 8;
constexpr unsigned kWarp = 0xffffffffu;

// Blocks per multiprocessor to leave registers for, as many as backward allows without spilling.
template <class T, bool kGeneric>
constexpr int kMinBlocks = sizeof(T) == 8 || kGeneric ? 1
                           : sizeof(T) == 4           ? 2
                                                      : 3;

// Rows in flight: a slice of doubles takes 16 registers, and backward holds two slices per row.
template <class T>
constexpr int kKeys = sizeof(T) == 8 ? 2 : 4;

// Channels that the lanes of a token cover in one step.
template <int kLanes>
constexpr int kStepChannels = kLanes * kSliceChannels;

// The rows of one head of one batch item.
template <class T>
__device__ __forceinline__ T* head_rows(const TensorView& view, int64_t batch, int head) {
  return static_cast<T*>(view.data) + batch * view.batch_stride + head * view.head_stride;
}

template <class T>
struct alignas(16) Slice {
  T value[kSliceChannels];
};

// Kernels come in two kinds. Where every row of every tensor is made of aligned 16-byte words and has at most 256
// channels, the lanes of a token read consecutive words. Otherwise (`kGeneric`) they read consecutive elements, and
// rows of more than 256 channels are taken in steps. Channels past a row's end, and rows that are not valid, are zero.
template <int kLanes, bool kGeneric, class T>
__device__ __forceinline__ int slice_channel(int i, int lane) {
  constexpr int kVector = 16 / sizeof(T);
  return kGeneric ? i * kLanes + lane : (i / kVector * kLanes + lane) * kVector + i % kVector;
}

template <int kLanes, bool kGeneric, class T>
__device__ __forceinline__ Slice<T> load_slice(const T* row, int channels, int first, int lane, bool valid = true) {
  constexpr int kStep = kGeneric ? 1 : 16 / sizeof(T);
  Slice<T> slice;
#pragma unroll
  for (int i = 0; i < kSliceChannels; i += kStep) {
    const int channel = first + slice_channel<kLanes, kGeneric, T>(i, lane);
    const bool exists = valid && channel < channels;
    if constexpr (kGeneric) {
      slice.value[i] = exists ? row[channel] : narrow<T>(0);
    } else {
      *reinterpret_cast<uint4*>(slice.value + i) =
          exists ? __ldg(reinterpret_cast<const uint4*>(row + channel)) : uint4{0, 0, 0, 0};
    }
  }
  return slice;
}

template <int kLanes, bool kGeneric, class T>
__device__ __forceinline__ void store_slice(T* row, int channels, int first, int lane,
                                            const Accumulate<T> (&value)[kSliceChannels], Accumulate<T> factor) {
  constexpr int kStep = kGeneric ? 1 : 16 / sizeof(T);
  Slice<T> slice;
#pragma unroll
  for (int i = 0; i < kSliceChannels; ++i) slice.value[i] = narrow<T>(value[i] * factor);
#pragma unroll
  for (int i = 0; i < kSliceChannels; i += kStep) {
    const int channel = first + slice_channel<kLanes, kGeneric, T>(i, lane);
    if (channel >= channels) continue;
    if constexpr (kGeneric) {
      row[channel] = slice.value[i];
    } else {
      *reinterpret_cast<uint4*>(row + channel) = *reinterpret_cast<const uint4*>(slice.value + i);
    }
  }
}

// The slice of a row that meets many others, converted once.
template <class A>
struct Resident {
  A value[kSliceChannels];

  template <class T>
  __device__ __forceinline__ explicit Resident(const Slice<T>& slice) {
#pragma unroll
    for (int i = 0; i < kSliceChannels; ++i) value[i] = widen(slice.value[i]);
  }
};

template <class T>
__device__ __forceinline__ Accumulate<T> dot(const Resident<Accumulate<T>>& a, const Slice<T>& b) {
  Accumulate<T> sum = 0;
#pragma unroll
  for (int i = 0; i < kSliceChannels; ++i) sum += a.value[i] * widen(b.value[i]);
  return sum;
}

template <class T>
__device__ __forceinline__ void add_scaled(Accumulate<T> (&sum)[kSliceChannels], Accumulate<T> weight,
                                           const Slice<T>& slice) {
#pragma unroll
  for (int i = 0; i < kSliceChannels; ++i) sum[i] += weight * widen(slice.value[i]);
}

// Lane l of a token's lanes returns the sum over them of value[l % kCount]: each exchange halves the values a lane
// still carries.
template <int kLanes, int kCount, class A>
__device__ __forceinline__ A sum_over_lanes(A (&value)[kCount], int lane) {
  static_assert(kLanes >= kCount);
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
    const bool upper = lane & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const A given = ptx::select(upper, value[i], value[i + half]);
      const A kept = ptx::select(upper, value[i + half], value[i]);
      value[i] = kept + __shfl_xor_sync(kWarp, given, half);
    }
  }
#pragma unroll
  for (int distance = kCount; distance < kLanes; distance *= 2) {
    value[0] += __shfl_xor_sync(kWarp, value[0], distance);
  }
  return value[0];
}

// Dot products of a stationary row with kKeys others, of which `slices` holds the first channels. Only a generic kernel
// has more of them. Lane l returns the product with row l % kKeys.
template <int kLanes, bool kGeneric, class T>
__device__ __forceinline__ Accumulate<T> dot_rows(const Resident<Accumulate<T>>& resident, const T* stationary,
                                                  const Slice<T> (&slices)[kKeys<T>], const T* const (&rows)[kKeys<T>],
                                                  const bool (&valid)[kKeys<T>], int channels, int lane) {
  Accumulate<T> partial[kKeys<T>];
#pragma unroll
  for (int c = 0; c < kKeys<T>; ++c) partial[c] = dot(resident, slices[c]);
  if constexpr (kGeneric) {
    for (int first = kStepChannels<kLanes>; first < channels; first += kStepChannels<kLanes>) {
      const Resident<Accumulate<T>> more(load_slice<kLanes, true>(stationary, channels, first, lane));
#pragma unroll
      for (int c = 0; c < kKeys<T>; ++c) {
        partial[c] += dot(more, load_slice<kLanes, true>(rows[c], channels, first, lane, valid[c]));
      }
    }
  }
  return sum_over_lanes<kLanes>(partial, lane);
}

__device__ __forceinline__ float exp_base2(float x) { return exp2f(x); }
__device__ __forceinline__ double exp_base2(double x) { return exp2(x); }

template <class A>
constexpr A kLog2e = A(1.4426950408889634074);

// ---- Windows of a tile's tokens -------------------------------------------------------------------------------------

constexpr int kMaxTile = kThreads / 4;

// One coordinate of a tile: a token and the box of tokens on the other side that it meets.
struct AxisWindow {
  int token;        // local index of the token
  int position;     // and its position in the group
  int begin;        // first position that it meets
  int begin_token;  // and that position's local index
  int size;         // how many, at steps of `dilation` tokens
};

struct TileWindows {
  TokenTile tile;
  AxisWindow axis[kAxes][kMaxTile];
};

// By the whole block; synchronises. Queries meet the keys of their window; keys meet the queries that were passed and
// see them.
__device__ inline void make_windows(TileWindows& windows, const Problem& problem, const TileGrid& grid, Side side) {
  locate_tile(windows.tile, problem, grid, side, blockIdx.x);
  __syncthreads();
  const TokenTile& tile = windows.tile;
#pragma unroll
  for (int a = 0; a < kAxes; ++a) {
    const int i = threadIdx.x - a * kMaxTile;
    if (i < 0 || i >= tile.count[a]) continue;
    const Group& group = tile.group[a];
    const int dilation = problem.axis[a].dilation;
    const int index = tile.first[a] + i;
    AxisWindow entry;
    if (side == Side::queries) {
      const int position = group.q_position + index;
      const Range range = window(group, position);
      entry = {group.q_first + index * dilation, position, range.begin,
               group.kv_first + (range.begin - group.kv_position) * dilation, range.size()};
    } else {
      const int position = group.kv_position + index;
      Range range = inverse_window(group, position);
      range.begin = max_int(range.begin, group.q_position);
      range.end = min_int(range.end, group.q_position + group.q_count);
      const int size = max_int(range.size(), 0);
      if (size == 0) range.begin = group.q_position;
      entry = {group.kv_first + index * dilation, position, range.begin,
               group.q_first + (range.begin - group.q_position) * dilation, size};
    }
    windows.axis[a][i] = entry;
  }
  __syncthreads();
}

// The token of this thread. Threads past the tile's end repeat its last token and must not write.
struct TokenWindow {
  AxisWindow axis[kAxes];
  bool valid;
  int lane;            // among the token's lanes
  int longest[kAxes];  // largest window of the warp: loops run to it, so that shuffles meet

  __device__ int64_t offset(const TensorView& view) const {
    return axis[0].token * view.axis_stride[0] + axis[1].token * view.axis_stride[1] +
           axis[2].token * view.axis_stride[2];
  }
  // Of the first token of row (x, y) of the window; one step along the last axis is `dilation` tokens.
  __device__ int64_t row_offset(const Problem& problem, const TensorView& view, int x, int y) const {
    return (axis[0].begin_token + int64_t(x) * problem.axis[0].dilation) * view.axis_stride[0] +
           (axis[1].begin_token + int64_t(y) * problem.axis[1].dilation) * view.axis_stride[1] +
           axis[2].begin_token * view.axis_stride[2];
  }
};

template <int kLanes>
__device__ inline TokenWindow token_window(const TileWindows& windows, const TileGrid& grid) {
  TokenWindow token;
  const int n = threadIdx.x / kLanes;
  token.lane = threadIdx.x % kLanes;
  token.valid = n < grid.tokens();
#pragma unroll
  for (int a = 0; a < kAxes; ++a) {
    const int i = grid.coordinate(n, a);
    token.valid = token.valid && i < windows.tile.count[a];
    token.axis[a] = windows.axis[a][min_int(i, windows.tile.count[a] - 1)];
    token.longest[a] = __reduce_max_sync(kWarp, token.axis[a].size);
  }
  return token;
}

// Tiles for `tokens` tokens per block, as square as the axes allow.
inline TileGrid plan_tiles(const Problem& problem, Side side, int tokens) {
  int tile_log2[kAxes] = {0, 0, 0};
  for (int product = 1; product < tokens; product *= 2) {
    int best = -1;
    for (int a = kAxes - 1; a >= 0; --a) {
      const bool grows = (1 << tile_log2[a]) < longest_group(problem.axis[a], side);
      if (grows && (best < 0 || tile_log2[a] < tile_log2[best])) best = a;
    }
    if (best < 0) break;
    ++tile_log2[best];
  }
  return make_tile_grid(problem, side, tile_log2);
}

template <int kLanes>
TileGrid plan_tiles(const Problem& problem, Side side) {
  return plan_tiles(problem, side, kThreads / kLanes);
}

// Calls launch(lanes, generic) with the kind of kernel as compile-time constants.
template <class Launch>
void for_head_dim(int channels, bool aligned, const Launch& launch) {
  using std::integral_constant;
  const bool generic = !aligned || channels > kStepChannels<32>;
  if (channels <= kStepChannels<4>) {
    generic ? launch(integral_constant<int, 4>(), std::true_type())
            : launch(integral_constant<int, 4>(), std::false_type());
  } else if (generic) {
    launch(integral_constant<int, 32>(), std::true_type());
  } else if (channels <= kStepChannels<8>) {
    launch(integral_constant<int, 8>(), std::false_type());
  } else if (channels <= kStepChannels<16>) {
    launch(integral_constant<int, 16>(), std::false_type());
  } else {
    launch(integral_constant<int, 32>(), std::false_type());
  }
}

}  // namespace natten::naive
