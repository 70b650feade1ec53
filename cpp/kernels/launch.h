// What every CUDA kernel family needs to launch: error checks, and what decides whether and how to launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels/arguments.h"

namespace natten {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// To be called right after a launch; clears the error, so that the next call starts clean.
inline void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

// Blocks of a one-dimensional grid (at most 2^31 - 1).
inline unsigned grid_size(int64_t blocks, const char* kernel) {
  if (blocks > INT32_MAX) throw std::runtime_error(std::string(kernel) + ": more than 2^31 - 1 thread blocks");
  return static_cast<unsigned>(blocks);
}

// More than 48 KB of shared memory, static included, must be asked for per kernel and device; asking again is cheap.
template <class Kernel>
void allow_shared_memory(Kernel* kernel, int dynamic_bytes, const char* name) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic_bytes), name);
}

// Whether every row of the tensor is made of aligned 16-byte words. Absent tensors are.
inline bool has_aligned_rows(const TensorView& view, int channels, int element_bytes) {
  if (view.data == nullptr) return true;
  const int64_t elements =
      view.batch_stride | view.axis_stride[0] | view.axis_stride[1] | view.axis_stride[2] | view.head_stride | channels;
  return elements * element_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
}

inline bool no_queries(const Problem& problem) {
  return problem.batch == 0 || problem.axis[0].q_length == 0 || problem.axis[1].q_length == 0 ||
         problem.axis[2].q_length == 0;
}
inline bool no_keys(const Problem& problem) {
  return problem.batch == 0 || problem.axis[0].kv_length == 0 || problem.axis[1].kv_length == 0 ||
         problem.axis[2].kv_length == 0;
}

}  // namespace natten
