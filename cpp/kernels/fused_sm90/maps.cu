#include "kernels/fused_sm90/maps.h"

#include <cuda_runtime.h>

#include <numeric>
#include <stdexcept>
#include <string>

namespace natten::fused_sm90 {

const char* fold(const TensorView& tensor, int64_t batch, int heads, int channels, const int (&length)[kAxes],
                 const int (&dilation)[kAxes], FoldedTensor* folded) {
  constexpr int64_t kElementsPer16Bytes = 8, kMaxStride = int64_t{1} << 39;  // elements of 2 bytes: 2^40 bytes
  if (reinterpret_cast<uintptr_t>(tensor.data) % 16 != 0) return "a tensor is not aligned to 16 bytes";
  FoldedTensor& f = *folded;
  f.channels = channels;
  int64_t common = 0, furthest = 0;
  auto take = [&](int64_t stride, int64_t steps) {
    if (steps == 0) return;
    common = std::gcd(common, stride);
    furthest += stride * steps;
  };
  take(tensor.batch_stride, batch - 1);
  take(tensor.head_stride, heads - 1);
  for (int a = 0; a < kAxes; ++a) {
    const int d = dilation[a];
    f.length[a] = ceil_div(length[a], d);
    f.ragged[a] = length[a] % d != 0;
    f.position_stride[a] = f.length[a] > 1 ? tensor.axis_stride[a] * d : kElementsPer16Bytes;
    if (d > 1) take(tensor.axis_stride[a], d - 1);
    if (f.position_stride[a] <= 0 || f.position_stride[a] % kElementsPer16Bytes != 0 ||
        f.position_stride[a] >= kMaxStride) {
      return "the stride of an axis is not a positive multiple of 16 bytes";
    }
  }
  f.fold_stride = common == 0 ? kElementsPer16Bytes : common;
  if (f.fold_stride < 0 || f.fold_stride % kElementsPer16Bytes != 0 || f.fold_stride >= kMaxStride) {
    return "the stride of heads, batch or a dilated axis is not a positive multiple of 16 bytes";
  }
  f.fold_size = furthest / f.fold_stride + 1;
  if (furthest < 0 || f.fold_size > INT32_MAX) return "heads, batch and dilation groups span more than 2^31 strides";
  f.base = tensor.data;
  f.units.batch = batch > 1 ? static_cast<int>(tensor.batch_stride / f.fold_stride) : 0;
  f.units.head = heads > 1 ? static_cast<int>(tensor.head_stride / f.fold_stride) : 0;
  for (int a = 0; a < kAxes; ++a) {
    f.units.axis[a] = dilation[a] > 1 ? static_cast<int>(tensor.axis_stride[a] / f.fold_stride) : 0;
  }
  return nullptr;
}

namespace {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, found at run time so that nothing links against libcuda.
EncodeTiled find_encode_tiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess || function == nullptr) {
    throw std::runtime_error("natten: this driver has no cuTensorMapEncodeTiled (CUDA 12 is needed)");
  }
  return reinterpret_cast<EncodeTiled>(function);
}

}  // namespace

void encode(const FoldedTensor& tensor, ScalarType type, int chunk_channels, const int (&box)[kAxes],
            CUtensorMap (&maps)[kGroupShapes]) {
  static const EncodeTiled encode_tiled = find_encode_tiled();
  const cuuint64_t stride_bytes[4] = {
      2 * static_cast<cuuint64_t>(tensor.fold_stride), 2 * static_cast<cuuint64_t>(tensor.position_stride[2]),
      2 * static_cast<cuuint64_t>(tensor.position_stride[1]), 2 * static_cast<cuuint64_t>(tensor.position_stride[0])};
  const cuuint32_t box_size[5] = {static_cast<cuuint32_t>(chunk_channels), 1, static_cast<cuuint32_t>(box[2]),
                                  static_cast<cuuint32_t>(box[1]), static_cast<cuuint32_t>(box[0])};
  const cuuint32_t element_stride[5] = {1, 1, 1, 1, 1};
  const bool single = type == ScalarType::float32;
  const int row_bytes = chunk_channels * (single ? 4 : 2);
  for (int shape = 0; shape < kGroupShapes; ++shape) {
    cuuint64_t length[kAxes];
    bool exists = true;
    for (int a = 0; a < kAxes; ++a) {
      const int shorter = shape >> a & 1;
      exists = exists && (!shorter || (tensor.ragged[a] && tensor.length[a] > 1));
      length[a] = static_cast<cuuint64_t>(tensor.length[a] - shorter);
    }
    if (!exists) continue;
    const cuuint64_t size[5] = {static_cast<cuuint64_t>(tensor.channels), static_cast<cuuint64_t>(tensor.fold_size),
                                length[2], length[1], length[0]};
    const CUresult result =
        encode_tiled(&maps[shape],
                     single                        ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                     : type == ScalarType::float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                   : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                     5, tensor.base, size, stride_bytes, box_size, element_stride, CU_TENSOR_MAP_INTERLEAVE_NONE,
                     row_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                     : row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                       : CU_TENSOR_MAP_SWIZZLE_NONE,
                     row_bytes == 128 ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                     CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
      throw std::runtime_error("natten: cuTensorMapEncodeTiled failed with " +
                               std::to_string(static_cast<int>(result)));
    }
  }
}

}  // namespace natten::fused_sm90
