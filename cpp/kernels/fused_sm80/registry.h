// The kernels that are built, as a table the host code can read: one entry per (pass, element type, head dim class,
// variant), each instantiated in a small generated file.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/fused_sm80/parameters.h"
#include "tile/tf32.h"

namespace natten::fused_sm80 {

struct KernelEntry {
  void (*function)(const Parameters);
  int threads;
  int shared_bytes;
  int owned_rows;   // of the tile that a block owns
  int owned_warps;  // sub-boxes that it is cut into
  int walked_rows;  // of a box
};

// Two tile sizes per pass: `wide` for many keys per query, `narrow` for small windows, small problems and devices with
// little shared memory. config.h says what they are.
enum class Variant : int { wide = 0, narrow = 1 };
constexpr int kVariants = 2;

constexpr int kHeadDimClasses[] = {32, 64, 96, 128, 192, 256};
constexpr int kFloat32HeadDimClasses[] = {32, 64, 128};

template <class Element, int kHeadDim>
KernelEntry forward_entry(Variant variant);
template <class Element, int kHeadDim>
KernelEntry query_gradient_entry(Variant variant);
template <class Element, int kHeadDim>
KernelEntry key_gradient_entry(Variant variant);
// The key gradient kernel that accumulates query gradients; of 16-bit types only.
template <class Element, int kHeadDim>
KernelEntry accumulating_entry(Variant variant);

}  // namespace natten::fused_sm80
