#include "kernels/fused_sm90/forward.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <iterator>
#include <stdexcept>
#include <string>

#include "kernels/families.h"
#include "kernels/fused_sm90/config.h"
#include "kernels/fused_sm90/kernel.h"
#include "kernels/fused_sm90/kernels.h"
#include "kernels/fused_sm90/maps.h"
#include "kernels/fused_sm90/planner.h"
#include "kernels/launch.h"

namespace natten::fused_sm90 {

namespace {

constexpr char kName[] = "fused_sm90 forward";

// Key boxes come x fastest: that is where masks are cheapest to update, and where warpgroups that lie side by side run
// least out of step when each skips the boxes that only others need. So x takes the place of y where that helps.
void exchange_x_and_y(ForwardArguments* a, Schedule* s) {
  std::swap(a->problem.axis[0], a->problem.axis[1]);
  for (TensorView* view : {&a->query, &a->key, &a->value, &a->out, &a->logsumexp}) {
    std::swap(view->axis_stride[0], view->axis_stride[1]);
  }
  std::swap(s->warpgroup_box[0], s->warpgroup_box[1]);
  std::swap(s->key_box[0], s->key_box[1]);
  if (s->pair_axis < 2) s->pair_axis = 1 - s->pair_axis;
}

struct FoldedTensors {
  FoldedTensor query, key, value, out, additional_key, additional_value;
};

const char* fold_all(const ForwardArguments& a, FoldedTensors* folded) {
  const Problem& p = a.problem;
  int q_length[kAxes], kv_length[kAxes], dilation[kAxes];
  for (int i = 0; i < kAxes; ++i) {
    q_length[i] = p.axis[i].q_length;
    kv_length[i] = p.axis[i].kv_length;
    dilation[i] = p.axis[i].dilation;
  }
  const char* why = fold(a.query, p.batch, p.heads, p.head_dim, q_length, dilation, &folded->query);
  if (!why) why = fold(a.key, p.batch, p.heads_kv, p.head_dim, kv_length, dilation, &folded->key);
  if (!why) why = fold(a.value, p.batch, p.heads_kv, p.head_dim_v, kv_length, dilation, &folded->value);
  if (!why) why = fold(a.out, p.batch, p.heads, p.head_dim_v, q_length, dilation, &folded->out);
  if (!why && p.additional > 0) {
    const int length[kAxes] = {1, 1, static_cast<int>(p.additional)}, dense[kAxes] = {1, 1, 1};
    why = fold(a.additional_keys, p.batch, p.heads_kv, p.head_dim, length, dense, &folded->additional_key);
    if (!why)
      why = fold(a.additional_values, p.batch, p.heads_kv, p.head_dim_v, length, dense, &folded->additional_value);
  }
  return why;
}

const char* check_problem(const Problem& p) {
  if (p.type != ScalarType::bfloat16 && p.type != ScalarType::float16) return "the element type is not a 16-bit float";
  for (int d : {p.head_dim, p.head_dim_v}) {
    if (d < 8 || d % 8 != 0 || d > kClasses[std::size(kClasses) - 1])
      return "a head dim is not a multiple of 8 up to 256";
  }
  const double scale_log2 = p.scale * 1.4426950408889634;
  // Masked scores must vanish after scaling.
  const double least = p.type == ScalarType::bfloat16 ? 0x1p-60 : 0x1p-20;
  if (!(scale_log2 > least && scale_log2 < 0x1p20)) return "the scale is not positive, or extreme";
  if (p.additional > INT32_MAX / 2) return "too many additional keys";
  return nullptr;
}

Parameters make_parameters(const ForwardArguments& a, const Schedule& s, const FoldedTensors& folded) {
  const Problem& problem = a.problem;
  Parameters p{};
  int64_t tiles = 1, radix[kDigits];
  for (int i = 0; i < kAxes; ++i) {
    p.axis[i] = problem.axis[i];
    p.warpgroup_box[i] = s.warpgroup_box[i];
    p.tile_box[i] = s.warpgroup_box[i] * (i == s.pair_axis ? s.warpgroups : 1);
    p.key_box[i] = s.key_box[i];
    radix[kTileX - i] = ceil_div(ceil_div(problem.axis[i].q_length, problem.axis[i].dilation), p.tile_box[i]);
    radix[kGroupX - i] = problem.axis[i].dilation;
  }
  radix[kHead] = problem.heads;
  radix[kBatch] = problem.batch;
  // Tiles come x fastest, as the boxes of a tile do: blocks that run together then read the same keys within a short
  // time, while those are in the L2 cache.
  constexpr Digit kOrder[kDigits] = {kTileX, kTileY, kTileZ, kGroupZ, kGroupY, kGroupX, kHead, kBatch};
  for (Digit d : kOrder) {
    p.digit_weight[d] = Divisor(static_cast<uint32_t>(tiles));
    p.digit_radix[d] = Divisor(static_cast<uint32_t>(radix[d]));
    tiles *= radix[d];
    if (tiles > INT32_MAX / 2) throw std::invalid_argument("natten: more than 2^30 tiles");
  }
  p.tiles = static_cast<int>(tiles);
  p.pair_axis = s.pair_axis;
  while (1 << p.log2_z < s.warpgroup_box[2]) ++p.log2_z;
  while (1 << p.log2_y < s.warpgroup_box[1]) ++p.log2_y;
  p.head_group = problem.heads / problem.heads_kv;

  p.query = folded.query.units;
  p.key = folded.key.units;
  p.value = folded.value.units;
  p.out = folded.out.units;
  p.additional_key = folded.additional_key.units;
  p.additional_value = folded.additional_value.units;
  p.additional = static_cast<int>(problem.additional);
  p.additional_steps = ceil_div(p.additional, s.keys);

  p.row_columns = s.key_box[2] / 8;
  p.plane_columns = s.key_box[1] * p.row_columns;
  for (int i = 0; i < s.key_box[0]; ++i) p.repeat_planes |= 1u << i * p.plane_columns;
  for (int i = 0; i < s.key_box[0] * s.key_box[1]; ++i) p.repeat_rows |= 1u << i * p.row_columns;

  p.scale_log2 = static_cast<float>(problem.scale * 1.4426950408889634);
  p.slack = 8.f / p.scale_log2;

  p.bias = masks_by_bias(problem, s);
  p.first_slot_y = s.warpgroup_box[0] > 1 ? s.warpgroup_box[0] : 0;
  // Masked scores are around -2^126 in bfloat16 and -2^31 in float16 by bias, -inf otherwise.
  p.lowest = p.bias && problem.type == ScalarType::float16 ? -0x1p30f : -0x1p100f;

  p.logsumexp = static_cast<float*>(a.logsumexp.data);
  std::copy(std::begin(a.logsumexp.axis_stride), std::end(a.logsumexp.axis_stride), p.logsumexp_axis);
  p.logsumexp_head = a.logsumexp.head_stride;
  p.logsumexp_batch = a.logsumexp.batch_stride;
  return p;
}

[[noreturn]] void refuse(const char* why) {
  throw std::invalid_argument(std::string("natten: the Hopper kernel cannot run this call: ") + why);
}

// Raises the kernel's shared memory limit, once per device.
void allow_shared_memory(const KernelInfo& kernel, int variant, ScalarType type, int device) {
  static std::atomic<uint64_t> allowed[2][std::size(kVariants)];
  std::atomic<uint64_t>& devices = allowed[type == ScalarType::float16][variant];
  const uint64_t bit = uint64_t{1} << (device % 64);
  if (device < 64 && devices.load(std::memory_order_relaxed) & bit) return;
  check_cuda(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes),
             kName);
  devices.fetch_or(bit, std::memory_order_relaxed);
}

int current_device() {
  int device;
  check_cuda(cudaGetDevice(&device), kName);
  return device;
}

int multiprocessor_count(int device) {
  int count;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), kName);
  return count;
}

}  // namespace

