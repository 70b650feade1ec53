// Backward for Hopper, deterministic: statistics of the queries, then the gradients of keys and values by a kernel that
// owns keys, and those of the queries by one that owns queries. docs/kernels/fused-hopper-backward.md.
//
// Workspace (python/natten/dispatch.py allocates it): 16 bytes * batch * queries * heads.
#include <cuda_runtime.h>

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels/families.h"
#include "kernels/fused_sm90/backward_config.h"
#include "kernels/fused_sm90/backward_planner.h"
#include "kernels/fused_sm90/maps.h"
#include "kernels/launch.h"
#include "tile/scalar.h"
#include "tile/softmax.h"

namespace natten::fused_sm90 {

namespace {

constexpr char kName[] = "fused_sm90 backward";
constexpr int kStatisticsThreads = 256;

// A tensor [B, X, Y, Z, H, C], strides in elements; rows are numbered with heads innermost.
struct Rows {
  const void* data;
  int64_t batch, axis[kAxes], head;
};

struct StatisticsParameters {
  Rows grad_out, out, logsumexp, grad_logsumexp;  // grad_logsumexp.data may be null
  char* statistics;                               // [B, X, Y, Z, H] of kStatisticsBytes
  Divisor blocks_per_item, heads, length[kAxes];  // length: queries per axis
  int rows_per_item, lanes, head_dim;             // lanes: threads per row, a power of two
};

// {logsumexp * log2(e), delta} of every query, delta = rowsum(grad_out * out) - grad_logsumexp.
template <class Element>
__global__ void __launch_bounds__(kStatisticsThreads)
    statistics_kernel(const __grid_constant__ StatisticsParameters p) {
  uint32_t batch = blockIdx.x;
  const int block_in_item = p.blocks_per_item.peel(batch);
  const int row = block_in_item * (kStatisticsThreads / p.lanes) + threadIdx.x / p.lanes, lane = threadIdx.x % p.lanes;
  const bool exists = row < p.rows_per_item;
  uint32_t index = exists ? row : 0;
  const int head = p.heads.peel(index);
  const int z = p.length[2].peel(index), y = p.length[1].peel(index), x = index;
  const auto offset = [&](const Rows& t) {
    return batch * t.batch + head * t.head + x * t.axis[0] + y * t.axis[1] + z * t.axis[2];
  };
  float sum = 0.f;
  if (exists && lane * 8 < p.head_dim) {
    Element grad[8], out[8];
    *reinterpret_cast<uint4*>(grad) =
        *reinterpret_cast<const uint4*>(static_cast<const Element*>(p.grad_out.data) + offset(p.grad_out) + lane * 8);
    *reinterpret_cast<uint4*>(out) =
        *reinterpret_cast<const uint4*>(static_cast<const Element*>(p.out.data) + offset(p.out) + lane * 8);
#pragma unroll
    for (int e = 0; e < 8; ++e) sum += widen(grad[e]) * widen(out[e]);
  }
  for (int distance = p.lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (!exists || lane != 0) return;
  if (p.grad_logsumexp.data != nullptr)
    sum -= static_cast<const float*>(p.grad_logsumexp.data)[offset(p.grad_logsumexp)];
  const float logsumexp = static_cast<const float*>(p.logsumexp.data)[offset(p.logsumexp)];
  *reinterpret_cast<float2*>(p.statistics + (int64_t(batch) * p.rows_per_item + row) * kStatisticsBytes) =
      make_float2(logsumexp * tile::kLog2E, sum);
}

[[noreturn]] void refuse(const char* why) {
  throw std::invalid_argument(std::string("natten: the Hopper backward kernels cannot run this call: ") + why);
}

int64_t query_rows_per_item(const Problem& p) {
  return int64_t(p.axis[0].q_length) * p.axis[1].q_length * p.axis[2].q_length * p.heads;
}

const char* check_problem(const Problem& p) {
  if (p.type != ScalarType::bfloat16 && p.type != ScalarType::float16) return "the element type is not a 16-bit float";
  for (int d : {p.head_dim, p.head_dim_v}) {
    if (d < 8 || d % 8 != 0 || gradient_class(d) == 0) return "a head dim is not a multiple of 8 up to 128";
  }
  const double scale_log2 = p.scale * 1.4426950408889634;
  if (!(scale_log2 > 0x1p-60 && scale_log2 < 0x1p20)) return "the scale is not positive, or extreme";
  if (p.additional > 0) return "there are additional keys";
  if (no_queries(p) || no_keys(p)) return "there are no queries, or no keys";
  if (query_rows_per_item(p) > INT32_MAX) return "more than 2^31 queries times heads";
  return nullptr;
}

// Images have axes y and z; boxes are walked x fastest, where masks are cheapest to update: x takes the place of y.
void exchange_x_and_y(BackwardArguments* a) {
  std::swap(a->problem.axis[0], a->problem.axis[1]);
  for (TensorView* view : {&a->grad_out, &a->grad_logsumexp, &a->query, &a->key, &a->value, &a->out, &a->logsumexp,
                           &a->grad_query, &a->grad_key, &a->grad_value}) {
    std::swap(view->axis_stride[0], view->axis_stride[1]);
  }
}

// The workspace as a tensor of 16-bit elements, contiguous.
TensorView statistics_view(const BackwardArguments& a) {
  const Problem& p = a.problem;
  TensorView view{a.workspace, 0, {}, kStatisticsBytes / 2};
  int64_t stride = view.head_stride * p.heads;
  for (int i = kAxes - 1; i >= 0; --i) {
    view.axis_stride[i] = stride;
    stride *= p.axis[i].q_length;
  }
  view.batch_stride = stride;
  return view;
}

// Every tensor that a map describes.
struct FoldedTensors {
  FoldedTensor query, key, value, grad_out, statistics, grad_query, grad_key, grad_value;
};

const char* fold_all(const BackwardArguments& a, FoldedTensors* folded) {
  const Problem& p = a.problem;
  int q_length[kAxes], kv_length[kAxes], dilation[kAxes];
  for (int i = 0; i < kAxes; ++i) {
    q_length[i] = p.axis[i].q_length;
    kv_length[i] = p.axis[i].kv_length;
    dilation[i] = p.axis[i].dilation;
  }
  const char* why = nullptr;
  const auto of_queries = [&](const TensorView& view, int channels, FoldedTensor* f) {
    if (!why) why = fold(view, p.batch, p.heads, channels, q_length, dilation, f);
  };
  const auto of_keys = [&](const TensorView& view, int channels, FoldedTensor* f) {
    if (!why) why = fold(view, p.batch, p.heads_kv, channels, kv_length, dilation, f);
  };
  of_queries(a.query, p.head_dim, &folded->query);
  of_queries(a.grad_out, p.head_dim_v, &folded->grad_out);
  of_queries(a.grad_query, p.head_dim, &folded->grad_query);
  of_queries(statistics_view(a), kStatisticsChannels, &folded->statistics);
  of_keys(a.key, p.head_dim, &folded->key);
  of_keys(a.value, p.head_dim_v, &folded->value);
  of_keys(a.grad_key, p.head_dim, &folded->grad_key);
  of_keys(a.grad_value, p.head_dim_v, &folded->grad_value);
  return why;
}

Rows make_rows(const TensorView& view) {
  return {
      view.data, view.batch_stride, {view.axis_stride[0], view.axis_stride[1], view.axis_stride[2]}, view.head_stride};
}

void launch_statistics(const BackwardArguments& a, cudaStream_t stream) {
  const Problem& problem = a.problem;
  StatisticsParameters s{};
  s.grad_out = make_rows(a.grad_out);
  s.out = make_rows(a.out);
  s.logsumexp = make_rows(a.logsumexp);
  s.grad_logsumexp = make_rows(a.grad_logsumexp);
  s.statistics = static_cast<char*>(a.workspace);
  s.lanes = 1;
  while (s.lanes * 8 < problem.head_dim_v) s.lanes *= 2;
  s.rows_per_item = static_cast<int>(query_rows_per_item(problem));
  s.head_dim = problem.head_dim_v;
  s.heads = Divisor(problem.heads);
  for (int i = 0; i < kAxes; ++i) s.length[i] = Divisor(problem.axis[i].q_length);
  const int64_t rows_per_block = kStatisticsThreads / s.lanes;
  const int64_t blocks_per_item = (s.rows_per_item + rows_per_block - 1) / rows_per_block;
  s.blocks_per_item = Divisor(static_cast<uint32_t>(blocks_per_item));
  const unsigned grid = grid_size(blocks_per_item * problem.batch, kName);
  if (problem.type == ScalarType::float16) {
    statistics_kernel<__half><<<grid, kStatisticsThreads, 0, stream>>>(s);
  } else {
    statistics_kernel<__nv_bfloat16><<<grid, kStatisticsThreads, 0, stream>>>(s);
  }
  check_launch(kName);
}

GradientParameters make_parameters(const Problem& problem, Side owned, const GradientSchedule& s, int warpgroups) {
  GradientParameters p{};
  const bool owns_keys = owned == Side::keys;
  int64_t tiles = 1, radix[kDigits];
  for (int i = 0; i < kAxes; ++i) {
    const Axis& axis = problem.axis[i];
    p.axis[i] = axis;
    p.warpgroup_box[i] = s.own_box[i];
    p.tile_box[i] = s.own_box[i] * (i == s.pair_axis ? warpgroups : 1);
    p.key_box[i] = s.walked_box[i];
    radix[kTileX - i] = ceil_div(ceil_div(owns_keys ? axis.kv_length : axis.q_length, axis.dilation), p.tile_box[i]);
    radix[kGroupX - i] = axis.dilation;
  }
  radix[kHead] = owns_keys ? problem.heads_kv : problem.heads;
  radix[kBatch] = problem.batch;
  for (int d = 0; d < kDigits; ++d) {
    p.digit_weight[d] = Divisor(static_cast<uint32_t>(tiles));
    p.digit_radix[d] = Divisor(static_cast<uint32_t>(radix[d]));
    tiles *= radix[d];
    if (tiles > INT32_MAX / 2) refuse("more than 2^30 tiles");
  }
  p.tiles = static_cast<int>(tiles);
  p.pair_axis = s.pair_axis;
  while (1 << p.log2_z < s.own_box[2]) ++p.log2_z;
  while (1 << p.log2_y < s.own_box[1]) ++p.log2_y;
  p.head_group = problem.heads / problem.heads_kv;
  p.rounds = owns_keys ? p.head_group : 1;
  p.row_columns = s.walked_box[2] / 8;
  p.plane_columns = s.walked_box[1] * p.row_columns;
  for (int i = 0; i < s.walked_box[0]; ++i) p.repeat_planes |= 1u << i * p.plane_columns;
  for (int i = 0; i < s.walked_box[0] * s.walked_box[1]; ++i) p.repeat_rows |= 1u << i * p.row_columns;
  p.scale_log2 = static_cast<float>(problem.scale * 1.4426950408889634);
  p.gradient_scale = static_cast<float>(problem.scale);
  return p;
}

void launch_gradient(const Problem& problem, Side owned, const FoldedTensors& f, int multiprocessors,
                     cudaStream_t stream) {
  const bool owns_keys = owned == Side::keys;
  const int head_dim = gradient_class(std::max(problem.head_dim, problem.head_dim_v));
  const GradientShape shape = gradient_shape(head_dim, owned);
  const GradientSchedule s = choose_gradient_schedule(problem, owned, head_dim, multiprocessors);
  GradientParameters parameters = make_parameters(problem, owned, s, shape.warpgroups);
  GradientMaps maps{};
  const FoldedTensor* const of_queries[] = {&f.query, &f.grad_out};
  const FoldedTensor* const of_keys[] = {&f.key, &f.value};
  const auto describe = [&](Operand operand, const FoldedTensor& tensor, int chunk, const int (&box)[kAxes]) {
    encode(tensor, problem.type, chunk, box, maps.operand[operand]);
    parameters.operand[operand] = tensor.units;
  };
  constexpr int kChunk = 64, kStatisticsChunk = kStatisticsRowBytes / 2;
  for (int o = 0; o < 2; ++o) {
    describe(Operand(kOwnScores + o), owns_keys ? *of_keys[o] : *of_queries[o], kChunk, s.own_box);
    describe(Operand(kWalkedScores + o), owns_keys ? *of_queries[o] : *of_keys[o], kChunk, s.walked_box);
  }
  describe(kStatistics, f.statistics, kStatisticsChunk, owns_keys ? s.walked_box : s.own_box);
  describe(kScoresGradient, owns_keys ? f.grad_key : f.grad_query, kChunk, s.own_box);
  if (owns_keys) describe(kGradsGradient, f.grad_value, kChunk, s.own_box);
  const GradientKernelInfo kernel = problem.type == ScalarType::bfloat16 ? bfloat16_gradient_kernel(head_dim, owned)
                                                                         : float16_gradient_kernel(head_dim, owned);
  check_cuda(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes),
             kName);
  void* kernel_arguments[] = {&maps, &parameters};
  check_cuda(cudaLaunchKernel(kernel.function, dim3(parameters.tiles), dim3(kernel.threads), kernel_arguments,
                              kernel.shared_bytes, stream),
             kName);
}

}  // namespace

void backward(const BackwardArguments& arguments, void* stream_) {
  if (const char* why = check_problem(arguments.problem)) refuse(why);
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  BackwardArguments a = arguments;
  const Problem& problem = a.problem;
  if (a.workspace_bytes < kStatisticsBytes * problem.batch * query_rows_per_item(problem))
    refuse("the workspace is too small");
  if (!has_aligned_rows(a.out, problem.head_dim_v, 2)) refuse("rows of out are not aligned to 16 bytes");
  if (problem.rank == 2) exchange_x_and_y(&a);
  FoldedTensors folded{};
  if (const char* why = fold_all(a, &folded)) refuse(why);
  int device, multiprocessors;
  check_cuda(cudaGetDevice(&device), kName);
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), kName);
  launch_statistics(a, stream);
  launch_gradient(problem, Side::keys, folded, multiprocessors, stream);
  launch_gradient(problem, Side::queries, folded, multiprocessors, stream);
}

}  // namespace natten::fused_sm90
