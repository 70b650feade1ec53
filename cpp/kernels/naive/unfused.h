// The unfused operators qk, av and inverse_av, and the gradient of the relative positional bias.
#pragma once

#include "kernels/naive/lanes.h"

namespace natten::naive {

// attention[i, w] = scale * query[i] . key[begin(i) + w] + bias, -inf where the window has no key at slot w.
template <class T, int kLanes, bool kGeneric>
__global__ void __launch_bounds__(kThreads, (kMinBlocks<T, kGeneric>))
    qk_kernel(const __grid_constant__ UnfusedArguments args, const __grid_constant__ TileGrid grid) {
  using A = Accumulate<T>;
  constexpr int kCount = kKeys<T>;
  __shared__ TileWindows windows;
  const Problem& problem = args.problem;
  make_windows(windows, problem, grid, Side::queries);
  const TokenTile& tile = windows.tile;
  if (tile.empty()) return;
  const TokenWindow token = token_window<kLanes>(windows, grid);
  const int lane = token.lane;
  const int head_kv = tile.head / (problem.heads / problem.heads_kv);
  const int slots[kAxes] = {args.slots[0], args.slots[1], args.slots[2]};

  const int d = problem.head_dim;
  const T* query = head_rows<const T>(args.a, tile.batch, tile.head) + token.offset(args.a);
  const T* key_head = head_rows<const T>(args.b, tile.batch, head_kv);
  const Resident<A> resident(load_slice<kLanes, kGeneric>(query, d, 0, lane));
  const int64_t key_step = args.b.axis_stride[2] * problem.axis[2].dilation;
  T* attention = head_rows<T>(args.c, tile.batch, tile.head) + token.offset(args.c);

  // Index of slot (0, 0, 0) in the table of relative positions, t - p + k - 1 per axis.
  const T* bias = static_cast<const T*>(args.rpb);
  const int bias_y = 2 * slots[2] - 1, bias_x = (2 * slots[1] - 1) * bias_y;
  if (bias != nullptr) {
    int relative[kAxes];
    for (int a = 0; a < kAxes; ++a) relative[a] = token.axis[a].begin - token.axis[a].position + slots[a] - 1;
    bias +=
        int64_t(tile.head) * (2 * slots[0] - 1) * bias_x + relative[0] * bias_x + relative[1] * bias_y + relative[2];
  }

  for (int x = 0; x < slots[0]; ++x) {
    for (int y = 0; y < slots[1]; ++y) {
      const int keys = x < token.axis[0].size && y < token.axis[1].size ? token.axis[2].size : 0;
      const T* key = key_head + token.row_offset(problem, args.b, x, y);
      const bool warp_inside = x < token.longest[0] && y < token.longest[1];
      for (int z = 0; z < slots[2]; z += kCount) {
        A logit = 0;
        if (warp_inside && z < token.longest[2]) {
          Slice<T> slice[kCount];
          const T* row[kCount];
          bool valid[kCount];
#pragma unroll
          for (int c = 0; c < kCount; ++c) {
            valid[c] = z + c < keys;
            row[c] = key;
            slice[c] = load_slice<kLanes, kGeneric>(key, d, 0, lane, valid[c]);
            key += key_step;
          }
          logit = A(problem.scale) * dot_rows<kLanes, kGeneric>(resident, query, slice, row, valid, d, lane);
        }
        const int own = z + lane;
        if (lane < kCount && own < slots[2] && token.valid) {
          if (own >= keys) {
            logit = A(-INFINITY);
          } else if (bias != nullptr) {
            logit += widen(bias[x * bias_x + y * bias_y + own]);
          }
          attention[(int64_t(x) * slots[1] + y) * slots[2] + own] = narrow<T>(logit);
        }
      }
    }
  }
}

// out[i] = scale * sum_w attention[i, w] value[begin(i) + w]
template <class T, int kLanes, bool kGeneric>
__global__ void __launch_bounds__(kThreads, (kMinBlocks<T, kGeneric>))
    av_kernel(const __grid_constant__ UnfusedArguments args, const __grid_constant__ TileGrid grid) {
  using A = Accumulate<T>;
  constexpr int kCount = kKeys<T>;
  __shared__ TileWindows windows;
  const Problem& problem = args.problem;
  make_windows(windows, problem, grid, Side::queries);
  const TokenTile& tile = windows.tile;
  if (tile.empty()) return;
  const TokenWindow token = token_window<kLanes>(windows, grid);
  const int lane = token.lane;
  const int head_kv = tile.head / (problem.heads / problem.heads_kv);

  const int d = problem.head_dim;
  const T* attention = head_rows<const T>(args.a, tile.batch, tile.head) + token.offset(args.a);
  const T* value_head = head_rows<const T>(args.b, tile.batch, head_kv);
  const int64_t value_step = args.b.axis_stride[2] * problem.axis[2].dilation;

  for (int first = 0; first < (kGeneric ? d : 1); first += kStepChannels<kLanes>) {
    A accumulated[kSliceChannels] = {};
    for (int x = 0; x < token.longest[0]; ++x) {
      for (int y = 0; y < token.longest[1]; ++y) {
        const int keys = x < token.axis[0].size && y < token.axis[1].size ? token.axis[2].size : 0;
        const T* value = value_head + token.row_offset(problem, args.b, x, y);
        const T* weights = attention + (int64_t(x) * args.slots[1] + y) * args.slots[2];
        for (int z = 0; z < token.longest[2]; z += kCount) {
          const int own = z + lane % kCount;
          const A weight = own < keys ? widen(weights[own]) : A(0);
          Slice<T> slice[kCount];
#pragma unroll
          for (int c = 0; c < kCount; ++c) {
            slice[c] = load_slice<kLanes, kGeneric>(value, d, first, lane, z + c < keys);
            value += value_step;
          }
#pragma unroll
          for (int c = 0; c < kCount; ++c) {
            add_scaled<T>(accumulated, __shfl_sync(kWarp, weight, c, kLanes), slice[c]);
          }
        }
      }
    }
    if (token.valid) {
      store_slice<kLanes, kGeneric>(head_rows<T>(args.c, tile.batch, tile.head) + token.offset(args.c), d, first, lane,
                                    accumulated, A(problem.scale));
    }
  }
}

// out[j] = scale * sum over the query heads of j's head and the queries i that see j of attention[i, j - begin(i)]
// input[i]
template <class T, int kLanes, bool kGeneric>
__global__ void __launch_bounds__(kThreads, (kMinBlocks<T, kGeneric>))
    inverse_av_kernel(const __grid_constant__ UnfusedArguments args, const __grid_constant__ TileGrid grid) {
  using A = Accumulate<T>;
  constexpr int kCount = kKeys<T>;
  __shared__ TileWindows windows;
  const Problem& problem = args.problem;
  make_windows(windows, problem, grid, Side::keys);
  const TokenTile& tile = windows.tile;
  if (tile.empty()) return;
  const TokenWindow token = token_window<kLanes>(windows, grid);
  const int lane = token.lane;
  const int group_heads = problem.heads / problem.heads_kv;
  const Group group_x = tile.group[0], group_y = tile.group[1], group_z = tile.group[2];

  const int d = problem.head_dim;
  const int64_t attention_step = args.a.axis_stride[2] * problem.axis[2].dilation;
  const int64_t input_step = args.b.axis_stride[2] * problem.axis[2].dilation;

  for (int first = 0; first < (kGeneric ? d : 1); first += kStepChannels<kLanes>) {
    A accumulated[kSliceChannels] = {};
    for (int head = tile.head * group_heads; head < (tile.head + 1) * group_heads; ++head) {
      for (int x = 0; x < token.longest[0]; ++x) {
        const int slot_x = token.axis[0].position - window(group_x, token.axis[0].begin + x).begin;
        for (int y = 0; y < token.longest[1]; ++y) {
          const int slot_y = token.axis[1].position - window(group_y, token.axis[1].begin + y).begin;
          const int queries = x < token.axis[0].size && y < token.axis[1].size ? token.axis[2].size : 0;
          const T* input = head_rows<const T>(args.b, tile.batch, head) + token.row_offset(problem, args.b, x, y);
          const T* weights = head_rows<const T>(args.a, tile.batch, head) + token.row_offset(problem, args.a, x, y) +
                             (int64_t(slot_x) * args.slots[1] + slot_y) * args.slots[2] + token.axis[2].position;
          for (int z = 0; z < token.longest[2]; z += kCount) {
            const int own = z + lane % kCount;
            const int own_begin = window(group_z, token.axis[2].begin + own).begin;
            const A weight = own < queries ? widen(weights[own * attention_step - own_begin]) : A(0);
            Slice<T> slice[kCount];
#pragma unroll
            for (int c = 0; c < kCount; ++c) {
              slice[c] = load_slice<kLanes, kGeneric>(input, d, first, lane, z + c < queries);
              input += input_step;
            }
#pragma unroll
            for (int c = 0; c < kCount; ++c) {
              add_scaled<T>(accumulated, __shfl_sync(kWarp, weight, c, kLanes), slice[c]);
            }
          }
        }
      }
    }
    if (token.valid) {
      store_slice<kLanes, kGeneric>(head_rows<T>(args.c, tile.batch, tile.head) + token.offset(args.c), d, first, lane,
                                    accumulated, A(problem.scale));
    }
  }
}

// One block per head and entry of the bias table; its threads share out batch items and queries and add their sums in a
// fixed order.
template <class T>
__global__ void __launch_bounds__(1024)
    rpb_backward_kernel(const __grid_constant__ RpbBackwardArguments args, int threads_z) {
  using A = Accumulate<T>;
  __shared__ A partial[32];
  const Problem& problem = args.problem;
  int relative[kAxes];  // t - p
  unsigned rest = blockIdx.x;
  for (int a = kAxes - 1; a >= 0; --a) {
    const int entries = 2 * args.slots[a] - 1;
    relative[a] = int(rest % entries) - (args.slots[a] - 1);
    rest /= entries;
  }
  const int head = rest;

  // Slot of the key at the wanted relative position in the window of local query `token`; -1 if it is not there.
  const auto find_slot = [&](int a, int token) {
    const Axis& axis = problem.axis[a];
    const int coordinate = axis.q_start + token;
    const int position = coordinate / axis.dilation;
    const Range range = window(make_group(axis, coordinate - position * axis.dilation), position);
    const int key = position + relative[a];
    return range.contains(key) ? key - range.begin : -1;
  };

  const int length_x = problem.axis[0].q_length, length_y = problem.axis[1].q_length;
  const int64_t rows = problem.batch * length_x * length_y;
  A sum = 0;
  for (int z = threadIdx.x % threads_z; z < problem.axis[2].q_length; z += threads_z) {
    const int slot_z = find_slot(2, z);
    if (slot_z < 0) continue;
    for (int64_t row = threadIdx.x / threads_z; row < rows; row += blockDim.x / threads_z) {
      const int64_t plane = row / length_y;
      const int y = row - plane * length_y;
      const int64_t batch = plane / length_x;
      const int x = plane - batch * length_x;
      const int slot_y = find_slot(1, y);
      if (slot_y < 0) continue;
      const int slot_x = find_slot(0, x);
      if (slot_x < 0) continue;
      const T* attention = head_rows<const T>(args.grad_attention, batch, head) +
                           x * args.grad_attention.axis_stride[0] + y * args.grad_attention.axis_stride[1] +
                           z * args.grad_attention.axis_stride[2];
      sum += widen(attention[(int64_t(slot_x) * args.slots[1] + slot_y) * args.slots[2] + slot_z]);
    }
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kWarp, sum, distance);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) sum += partial[warp];
    static_cast<T*>(args.grad_rpb)[blockIdx.x] = narrow<T>(sum);
  }
}

