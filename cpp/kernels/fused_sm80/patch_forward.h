// The forward pass in patches: its kernels as a table that the host code can read, plan and launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/arguments.h"
#include "kernels/fused_sm80/patch_forward_parameters.h"
#include "kernels/fused_sm80/patch_forward_plan.h"

namespace natten::fused_sm80 {

struct PatchEntry {
  void (*function)(const PatchParameters);
  int row_bytes;  // of a key in shared memory
  int own_bytes;  // of a warp
};

// `single`: for patches of one chunk in blocks of one slab.
template <class Element, int kHeadDim>
PatchEntry patch_forward_entry(bool single);

// Whether there are kernels for the problem.
bool has_patches(const Problem& problem);
// The cheapest plan and its estimated milliseconds; negative when there is none.
double plan_patches(const Problem& problem, PatchPlan& plan);
// Reads eight numbers: patch (3), patches of a tile (3), slab step, heads of a set.
PatchPlan read_patch_plan(const int* values, const Problem& problem);
// Whether tiles and slabs span less than 2^31 bytes of every tensor.
bool patches_reach(const PatchPlan& plan, const ForwardArguments& arguments);
void forward_in_patches(const PatchPlan& plan, const ForwardArguments& arguments, cudaStream_t stream);

}  // namespace natten::fused_sm80
