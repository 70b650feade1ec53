// Schemas and registration under torch.ops.natten, through torch's stable ABI.
#include <torch/csrc/stable/library.h>

#include <string>

#include "kernels/families.h"
#include "ops/convert.h"
#include "ops/operators.h"
#include "window/planner.h"

namespace natten::ops {

void launch(int64_t kernel, const Tensor& tensor, const Implementations& implementations) {
  const auto run_on_cpu = [&](const std::function<void()>& implementation, const char* name) {
    check(bool(implementation), "kernel ", name, " does not implement this operator");
    check(tensor.is_cpu(), "kernel ", name, " takes CPU tensors");
    implementation();
  };
  const auto run_on_cuda = [&](const std::function<void(void*)>& implementation, const char* name) {
    check(bool(implementation), "kernel ", name,
          " does not implement this operator, or was not built into this library (see `python -m natten info`)");
    check(tensor.is_cuda(), "kernel ", name, " takes CUDA tensors");
    const CudaScope scope(tensor);
    implementation(scope.stream());
  };
  switch (static_cast<Kernel>(kernel)) {
    case Kernel::cpu_naive:
      return run_on_cpu(implementations.cpu_naive, "cpu_naive");
    case Kernel::cpu:
      return run_on_cpu(implementations.cpu, "cpu");
    case Kernel::naive:
      return run_on_cuda(implementations.naive, "naive");
    case Kernel::gemm:
      return run_on_cuda(implementations.gemm, "gemm");
    case Kernel::fused_sm80:
      return run_on_cuda(implementations.fused_sm80, "fused_sm80");
    case Kernel::fused_sm90:
      return run_on_cuda(implementations.fused_sm90, "fused_sm90");
  }
  check(false, "there is no kernel ", kernel);
}

// [version of the operators, CUDA architectures (bit 0: sm_80, 1: sm_86, 2: sm_90a), CUDA compiler version,
//  CPU instruction set (0: baseline, 1: AVX2, 2: AVX-512)]
std::vector<int64_t> build_info() {
  int64_t architectures = 0, cuda_version = 0;
#if defined(NATTEN_CUDA_ARCHITECTURE_MASK)
  architectures = NATTEN_CUDA_ARCHITECTURE_MASK;
  cuda_version = NATTEN_CUDA_VERSION;
#endif
  const std::string set = cpu::instruction_set();
  return {1, architectures, cuda_version, set == "avx512" ? 2 : set == "avx2" ? 1 : 0};
}

// What a kernel would choose for the forward pass of a problem: the numbers of its `plan`, empty where it has none.
// CUDA kernels plan for the current device.
std::vector<int64_t> forward_plan(int64_t kernel, const std::vector<int64_t> window, const std::vector<int64_t> q_grid,
                                  const std::vector<int64_t> kv_grid, int64_t batch, int64_t heads, int64_t heads_kv,
                                  int64_t head_dim, int64_t head_dim_v, int64_t additional, int64_t type,
                                  int64_t flags) {
  Problem problem{};
  check(q_grid.size() == window.size() / 7 && kv_grid.size() == window.size() / 7, "one grid extent for each axis");
  check(heads >= 1 && heads_kv >= 1 && heads % heads_kv == 0, "key heads must divide query heads");
  check(type >= 0 && type <= int64_t(ScalarType::bfloat16), "there is no type ", type);
  fill_window(problem, window, q_grid.data(), kv_grid.data());
  problem.batch = batch;
  problem.heads = int(heads);
  problem.heads_kv = int(heads_kv);
  problem.head_dim = int(head_dim);
  problem.head_dim_v = int(head_dim_v);
  problem.additional = additional;
  problem.type = static_cast<ScalarType>(type);
  problem.flags = int(flags);
  problem.scale = 1;  // plans do not depend on it
  std::vector<int> plan;
  switch (static_cast<Kernel>(kernel)) {
    case Kernel::cpu:
      plan = cpu::forward_plan(problem);
      break;
#if defined(NATTEN_WITH_FUSED_SM80)
    case Kernel::fused_sm80:
      plan = fused_sm80::forward_plan(problem);
      break;
#endif
#if defined(NATTEN_WITH_FUSED_SM90)
    case Kernel::fused_sm90:
      plan = fused_sm90::forward_plan(problem);
      break;
#endif
    default:
      break;
  }
  return {plan.begin(), plan.end()};
}

// The planner's choice [q tile (3), key box (3)] for tiles of that many tokens; leading axes that the rank lacks
// hold 1.
std::vector<int64_t> plan_tiles(const std::vector<int64_t> window, const std::vector<int64_t> q_grid,
                                const std::vector<int64_t> kv_grid, int64_t q_tokens, int64_t kv_tokens,
                                int64_t kv_innermost, double partial_charge) {
  Problem problem{};
  check(q_grid.size() == window.size() / 7 && kv_grid.size() == window.size() / 7, "one grid extent for each axis");
  for (const int64_t tokens : {q_tokens, kv_tokens, kv_innermost})
    check(tokens >= 1 && tokens <= 256 && (tokens & (tokens - 1)) == 0, "token counts are powers of two up to 256");
  fill_window(problem, window, q_grid.data(), kv_grid.data());
  const TileShape shape =
      natten::plan_tiles(problem.axis, {int(q_tokens), int(kv_tokens), int(kv_innermost), partial_charge});
  return {shape.q[0], shape.q[1], shape.q[2], shape.kv[0], shape.kv[1], shape.kv[2]};
}

}  // namespace natten::ops

