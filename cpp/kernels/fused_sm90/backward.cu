// Backward for Hopper: statistics of the queries; then either a kernel that owns keys and adds to the gradients of the
// queries in memory as it goes, and their conversion (five products), or, deterministic, the gradients of keys and
// values by a kernel that owns keys and those of the queries by one that owns queries (seven).
// docs/kernels/fused-hopper-backward.md.
//
// Workspace (python/natten/dispatch.py allocates it): 16 bytes * batch * queries * heads; the first form is taken if
// kDeterministic is not set and there are 4 * head_dim * batch * queries * heads bytes more, for the sums.
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
#include "ptx/math.h"
#include "tile/scalar.h"
#include "tile/softmax.h"

namespace natten::fused_sm90 {

namespace {

constexpr char kName[] = "fused_sm90 backward";
constexpr int kRowThreads = 256;  // of the kernels that go over rows

// A tensor [B, X, Y, Z, H, C], strides in elements; rows are numbered with heads innermost.
struct Rows {
  const void* data;
  int64_t batch, axis[kAxes], head;
};

// How threads of a kernel are dealt out to the rows of queries.
struct RowGrid {
  Divisor blocks_per_item, heads, length[kAxes];  // length: queries per axis
  int rows_per_item, lanes;                       // lanes: threads per row, a power of two; each has 8 channels
};

// A thread's row.
struct RowThread {
  uint32_t batch;
  int row, x, y, z, head, lane;
  bool exists;