template <class T>
void qk(const UnfusedArguments& args, cudaStream_t stream) {
  const Problem& problem = args.problem;
  if (no_queries(problem)) return;
  const int d = problem.head_dim;
  const bool aligned = has_aligned_rows(args.a, d, sizeof(T)) && has_aligned_rows(args.b, d, sizeof(T));
  for_head_dim(d, aligned, [&](auto lanes, auto generic) {
    const TileGrid grid = plan_tiles<lanes()>(problem, Side::queries);
    const unsigned blocks = grid_size(tile_count(problem, grid), "naive qk");
    qk_kernel<T, lanes(), generic()><<<blocks, kThreads, 0, stream>>>(args, grid);
    check_launch("naive qk");
  });
}

template <class T>
void av(const UnfusedArguments& args, cudaStream_t stream) {
  const Problem& problem = args.problem;
  if (no_queries(problem)) return;
  const int d = problem.head_dim;
  const bool aligned = has_aligned_rows(args.b, d, sizeof(T)) && has_aligned_rows(args.c, d, sizeof(T));
  for_head_dim(d, aligned, [&](auto lanes, auto generic) {
    const TileGrid grid = plan_tiles<lanes()>(problem, Side::queries);
    const unsigned blocks = grid_size(tile_count(problem, grid), "naive av");
    av_kernel<T, lanes(), generic()><<<blocks, kThreads, 0, stream>>>(args, grid);
    check_launch("naive av");
  });
}

