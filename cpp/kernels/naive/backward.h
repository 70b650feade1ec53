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

  const auto query = make_matrix<const T>(args.query, tile.batch, tile.head, problem.head_dim);
  const auto grad_out = make_matrix<const T>(args.grad_out, tile.batch, tile.head, problem.head_dim_v);
  const auto out = make_matrix<const T>(args.out, tile.batch, tile.head, problem.head_dim_v);
  const auto grad_query = make_matrix<T>(args.grad_query, tile.batch, tile.head, problem.head_dim);
  const int64_t query_offset = token.offset(args.query), grad_out_offset = token.offset(args.grad_out);
  const auto resident_query = load_slice<kLanes, kGeneric>(query, query_offset, 0, lane);
  const auto resident_grad_out = load_slice<kLanes, kGeneric>(grad_out, grad_out_offset, 0, lane);

  A delta[1] = {0};
  for (int first = 0; first < (kGeneric ? problem.head_dim_v : 1); first += kStepChannels<kLanes>) {
    delta[0] += dot(load_slice<kLanes, kGeneric>(grad_out, grad_out_offset, first, lane),
                    load_slice<kLanes, kGeneric>(out, token.offset(args.out), first, lane));
  }
  delta[0] = sum_over_lanes<kLanes>(delta, lane);
  if (args.grad_logsumexp.data != nullptr) {
    const auto grad_logsumexp = make_matrix<const A>(args.grad_logsumexp, tile.batch, tile.head, 1);
    delta[0] -= grad_logsumexp.data[token.offset(args.grad_logsumexp)];
  }
  if (token.valid && lane == 0) {
    static_cast<A*>(args.workspace)[delta_index(problem, tile.batch, tile.head, token.axis[0].token,
                                                token.axis[1].token, token.axis[2].token)] = delta[0];
  }
  const auto logsumexp = make_matrix<const A>(args.logsumexp, tile.batch, tile.head, 1);
  const A normaliser = logsumexp.data[token.offset(args.logsumexp)] * kLog2e<A>;

  for (int first = 0; first < (kGeneric ? problem.head_dim : 1); first += kStepChannels<kLanes>) {
    A accumulated[kSliceChannels] = {};
    const int rows = token.longest[0] * token.longest[1];
    int x = 0, y = 0;
    for (int row = 0; row < rows + (problem.additional > 0); ++row) {
      const bool in_window = row < rows;
      const TensorView& key_view = in_window ? args.key : args.additional_keys;
      const TensorView& value_view = in_window ? args.value : args.additional_values;
      const auto key = make_matrix<const T>(key_view, tile.batch, head_kv, problem.head_dim);
      const auto value = make_matrix<const T>(value_view, tile.batch, head_kv, problem.head_dim_v);
      int64_t key_row = 0, value_row = 0;
      int64_t key_step = key_view.axis_stride[2], value_step = value_view.axis_stride[2];
      int keys = int(problem.additional), longest = keys;
      if (in_window) {
        const bool inside = x < token.axis[0].size && y < token.axis[1].size;
        key_row = token.row_offset(problem, args.key, inside ? x : 0, inside ? y : 0);
        value_row = token.row_offset(problem, args.value, inside ? x : 0, inside ? y : 0);
        key_step *= problem.axis[2].dilation;
        value_step *= problem.axis[2].dilation;
        keys = inside ? token.axis[2].size : 0;
        longest = token.longest[2];
        if (++y == token.longest[1]) y = 0, ++x;
      }

      for (int z = 0; z < longest; z += kCount) {
        Slice<T> key_slice[kCount], value_slice[kCount];
        int64_t key_offset[kCount], value_offset[kCount];
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
          const int index = max_int(min_int(z + c, keys - 1), 0);
          key_offset[c] = key_row + index * key_step;
          value_offset[c] = value_row + index * value_step;
          key_slice[c] = load_slice<kLanes, kGeneric>(key, key_offset[c], 0, lane);
          value_slice[c] = load_slice<kLanes, kGeneric>(value, value_offset[c], 0, lane);
        }
        const A logit =
            dot_rows<kLanes, kGeneric>(resident_query, query, query_offset, key_slice, key, key_offset, lane);
        const A grad_weight = dot_rows<kLanes, kGeneric>(resident_grad_out, grad_out, grad_out_offset, value_slice,
                                                         value, value_offset, lane);
        const A grad_logit = z + lane % kCount < keys
                                 ? exp_base2(factor * logit - normaliser) * (grad_weight - delta[0])
                                 : A(0);
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
          if constexpr (kGeneric) key_slice[c] = load_slice<kLanes, kGeneric>(key, key_offset[c], first, lane);
          add_scaled<T>(accumulated, __shfl_sync(kWarp, grad_logit, c, kLanes), key_slice[c]);
        }
      }
    }
    if (token.valid) {
      store_slice<kLanes, kGeneric>(grad_query, token.offset(args.grad_query), first, lane, accumulated,
                                    A(problem.scale));
    }
  }
}

// Gradients of one key and value: the sums over a run of queries, each lane contributing its channels.
template <class T, int kLanes, bool kGeneric>
struct KeyGradients {
  using A = Accumulate<T>;
  static constexpr int kCount = kKeys<T>;

