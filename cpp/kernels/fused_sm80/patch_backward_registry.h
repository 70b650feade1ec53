// The patch kernels of the backward pass, as a table the host code can read.
#pragma once

#include "kernels/fused_sm80/patch_backward.cuh"

namespace natten::fused_sm80::gradient {

struct PatchEntry {
  void (*function)(const PatchParameters);
  int most_warps, blocks_per_sm;
  int row_bytes;   // of a row of one walked tensor in shared memory
  int warp_bytes;  // of shared memory beside the slabs, per warp
};

constexpr int kPatchHeadDims[] = {32, 64};

template <class Element, int kHeadDim>
PatchEntry patch_query_gradient_entry();
template <class Element, int kHeadDim>
PatchEntry patch_key_gradient_entry();

}  // namespace natten::fused_sm80::gradient