#define NATTEN_WINDOW "SymInt[] window, float scale, int kernel, int flags, int[] plan"

STABLE_TORCH_LIBRARY_FRAGMENT(natten, m) {
  m.def(
      "na_forward(Tensor query, Tensor key, Tensor value, Tensor? additional_keys, Tensor? additional_values, "
      "Tensor(a!) out, Tensor(b!) logsumexp, " NATTEN_WINDOW ") -> ()");
  m.def(
      "na_backward(Tensor grad_out, Tensor? grad_logsumexp, Tensor query, Tensor key, Tensor value, "
      "Tensor? additional_keys, Tensor? additional_values, Tensor out, Tensor logsumexp, "
      "Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value, Tensor(d!)? grad_additional_keys, "
      "Tensor(e!)? grad_additional_values, Tensor(f!)? workspace, " NATTEN_WINDOW ") -> ()");
  m.def("na_qk(Tensor query, Tensor key, Tensor? rpb, Tensor(a!) attention, " NATTEN_WINDOW ") -> ()");
  m.def("na_av(Tensor attention, Tensor value, Tensor(a!) out, " NATTEN_WINDOW ") -> ()");
  m.def("na_inverse_av(Tensor attention, Tensor input, Tensor(a!) out, " NATTEN_WINDOW ") -> ()");
  m.def(
      "na_rpb_backward(Tensor grad_attention, Tensor(a!) grad_rpb, SymInt[] window, int kernel, int flags, "
      "int[] plan) -> ()");
  m.def("build_info() -> int[]");
  m.def(
      "plan_tiles(SymInt[] window, SymInt[] q_grid, SymInt[] kv_grid, int q_tokens, int kv_tokens, int kv_innermost, "
      "float partial_charge) -> int[]");
  m.def(
      "forward_plan(int kernel, SymInt[] window, SymInt[] q_grid, SymInt[] kv_grid, int batch, int heads, int "
      "heads_kv, "
      "int head_dim, int head_dim_v, int additional, int type, int flags) -> int[]");
}

#define NATTEN_IMPLEMENT(m)                                        \
  m.impl("na_forward", TORCH_BOX(&natten::ops::na_forward));       \
  m.impl("na_backward", TORCH_BOX(&natten::ops::na_backward));     \
  m.impl("na_qk", TORCH_BOX(&natten::ops::na_qk));                 \
  m.impl("na_av", TORCH_BOX(&natten::ops::na_av));                 \
  m.impl("na_inverse_av", TORCH_BOX(&natten::ops::na_inverse_av)); \
  m.impl("na_rpb_backward", TORCH_BOX(&natten::ops::na_rpb_backward))

STABLE_TORCH_LIBRARY_IMPL(natten, CPU, m) { NATTEN_IMPLEMENT(m); }
STABLE_TORCH_LIBRARY_IMPL(natten, CUDA, m) { NATTEN_IMPLEMENT(m); }
STABLE_TORCH_LIBRARY_IMPL(natten, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&natten::ops::build_info));
  m.impl("plan_tiles", TORCH_BOX(&natten::ops::plan_tiles));
  m.impl("forward_plan", TORCH_BOX(&natten::ops::forward_plan));
}
