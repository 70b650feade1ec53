#include "ops/convert.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <climits>

// Weak: absent in a torch without CUDA, found in one with it. A strong reference, or libtorch_cuda as a needed library,
// would keep the library from loading on machines without a GPU.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream)
    __attribute__((weak));

namespace natten::ops {

TensorView view(const Tensor& tensor, int rank, Channel channel) {
  TensorView v{};
  const auto strides = tensor.strides();
  v.data = const_cast<void*>(tensor.const_data_ptr());
  v.batch_stride = strides[0];
  for (int a = 0; a < rank; ++a) v.axis_stride[kAxes - rank + a] = strides[1 + a];
  v.head_stride = strides[1 + rank];
  if (channel == Channel::present)
    check(tensor.size(rank + 2) <= 1 || strides[rank + 2] == 1, "the last dimension must have stride 1, found ",
          strides[rank + 2]);
  return v;
}

TensorView view(const std::optional<Tensor>& tensor, int rank, Channel channel) {
  return tensor ? view(*tensor, rank, channel) : TensorView{};
}

TensorView additional_view(const std::optional<Tensor>& tensor) { return view(tensor, 1, Channel::present); }

ScalarType scalar_type(const Tensor& tensor, const char* name) {
  using Torch = torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case Torch::Double:
      return ScalarType::float64;
    case Torch::Float:
      return ScalarType::float32;
    case Torch::Half:
      return ScalarType::float16;
    case Torch::BFloat16:
      return ScalarType::bfloat16;
    default:
      check(false, name, " must be float64, float32, float16 or bfloat16");
  }
  return ScalarType::float32;
}

static void check_shape_and_device(const Tensor& tensor, const char* name, const std::vector<int64_t>& sizes,
                                   const Tensor& like) {
  check(tensor.dim() == int64_t(sizes.size()), name, " must have ", sizes.size(), " dimensions, found ", tensor.dim());
  for (size_t i = 0; i < sizes.size(); ++i)
    check(tensor.size(i) == sizes[i], name, " must have size ", sizes[i], " in dimension ", i, ", found ",
          tensor.size(i));
  check(tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
        " must be on the device of the first argument");
}

void check_like(const Tensor& tensor, const char* name, const std::vector<int64_t>& sizes, const Tensor& like,
                bool same_dtype) {
  check_shape_and_device(tensor, name, sizes, like);
  check(!same_dtype || tensor.scalar_type() == like.scalar_type(), name, " must have the dtype of the first argument");
}

void check_logsumexp(const Tensor& tensor, const char* name, const std::vector<int64_t>& sizes, const Tensor& like) {
  using Torch = torch::headeronly::ScalarType;
  check_shape_and_device(tensor, name, sizes, like);
  const Torch expected = like.scalar_type() == Torch::Double ? Torch::Double : Torch::Float;
  check(tensor.scalar_type() == expected, name, " must be float32 (float64 for float64 inputs)");
}

static int to_int(int64_t value, const char* name) {
  check(value >= INT_MIN && value <= INT_MAX, name, " must fit 32 bits, found ", value);
  return int(value);
}

void fill_window(Problem& problem, const std::vector<int64_t>& window, const int64_t* q_grid, const int64_t* kv_grid) {
  check(window.size() % 7 == 0 && window.size() >= 7 && window.size() <= 21,
        "window must hold seven integers for each of one to three axes, found ", window.size());
  problem.rank = int(window.size() / 7);
  for (int a = 0; a < kAxes; ++a) problem.axis[a] = {1, 1, 1, 0, 1, 0, 1, 0, 1};
  for (int a = 0; a < problem.rank; ++a) {
    const int64_t* w = window.data() + 7 * a;
    Axis& axis = problem.axis[kAxes - problem.rank + a];
    axis = {
        to_int(w[0], "kernel_size"), to_int(w[1], "stride"),  to_int(w[2], "dilation"),     w[3] != 0,
        to_int(w[6], "extent"),      to_int(w[4], "q_start"), to_int(q_grid[a], "queries"), to_int(w[5], "kv_start"),
        to_int(kv_grid[a], "keys")};
    check(axis.extent >= 1 && axis.dilation >= 1 && axis.stride >= 1, "extent, dilation and stride must be at least 1");
    check(axis.dilation <= axis.extent, "dilation must not exceed the extent, found ", axis.dilation);
    check(axis.kernel_size == -1 || (axis.kernel_size >= 1 && int64_t(axis.kernel_size) * axis.dilation <= axis.extent),
          "kernel_size * dilation must be between 1 and the extent ", axis.extent, ", found ", axis.kernel_size, " * ",
          axis.dilation);
    check(axis.stride <= (axis.kernel_size < 0 ? ceil_div(axis.extent, axis.dilation) : axis.kernel_size),
          "stride must not exceed kernel_size, found ", axis.stride);
    check(axis.q_start >= 0 && int64_t(axis.q_start) + axis.q_length <= axis.extent && axis.kv_start >= 0 &&
              int64_t(axis.kv_start) + axis.kv_length <= axis.extent,
          "queries and keys must lie inside the global extent ", axis.extent);
  }
}

void fill_plan(Problem& problem, const std::vector<int64_t>& plan) {
  check(plan.size() <= sizeof(problem.plan.values) / sizeof(int), "plan is too long");
  problem.plan.size = int(plan.size());
  for (size_t i = 0; i < plan.size(); ++i) problem.plan.values[i] = to_int(plan[i], "plan");
}

void check_keys_present(const Problem& problem) {
  for (const Axis& axis : problem.axis) {
    if (axis.kv_start == 0 && axis.kv_length == axis.extent) continue;
    for (int group = 0; group < axis.dilation; ++group) {
      const Group g = make_group(axis, group);
      if (g.q_count == 0) continue;
      const Range needed = window_union(g, g.q_position, g.q_position + g.q_count - 1);
      check(g.kv_count > 0 && needed.begin >= g.kv_position && needed.end <= g.kv_position + g.kv_count,
            "a window needs keys that were not passed");
    }
  }
}

int64_t fill_slots(const Problem& problem, int (&slots)[kAxes]) {
  int64_t product = 1;
  for (int a = 0; a < kAxes; ++a) {
    const Axis& axis = problem.axis[a];
    slots[a] = axis.kernel_size < 0 ? ceil_div(axis.extent, axis.dilation) : axis.kernel_size;
    product *= slots[a];
  }
  return product;
}

CudaScope::CudaScope(const Tensor& tensor) {
  const int32_t device = tensor.get_device_index();
  check(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  DeviceGuardHandle guard = nullptr;
  check(aoti_torch_create_device_guard(device, &guard) == TORCH_SUCCESS, "device ", device, " cannot be selected");
  guard_ = guard;
  check(aoti_torch_get_current_cuda_stream(device, &stream_) == TORCH_SUCCESS, "no current stream");
}

CudaScope::~CudaScope() { aoti_torch_delete_device_guard(static_cast<DeviceGuardHandle>(guard_)); }

}  // namespace natten::ops
