// Which patches, tiles of patches and slabs the forward takes for a problem. Host code without CUDA.
#pragma once

#include "kernels/arguments.h"

namespace natten::fused_sm80 {

struct PatchPlan {
  int patch[kAxes];    // rows of a patch
  int patches[kAxes];  // of a tile, one per warp
  int slab_step;       // of the slabs' extent along slab_axis(); the largest that a tile needs: one slab
  int set_heads;       // heads that a block works on, one after the other

  int slab_axis;
  int slab[kAxes];  // largest extents of a slab
  int slab_line;    // rows of shared memory from line to line
  int slabs;        // in shared memory: one, or two in turns
  bool single;      // every patch has one chunk of keys, every tile one slab

  int warps() const { return patches[0] * patches[1] * patches[2]; }
  int slab_tokens() const { return slab[0] * slab[1] * slab[2]; }
  int slab_rows() const { return slab[0] * slab[1] * slab_line; }
};

constexpr int kMostPatches = 16;  // of a tile: warps of a block

// Groups of 16 keys in a chunk, where patches have one and where they have several.
constexpr int kSingleGroups = 7, kSeveralGroups = 5;

// What the planner knows of the kernels for one head dim class.
struct PatchKernels {
  int head_dim;
  int row_bytes;          // of a key in shared memory
  int own_bytes;          // of a warp
  int most_shared_bytes;  // of a block
};

// Dynamic shared memory of a block.
int patch_shared_bytes(const PatchPlan& plan, const PatchKernels& kernels, bool same_steps);

// Fills in what follows from the patch, its number per tile, slab_step (0: one slab) and set_heads. False when it does
// not fit.
bool complete_patch_plan(PatchPlan& plan, const Problem& problem, const PatchKernels& kernels);

// The cheapest plan and its estimated time on an H200 in milliseconds; negative when there is none.
double choose_patch_plan(PatchPlan& plan, const Problem& problem, const PatchKernels& kernels);

}  // namespace natten::fused_sm80
