// From torch's tensors and packed integers to the plain structs of the kernels.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/arguments.h"

namespace natten::ops {

using torch::stable::Tensor;

// Callers are checked in Python, in the user's words; these checks keep a direct call of an operator from reading or
// writing out of bounds.
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::string message = "natten: ";
  auto append = [&message](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>)
      message += std::to_string(part);
    else
      message += part;
  };
  (append(parts), ...);
  throw std::invalid_argument(message);
}

enum class Channel : int { absent = 0, present = 1 };

// Where a tensor of the problem lives in memory: [B, axes..., H, C], or [B, axes..., H] without a channel axis.
TensorView view(const Tensor& tensor, int rank, Channel channel);
TensorView view(const std::optional<Tensor>& tensor, int rank, Channel channel);

// [B, S, H, C]
TensorView additional_view(const std::optional<Tensor>& tensor);

ScalarType scalar_type(const Tensor& tensor, const char* name);

// The shape of `tensor` is exactly `sizes`, its dtype and device those of `like`.
void check_like(const Tensor& tensor, const char* name, const std::vector<int64_t>& sizes, const Tensor& like,
                bool same_dtype = true);

// logsumexp: float32, or float64 for float64 problems.
void check_logsumexp(const Tensor& tensor, const char* name, const std::vector<int64_t>& sizes, const Tensor& like);

// Axes and rank from `window` (seven integers an axis), the extents of the queries' and the keys' grids.
void fill_window(Problem& problem, const std::vector<int64_t>& window, const int64_t* q_grid, const int64_t* kv_grid);

void fill_plan(Problem& problem, const std::vector<int64_t>& plan);

// Every window of the passed queries lies inside the passed keys.
void check_keys_present(const Problem& problem);

// Window slots per axis of the unfused operators; returns their product.
int64_t fill_slots(const Problem& problem, int (&slots)[kAxes]);

// Makes the tensor's CUDA device current for its lifetime and holds torch's current stream there.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& tensor);
  ~CudaScope();
  CudaScope(const CudaScope&) = delete;
  CudaScope& operator=(const CudaScope&) = delete;
  void* stream() const { return stream_; }

 private:
  void* guard_ = nullptr;
  void* stream_ = nullptr;
};

}  // namespace natten::ops