template <class T>
void inverse_av(const UnfusedArguments& args, cudaStream_t stream) {
  const Problem& problem = args.problem;
  if (no_keys(problem)) return;
  const int d = problem.head_dim;
  const bool aligned = has_aligned_rows(args.b, d, sizeof(T)) && has_aligned_rows(args.c, d, sizeof(T));
  for_head_dim(d, aligned, [&](auto lanes, auto generic) {
    const TileGrid grid = plan_tiles<lanes()>(problem, Side::keys);
    const unsigned blocks = grid_size(tile_count(problem, grid), "naive inverse_av");
    inverse_av_kernel<T, lanes(), generic()><<<blocks, kThreads, 0, stream>>>(args, grid);
    check_launch("naive inverse_av");
  });
}

template <class T>
void rpb_backward(const RpbBackwardArguments& args, cudaStream_t stream) {
  int64_t blocks = args.problem.heads;
  for (int a = 0; a < kAxes; ++a) blocks *= 2 * args.slots[a] - 1;
  int threads_z = 1;
  while (threads_z < 1024 && threads_z < args.problem.axis[2].q_length) threads_z *= 2;
  rpb_backward_kernel<T><<<grid_size(blocks, "naive rpb backward"), 1024, 0, stream>>>(args, threads_z);
  check_launch("naive rpb backward");
}

}  // namespace natten::naive
