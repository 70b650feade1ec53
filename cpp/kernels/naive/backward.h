// Gradients of fused attention. With P = exp(logits - logsumexp) and delta_i = grad_out_i . out_i - grad_logsumexp_i:
//   dS_ij = P_ij (grad_out_i . value_j - delta_i),  dV_j = sum_i P_ij grad_out_i,
//   dQ_i = scale sum_j dS_ij key_j,  dK_j = scale sum_i dS_ij query_i.
// dQ walks the queries' windows (and leaves delta in the workspace), dK and dV walk the keys' inverse windows: no
// atomic operation, hence the same bits every time. Additional keys are seen by every query: one block each.
#pragma once

#include "kernels/naive/lanes.h"

namespace natten::naive {

// The workspace holds delta, [B, X, Y, Z, H] dense, in the accumulation type.
__device__ __forceinline__ int64_t delta_index(const Problem& problem, int64_t batch, int head, int x, int y, int z) {
  return (((batch * problem.axis[0].q_length + x) * problem.axis[1].q_length + y) * problem.axis[2].q_length + z) *
             problem.heads +
         head;
}

template <class T, int kLanes, bool kGeneric>
__global__ void __launch_bounds__(kThreads, (kMinBlocks<T, kGeneric>))
    grad_query_kernel(const __grid_constant__ BackwardArguments args, const __grid_constant__ TileGrid grid) {
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
  const T* grad_out = head_rows<const T>(args.grad_out, tile.batch, tile.head) + token.offset(args.grad_out);
  const T* out = head_rows<const T>(args.out, tile.batch, tile.head) + token.offset(args.out);
  const Resident<A> resident_query(load_slice<kLanes, kGeneric>(query, d, 0, lane));
  const Resident<A> resident_grad_out(load_slice<kLanes, kGeneric>(grad_out, dv, 0, lane));

  A delta[1] = {dot(resident_grad_out, load_slice<kLanes, kGeneric>(out, dv, 0, lane))};
  for (int first = kStepChannels<kLanes>; kGeneric && first < dv; first += kStepChannels<kLanes>) {
    delta[0] += dot(Resident<A>(load_slice<kLanes, kGeneric>(grad_out, dv, first, lane)),
                    load_slice<kLanes, kGeneric>(out, dv, first, lane));
  }
  delta[0] = sum_over_lanes<kLanes>(delta, lane);
  if (args.grad_logsumexp.data != nullptr) {
    delta[0] -= head_rows<const A>(args.grad_logsumexp, tile.batch, tile.head)[token.offset(args.grad_logsumexp)];
  }
  if (token.valid && lane == 0) {
    static_cast<A*>(args.workspace)[delta_index(problem, tile.batch, tile.head, token.axis[0].token,
                                                token.axis[1].token, token.axis[2].token)] = delta[0];
  }
  const A normaliser =
      head_rows<const A>(args.logsumexp, tile.batch, tile.head)[token.offset(args.logsumexp)] * kLog2e<A>;

  for (int first = 0; first < (kGeneric ? d : 1); first += kStepChannels<kLanes>) {
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
        const T *key_row[kCount], *value_row[kCount];
        bool valid[kCount];
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
          valid[c] = z + c < keys;
          key_row[c] = key;
          value_row[c] = value;
          key_slice[c] = load_slice<kLanes, kGeneric>(key, d, 0, lane, valid[c]);
          value_slice[c] = load_slice<kLanes, kGeneric>(value, dv, 0, lane, valid[c]);
          key += key_step;
          value += value_step;
        }
        const A logit = dot_rows<kLanes, kGeneric>(resident_query, query, key_slice, key_row, valid, d, lane);
        const A grad_weight =
            dot_rows<kLanes, kGeneric>(resident_grad_out, grad_out, value_slice, value_row, valid, dv, lane);
        const A grad_logit =
            z + lane % kCount < keys ? exp_base2(factor * logit - normaliser) * (grad_weight - delta[0]) : A(0);
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
          if constexpr (kGeneric) key_slice[c] = load_slice<kLanes, kGeneric>(key_row[c], d, first, lane, valid[c]);
          add_scaled<T>(accumulated, __shfl_sync(kWarp, grad_logit, c, kLanes), key_slice[c]);
        }
      }
    }
    if (token.valid) {
      store_slice<kLanes, kGeneric>(
          head_rows<T>(args.grad_query, tile.batch, tile.head) + token.offset(args.grad_query), d, first, lane,
          accumulated, A(problem.scale));
    }
  }
}

