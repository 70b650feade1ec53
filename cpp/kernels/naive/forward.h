// Fused attention in one pass over the window with an online softmax, on the ordinary arithmetic units.
#pragma once

#include "kernels/naive/lanes.h"

namespace natten::naive {

template <class T, int kLanes, bool kGeneric>
__global__ void __launch_bounds__(kThreads, (kMinBlocks<T, kGeneric>))
    forward_kernel(const __grid_constant__ ForwardArguments args, const __grid_constant__ TileGrid grid) {
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
  const A factor = A(problem.scale) * kLog2e<A>;

  const int d = problem.head_dim, dv = problem.head_dim_v;
  const T* query = head_rows<const T>(args.query, tile.batch, tile.head) + token.offset(args.query);
  const Resident<A> resident(load_slice<kLanes, kGeneric>(query, d, 0, lane));

  // A generic kernel holds part of the output's channels and repeats the pass for every part.
  for (int first = 0; first < (kGeneric ? dv : 1); first += kStepChannels<kLanes>) {
    A maximum = A(-1e30);  // finite, so that no difference of infinities arises
    A sum = 0;             // over the keys that this lane weighs: those with index = lane modulo kCount
    A accumulated[kSliceChannels] = {};

    const int rows = token.longest[0] * token.longest[1];
    int x = 0, y = 0;
    for (int row = 0; row < rows + (problem.additional > 0); ++row) {
      const bool in_window = row < rows;
      const TensorView& key_view = in_window ? args.key : args.additional_keys;
      const TensorView& value_view = in_window ? args.value : args.additional_values;
      const T* key = head_rows<const T>(key_view, tile.batch, head_kv);
      const T* value = head_rows<const T>(value_view, tile.batch, head_kv);
      int64_t key_step = key_view.axis_stride[2], value_step = value_view.axis_stride[2];
      int keys = int(problem.additional), longest = keys;
      if (in_window) {
        key += token.row_offset(problem, args.key, x, y);
        value += token.row_offset(problem, args.value, x, y);
        key_step *= problem.axis[2].dilation;
        value_step *= problem.axis[2].dilation;
        keys = x < token.axis[0].size && y < token.axis[1].size ? token.axis[2].size : 0;
        longest = token.longest[2];
        if (++y == token.longest[1]) y = 0, ++x;
      }

      for (int z = 0; z < longest; z += kCount) {
        Slice<T> key_slice[kCount], value_slice[kCount];
        const T* key_row[kCount];
        bool valid[kCount];
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
          valid[c] = z + c < keys;
          key_row[c] = key;
          key_slice[c] = load_slice<kLanes, kGeneric>(key, d, 0, lane, valid[c]);
          value_slice[c] = load_slice<kLanes, kGeneric>(value, dv, first, lane, valid[c]);
          key += key_step;
          value += value_step;
        }
        A logit = factor * dot_rows<kLanes, kGeneric>(resident, query, key_slice, key_row, valid, d, lane);
        if (z + lane % kCount >= keys) logit = A(-INFINITY);

        A highest = logit;
#pragma unroll
        for (int distance = 1; distance < kCount; distance *= 2) {
          highest = max(highest, __shfl_xor_sync(kWarp, highest, distance));
        }
        highest = max(highest, maximum);
        const A correction = exp_base2(maximum - highest);
        const A weight = exp_base2(logit - highest);
        maximum = highest;
        sum = sum * correction + weight;
#pragma unroll
        for (int i = 0; i < kSliceChannels; ++i) accumulated[i] *= correction;
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
          add_scaled<T>(accumulated, __shfl_sync(kWarp, weight, c, kLanes), value_slice[c]);
        }
      }
    }

#pragma unroll
    for (int distance = 1; distance < kCount; distance *= 2) sum += __shfl_xor_sync(kWarp, sum, distance);
    if (token.valid) {
      store_slice<kLanes, kGeneric>(head_rows<T>(args.out, tile.batch, tile.head) + token.offset(args.out), dv, first,
                                    lane, accumulated, 1 / sum);
      if (first == 0 && lane == 0) {
        head_rows<A>(args.logsumexp, tile.batch, tile.head)[token.offset(args.logsumexp)] =
            maximum / kLog2e<A> + log(sum);
      }
    }
  }
}

template <class T>
void forward(const ForwardArguments& args, cudaStream_t stream) {
  const Problem& problem = args.problem;
  if (no_queries(problem)) return;
  const int d = problem.head_dim, dv = problem.head_dim_v;
  const bool aligned =
      has_aligned_rows(args.query, d, sizeof(T)) && has_aligned_rows(args.key, d, sizeof(T)) &&
      has_aligned_rows(args.additional_keys, d, sizeof(T)) && has_aligned_rows(args.value, dv, sizeof(T)) &&
      has_aligned_rows(args.additional_values, dv, sizeof(T)) && has_aligned_rows(args.out, dv, sizeof(T));
  for_head_dim(max_int(d, dv), aligned, [&](auto lanes, auto generic) {
    const TileGrid grid = plan_tiles<lanes()>(problem, Side::queries);
    const unsigned blocks = grid_size(tile_count(problem, grid), "naive forward");
    forward_kernel<T, lanes(), generic()><<<blocks, kThreads, 0, stream>>>(args, grid);
    check_launch("naive forward");
  });
}

}  // namespace natten::naive