  __device__ __forceinline__ explicit RowThread(const RowGrid& g) : batch(blockIdx.x), lane(threadIdx.x % g.lanes) {
    const int block_in_item = g.blocks_per_item.peel(batch);
    row = block_in_item * (kRowThreads / g.lanes) + threadIdx.x / g.lanes;
    exists = row < g.rows_per_item;
    uint32_t index = exists ? row : 0;
    head = g.heads.peel(index);
    z = g.length[2].peel(index);
    y = g.length[1].peel(index);
    x = index;
  }
  __device__ __forceinline__ int64_t offset(const Rows& t) const {
    return batch * t.batch + head * t.head + x * t.axis[0] + y * t.axis[1] + z * t.axis[2];
  }
  __device__ __forceinline__ int64_t number(const RowGrid& g) const { return int64_t(batch) * g.rows_per_item + row; }
};

struct StatisticsParameters {
  RowGrid grid;
  Rows grad_out, out, logsumexp, grad_logsumexp;  // grad_logsumexp.data may be null
  char* statistics;                               // [B, X, Y, Z, H] of kStatisticsBytes
  int head_dim;
};

// {logsumexp * log2(e), delta} of every query, delta = rowsum(grad_out * out) - grad_logsumexp.
template <class Element>
__global__ void __launch_bounds__(kRowThreads) statistics_kernel(const __grid_constant__ StatisticsParameters p) {
  const RowThread t(p.grid);
  float sum = 0.f;
  if (t.exists && t.lane * 8 < p.head_dim) {
    Element grad[8], out[8];
    *reinterpret_cast<uint4*>(grad) = *reinterpret_cast<const uint4*>(static_cast<const Element*>(p.grad_out.data) +
                                                                      t.offset(p.grad_out) + t.lane * 8);
    *reinterpret_cast<uint4*>(out) =
        *reinterpret_cast<const uint4*>(static_cast<const Element*>(p.out.data) + t.offset(p.out) + t.lane * 8);
#pragma unroll
    for (int e = 0; e < 8; ++e) sum += widen(grad[e]) * widen(out[e]);
  }
  for (int distance = p.grid.lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (!t.exists || t.lane != 0) return;
  if (p.grad_logsumexp.data != nullptr)
    sum -= static_cast<const float*>(p.grad_logsumexp.data)[t.offset(p.grad_logsumexp)];
  const float logsumexp = static_cast<const float*>(p.logsumexp.data)[t.offset(p.logsumexp)];
  *reinterpret_cast<float2*>(p.statistics + t.number(p.grid) * kStatisticsBytes) =
      make_float2(logsumexp * tile::kLog2E, sum);
}

struct ConversionParameters {
  RowGrid grid;
  const float* sums;  // [B, X, Y, Z, H, D]
  Rows gradient;
  int head_dim;
  float scale;
};

// gradient = scale * sums
template <class Element>
__global__ void __launch_bounds__(kRowThreads) conversion_kernel(const __grid_constant__ ConversionParameters p) {
  const RowThread t(p.grid);
  if (!t.exists || t.lane * 8 >= p.head_dim) return;
  float sums[8];
  const float4* const source = reinterpret_cast<const float4*>(p.sums + t.number(p.grid) * p.head_dim + t.lane * 8);
  *reinterpret_cast<float4*>(sums) = source[0];
  *reinterpret_cast<float4*>(sums + 4) = source[1];
  uint32_t rounded[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) rounded[i] = ptx::pack(sums[2 * i] * p.scale, sums[2 * i + 1] * p.scale, Element());
  Element* const destination =
      const_cast<Element*>(static_cast<const Element*>(p.gradient.data)) + t.offset(p.gradient) + t.lane * 8;
  *reinterpret_cast<uint4*>(destination) = make_uint4(rounded[0], rounded[1], rounded[2], rounded[3]);
}

[[noreturn]] void refuse(const char* why) {
  throw std::invalid_argument(std::string("natten: the Hopper backward kernels cannot run this call: ") + why);
}

int64_t query_rows_per_item(const Problem& p) {
  return int64_t(p.axis[0].q_length) * p.axis[1].q_length * p.axis[2].q_length * p.heads;
}

// Parts of the workspace, in this order.
int64_t statistics_bytes(const Problem& p) { return kStatisticsBytes * p.batch * query_rows_per_item(p); }
int accumulator_row_bytes(const Problem& p) { return 4 * p.head_dim; }
int64_t accumulator_bytes(const Problem& p) { return accumulator_row_bytes(p) * p.batch * query_rows_per_item(p); }

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

// A part of the workspace: `row_bytes` per query and head, contiguous; strides in units of 2 bytes.
TensorView workspace_view(const Problem& p, char* data, int row_bytes) {
  TensorView view{data, 0, {}, row_bytes / 2};
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
  FoldedTensor query, key, value, grad_out, statistics, grad_query, grad_key, grad_value, accumulator;
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
  char* const workspace = static_cast<char*>(a.workspace);
  of_queries(workspace_view(p, workspace, kStatisticsBytes), kStatisticsBytes / 4, &folded->statistics);
  of_queries(workspace_view(p, workspace + statistics_bytes(p), accumulator_row_bytes(p)), p.head_dim,
             &folded->accumulator);
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

float* sums_of(const BackwardArguments& a) {
  return reinterpret_cast<float*>(static_cast<char*>(a.workspace) + statistics_bytes(a.problem));
}

// Returns how many blocks the grid has.
unsigned deal_rows(const Problem& problem, int head_dim, RowGrid* g) {
  g->lanes = 1;
  while (g->lanes * 8 < head_dim) g->lanes *= 2;
  g->rows_per_item = static_cast<int>(query_rows_per_item(problem));
  g->heads = Divisor(problem.heads);
  for (int i = 0; i < kAxes; ++i) g->length[i] = Divisor(problem.axis[i].q_length);
  const int64_t rows_per_block = kRowThreads / g->lanes;
  const int64_t blocks_per_item = (g->rows_per_item + rows_per_block - 1) / rows_per_block;
  g->blocks_per_item = Divisor(static_cast<uint32_t>(blocks_per_item));
  return grid_size(blocks_per_item * problem.batch, kName);
}

void launch_statistics(const BackwardArguments& a, cudaStream_t stream) {
  StatisticsParameters s{};
  s.grad_out = make_rows(a.grad_out);
  s.out = make_rows(a.out);
  s.logsumexp = make_rows(a.logsumexp);
  s.grad_logsumexp = make_rows(a.grad_logsumexp);
  s.statistics = static_cast<char*>(a.workspace);
  s.head_dim = a.problem.head_dim_v;
  const unsigned grid = deal_rows(a.problem, s.head_dim, &s.grid);
  if (a.problem.type == ScalarType::float16) {
    statistics_kernel<__half><<<grid, kRowThreads, 0, stream>>>(s);
  } else {
    statistics_kernel<__nv_bfloat16><<<grid, kRowThreads, 0, stream>>>(s);
  }
  check_launch(kName);
}

void launch_conversion(const BackwardArguments& a, cudaStream_t stream) {
  ConversionParameters c{};
  c.sums = sums_of(a);
  c.gradient = make_rows(a.grad_query);
  c.head_dim = a.problem.head_dim;
  c.scale = static_cast<float>(a.problem.scale);
  const unsigned grid = deal_rows(a.problem, c.head_dim, &c.grid);
  if (a.problem.type == ScalarType::float16) {
    conversion_kernel<__half><<<grid, kRowThreads, 0, stream>>>(c);
  } else {
    conversion_kernel<__nv_bfloat16><<<grid, kRowThreads, 0, stream>>>(c);
  }
  check_launch(kName);
}

GradientParameters make_parameters(const Problem& problem, Pass pass, const GradientSchedule& s, int warpgroups) {
  GradientParameters p{};
  const bool owns_keys = owned_side(pass) == Side::keys;
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
  // Tiles follow each other x fastest, as the boxes of a walk do: blocks that run together walk together, and what they
  // read and add to stays in the L2 cache.
  for (int d : {kTileX, kTileY, kTileZ, kGroupZ, kGroupY, kGroupX, kHead, kBatch}) {
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

void launch_gradient(const Problem& problem, Pass pass, const FoldedTensors& f, int multiprocessors,
                     cudaStream_t stream) {
  const bool owns_keys = owned_side(pass) == Side::keys;
  const int head_dim = gradient_class(std::max(problem.head_dim, problem.head_dim_v));
  const GradientShape shape = gradient_shape(head_dim, pass);
  const GradientSchedule s = choose_gradient_schedule(problem, pass, head_dim, multiprocessors);
  GradientParameters parameters = make_parameters(problem, pass, s, shape.warpgroups);
  GradientMaps maps{};
  const FoldedTensor* const of_queries[] = {&f.query, &f.grad_out};
  const FoldedTensor* const of_keys[] = {&f.key, &f.value};
  const auto describe = [&](Operand operand, const FoldedTensor& tensor, int row_bytes, const int (&box)[kAxes]) {
    const bool single = operand == kStatistics || operand == kAccumulator;
    encode(tensor, single ? ScalarType::float32 : problem.type, row_bytes / (single ? 4 : 2), box,
           maps.operand[operand]);
    parameters.operand[operand] = tensor.units;
  };
  constexpr int kRowBytes = 128;  // of one copy, swizzled
  for (int o = 0; o < 2; ++o) {
    describe(Operand(kOwnScores + o), owns_keys ? *of_keys[o] : *of_queries[o], kRowBytes, s.own_box);
    describe(Operand(kWalkedScores + o), owns_keys ? *of_queries[o] : *of_keys[o], kRowBytes, s.walked_box);
  }
  describe(kStatistics, f.statistics, kStatisticsBytes, owns_keys ? s.walked_box : s.own_box);
  describe(kScoresGradient, owns_keys ? f.grad_key : f.grad_query, kRowBytes, s.own_box);
  if (owns_keys) describe(kGradsGradient, f.grad_value, kRowBytes, s.own_box);
  if (pass == Pass::all) describe(kAccumulator, f.accumulator, kRowBytes, s.walked_box);
  const GradientKernelInfo kernel = problem.type == ScalarType::bfloat16 ? bfloat16_gradient_kernel(head_dim, pass)
                                                                         : float16_gradient_kernel(head_dim, pass);
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
  if (a.workspace_bytes < statistics_bytes(problem)) refuse("the workspace is too small");
  const bool accumulates =
      !(problem.flags & kDeterministic) && a.workspace_bytes >= statistics_bytes(problem) + accumulator_bytes(problem);
  if (!has_aligned_rows(a.out, problem.head_dim_v, 2)) refuse("rows of out are not aligned to 16 bytes");
  if (problem.rank == 2) exchange_x_and_y(&a);
  FoldedTensors folded{};
  if (const char* why = fold_all(a, &folded)) refuse(why);
  int device, multiprocessors;
  check_cuda(cudaGetDevice(&device), kName);
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), kName);
  launch_statistics(a, stream);
  if (accumulates) {
    check_cuda(cudaMemsetAsync(sums_of(a), 0, accumulator_bytes(problem), stream), kName);
    launch_gradient(problem, Pass::all, folded, multiprocessors, stream);
    launch_conversion(a, stream);
  } else {
    launch_gradient(problem, Pass::keys, folded, multiprocessors, stream);
    launch_gradient(problem, Pass::queries, folded, multiprocessors, stream);
  }
}

}  // namespace natten::fused_sm90