// Gradients of one key and value: the sums over a run of queries, each lane contributing its channels.
template <class T, int kLanes, bool kGeneric>
struct KeyGradients {
  using A = Accumulate<T>;
  static constexpr int kCount = kKeys<T>;

  const T *key, *value;
  int d, dv;
  Resident<A> resident_key, resident_value;
  A factor;
  A grad_key[kSliceChannels], grad_value[kSliceChannels];

  __device__ __forceinline__ KeyGradients(const Problem& problem, const T* key_row, const T* value_row, int lane)
      : key(key_row),
        value(value_row),
        d(problem.head_dim),
        dv(problem.head_dim_v),
        resident_key(load_slice<kLanes, kGeneric>(key_row, d, 0, lane)),
        resident_value(load_slice<kLanes, kGeneric>(value_row, dv, 0, lane)),
        factor(A(problem.scale) * kLog2e<A>) {}

  // Lane l knows whether query l % kCount exists and sees the key, and that query's `normaliser` and `delta`.
  __device__ __forceinline__ void add(const T* const (&query)[kCount], const T* const (&grad_out)[kCount],
                                      const bool (&valid)[kCount], bool own_valid, A normaliser, A delta, int first,
                                      int lane) {
    Slice<T> query_slice[kCount], grad_out_slice[kCount];
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      query_slice[c] = load_slice<kLanes, kGeneric>(query[c], d, 0, lane, valid[c]);
      grad_out_slice[c] = load_slice<kLanes, kGeneric>(grad_out[c], dv, 0, lane, valid[c]);
    }
    const A logit = dot_rows<kLanes, kGeneric>(resident_key, key, query_slice, query, valid, d, lane);
    const A grad_weight = dot_rows<kLanes, kGeneric>(resident_value, value, grad_out_slice, grad_out, valid, dv, lane);
    const A weight = own_valid ? exp_base2(factor * logit - normaliser) : A(0);
    const A grad_logit = own_valid ? weight * (grad_weight - delta) : A(0);
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      if constexpr (kGeneric) {
        query_slice[c] = load_slice<kLanes, kGeneric>(query[c], d, first, lane, valid[c]);
        grad_out_slice[c] = load_slice<kLanes, kGeneric>(grad_out[c], dv, first, lane, valid[c]);
      }
      add_scaled<T>(grad_key, __shfl_sync(kWarp, grad_logit, c, kLanes), query_slice[c]);
      add_scaled<T>(grad_value, __shfl_sync(kWarp, weight, c, kLanes), grad_out_slice[c]);
    }
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kSliceChannels; ++i) grad_key[i] = grad_value[i] = 0;
  }
};