std::vector<int> forward_plan(const Problem& problem) {
  if (const char* why = check_problem(problem)) refuse(why);
  const Schedule s = choose_schedule(problem, multiprocessor_count(current_device()));
  return {s.keys,       s.warpgroups, s.blocks,     s.warpgroup_box[0], s.warpgroup_box[1], s.warpgroup_box[2],
          s.key_box[0], s.key_box[1], s.key_box[2], s.pair_axis};
}

const char* why_unsupported(const ForwardArguments& arguments) {
  FoldedTensors folded;
  const char* why = check_problem(arguments.problem);
  return why ? why : fold_all(arguments, &folded);
}

void forward(const ForwardArguments& arguments, void* stream) {
  if (no_queries(arguments.problem)) return;
  if (const char* why = check_problem(arguments.problem)) refuse(why);
  const int device = current_device(), multiprocessors = multiprocessor_count(device);
  ForwardArguments a = arguments;
  const Problem& problem = a.problem;
  Schedule schedule = choose_schedule(problem, multiprocessors);
  if (problem.rank == 2 || schedule.pair_axis == 1) exchange_x_and_y(&a, &schedule);
  FoldedTensors folded{};
  if (const char* why = fold_all(a, &folded)) refuse(why);

  const int head_dim = head_dim_class(std::max(problem.head_dim, problem.head_dim_v));
  const int variant = variant_index(head_dim, schedule);
  const KernelInfo kernel = problem.type == ScalarType::bfloat16 ? bfloat16_kernel(variant) : float16_kernel(variant);

  Parameters parameters = make_parameters(a, schedule, folded);
  const int chunk = chunk_channels(head_dim), additional_box[kAxes] = {1, 1, schedule.keys};
  Maps maps{};
  encode(folded.query, problem.type, chunk, schedule.warpgroup_box, maps.query);
  encode(folded.key, problem.type, chunk, schedule.key_box, maps.key);
  encode(folded.value, problem.type, chunk, schedule.key_box, maps.value);
  encode(folded.out, problem.type, chunk, schedule.warpgroup_box, maps.out);
  if (problem.additional > 0) {
    encode(folded.additional_key, problem.type, chunk, additional_box, maps.additional_key);
    encode(folded.additional_value, problem.type, chunk, additional_box, maps.additional_value);
  }

  allow_shared_memory(kernel, variant, problem.type, device);
  void* kernel_arguments[] = {&maps, &parameters};
  const int grid = std::min(parameters.tiles, multiprocessors * schedule.blocks);
  check_cuda(cudaLaunchKernel(kernel.function, dim3(grid), dim3(kernel.threads), kernel_arguments, kernel.shared_bytes,
                              static_cast<cudaStream_t>(stream)),
             kName);
}

}  // namespace natten::fused_sm90
