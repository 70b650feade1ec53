// Warps of a block, at most, and blocks per multiprocessor that registers must leave room for.
#pragma once

#include "kernels/fused_sm80/patch_backward_key.cuh"
#include "kernels/fused_sm80/patch_backward_query.cuh"
#include "kernels/fused_sm80/patch_backward_registry.h"

namespace natten::fused_sm80::gradient {

template <class E, int kHeadDim>
struct PatchTiles;
template <class E>
struct PatchTiles<E, 32> {
  using QueryGradient = PatchQueryGradientConfig<E, 32, 8, 2>;
  using KeyGradient = PatchKeyGradientConfig<E, 32, 8, 2>;
};
template <class E>
struct PatchTiles<E, 64> {
  using QueryGradient = PatchQueryGradientConfig<E, 64, 8, 2>;
  using KeyGradient = PatchKeyGradientConfig<E, 64, 6, 2>;
};

template <class Config>
PatchEntry make_patch_entry(void (*function)(const PatchParameters)) {
  return {function, Config::kMostWarps, Config::kBlocksPerSm, SlabRows<Config::kHeadDim>::kRowBytes,
          Config::kWarpBytes};
}

template <class E, int kHeadDim>
PatchEntry patch_query_gradient_entry() {
  using Config = typename PatchTiles<E, kHeadDim>::QueryGradient;
  return make_patch_entry<Config>(patch_query_gradient_kernel<Config>);
}
template <class E, int kHeadDim>
PatchEntry patch_key_gradient_entry() {
  using Config = typename PatchTiles<E, kHeadDim>::KeyGradient;
  return make_patch_entry<Config>(patch_key_gradient_kernel<Config>);
}

}  // namespace natten::fused_sm80::gradient
