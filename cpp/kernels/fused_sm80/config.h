// Tile sizes of every kernel of the family: the one table to tune.
#pragma once

#include "kernels/fused_sm80/forward.cuh"
#include "kernels/fused_sm80/registry.h"

namespace natten::fused_sm80 {

// Forward: warps, 16-query tiles per warp, keys per box, boxes in flight, blocks per multiprocessor (register limit).
template <class Element, int kHeadDim, Variant kVariant>
struct ForwardTiles;

template <class E> struct ForwardTiles<E, 32, Variant::wide> { using Config = ForwardConfig<E, 32, 4, 2, 64, 2, 3>; };
template <class E> struct ForwardTiles<E, 64, Variant::wide> { using Config = ForwardConfig<E, 64, 4, 2, 64, 2, 2>; };
template <class E> struct ForwardTiles<E, 96, Variant::wide> { using Config = ForwardConfig<E, 96, 4, 2, 64, 1, 2>; };
template <class E> struct ForwardTiles<E, 128, Variant::wide> { using Config = ForwardConfig<E, 128, 4, 2, 64, 1, 2>; };
template <class E> struct ForwardTiles<E, 192, Variant::wide> { using Config = ForwardConfig<E, 192, 8, 1, 64, 1, 1>; };
template <class E> struct ForwardTiles<E, 256, Variant::wide> { using Config = ForwardConfig<E, 256, 8, 1, 64, 1, 1>; };

template <class E> struct ForwardTiles<E, 32, Variant::narrow> { using Config = ForwardConfig<E, 32, 4, 1, 64, 2, 5>; };
template <class E> struct ForwardTiles<E, 64, Variant::narrow> { using Config = ForwardConfig<E, 64, 4, 1, 64, 2, 4>; };
template <class E> struct ForwardTiles<E, 96, Variant::narrow> { using Config = ForwardConfig<E, 96, 4, 1, 64, 1, 3>; };
template <class E> struct ForwardTiles<E, 128, Variant::narrow> { using Config = ForwardConfig<E, 128, 4, 1, 64, 1, 3>; };
template <class E> struct ForwardTiles<E, 192, Variant::narrow> { using Config = ForwardConfig<E, 192, 4, 1, 32, 1, 2>; };
template <class E> struct ForwardTiles<E, 256, Variant::narrow> { using Config = ForwardConfig<E, 256, 4, 1, 32, 1, 2>; };

template <class Config>
KernelEntry make_forward_entry() {
  return {forward_kernel<Config>, Config::kThreads,      int(sizeof(typename Config::Shared)),
          Config::kQueries,       Config::kWarps,        Config::kKeys};
}

template <class Element, int kHeadDim>
KernelEntry forward_entry(Variant variant) {
  using Wide = typename ForwardTiles<Element, kHeadDim, Variant::wide>::Config;
  using Narrow = typename ForwardTiles<Element, kHeadDim, Variant::narrow>::Config;
  return variant == Variant::wide ? make_forward_entry<Wide>() : make_forward_entry<Narrow>();
}

}  // namespace natten::fused_sm80
