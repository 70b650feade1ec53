// na_forward and na_backward: fused neighborhood attention.
#include "ops/operators.h"

#include "kernels/families.h"
#include "ops/convert.h"

namespace natten::ops {
namespace {

// Sizes of a [B, axes..., H, C] tensor with some of them replaced.
std::vector<int64_t> with_last_two(const Tensor& like, int64_t heads, int64_t channels) {
  const auto sizes = like.sizes();
  std::vector<int64_t> result(sizes.begin(), sizes.end());
  result[result.size() - 2] = heads;
  result[result.size() - 1] = channels;
  return result;
}

std::vector<int64_t> without_channels(const Tensor& like) {
  const auto sizes = like.sizes();
  return {sizes.begin(), sizes.end() - 1};
}

Problem make_problem(const Tensor& query, const Tensor& key, const Tensor& value,
                     const std::optional<Tensor>& additional_keys, const std::optional<Tensor>& additional_values,
                     const std::vector<int64_t>& window, double scale, int64_t flags,
                     const std::vector<int64_t>& plan) {
  Problem problem{};
  const int rank = int(window.size() / 7);
  check(query.dim() == rank + 3 && key.dim() == rank + 3 && value.dim() == rank + 3, "query, key and value must have ",
        rank + 3, " dimensions for a window of rank ", rank);
  problem.type = scalar_type(query, "query");
  problem.batch = query.size(0);
  problem.heads = int(query.size(rank + 1));
  problem.head_dim = int(query.size(rank + 2));
  problem.heads_kv = int(key.size(rank + 1));
  problem.head_dim_v = int(value.size(rank + 2));
  check(problem.heads_kv >= 1 && problem.heads % problem.heads_kv == 0, "key heads must divide query heads, found ",
        problem.heads_kv, " and ", problem.heads);
  std::vector<int64_t> key_sizes = with_last_two(key, problem.heads_kv, problem.head_dim);
  key_sizes[0] = problem.batch;
  check_like(key, "key", key_sizes, query);
  check_like(value, "value", with_last_two(key, problem.heads_kv, problem.head_dim_v), query);
  check(additional_keys.has_value() == additional_values.has_value(),
        "additional_keys and additional_values go together");
  if (additional_keys) {
    check(additional_keys->dim() == 4, "additional_keys must have 4 dimensions");
    problem.additional = additional_keys->size(1);
    check_like(*additional_keys, "additional_keys",
               {problem.batch, problem.additional, problem.heads_kv, problem.head_dim}, query);
    check_like(*additional_values, "additional_values",
               {problem.batch, problem.additional, problem.heads_kv, problem.head_dim_v}, query);
  }
  const auto q_sizes = query.sizes(), kv_sizes = key.sizes();
  fill_window(problem, window, q_sizes.begin() + 1, kv_sizes.begin() + 1);
  fill_plan(problem, plan);
  check_keys_present(problem);
  problem.scale = scale;
  problem.flags = int(flags);
  return problem;
}

}  // namespace

void na_forward(const Tensor query, const Tensor key, const Tensor value, const std::optional<Tensor> additional_keys,
                const std::optional<Tensor> additional_values, Tensor out, Tensor logsumexp,
                const std::vector<int64_t> window, double scale, int64_t kernel, int64_t flags,
                const std::vector<int64_t> plan) {
  ForwardArguments arguments{};
  Problem& problem = arguments.problem;
  problem = make_problem(query, key, value, additional_keys, additional_values, window, scale, flags, plan);
  check_like(out, "out", with_last_two(query, problem.heads, problem.head_dim_v), query);
  check_logsumexp(logsumexp, "logsumexp", without_channels(query), query);
  const int rank = problem.rank;
  arguments.query = view(query, rank, Channel::present);
  arguments.key = view(key, rank, Channel::present);
  arguments.value = view(value, rank, Channel::present);
  arguments.additional_keys = additional_view(additional_keys);
  arguments.additional_values = additional_view(additional_values);
  arguments.out = view(out, rank, Channel::present);
  arguments.logsumexp = view(logsumexp, rank, Channel::absent);
  if (out.numel() == 0) return;
  launch(kernel, query,
         {.cpu_naive = [&] { cpu_naive::forward(arguments); },
          .cpu = [&] { cpu::forward(arguments); },
          .naive = NATTEN_NAIVE(forward(arguments, stream)),
          .fused_sm80 = NATTEN_FUSED_SM80(forward(arguments, stream)),
          .fused_sm90 = NATTEN_FUSED_SM90(forward(arguments, stream))});
}

void na_backward(const Tensor grad_out, const std::optional<Tensor> grad_logsumexp, const Tensor query,
                 const Tensor key, const Tensor value, const std::optional<Tensor> additional_keys,
                 const std::optional<Tensor> additional_values, const Tensor out, const Tensor logsumexp,
                 Tensor grad_query, Tensor grad_key, Tensor grad_value, std::optional<Tensor> grad_additional_keys,
                 std::optional<Tensor> grad_additional_values, std::optional<Tensor> workspace,
                 const std::vector<int64_t> window, double scale, int64_t kernel, int64_t flags,
                 const std::vector<int64_t> plan) {
  BackwardArguments arguments{};
  Problem& problem = arguments.problem;
  problem = make_problem(query, key, value, additional_keys, additional_values, window, scale, flags, plan);
  const std::vector<int64_t> out_sizes = with_last_two(query, problem.heads, problem.head_dim_v);
  const auto sizes_of = [](const Tensor& tensor) {
    const auto sizes = tensor.sizes();
    return std::vector<int64_t>(sizes.begin(), sizes.end());
  };
  check_like(out, "out", out_sizes, query);
  check_like(grad_out, "grad_out", out_sizes, query);
  check_logsumexp(logsumexp, "logsumexp", without_channels(query), query);
  if (grad_logsumexp) check_logsumexp(*grad_logsumexp, "grad_logsumexp", without_channels(query), query);
  check_like(grad_query, "grad_query", sizes_of(query), query);
  check_like(grad_key, "grad_key", sizes_of(key), query);
  check_like(grad_value, "grad_value", sizes_of(value), query);
  check(grad_additional_keys.has_value() == additional_keys.has_value() &&
            grad_additional_values.has_value() == additional_values.has_value(),
        "gradients of the additional keys and values are wanted exactly when these are given");
  if (additional_keys) {
    check_like(*grad_additional_keys, "grad_additional_keys", sizes_of(*additional_keys), query);
    check_like(*grad_additional_values, "grad_additional_values", sizes_of(*additional_values), query);
  }
  const int rank = problem.rank;
  arguments.grad_out = view(grad_out, rank, Channel::present);
  arguments.grad_logsumexp = view(grad_logsumexp, rank, Channel::absent);
  arguments.query = view(query, rank, Channel::present);
  arguments.key = view(key, rank, Channel::present);
  arguments.value = view(value, rank, Channel::present);
  arguments.additional_keys = additional_view(additional_keys);
  arguments.additional_values = additional_view(additional_values);
  arguments.out = view(out, rank, Channel::present);
  arguments.logsumexp = view(logsumexp, rank, Channel::absent);
  arguments.grad_query = view(grad_query, rank, Channel::present);
  arguments.grad_key = view(grad_key, rank, Channel::present);
  arguments.grad_value = view(grad_value, rank, Channel::present);
  arguments.grad_additional_keys = additional_view(grad_additional_keys);
  arguments.grad_additional_values = additional_view(grad_additional_values);
  if (workspace) {
    check(workspace->is_contiguous(), "workspace must be contiguous");
    check(workspace->is_cuda() == query.is_cuda(), "workspace must be on the device of query");
    arguments.workspace = workspace->mutable_data_ptr();
    arguments.workspace_bytes = workspace->numel() * int64_t(workspace->element_size());
  }
  if (problem.batch == 0) return;
  launch(kernel, query,
         {.cpu_naive = [&] { cpu_naive::backward(arguments); },
          .cpu = [&] { cpu::backward(arguments); },
          .naive = NATTEN_NAIVE(backward(arguments, stream)),
          .fused_sm80 = NATTEN_FUSED_SM80(backward(arguments, stream)),
          .fused_sm90 = NATTEN_FUSED_SM90(backward(arguments, stream))});
}

}  // namespace natten::ops