template <class T, int kLanes, bool kGeneric>
__global__ void __launch_bounds__(kThreads, (kMinBlocks<T, kGeneric>))
    grad_key_value_kernel(const __grid_constant__ BackwardArguments args, const __grid_constant__ TileGrid grid) {
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

  KeyGradients<T, kLanes, kGeneric> gradients(
      problem, head_rows<const T>(args.key, tile.batch, tile.head) + token.offset(args.key),
      head_rows<const T>(args.value, tile.batch, tile.head) + token.offset(args.value), lane);
  const int64_t query_step = args.query.axis_stride[2] * problem.axis[2].dilation;
  const int64_t grad_out_step = args.grad_out.axis_stride[2] * problem.axis[2].dilation;
  const int64_t logsumexp_step = args.logsumexp.axis_stride[2] * problem.axis[2].dilation;
  const int64_t delta_step = int64_t(problem.heads) * problem.axis[2].dilation;

  const int channels = kGeneric ? max_int(problem.head_dim, problem.head_dim_v) : 1;
  for (int first = 0; first < channels; first += kStepChannels<kLanes>) {
    gradients.clear();
    for (int head = tile.head * group_heads; head < (tile.head + 1) * group_heads; ++head) {
      for (int x = 0; x < token.longest[0]; ++x) {
        for (int y = 0; y < token.longest[1]; ++y) {
          const int queries = x < token.axis[0].size && y < token.axis[1].size ? token.axis[2].size : 0;
          const T* query_row =
              head_rows<const T>(args.query, tile.batch, head) + token.row_offset(problem, args.query, x, y);
          const T* grad_out_row =
              head_rows<const T>(args.grad_out, tile.batch, head) + token.row_offset(problem, args.grad_out, x, y);
          const A* normalisers =
              head_rows<const A>(args.logsumexp, tile.batch, head) + token.row_offset(problem, args.logsumexp, x, y);
          const A* deltas =
              static_cast<const A*>(args.workspace) +
              delta_index(problem, tile.batch, head, token.axis[0].begin_token + x * problem.axis[0].dilation,
                          token.axis[1].begin_token + y * problem.axis[1].dilation, token.axis[2].begin_token);
          for (int z = 0; z < token.longest[2]; z += kCount) {
            const T *query[kCount], *grad_out[kCount];
            bool valid[kCount];
#pragma unroll
            for (int c = 0; c < kCount; ++c) {
              valid[c] = z + c < queries;
              query[c] = query_row;
              grad_out[c] = grad_out_row;
              query_row += query_step;
              grad_out_row += grad_out_step;
            }
            const int own = z + lane % kCount;
            const bool own_valid = own < queries;
            const A normaliser = own_valid ? normalisers[own * logsumexp_step] * kLog2e<A> : A(0);
            const A delta = own_valid ? deltas[own * delta_step] : A(0);
            gradients.add(query, grad_out, valid, own_valid, normaliser, delta, first, lane);
          }
        }
      }
    }
    if (token.valid) {
      store_slice<kLanes, kGeneric>(head_rows<T>(args.grad_key, tile.batch, tile.head) + token.offset(args.grad_key),
                                    problem.head_dim, first, lane, gradients.grad_key, A(problem.scale));
      store_slice<kLanes, kGeneric>(
          head_rows<T>(args.grad_value, tile.batch, tile.head) + token.offset(args.grad_value), problem.head_dim_v,
          first, lane, gradients.grad_value, A(1));
    }
  }
}

// One block per batch item, additional key and K/V head. Its tokens' lanes share out the queries; their sums are added
// in a fixed order.
template <class T, int kLanes, bool kGeneric>
__global__ void __launch_bounds__(kThreads, (kMinBlocks<T, kGeneric>))
    grad_additional_kernel(const __grid_constant__ BackwardArguments args) {
  using A = Accumulate<T>;
  constexpr int kCount = kKeys<T>;
  constexpr int kTeams = kThreads / kLanes;
  __shared__ A partial[kTeams][kStepChannels<kLanes>];
  const Problem& problem = args.problem;
  unsigned rest = blockIdx.x;
  const int head_kv = rest % problem.heads_kv;
  rest /= problem.heads_kv;
  const int index = rest % unsigned(problem.additional);
  const int batch = rest / unsigned(problem.additional);
  const int team = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int group_heads = problem.heads / problem.heads_kv;

  KeyGradients<T, kLanes, kGeneric> gradients(
      problem, head_rows<const T>(args.additional_keys, batch, head_kv) + index * args.additional_keys.axis_stride[2],
      head_rows<const T>(args.additional_values, batch, head_kv) + index * args.additional_values.axis_stride[2], lane);

  const int length_y = problem.axis[1].q_length, length_z = problem.axis[2].q_length;
  const int64_t tokens = int64_t(problem.axis[0].q_length) * length_y * length_z;
  const int channels = kGeneric ? max_int(problem.head_dim, problem.head_dim_v) : 1;
  for (int first = 0; first < channels; first += kStepChannels<kLanes>) {
    gradients.clear();
    for (int head = head_kv * group_heads; head < (head_kv + 1) * group_heads; ++head) {
      const T* query_head = head_rows<const T>(args.query, batch, head);
      const T* grad_out_head = head_rows<const T>(args.grad_out, batch, head);
      const A* logsumexp = head_rows<const A>(args.logsumexp, batch, head);
      // The loop's bounds are the same for all teams, so that shuffles meet.
      for (int64_t begin = 0; begin < tokens; begin += kTeams * kCount) {
        const int64_t own = begin + team * kCount + lane % kCount;
        const bool own_valid = own < tokens;
        int64_t n = own_valid ? own : 0;
        const int z = n % length_z;
        n /= length_z;
        const int y = n % length_y;
        const int x = n / length_y;
        const auto own_offset = [&](const TensorView& view) {
          return x * view.axis_stride[0] + y * view.axis_stride[1] + z * view.axis_stride[2];
        };
        const A normaliser = logsumexp[own_offset(args.logsumexp)] * kLog2e<A>;
        const A delta = static_cast<const A*>(args.workspace)[delta_index(problem, batch, head, x, y, z)];
        const T *query[kCount], *grad_out[kCount];
        bool valid[kCount];
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
          valid[c] = begin + team * kCount + c < tokens;
          query[c] = query_head + __shfl_sync(kWarp, own_offset(args.query), c, kLanes);
          grad_out[c] = grad_out_head + __shfl_sync(kWarp, own_offset(args.grad_out), c, kLanes);
        }
        gradients.add(query, grad_out, valid, own_valid, normaliser, delta, first, lane);
      }
    }
    for (const bool of_key : {true, false}) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kSliceChannels; ++i) {
        partial[team][slice_channel<kLanes, kGeneric, T>(i, lane)] =
            of_key ? gradients.grad_key[i] * A(problem.scale) : gradients.grad_value[i];
      }
      __syncthreads();
      const TensorView& view = of_key ? args.grad_additional_keys : args.grad_additional_values;
      T* row = head_rows<T>(view, batch, head_kv) + index * view.axis_stride[2];
      const int row_channels = of_key ? problem.head_dim : problem.head_dim_v;
      for (int c = threadIdx.x; c < kStepChannels<kLanes> && first + c < row_channels; c += kThreads) {
        A sum = 0;
        for (int t = 0; t < kTeams; ++t) sum += partial[t][c];
        row[first + c] = narrow<T>(sum);
      }
    }
  }
}

