// What every CUDA kernel family needs to launch: error checks and the limits of a device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

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

// Shared memory above 48 KB must be asked for once per kernel and device; asking again is cheap.
template <class Kernel>
void allow_shared_memory(Kernel* kernel, int bytes, const char* name) {
  if (bytes > 48 * 1024) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
  }
}

}  // namespace natten
