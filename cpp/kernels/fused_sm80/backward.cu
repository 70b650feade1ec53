// Backward: by patches where windows are small (patch_backward.cu). Else statistics of the queries, then key gradients
// and query gradients by two kernels that own what they write (seven products, deterministic); or by one that owns the
// key gradients and adds to float32 accumulators of the query gradients, then converted (five products). The second is
// taken when kDeterministic is not set and the workspace has room for the accumulators: who allocates it decides.
// float32 always takes the first.
//
// Workspace, in bytes (python/natten/dispatch.py allocates it):
//   8 * batch * queries * heads                                          statistics
// + 4 * parts * batch * additional * heads_kv * (head_dim + head_dim_v)  partial sums for the additional keys, with
//   parts = min(max(512 / (batch * heads_kv * ceil(additional / 64)), 1), 16)
// + 4 * batch * queries * heads * (head_dim rounded up to 16)            accumulators, optional; from a multiple of 16
#include "kernels/families.h"
#include "kernels/fused_sm80/backward_rows.cuh"
#include "kernels/fused_sm80/host.h"
#include "kernels/fused_sm80/patch_backward.h"

namespace natten::fused_sm80 {

namespace {

int64_t query_count(const Problem& problem) {
  return int64_t(problem.axis[0].q_length) * problem.axis[1].q_length * problem.axis[2].q_length;
}

// Blocks that share the queries of a tile of additional keys: enough to fill a large device.
int additional_parts(const Problem& problem) {
  const int64_t tiles = problem.batch * problem.heads_kv * ((problem.additional + 63) / 64);
  return int(std::min<int64_t>(std::max<int64_t>(512 / tiles, 1), 16));
}

int64_t statistics_bytes(const Problem& problem) {
  return int64_t(sizeof(float2)) * problem.batch * query_count(problem) * problem.heads;
}

int64_t partial_bytes(const Problem& problem) {
  if (problem.additional == 0) return 0;
  return 4 * int64_t(additional_parts(problem)) * problem.batch * problem.additional * problem.heads_kv *
         (problem.head_dim + problem.head_dim_v);
}

int padded_head_dim(const Problem& problem) { return (problem.head_dim + 15) / 16 * 16; }

int64_t accumulator_bytes(const Problem& problem) {
  return int64_t(sizeof(float)) * problem.batch * query_count(problem) * problem.heads * padded_head_dim(problem);
}

// [B, X, Y, Z, H] of `item_bytes`, contiguous.
Tensor workspace_tensor(char* data, int64_t item_bytes, const Problem& problem) {
  Tensor t{data, 0, item_bytes, {}, {}};
  int64_t stride = item_bytes * problem.heads;
  for (int a = kAxes - 1; a >= 0; --a) {
    t.axis[a] = stride;
    t.step[a] = stride * problem.axis[a].dilation;
    stride *= problem.axis[a].q_length;
  }
  t.batch = stride;
  return t;
}

// Rows of queries of one batch item, for the kernels that take one row after the other.
int64_t rows_per_item(const Problem& problem) {
  const int64_t rows = query_count(problem) * problem.heads;
  if (rows > INT32_MAX / 64) throw std::invalid_argument("fused_sm80: more than 2^25 queries times heads");
  return rows;
}

void launch_statistics(const BackwardArguments& arguments, const Parameters& p, cudaStream_t stream) {
  const Problem& problem = arguments.problem;
  const int64_t rows = rows_per_item(problem);
  if (rows == 0 || problem.batch == 0) return;
  StatisticsParameters s{};
  s.grad_out = p.grad_out;
  s.out = p.out;
  s.logsumexp = p.logsumexp;
  s.grad_logsumexp = p.grad_logsumexp;
  s.statistics = reinterpret_cast<float2*>(p.statistics.data);
  s.lanes = 1;
  while (s.lanes * 8 < problem.head_dim_v) s.lanes *= 2;
  s.rows_per_item = int(rows);
  s.head_dim_v = problem.head_dim_v;
  s.heads = Divisor(problem.heads);
  for (int a = 0; a < kAxes; ++a) s.length[a] = Divisor(problem.axis[a].q_length);
  const int64_t blocks_per_item = (rows + kRowThreads / s.lanes - 1) / (kRowThreads / s.lanes);
  s.blocks_per_item = Divisor(uint32_t(blocks_per_item));
  const unsigned grid = grid_size(blocks_per_item * problem.batch, "fused_sm80 statistics");
  if (problem.type == ScalarType::float32)
    statistics_kernel<float><<<grid, kRowThreads, 0, stream>>>(s);
  else if (problem.type == ScalarType::float16)
    statistics_kernel<__half><<<grid, kRowThreads, 0, stream>>>(s);
  else
    statistics_kernel<__nv_bfloat16><<<grid, kRowThreads, 0, stream>>>(s);
  check_launch("fused_sm80 statistics");
}

void launch_convert(const Parameters& p, const Problem& problem, cudaStream_t stream) {
  ConvertParameters c{};
  c.accumulator = reinterpret_cast<const float*>(p.accumulator.data);
  c.grad_query = p.grad_query;
  const int tiles_per_row = padded_head_dim(problem) / 16;
  c.tiles_per_item = int(rows_per_item(problem) * tiles_per_row);
  if (c.tiles_per_item == 0 || problem.batch == 0) return;
  c.head_dim = problem.head_dim;
  c.scale = p.scale;
  const int blocks_per_item = ceil_div(c.tiles_per_item, kRowThreads);
  c.blocks_per_item = Divisor(blocks_per_item);
  c.tiles_per_row = Divisor(tiles_per_row);
  c.heads = Divisor(problem.heads);
  for (int a = 0; a < kAxes; ++a) c.length[a] = Divisor(problem.axis[a].q_length);
  const unsigned grid = grid_size(blocks_per_item * problem.batch, "fused_sm80 conversion");
  if (problem.type == ScalarType::float16)
    convert_kernel<__half><<<grid, kRowThreads, 0, stream>>>(c);
  else
    convert_kernel<__nv_bfloat16><<<grid, kRowThreads, 0, stream>>>(c);
  check_launch("fused_sm80 conversion");
}

// The additional keys as a problem of the key gradient kernel: one dense axis of keys, each attended by every query.
void launch_additional(const BackwardArguments& arguments, Parameters p, const KernelEntry& entry,
                       cudaStream_t stream) {
  Problem problem = arguments.problem;
  const int parts = additional_parts(problem), additional = int(problem.additional), bytes = element_bytes(problem);
  p.key = p.additional_key;
  p.value = p.additional_value;
  for (int a = 0; a < kAxes; ++a) {
    Axis& axis = problem.axis[a];
    const int keys = a == kAxes - 1 ? additional : 1;
    axis = {-1, 1, 1, 0, max_int(axis.q_length, keys), 0, axis.q_length, 0, keys};
    p.axis[a] = axis;
    p.dense[a] = make_group(axis, 0);
    p.groups[a] = Divisor(1);
    for (Tensor* t : {&p.query, &p.grad_out, &p.statistics, &p.accumulator}) t->step[a] = t->axis[a];
  }
  p.partial = reinterpret_cast<float*>(static_cast<char*>(arguments.workspace) + statistics_bytes(problem));
  p.partial_batch = problem.batch;
  TilePlan tiles{
      Variant::wide, {1, 1, entry.owned_rows}, {1, 1, entry.owned_rows / entry.owned_warps}, {1, 1, tile::kRun}};
  int runs = entry.walked_rows / tile::kRun;
  for (int a = kAxes - 1; a >= 0; --a)
    for (; runs > 1 && (tiles.walked[a] < problem.axis[a].q_length || a == 0); runs /= 2) tiles.walked[a] *= 2;
  launch(entry, p, problem, Side::keys, tiles, parts, stream, "fused_sm80 additional keys");

  SumPartsParameters s{};
  s.partial = p.partial;
  const int chunks_per_row = (problem.head_dim + problem.head_dim_v) / 8;
  s.chunks = problem.batch * additional * problem.heads_kv * chunks_per_row;
  if (s.chunks > INT32_MAX) throw std::invalid_argument("fused_sm80: too many additional keys");
  s.part_stride = s.chunks * 8;
  s.parts = parts;
  s.head_dim = problem.head_dim;
  s.chunks_per_row = Divisor(chunks_per_row);
  s.heads = Divisor(problem.heads_kv);
  s.additional = Divisor(additional);
  s.grad_key = make_additional(arguments.grad_additional_keys, bytes);
  s.grad_value = make_additional(arguments.grad_additional_values, bytes);
  if (s.chunks == 0) return;
  const unsigned grid = grid_size((s.chunks + kRowThreads - 1) / kRowThreads, "fused_sm80 sum of parts");
  if (problem.type == ScalarType::float32)
    sum_parts_kernel<float><<<grid, kRowThreads, 0, stream>>>(s);
  else if (problem.type == ScalarType::float16)
    sum_parts_kernel<__half><<<grid, kRowThreads, 0, stream>>>(s);
  else
    sum_parts_kernel<__nv_bfloat16><<<grid, kRowThreads, 0, stream>>>(s);
  check_launch("fused_sm80 sum of parts");
}

}  // namespace

// problem.plan, when given: the variants of the query and of the key gradient kernel (-1: the cheaper one); or, for
// each of the two, variant, owned tile (3) and walked box (3); or what patch_backward takes.
void backward(const BackwardArguments& arguments, void* stream_) {
  const Problem& problem = arguments.problem;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  check_problem(problem);
  check_rows(arguments.grad_out, problem, problem.head_dim_v, "grad_out");
  check_rows(arguments.query, problem, problem.head_dim, "query");
  check_rows(arguments.key, problem, problem.head_dim, "key");
  check_rows(arguments.value, problem, problem.head_dim_v, "value");
  check_rows(arguments.out, problem, problem.head_dim_v, "out");
  check_rows(arguments.grad_query, problem, problem.head_dim, "grad_query");
  check_rows(arguments.grad_key, problem, problem.head_dim, "grad_key");
  check_rows(arguments.grad_value, problem, problem.head_dim_v, "grad_value");
  if (arguments.workspace_bytes < statistics_bytes(problem) + partial_bytes(problem))
    throw std::invalid_argument("fused_sm80: the workspace is too small");

  const int bytes = element_bytes(problem);
  Parameters p = make_parameters(problem);
  p.query = make_tensor(arguments.query, problem, bytes);
  p.key = make_tensor(arguments.key, problem, bytes);
  p.value = make_tensor(arguments.value, problem, bytes);
  p.out = make_tensor(arguments.out, problem, bytes);
  p.logsumexp = make_tensor(arguments.logsumexp, problem, sizeof(float));
  p.grad_out = make_tensor(arguments.grad_out, problem, bytes);
  p.grad_logsumexp = make_tensor(arguments.grad_logsumexp, problem, sizeof(float));
  p.grad_query = make_tensor(arguments.grad_query, problem, bytes);
  p.grad_key = make_tensor(arguments.grad_key, problem, bytes);
  p.grad_value = make_tensor(arguments.grad_value, problem, bytes);
  p.statistics = workspace_tensor(static_cast<char*>(arguments.workspace), sizeof(float2), problem);
  if (problem.additional > 0) {
    check_rows(arguments.additional_keys, problem, problem.head_dim, "additional_keys");
    check_rows(arguments.additional_values, problem, problem.head_dim_v, "additional_values");
    check_rows(arguments.grad_additional_keys, problem, problem.head_dim, "grad_additional_keys");
    check_rows(arguments.grad_additional_values, problem, problem.head_dim_v, "grad_additional_values");
    p.additional_key = make_additional(arguments.additional_keys, bytes);
    p.additional_value = make_additional(arguments.additional_values, bytes);
  }

  if (patch_backward(problem, p, stream)) return;

  KernelEntry query_entries[kVariants], key_entries[kVariants], accumulating[kVariants] = {};
  visit_types(problem, [&](auto element, auto head_dim) {
    using Element = decltype(element);
    for (Variant v : {Variant::wide, Variant::narrow}) {
      query_entries[int(v)] = query_gradient_entry<Element, head_dim()>(v);
      key_entries[int(v)] = key_gradient_entry<Element, head_dim()>(v);
      if constexpr (sizeof(Element) == 2) accumulating[int(v)] = accumulating_entry<Element, head_dim()>(v);
    }
  });
  launch_statistics(arguments, p, stream);

  const int64_t before = (statistics_bytes(problem) + partial_bytes(problem) + 15) / 16 * 16;
  const bool accumulate = (problem.flags & kDeterministic) == 0 && problem.type != ScalarType::float32 &&
                          accumulating[int(Variant::narrow)].shared_bytes <= shared_memory_limit() &&
                          arguments.workspace_bytes >= before + accumulator_bytes(problem);
  const int* given = problem.plan.values;
  const int plan_size = problem.plan.size;
  if (plan_size != 0 && plan_size != 2 && plan_size != 14)
    throw std::invalid_argument("fused_sm80: a backward plan has 1, 2, 14 or 15 numbers");
  if (accumulate) {
    p.accumulator =
        workspace_tensor(static_cast<char*>(arguments.workspace) + before, 4 * padded_head_dim(problem), problem);
    check_cuda(cudaMemsetAsync(p.accumulator.data, 0, accumulator_bytes(problem), stream), "fused_sm80 accumulators");
    const TilePlan tiles = plan(problem, Side::keys, accumulating, plan_size == 2 ? given[1] : -1);
    const KernelEntry& entry = accumulating[int(tiles.variant)];
    launch(entry, p, problem, Side::keys, tiles, 1, stream, "fused_sm80 gradient");
    if (problem.additional > 0) launch_additional(arguments, p, entry, stream);
    launch_convert(p, problem, stream);
    return;
  }
  const TilePlan key_plan = plan_size == 14 ? read_plan(given + 7, problem, Side::keys, key_entries)
                                            : plan(problem, Side::keys, key_entries, plan_size == 2 ? given[1] : -1);
  const KernelEntry& key_entry = key_entries[int(key_plan.variant)];
  launch(key_entry, p, problem, Side::keys, key_plan, 1, stream, "fused_sm80 key gradient");
  if (problem.additional > 0) launch_additional(arguments, p, key_entry, stream);
  const TilePlan query_plan = plan_size == 14
                                  ? read_plan(given, problem, Side::queries, query_entries)
                                  : plan(problem, Side::queries, query_entries, plan_size == 2 ? given[0] : -1);
  launch(query_entries[int(query_plan.variant)], p, problem, Side::queries, query_plan, 1, stream,
         "fused_sm80 query gradient");
}

}  // namespace natten::fused_sm80