template <class T>
void backward(const BackwardArguments& args, cudaStream_t stream) {
  const Problem& problem = args.problem;
  const int d = problem.head_dim, dv = problem.head_dim_v;
  const int64_t queries = problem.batch * problem.heads * int64_t(problem.axis[0].q_length) * problem.axis[1].q_length *
                          problem.axis[2].q_length;
  if (args.workspace_bytes < queries * int64_t(sizeof(Accumulate<T>))) {
    throw std::runtime_error("naive backward: the workspace must hold one number per query and head");
  }
  bool aligned = true;
  for (const TensorView* view :
       {&args.query, &args.key, &args.additional_keys, &args.grad_query, &args.grad_key, &args.grad_additional_keys}) {
    aligned = aligned && has_aligned_rows(*view, d, sizeof(T));
  }
  for (const TensorView* view : {&args.value, &args.additional_values, &args.out, &args.grad_out, &args.grad_value,
                                 &args.grad_additional_values}) {
    aligned = aligned && has_aligned_rows(*view, dv, sizeof(T));
  }
  for_head_dim(max_int(d, dv), aligned, [&](auto lanes, auto generic) {
    constexpr int kLanes = lanes();
    if (!no_queries(problem)) {
      const TileGrid grid = plan_tiles<kLanes>(problem, Side::queries);
      const unsigned blocks = grid_size(tile_count(problem, grid), "naive backward, queries");
      grad_query_kernel<T, kLanes, generic()><<<blocks, kThreads, 0, stream>>>(args, grid);
      check_launch("naive backward, queries");
    }
    if (!no_keys(problem)) {
      const TileGrid grid = plan_tiles<kLanes>(problem, Side::keys);
      const unsigned blocks = grid_size(tile_count(problem, grid), "naive backward, keys");
      grad_key_value_kernel<T, kLanes, generic()><<<blocks, kThreads, 0, stream>>>(args, grid);
      check_launch("naive backward, keys");
    }
    if (problem.additional > 0 && problem.batch > 0) {
      const unsigned blocks =
          grid_size(problem.batch * problem.additional * problem.heads_kv, "naive backward, additional keys");
      grad_additional_kernel<T, kLanes, generic()><<<blocks, kThreads, 0, stream>>>(args);
      check_launch("naive backward, additional keys");
    }
  });
}

}  // namespace natten::naive
