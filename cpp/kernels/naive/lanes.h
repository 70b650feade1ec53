// How the naive kernels spread work: a token belongs to kLanes neighbouring lanes of a warp, each of which holds eight
// of its channels ("slice") in registers. Rows of the other operand are taken kKeys at a time, so that their loads
// overlap and one reduction serves them all.
#pragma once

#include "kernels/launch.h"
#include "tile/scalar.h"
#include "tile/token_tile.h"

namespace natten::naive {

constexpr int kThreads = 128;
constexpr int kSliceChannels = 8;
constexpr unsigned kWarp = 0xffffffffu;

// Blocks per multiprocessor to leave registers for: 168 a thread for three, which backward needs without spilling.
template <class T, bool kGeneric>
constexpr int kMinBlocks = sizeof(T) == 8 || kGeneric ? 1 : 3;

// Rows in flight: a slice of doubles takes 16 registers, and backward holds two slices per row.
template <class T>
constexpr int kKeys = sizeof(T) == 8 ? 2 : 4;

// Channels that the lanes of a token cover in one step.
template <int kLanes>
constexpr int kStepChannels = kLanes * kSliceChannels;

// One head of one batch item: rows of channels at 64-bit offsets.
template <class T>
struct Matrix {
  T* data;
  int channels;
};

template <class T>
__device__ __forceinline__ Matrix<T> make_matrix(const TensorView& view, int64_t batch, int head, int channels) {
  return {static_cast<T*>(view.data) + batch * view.batch_stride + head * view.head_stride, channels};
}

template <class T>
struct alignas(16) Slice {
  T value[kSliceChannels];
};

// Kernels come in two kinds. Where every row of every tensor is made of aligned 16-byte words and has at most 256
// channels, the lanes of a token read consecutive words. Otherwise (`kGeneric`) they read consecutive elements, and
// rows of more than 256 channels are taken in steps. Channels past a row's end are zero.
template <int kLanes, bool kGeneric, class T>
__device__ __forceinline__ int slice_channel(int i, int lane) {
  constexpr int kVector = 16 / sizeof(T);
  return kGeneric ? i * kLanes + lane : (i / kVector * kLanes + lane) * kVector + i % kVector;
}

template <int kLanes, bool kGeneric, class T>
__device__ __forceinline__ Slice<T> load_slice(const Matrix<const T>& matrix, int64_t offset, int first, int lane) {
  constexpr int kStep = kGeneric ? 1 : 16 / sizeof(T);
  const T* row = matrix.data + offset;
  Slice<T> slice;
#pragma unroll
  for (int i = 0; i < kSliceChannels; i += kStep) {
    const int channel = first + slice_channel<kLanes, kGeneric, T>(i, lane);
    const bool exists = channel < matrix.channels;
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
__device__ __forceinline__ void store_slice(const Matrix<T>& matrix, int64_t offset, int first, int lane,
                                            const Accumulate<T> (&value)[kSliceChannels], Accumulate<T> factor) {
  constexpr int kStep = kGeneric ? 1 : 16 / sizeof(T);
  T* row = matrix.data + offset;
  Slice<T> slice;
#pragma unroll
  for (int i = 0; i < kSliceChannels; ++i) slice.value[i] = narrow<T>(value[i] * factor);
#pragma unroll
  for (int i = 0; i < kSliceChannels; i += kStep) {
    const int channel = first + slice_channel<kLanes, kGeneric, T>(i, lane);
    if (channel >= matrix.channels) continue;
    if constexpr (kGeneric) {
      row[channel] = slice.value[i];
    } else {
      *reinterpret_cast<uint4*>(row + channel) = *reinterpret_cast<const uint4*>(slice.value + i);
    }
  }
}

template <class T>
__device__ __forceinline__ Accumulate<T> dot(const Slice<T>& a, const Slice<T>& b) {
  Accumulate<T> sum = 0;
#pragma unroll
  for (int i = 0; i < kSliceChannels; ++i) sum += widen(a.value[i]) * widen(b.value[i]);
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
      const A given = upper ? value[i] : value[i + half];
      const A kept = upper ? value[i + half] : value[i];
      value[i] = kept + __shfl_xor_sync(kWarp, given, half);
    }
  }
#pragma unroll
  for (int distance = kCount; distance < kLanes; distance *= 2) {
    value[0] += __shfl_xor_sync(kWarp, value[0], distance);
  }
  return value[0];
}

// Dot products of one row of `stationary` with kKeys rows of `moving`. `resident` holds the first channels of the
// stationary row; only a generic kernel has more of them.
template <int kLanes, bool kGeneric, class T>
__device__ __forceinline__ Accumulate<T> dot_rows(const Slice<T>& resident, const Matrix<const T>& stationary,
                                                  int64_t stationary_offset, const Slice<T> (&rows)[kKeys<T>],
                                                  const Matrix<const T>& moving, const int64_t (&offset)[kKeys<T>],
                                                  int lane) {
  Accumulate<T> partial[kKeys<T>];
#pragma unroll
  for (int c = 0; c < kKeys<T>; ++c) partial[c] = dot(resident, rows[c]);
  if constexpr (kGeneric) {
    for (int first = kStepChannels<kLanes>; first < stationary.channels; first += kStepChannels<kLanes>) {
      const Slice<T> slice = load_slice<kLanes, true>(stationary, stationary_offset, first, lane);
#pragma unroll
      for (int c = 0; c < kKeys<T>; ++c) {
        partial[c] += dot(slice, load_slice<kLanes, true>(moving, offset[c], first, lane));
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
  locate_tile(windows.tile, problem, grid, side);
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
  int lane;       // among the token's lanes
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

// Whether every row of the tensor is made of aligned 16-byte words. Absent tensors are.
inline bool has_aligned_rows(const TensorView& view, int channels, int element_bytes) {
  if (view.data == nullptr) return true;
  const int64_t elements = view.batch_stride | view.axis_stride[0] | view.axis_stride[1] | view.axis_stride[2] |
                           view.head_stride | channels;
  return elements * element_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
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

inline bool no_queries(const Problem& problem) {
  return problem.batch == 0 || problem.axis[0].q_length == 0 || problem.axis[1].q_length == 0 ||
         problem.axis[2].q_length == 0;
}
inline bool no_keys(const Problem& problem) {
  return problem.batch == 0 || problem.axis[0].kv_length == 0 || problem.axis[1].kv_length == 0 ||
         problem.axis[2].kv_length == 0;
}

}  // namespace natten::naive