  Matrix<const T> key, value;
  int64_t key_offset, value_offset;
  Slice<T> resident_key, resident_value;
  A factor;
  A grad_key[kSliceChannels], grad_value[kSliceChannels];

  // `known` says whether this lane's query (lane modulo kCount) exists and sees the key; `normaliser` and `delta` are
  // that query's.
  __device__ __forceinline__ void add(const Matrix<const T>& query, const int64_t (&query_offset)[kCount],
                                      const Matrix<const T>& grad_out, const int64_t (&grad_out_offset)[kCount],
                                      bool known, A normaliser, A delta, int first, int lane) {
    Slice<T> query_slice[kCount], grad_out_slice[kCount];
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      query_slice[c] = load_slice<kLanes, kGeneric>(query, query_offset[c], 0, lane);
      grad_out_slice[c] = load_slice<kLanes, kGeneric>(grad_out, grad_out_offset[c], 0, lane);
    }
    const A logit = dot_rows<kLanes, kGeneric>(resident_key, key, key_offset, query_slice, query, query_offset, lane);
    const A grad_weight = dot_rows<kLanes, kGeneric>(resident_value, value, value_offset, grad_out_slice, grad_out,
                                                     grad_out_offset, lane);
    const A weight = known ? exp_base2(factor * logit - normaliser) : A(0);
    const A grad_logit = known ? weight * (grad_weight - delta) : A(0);
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      if constexpr (kGeneric) {
        query_slice[c] = load_slice<kLanes, kGeneric>(query, query_offset[c], first, lane);
        grad_out_slice[c] = load_slice<kLanes, kGeneric>(grad_out, grad_out_offset[c], first, lane);
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

  KeyGradients<T, kLanes, kGeneric> gradients;
  gradients.key = make_matrix<const T>(args.key, tile.batch, tile.head, problem.head_dim);
  gradients.value = make_matrix<const T>(args.value, tile.batch, tile.head, problem.head_dim_v);
  gradients.key_offset = token.offset(args.key);
  gradients.value_offset = token.offset(args.value);
  gradients.resident_key = load_slice<kLanes, kGeneric>(gradients.key, gradients.key_offset, 0, lane);
  gradients.resident_value = load_slice<kLanes, kGeneric>(gradients.value, gradients.value_offset, 0, lane);
  gradients.factor = A(problem.scale) * kLog2e<A>;
  const auto grad_key = make_matrix<T>(args.grad_key, tile.batch, tile.head, problem.head_dim);
  const auto grad_value = make_matrix<T>(args.grad_value, tile.batch, tile.head, problem.head_dim_v);
  const int64_t query_step = args.query.axis_stride[2] * problem.axis[2].dilation;
  const int64_t grad_out_step = args.grad_out.axis_stride[2] * problem.axis[2].dilation;
  const int64_t logsumexp_step = args.logsumexp.axis_stride[2] * problem.axis[2].dilation;
  const int64_t delta_step = int64_t(problem.heads) * problem.axis[2].dilation;

  const int channels = kGeneric ? max_int(problem.head_dim, problem.head_dim_v) : 1;
  for (int first = 0; first < channels; first += kStepChannels<kLanes>) {
    gradients.clear();
    for (int head = tile.head * group_heads; head < (tile.head + 1) * group_heads; ++head) {
      const auto query = make_matrix<const T>(args.query, tile.batch, head, problem.head_dim);
      const auto grad_out = make_matrix<const T>(args.grad_out, tile.batch, head, problem.head_dim_v);
      const auto logsumexp = make_matrix<const A>(args.logsumexp, tile.batch, head, 1);
      for (int x = 0; x < token.longest[0]; ++x) {
        for (int y = 0; y < token.longest[1]; ++y) {
          const bool inside = x < token.axis[0].size && y < token.axis[1].size;
          const int queries = inside ? token.axis[2].size : 0;
          const int row_x = inside ? x : 0, row_y = inside ? y : 0;
          const int64_t query_row = token.row_offset(problem, args.query, row_x, row_y);
          const int64_t grad_out_row = token.row_offset(problem, args.grad_out, row_x, row_y);
          const A* normalisers = logsumexp.data + token.row_offset(problem, args.logsumexp, row_x, row_y);
          const A* deltas = static_cast<const A*>(args.workspace) +
                            delta_index(problem, tile.batch, head,
                                        token.axis[0].begin_token + row_x * problem.axis[0].dilation,
                                        token.axis[1].begin_token + row_y * problem.axis[1].dilation,
                                        token.axis[2].begin_token);
          for (int z = 0; z < token.longest[2]; z += kCount) {
            int64_t query_offset[kCount], grad_out_offset[kCount];
#pragma unroll
            for (int c = 0; c < kCount; ++c) {
              const int index = max_int(min_int(z + c, queries - 1), 0);
              query_offset[c] = query_row + index * query_step;
              grad_out_offset[c] = grad_out_row + index * grad_out_step;
            }
            const int own = z + lane % kCount;
            const bool known = own < queries;
            const A normaliser = known ? normalisers[own * logsumexp_step] * kLog2e<A> : A(0);
            const A delta = known ? deltas[own * delta_step] : A(0);
            gradients.add(query, query_offset, grad_out, grad_out_offset, known, normaliser, delta, first, lane);
          }
        }
      }
    }
    if (token.valid) {
      store_slice<kLanes, kGeneric>(grad_key, token.offset(args.grad_key), first, lane, gradients.grad_key,
                                    A(problem.scale));
      store_slice<kLanes, kGeneric>(grad_value, token.offset(args.grad_value), first, lane, gradients.grad_value, A(1));
    }
  }
}

// One block per batch item, additional key and K/V head. Its tokens' lanes share out the queries; their sums are added
// in a fixed order.
template <class T, int kLanes, bool kGeneric>
__global__ void __launch_bounds__(kThreads, (kMinBlocks<T, kGeneric>)) grad_additional_kernel(const __grid_constant__ BackwardArguments args) {
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

  KeyGradients<T, kLanes, kGeneric> gradients;
  gradients.key = make_matrix<const T>(args.additional_keys, batch, head_kv, problem.head_dim);
  gradients.value = make_matrix<const T>(args.additional_values, batch, head_kv, problem.head_dim_v);
  gradients.key_offset = index * args.additional_keys.axis_stride[2];
  gradients.value_offset = index * args.additional_values.axis_stride[2];
  gradients.resident_key = load_slice<kLanes, kGeneric>(gradients.key, gradients.key_offset, 0, lane);
  gradients.resident_value = load_slice<kLanes, kGeneric>(gradients.value, gradients.value_offset, 0, lane);
  gradients.factor = A(problem.scale) * kLog2e<A>;
  const auto grad_key = make_matrix<T>(args.grad_additional_keys, batch, head_kv, problem.head_dim);
  const auto grad_value = make_matrix<T>(args.grad_additional_values, batch, head_kv, problem.head_dim_v);

  const int length_y = problem.axis[1].q_length, length_z = problem.axis[2].q_length;
  const int64_t tokens = int64_t(problem.axis[0].q_length) * length_y * length_z;
  const int channels = kGeneric ? max_int(problem.head_dim, problem.head_dim_v) : 1;
  for (int first = 0; first < channels; first += kStepChannels<kLanes>) {
    gradients.clear();
    for (int head = head_kv * group_heads; head < (head_kv + 1) * group_heads; ++head) {
      const auto query = make_matrix<const T>(args.query, batch, head, problem.head_dim);
      const auto grad_out = make_matrix<const T>(args.grad_out, batch, head, problem.head_dim_v);
      const auto logsumexp = make_matrix<const A>(args.logsumexp, batch, head, 1);
      // The loop's bounds are the same for all teams, so that shuffles meet.
      for (int64_t begin = 0; begin < tokens; begin += kTeams * kCount) {
        const int64_t own = begin + team * kCount + lane % kCount;
        const bool known = own < tokens;
        int64_t n = known ? own : 0;
        const int z = n % length_z;
        n /= length_z;
        const int y = n % length_y;
        const int x = n / length_y;
        const auto own_offset = [&](const TensorView& view) {
          return x * view.axis_stride[0] + y * view.axis_stride[1] + z * view.axis_stride[2];
        };
        const A normaliser = logsumexp.data[own_offset(args.logsumexp)] * kLog2e<A>;
        const A delta = static_cast<const A*>(args.workspace)[delta_index(problem, batch, head, x, y, z)];
        int64_t query_offset[kCount], grad_out_offset[kCount];
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
          query_offset[c] = __shfl_sync(kWarp, own_offset(args.query), c, kLanes);
          grad_out_offset[c] = __shfl_sync(kWarp, own_offset(args.grad_out), c, kLanes);
        }
        gradients.add(query, query_offset, grad_out, grad_out_offset, known, normaliser, delta, first, lane);
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
      const Matrix<T>& result = of_key ? grad_key : grad_value;
      const int64_t row =
          index * (of_key ? args.grad_additional_keys.axis_stride[2] : args.grad_additional_values.axis_stride[2]);
      for (int c = threadIdx.x; c < kStepChannels<kLanes> && first + c < result.channels; c += kThreads) {
        A sum = 0;
        for (int t = 0; t < kTeams; ++t) sum += partial[t][c];
        result.data[row + first + c] = narrow<T>(sum);
      }
    }
  }
}

template <class T>
void backward(const BackwardArguments& args, cudaStream_t stream) {
  const Problem& problem = args.problem;
  const int d = problem.head_dim, dv = problem.head_dim_v;
  const int64_t queries = problem.batch * problem.heads * int64_t(problem.axis[0].q_length) *
                          problem.axis[1].q_length * problem.axis[2].q_length;
  if (args.workspace_bytes < queries * int64_t(sizeof(Accumulate<T>))) {
    throw std::runtime_error("naive backward: the workspace must hold one number per query and head");
  }
  bool aligned = true;
  for (const TensorView* view : {&args.query, &args.key, &args.additional_keys, &args.grad_query, &args.grad_key,
                                 &args.grad_additional_keys}) {
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
