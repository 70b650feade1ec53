// The operators behind torch.ops.natten, and how each reaches a kernel family.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <functional>
#include <optional>
#include <vector>

#include "kernels/arguments.h"

namespace natten::ops {

using torch::stable::Tensor;

void na_forward(const Tensor query, const Tensor key, const Tensor value, const std::optional<Tensor> additional_keys,
                const std::optional<Tensor> additional_values, Tensor out, Tensor logsumexp,
                const std::vector<int64_t> window, double scale, int64_t kernel, int64_t flags,
                const std::vector<int64_t> plan);

void na_backward(const Tensor grad_out, const std::optional<Tensor> grad_logsumexp, const Tensor query,
                 const Tensor key, const Tensor value, const std::optional<Tensor> additional_keys,
                 const std::optional<Tensor> additional_values, const Tensor out, const Tensor logsumexp,
                 Tensor grad_query, Tensor grad_key, Tensor grad_value, std::optional<Tensor> grad_additional_keys,
                 std::optional<Tensor> grad_additional_values, std::optional<Tensor> workspace,
                 const std::vector<int64_t> window, double scale, int64_t kernel, int64_t flags,
                 const std::vector<int64_t> plan);

void na_qk(const Tensor query, const Tensor key, const std::optional<Tensor> rpb, Tensor attention,
           const std::vector<int64_t> window, double scale, int64_t kernel, int64_t flags,
           const std::vector<int64_t> plan);

void na_av(const Tensor attention, const Tensor value, Tensor out, const std::vector<int64_t> window, double scale,
           int64_t kernel, int64_t flags, const std::vector<int64_t> plan);

void na_inverse_av(const Tensor attention, const Tensor input, Tensor out, const std::vector<int64_t> window,
                   double scale, int64_t kernel, int64_t flags, const std::vector<int64_t> plan);

void na_rpb_backward(const Tensor grad_attention, Tensor grad_rpb, const std::vector<int64_t> window, int64_t kernel,
                     int64_t flags, const std::vector<int64_t> plan);

std::vector<int64_t> build_info();

// One operator's implementations; empty where a family has none, or was not built.
struct Implementations {
  std::function<void()> cpu_naive = {}, cpu = {};
  std::function<void(void* stream)> naive = {}, gemm = {}, fused_sm80 = {}, fused_sm90 = {};
};

// Calls the implementation that `kernel` names, on the device and current stream of `tensor`.
void launch(int64_t kernel, const Tensor& tensor, const Implementations& implementations);

// The call of a CUDA family on `stream`, or nothing where the build has no such family.
#define NATTEN_ON_STREAM(call) [&]([[maybe_unused]] void* stream) { call; }
#if defined(NATTEN_WITH_NAIVE)
#define NATTEN_NAIVE(call) NATTEN_ON_STREAM(natten::naive::call)
#else
#define NATTEN_NAIVE(call) nullptr
#endif
#if defined(NATTEN_WITH_GEMM)
#define NATTEN_GEMM(call) NATTEN_ON_STREAM(natten::gemm::call)
#else
#define NATTEN_GEMM(call) nullptr
#endif
#if defined(NATTEN_WITH_FUSED_SM80)
#define NATTEN_FUSED_SM80(call) NATTEN_ON_STREAM(natten::fused_sm80::call)
#else
#define NATTEN_FUSED_SM80(call) nullptr
#endif
#if defined(NATTEN_WITH_FUSED_SM90)
#define NATTEN_FUSED_SM90(call) NATTEN_ON_STREAM(natten::fused_sm90::call)
#else
#define NATTEN_FUSED_SM90(call) nullptr
#endif

}  // namespace natten::ops
