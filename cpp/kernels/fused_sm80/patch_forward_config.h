// Sizes of the forward patch kernels: the table to tune.
#pragma once

#include "kernels/fused_sm80/patch_forward.cuh"
#include "kernels/fused_sm80/patch_forward.h"

namespace natten::fused_sm80 {

// Groups of 16 keys in a chunk, one chunk per patch or several, warps of a block at most, blocks per multiprocessor.
template <class E, int kHeadDim>
struct PatchForward {
  using Single = PatchForwardConfig<E, kHeadDim, kSingleGroups, true, kMostPatches, 1>;
  using Several = PatchForwardConfig<E, kHeadDim, kSeveralGroups, false, kMostPatches, 1>;
};

template <class Config>
PatchEntry make_patch_forward_entry() {
  return {patch_forward_kernel<Config>, Config::kRowBytes, int(sizeof(typename Config::Own))};
}
template <class E, int kHeadDim>
PatchEntry patch_forward_entry(bool single) {
  return single ? make_patch_forward_entry<typename PatchForward<E, kHeadDim>::Single>()
                : make_patch_forward_entry<typename PatchForward<E, kHeadDim>::Several>();
}

}  // namespace natten::fused_sm80
