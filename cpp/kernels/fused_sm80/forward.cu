#include "kernels/families.h"
#include "kernels/fused_sm80/host.h"

namespace natten::fused_sm80 {

namespace {

// problem.plan, when given: variant; or variant, query tile (3), key box (3).
TilePlan forward_plan(const Problem& problem, const KernelEntry (&entries)[kVariants]) {
  if (problem.plan.size == 0) return plan(problem, Side::queries, entries);
  if (problem.plan.size == 1) return plan(problem, Side::queries, entries, problem.plan.values[0]);
  if (problem.plan.size != 7) throw std::invalid_argument("fused_sm80: a forward plan has 1 or 7 numbers");
  return read_plan(problem.plan.values, problem, Side::queries, entries);
}

void forward_entries(const Problem& problem, KernelEntry (&entries)[kVariants]) {
  visit_types(problem, [&](auto element, auto head_dim) {
    for (Variant v : {Variant::wide, Variant::narrow})
      entries[int(v)] = forward_entry<decltype(element), head_dim()>(v);
  });
}

}  // namespace

std::vector<int> forward_plan(const Problem& problem) {
  KernelEntry entries[kVariants];
  forward_entries(problem, entries);
  const TilePlan tiles = forward_plan(problem, entries);
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
  KernelEntry entries[kVariants];
  forward_entries(problem, entries);
  const TilePlan tiles = forward_plan(problem, entries);
  launch(entries[int(tiles.variant)], p, problem, Side::queries, tiles, 1, static_cast<cudaStream_t>(stream),
         "fused_sm80 forward");
}

}  // namespace natten::fused_sm80
