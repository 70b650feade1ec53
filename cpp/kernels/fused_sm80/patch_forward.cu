#include "kernels/fused_sm80/patch_forward.h"

#include <algorithm>
#include <cmath>

#include "kernels/fused_sm80/host.h"

namespace natten::fused_sm80 {

namespace {

constexpr int kElementBytes = 2;
constexpr int kMostHeadDim = 64;

int patch_head_dim(const Problem& problem) { return max_int(problem.head_dim, problem.head_dim_v) <= 32 ? 32 : 64; }

PatchEntry find_entry(const Problem& problem, bool single) {
  const bool half = problem.type == ScalarType::float16;
  if (patch_head_dim(problem) == 32)
    return half ? patch_forward_entry<__half, 32>(single) : patch_forward_entry<__nv_bfloat16, 32>(single);
  return half ? patch_forward_entry<__half, 64>(single) : patch_forward_entry<__nv_bfloat16, 64>(single);
}

PatchKernels describe_kernels(const Problem& problem) {
  const PatchEntry entry = find_entry(problem, true);
  return {patch_head_dim(problem), entry.row_bytes, entry.own_bytes, shared_memory_limit()};
}

PatchTensor make_patch_tensor(const TensorView& view, const Problem& problem, int element_bytes) {
  PatchTensor t{static_cast<char*>(view.data), view.batch_stride * element_bytes, view.head_stride * element_bytes};
  for (int a = 0; a < kAxes; ++a) {
    t.axis[a] = view.axis_stride[a] * element_bytes;
    t.step[a] = int(t.axis[a] * problem.axis[a].dilation);
  }
  return t;
}

PatchParameters make_patch_parameters(const Problem& problem, const PatchPlan& plan, int row_bytes) {
  PatchParameters p{};
  double needed = 1;
  for (int a = 0; a < kAxes; ++a) {
    const Axis& axis = problem.axis[a];
    p.axis[a] = axis;
    p.dense[a] = make_group(axis, 0);
    p.groups[a] = Divisor(axis.dilation);
    p.tile_extent[a] = plan.patch[a] * plan.patches[a];
    p.tiles[a] = Divisor(ceil_div(longest_group(axis, Side::queries), p.tile_extent[a]));
    p.slab_extent[a] = plan.slab[a];
    needed *= p.tile_extent[a] + p.dense[a].kernel_size - 1;
  }
  p.heads = problem.heads;
  p.set_heads = plan.set_heads;
  p.head_sets = Divisor(ceil_div(problem.heads, plan.set_heads));
  p.heads_innermost =
      needed * problem.heads * (problem.head_dim + problem.head_dim_v) * kElementBytes < kHeadsInnermostBytes;
  p.heads_per_kv = Divisor(problem.heads / problem.heads_kv);
  p.patch = tile::make_patch(plan.patch);
  p.patches = tile::make_patch(plan.patches);
  p.slab_axis = plan.slab_axis;
  p.slab_y = Divisor(plan.slab[1]);
  p.slab_z = Divisor(plan.slab[2]);
  p.slab_line = plan.slab_line;
  p.slabs = plan.slabs;
  p.slab_tokens = plan.slab_tokens();
  p.slab_bytes = plan.slab_rows() * row_bytes;
  p.head_dim = problem.head_dim;
  p.head_dim_v = problem.head_dim_v;
  p.scale = float(problem.scale);
  p.scale_log2 = float(problem.scale * 1.4426950408889634);
  return p;
}

}  // namespace

bool has_patches(const Problem& problem) {
  return (problem.type == ScalarType::float16 || problem.type == ScalarType::bfloat16) && problem.additional == 0 &&
         max_int(problem.head_dim, problem.head_dim_v) <= kMostHeadDim && !no_queries(problem);
}

double plan_patches(const Problem& problem, PatchPlan& plan) {
  return choose_patch_plan(plan, problem, describe_kernels(problem));
}

PatchPlan read_patch_plan(const int* values, const Problem& problem) {
  PatchPlan plan{};
  std::copy(values, values + kAxes, plan.patch);
  std::copy(values + kAxes, values + 2 * kAxes, plan.patches);
  plan.slab_step = values[6];
  plan.set_heads = values[7];
  if (!has_patches(problem) || !complete_patch_plan(plan, problem, describe_kernels(problem)))
    throw std::invalid_argument("fused_sm80: the plan does not fit the kernel");
  return plan;
}

bool patches_reach(const PatchPlan& plan, const ForwardArguments& arguments) {
  const Problem& problem = arguments.problem;
  for (const TensorView* view : {&arguments.query, &arguments.key, &arguments.value, &arguments.out}) {
    double bytes = 0;
    for (int a = 0; a < kAxes; ++a) {
      const int extent = max_int(plan.slab[a], plan.patch[a] * plan.patches[a]);
      bytes += double(extent) * view->axis_stride[a] * problem.axis[a].dilation * kElementBytes;
    }
    if (bytes > INT32_MAX) return false;
  }
  return true;
}

void forward_in_patches(const PatchPlan& plan, const ForwardArguments& arguments, cudaStream_t stream) {
  constexpr const char* kName = "fused_sm80 forward in patches";
  const Problem& problem = arguments.problem;
  const PatchEntry entry = find_entry(problem, plan.single);
  PatchParameters p = make_patch_parameters(problem, plan, entry.row_bytes);
  p.tensor[PatchParameters::kQuery] = make_patch_tensor(arguments.query, problem, kElementBytes);
  p.tensor[PatchParameters::kKey] = make_patch_tensor(arguments.key, problem, kElementBytes);
  p.tensor[PatchParameters::kValue] = make_patch_tensor(arguments.value, problem, kElementBytes);
  p.tensor[PatchParameters::kOut] = make_patch_tensor(arguments.out, problem, kElementBytes);
  p.tensor[PatchParameters::kLogsumexp] = make_patch_tensor(arguments.logsumexp, problem, sizeof(float));
  const PatchTensor &key = p.tensor[PatchParameters::kKey], &value = p.tensor[PatchParameters::kValue];
  p.same_steps = std::equal(key.step, key.step + kAxes, value.step);
  int64_t blocks = problem.batch * p.head_sets.value;
  for (int a = 0; a < kAxes; ++a) blocks *= int64_t(p.tiles[a].value) * problem.axis[a].dilation;
  const int bytes = patch_shared_bytes(plan, describe_kernels(problem), p.same_steps);
  allow_shared_memory(entry.function, bytes, kName);
  entry.function<<<grid_size(blocks, kName), plan.warps() * 32, bytes, stream>>>(p);
  check_launch(kName);
}

}  // namespace natten::fused_sm80
