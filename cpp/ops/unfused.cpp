// na_qk, na_av, na_inverse_av: the unfused operators, and the gradient of the relative positional bias.
#include "kernels/families.h"
#include "ops/convert.h"
#include "ops/operators.h"

namespace natten::ops {
namespace {

// `queries` and `keys` are [B, axes..., H, C]; they give the two grids and the head counts.
Problem make_problem(const Tensor& queries, const Tensor& keys, const std::vector<int64_t>& window, double scale,
                     int64_t flags, const std::vector<int64_t>& plan) {
  Problem problem{};
  const int rank = int(window.size() / 7);
  check(queries.dim() == rank + 3 && keys.dim() == rank + 3, "tensors must have ", rank + 3,
        " dimensions for a window of rank ", rank);
  const auto q_sizes = queries.sizes(), kv_sizes = keys.sizes();
  check(q_sizes[0] == kv_sizes[0], "batch sizes differ: ", q_sizes[0], " and ", kv_sizes[0]);
  problem.type = scalar_type(queries, "the first argument");
  problem.batch = q_sizes[0];
  problem.heads = int(q_sizes[rank + 1]);
  problem.heads_kv = int(kv_sizes[rank + 1]);
  check(problem.heads_kv >= 1 && problem.heads % problem.heads_kv == 0, "key heads must divide query heads, found ",
        problem.heads_kv, " and ", problem.heads);
  fill_window(problem, window, q_sizes.begin() + 1, kv_sizes.begin() + 1);
  fill_plan(problem, plan);
  check_keys_present(problem);
  problem.scale = scale;
  problem.flags = int(flags);
  return problem;
}

// `tensor` has the sizes of `grid`, but for its last dimension.
void check_channels(const Tensor& tensor, const char* name, const Tensor& grid, int64_t channels) {
  const auto sizes = grid.sizes();
  std::vector<int64_t> expected(sizes.begin(), sizes.end());
  expected.back() = channels;
  check_like(tensor, name, expected, grid);
}

void check_slots(const Problem& problem, const Tensor& attention, int64_t slots) {
  check(attention.size(problem.rank + 2) == slots, "attention must have ", slots,
        " window slots in its last dimension, found ", attention.size(problem.rank + 2));
}

}  // namespace

void na_qk(const Tensor query, const Tensor key, const std::optional<Tensor> rpb, Tensor attention,
           const std::vector<int64_t> window, double scale, int64_t kernel, int64_t flags,
           const std::vector<int64_t> plan) {
  UnfusedArguments arguments{};
  Problem& problem = arguments.problem;
  problem = make_problem(query, key, window, scale, flags, plan);
  problem.head_dim = problem.head_dim_v = int(query.size(problem.rank + 2));
  check_channels(key, "key", key, problem.head_dim);
  check_like(key, "key", {key.sizes().begin(), key.sizes().end()}, query);
  check_channels(attention, "attention", query, fill_slots(problem, arguments.slots));
  if (rpb) {
    std::vector<int64_t> sizes{problem.heads};
    for (int a = kAxes - problem.rank; a < kAxes; ++a) {
      const Axis& axis = problem.axis[a];
      check(!axis.causal && axis.stride == 1 && axis.kernel_size > 0,
            "rpb does not go with causal axes, stride > 1 or kernel_size -1");
      sizes.push_back(2 * axis.kernel_size - 1);
    }
    check_like(*rpb, "rpb", sizes, query);
    check(rpb->is_contiguous(), "rpb must be contiguous");
    arguments.rpb = rpb->const_data_ptr();
  }
  arguments.a = view(query, problem.rank, Channel::present);
  arguments.b = view(key, problem.rank, Channel::present);
  arguments.c = view(attention, problem.rank, Channel::present);
  if (attention.numel() == 0) return;
  launch(kernel, query,
         {.cpu_naive = [&] { cpu_naive::qk(arguments); },
          .cpu = [&] { cpu::qk(arguments); },
          .naive = NATTEN_NAIVE(qk(arguments, stream)),
          .gemm = NATTEN_GEMM(qk(arguments, stream))});
}

void na_av(const Tensor attention, const Tensor value, Tensor out, const std::vector<int64_t> window, double scale,
           int64_t kernel, int64_t flags, const std::vector<int64_t> plan) {
  UnfusedArguments arguments{};
  Problem& problem = arguments.problem;
  problem = make_problem(attention, value, window, scale, flags, plan);
  problem.head_dim = problem.head_dim_v = int(value.size(problem.rank + 2));
  check_like(value, "value", {value.sizes().begin(), value.sizes().end()}, attention);
  check_slots(problem, attention, fill_slots(problem, arguments.slots));
  check_channels(out, "out", attention, problem.head_dim);
  arguments.a = view(attention, problem.rank, Channel::present);
  arguments.b = view(value, problem.rank, Channel::present);
  arguments.c = view(out, problem.rank, Channel::present);
  if (out.numel() == 0) return;
  launch(kernel, attention,
         {.cpu_naive = [&] { cpu_naive::av(arguments); },
          .cpu = [&] { cpu::av(arguments); },
          .naive = NATTEN_NAIVE(av(arguments, stream)),
          .gemm = NATTEN_GEMM(av(arguments, stream))});
}

void na_inverse_av(const Tensor attention, const Tensor input, Tensor out, const std::vector<int64_t> window,
                   double scale, int64_t kernel, int64_t flags, const std::vector<int64_t> plan) {
  UnfusedArguments arguments{};
  Problem& problem = arguments.problem;
  problem = make_problem(attention, out, window, scale, flags, plan);
  problem.head_dim = problem.head_dim_v = int(out.size(problem.rank + 2));
  check_like(out, "out", {out.sizes().begin(), out.sizes().end()}, attention);
  check_slots(problem, attention, fill_slots(problem, arguments.slots));
  check_channels(input, "input", attention, problem.head_dim);
  arguments.a = view(attention, problem.rank, Channel::present);
  arguments.b = view(input, problem.rank, Channel::present);
  arguments.c = view(out, problem.rank, Channel::present);
  if (out.numel() == 0) return;
  launch(kernel, attention,
         {.cpu_naive = [&] { cpu_naive::inverse_av(arguments); },
          .cpu = [&] { cpu::inverse_av(arguments); },
          .naive = NATTEN_NAIVE(inverse_av(arguments, stream)),
          .gemm = NATTEN_GEMM(inverse_av(arguments, stream))});
}

void na_rpb_backward(const Tensor grad_attention, Tensor grad_rpb, const std::vector<int64_t> window, int64_t kernel,
                     int64_t flags, const std::vector<int64_t> plan) {
  RpbBackwardArguments arguments{};
  Problem& problem = arguments.problem;
  check(!window.empty() && window.size() % 7 == 0 && grad_attention.dim() == int64_t(window.size() / 7) + 3,
        "grad_attention must have as many axes as the window");
  // Keys take no part here: describe them as the whole grid.
  std::vector<int64_t> whole = window, kv_grid;
  for (size_t a = 0; a < window.size(); a += 7) {
    whole[a + 5] = 0;
    kv_grid.push_back(window[a + 6]);
  }
  fill_window(problem, whole, grad_attention.sizes().begin() + 1, kv_grid.data());
  fill_plan(problem, plan);
  problem.type = scalar_type(grad_attention, "grad_attention");
  problem.batch = grad_attention.size(0);
  problem.heads = problem.heads_kv = int(grad_attention.size(problem.rank + 1));
  problem.scale = 1.0;
  problem.flags = int(flags);
  check_slots(problem, grad_attention, fill_slots(problem, arguments.slots));
  std::vector<int64_t> sizes{problem.heads};
  for (int a = kAxes - problem.rank; a < kAxes; ++a) {
    const Axis& axis = problem.axis[a];
    check(!axis.causal && axis.stride == 1 && axis.kernel_size > 0,
          "rpb does not go with causal axes, stride > 1 or kernel_size -1");
    sizes.push_back(2 * axis.kernel_size - 1);
  }
  check_like(grad_rpb, "grad_rpb", sizes, grad_attention);
  check(grad_rpb.is_contiguous(), "grad_rpb must be contiguous");
  arguments.grad_attention = view(grad_attention, problem.rank, Channel::present);
  arguments.grad_rpb = grad_rpb.mutable_data_ptr();
  launch(kernel, grad_attention,
         {.cpu_naive = [&] { cpu_naive::rpb_backward(arguments); },
          .naive = NATTEN_NAIVE(rpb_backward(arguments, stream))});
}

}  // namespace natten::ops
