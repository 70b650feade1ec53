#include "kernels/families.h"
#include "kernels/fused_sm80/host.h"
#include "kernels/fused_sm80/patch_forward.h"

#include <algorithm>
#include <cstring>

namespace natten::fused_sm80 {

namespace {

void forward_entries(const Problem& problem, KernelEntry (&entries)[kVariants]) {
  visit_types(problem, [&](auto element, auto head_dim) {
    for (Variant v : {Variant::wide, Variant::narrow})
      entries[int(v)] = forward_entry<decltype(element), head_dim()>(v);
  });
}

// The forms of the forward pass. The first two are the variants of the form that walks boxes.
constexpr int kPatchForm = kVariants;
constexpr int kBoxNumbers = 7, kPatchNumbers = 9;

// Estimated milliseconds of the form that walks boxes on an H200, for head dims that patches take.
double estimate_boxes(const Problem& problem, const TilePlan& plan) {
  const double picoseconds = max_int(problem.head_dim, problem.head_dim_v) <= 32 ? 0.7 : 0.95;  // of a score
  constexpr double kTileNanoseconds = 6;
  double scores = plan.scores * problem.batch * problem.heads, tiles = double(problem.batch) * problem.heads;
  for (int a = 0; a < kAxes; ++a) {
    scores *= problem.axis[a].dilation;
    tiles *= double(ceil_div(longest_group(problem.axis[a], Side::queries), plan.owned[a])) * problem.axis[a].dilation;
  }
  return scores * picoseconds * 1e-9 + tiles * kTileNanoseconds * 1e-6;
}

struct ForwardPlan {
  bool in_patches;
  PatchPlan patches;
  TilePlan boxes;
};

ForwardPlan cheaper_form(const Problem& problem, const KernelEntry (&entries)[kVariants]) {
  ForwardPlan chosen{false, {}, plan(problem, Side::queries, entries)};
  const double time = plan_patches(problem, chosen.patches);
  chosen.in_patches = time >= 0 && time < estimate_boxes(problem, chosen.boxes);
  return chosen;
}

struct ForwardKey {  // compared as bytes: no padding
  int64_t batch, shared_bytes;
  Axis axis[kAxes];
  int heads, heads_kv, head_dim, head_dim_v, type;
};
static_assert(std::has_unique_object_representations_v<ForwardKey>);
struct ForwardCache {
  static constexpr int kEntries = 16;
  ForwardKey key[kEntries];
  ForwardPlan plan[kEntries];
  int filled, next;
};

// The cheaper form, remembered for the last problems of a thread that can be done in patches.
ForwardPlan remembered_plan(const Problem& problem, const KernelEntry (&entries)[kVariants]) {
  if (!has_patches(problem)) return {false, {}, plan(problem, Side::queries, entries)};
  thread_local ForwardCache cache{};
  ForwardKey key{};
  std::copy(problem.axis, problem.axis + kAxes, key.axis);
  key.batch = problem.batch;
  key.heads = problem.heads;
  key.heads_kv = problem.heads_kv;
  key.head_dim = problem.head_dim;
  key.head_dim_v = problem.head_dim_v;
  key.shared_bytes = shared_memory_limit();
  key.type = int(problem.type);
  for (int i = 0; i < cache.filled; ++i)
    if (std::memcmp(&cache.key[i], &key, sizeof key) == 0) return cache.plan[i];
  const ForwardPlan chosen = cheaper_form(problem, entries);
  const int at = cache.next++ % ForwardCache::kEntries;
  cache.filled = max_int(cache.filled, at + 1);
  cache.key[at] = key;
  return cache.plan[at] = chosen;
}

// problem.plan, when given: variant of boxes; or variant, query tile (3), key box (3); or kPatchForm, patch (3),
// patches of a tile (3), slab step, heads of a set.
ForwardPlan make_forward_plan(const Problem& problem, const KernelEntry (&entries)[kVariants]) {
  const Plan& given = problem.plan;
  if (given.size == 0) return remembered_plan(problem, entries);
  if (given.size == 1) return {false, {}, plan(problem, Side::queries, entries, given.values[0])};
  if (given.size == kBoxNumbers) return {false, {}, read_plan(given.values, problem, Side::queries, entries)};
  if (given.size == kPatchNumbers && given.values[0] == kPatchForm)
    return {true, read_patch_plan(given.values + 1, problem), {}};
  throw std::invalid_argument("fused_sm80: a forward plan has 1, 7 or 9 numbers");
}

}  // namespace

std::vector<int> forward_plan(const Problem& problem) {
  KernelEntry entries[kVariants];
  forward_entries(problem, entries);
  const ForwardPlan plan = make_forward_plan(problem, entries);
  if (plan.in_patches) {
    const PatchPlan& p = plan.patches;
    return {kPatchForm,   p.patch[0],   p.patch[1],  p.patch[2], p.patches[0],
            p.patches[1], p.patches[2], p.slab_step, p.set_heads};
  }
  const TilePlan& tiles = plan.boxes;
  return {int(tiles.variant), tiles.owned[0],  tiles.owned[1], tiles.owned[2],
          tiles.walked[0],    tiles.walked[1], tiles.walked[2]};
}

void forward(const ForwardArguments& arguments, void* stream) {
  const Problem& problem = arguments.problem;
  check_problem(problem);
  check_rows(arguments.query, problem, problem.head_dim, "query");
  check_rows(arguments.key, problem, problem.head_dim, "key");
  check_rows(arguments.value, problem, problem.head_dim_v, "value");
  check_rows(arguments.out, problem, problem.head_dim_v, "out");
  KernelEntry entries[kVariants];
  forward_entries(problem, entries);
  ForwardPlan chosen = make_forward_plan(problem, entries);
  if (chosen.in_patches && patches_reach(chosen.patches, arguments))
    return forward_in_patches(chosen.patches, arguments, static_cast<cudaStream_t>(stream));
  if (chosen.in_patches && problem.plan.size > 0)
    throw std::invalid_argument("fused_sm80: tiles of the plan span more than 2^31 bytes");
  const int bytes = element_bytes(problem);
  Parameters p = make_parameters(problem);
  p.query = make_tensor(arguments.query, problem, bytes);
  p.key = make_tensor(arguments.key, problem, bytes);
  p.value = make_tensor(arguments.value, problem, bytes);
  p.out = make_tensor(arguments.out, problem, bytes);
  p.logsumexp = make_tensor(arguments.logsumexp, problem, 4);
  if (problem.additional > 0) {
    check_rows(arguments.additional_keys, problem, problem.head_dim, "additional_keys");
    check_rows(arguments.additional_values, problem, problem.head_dim_v, "additional_values");
    p.additional_key = make_additional(arguments.additional_keys, bytes);
    p.additional_value = make_additional(arguments.additional_values, bytes);
  }
  const TilePlan& tiles = chosen.boxes;
  launch(entries[int(tiles.variant)], p, problem, Side::queries, tiles, 1, static_cast<cudaStream_t>(stream),
         "fused_sm80 forward");
}

}  // namespace natten::fused_sm80
