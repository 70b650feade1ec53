// Tile sizes of every kernel of the family: the one table to tune.
#pragma once

#include "kernels/fused_sm80/backward_key.cuh"
#include "kernels/fused_sm80/backward_key_float32.cuh"
#include "kernels/fused_sm80/backward_query.cuh"
#include "kernels/fused_sm80/forward.cuh"
#include "kernels/fused_sm80/registry.h"

namespace natten::fused_sm80 {

template <class E, int kHeadDim, Variant kVariant>
struct Tiles;

// Forward and QueryGradient: warps, 16-query tiles per warp, keys per box, boxes in flight, blocks per multiprocessor.
// KeyGradient: keys per tile, queries per box, warps along keys, warps along the other side, boxes of queries and of
// output gradients in flight, blocks per multiprocessor.
template <class E>
struct Tiles<E, 32, Variant::wide> {
  using Forward = ForwardConfig<E, 32, 4, 2, 64, 2, 3>;
  using QueryGradient = QueryGradientConfig<E, 32, 4, 2, 64, 2, 2>;
  using KeyGradient = KeyGradientConfig<E, 32, 128, 64, 4, 2, 2, 2, 2>;
  using Accumulating = KeyGradientConfig<E, 32, 64, 64, 2, 2, 2, 2, 4, true>;
};
template <class E>
struct Tiles<E, 64, Variant::wide> {
  using Forward = ForwardConfig<E, 64, 4, 2, 128, 1, 2>;
  using QueryGradient = QueryGradientConfig<E, 64, 4, 2, 64, 2, 2>;
  using KeyGradient = KeyGradientConfig<E, 64, 128, 64, 4, 2, 2, 2, 1>;
  using Accumulating = KeyGradientConfig<E, 64, 128, 128, 4, 2, 2, 1, 1, true>;
};
template <class E>
struct Tiles<E, 96, Variant::wide> {
  using Forward = ForwardConfig<E, 96, 4, 2, 64, 1, 2>;
  using QueryGradient = QueryGradientConfig<E, 96, 4, 2, 32, 2, 2>;
  using KeyGradient = KeyGradientConfig<E, 96, 128, 64, 4, 2, 2, 1, 1>;
  using Accumulating = KeyGradientConfig<E, 96, 128, 64, 4, 2, 2, 1, 1, true>;
};
template <class E>
struct Tiles<E, 128, Variant::wide> {
  using Forward = ForwardConfig<E, 128, 4, 2, 64, 1, 2>;
  using QueryGradient = QueryGradientConfig<E, 128, 4, 2, 32, 2, 2>;
  using KeyGradient = KeyGradientConfig<E, 128, 128, 64, 4, 2, 2, 1, 1>;
  using Accumulating = KeyGradientConfig<E, 128, 128, 64, 4, 2, 2, 1, 1, true>;
};
template <class E>
struct Tiles<E, 192, Variant::wide> {
  using Forward = ForwardConfig<E, 192, 8, 1, 64, 1, 1>;
  using QueryGradient = QueryGradientConfig<E, 192, 8, 1, 32, 2, 1>;
  using KeyGradient = KeyGradientConfig<E, 192, 64, 64, 2, 4, 1, 1, 1>;
  using Accumulating = KeyGradientConfig<E, 192, 64, 64, 2, 4, 1, 1, 1, true>;
};
template <class E>
struct Tiles<E, 256, Variant::wide> {
  using Forward = ForwardConfig<E, 256, 8, 1, 64, 1, 1>;
  using QueryGradient = QueryGradientConfig<E, 256, 8, 1, 32, 2, 1>;
  using KeyGradient = KeyGradientConfig<E, 256, 64, 64, 2, 4, 1, 1, 1>;
  using Accumulating = KeyGradientConfig<E, 256, 64, 64, 2, 4, 1, 1, 1, true>;
};

template <class E>
struct Tiles<E, 32, Variant::narrow> {
  using Forward = ForwardConfig<E, 32, 4, 1, 64, 2, 5>;
  using QueryGradient = QueryGradientConfig<E, 32, 4, 1, 64, 2, 4>;
  using KeyGradient = KeyGradientConfig<E, 32, 64, 64, 2, 2, 2, 2, 4>;
  using Accumulating = KeyGradientConfig<E, 32, 64, 64, 2, 2, 2, 2, 4, true>;
};
template <class E>
struct Tiles<E, 64, Variant::narrow> {
  using Forward = ForwardConfig<E, 64, 4, 1, 64, 2, 4>;
  using QueryGradient = QueryGradientConfig<E, 64, 4, 1, 64, 2, 3>;
  using KeyGradient = KeyGradientConfig<E, 64, 64, 64, 2, 2, 2, 2, 3>;
  using Accumulating = KeyGradientConfig<E, 64, 64, 64, 2, 2, 2, 2, 3, true>;
};
template <class E>
struct Tiles<E, 96, Variant::narrow> {
  using Forward = ForwardConfig<E, 96, 4, 1, 64, 1, 3>;
  using QueryGradient = QueryGradientConfig<E, 96, 4, 1, 32, 2, 3>;
  using KeyGradient = KeyGradientConfig<E, 96, 64, 64, 2, 2, 2, 1, 2>;
  using Accumulating = KeyGradientConfig<E, 96, 128, 64, 4, 2, 2, 1, 1, true>;
};
template <class E>
struct Tiles<E, 128, Variant::narrow> {
  using Forward = ForwardConfig<E, 128, 4, 1, 64, 1, 3>;
  using QueryGradient = QueryGradientConfig<E, 128, 4, 1, 32, 2, 2>;
  using KeyGradient = KeyGradientConfig<E, 128, 64, 64, 2, 2, 2, 1, 2>;
  using Accumulating = KeyGradientConfig<E, 128, 128, 64, 4, 2, 2, 1, 1, true>;
};
template <class E>
struct Tiles<E, 192, Variant::narrow> {
  using Forward = ForwardConfig<E, 192, 4, 1, 32, 1, 2>;
  using QueryGradient = QueryGradientConfig<E, 192, 4, 1, 16, 2, 2>;
  using KeyGradient = KeyGradientConfig<E, 192, 32, 32, 2, 2, 1, 1, 2>;
  using Accumulating = KeyGradientConfig<E, 192, 64, 64, 2, 4, 1, 1, 1, true>;
};
template <class E>
struct Tiles<E, 256, Variant::narrow> {
  using Forward = ForwardConfig<E, 256, 4, 1, 32, 1, 2>;
  using QueryGradient = QueryGradientConfig<E, 256, 4, 1, 16, 2, 2>;
  using KeyGradient = KeyGradientConfig<E, 256, 32, 32, 2, 2, 1, 1, 2>;
  using Accumulating = KeyGradientConfig<E, 256, 64, 64, 2, 4, 1, 1, 1, true>;
};

// float32. KeyGradient as the other passes: warps, 16-key tiles per warp, queries per box, boxes in flight, blocks per
// multiprocessor. Tf32x3, where a fragment feeds three products anyway, has no wide variant.
template <>
struct Tiles<Tf32, 32, Variant::wide> {
  using Forward = ForwardConfig<Tf32, 32, 4, 2, 64, 2, 2>;
  using QueryGradient = QueryGradientConfig<Tf32, 32, 4, 2, 32, 2, 2>;
  using KeyGradient = Float32KeyGradientConfig<Tf32, 32, 4, 2, 32, 2, 2>;
};
template <>
struct Tiles<Tf32, 64, Variant::wide> {
  using Forward = ForwardConfig<Tf32, 64, 4, 2, 64, 1, 2>;
  using QueryGradient = QueryGradientConfig<Tf32, 64, 4, 2, 32, 1, 2>;
  using KeyGradient = Float32KeyGradientConfig<Tf32, 64, 4, 2, 16, 2, 2>;
};
template <>
struct Tiles<Tf32, 128, Variant::wide> {
  using Forward = ForwardConfig<Tf32, 128, 4, 2, 32, 1, 2>;
  using QueryGradient = QueryGradientConfig<Tf32, 128, 4, 1, 32, 1, 2>;
  using KeyGradient = Float32KeyGradientConfig<Tf32, 128, 4, 1, 32, 1, 2>;
};
template <>
struct Tiles<Tf32, 32, Variant::narrow> {
  using Forward = ForwardConfig<Tf32, 32, 4, 1, 64, 2, 4>;
  using QueryGradient = QueryGradientConfig<Tf32, 32, 4, 1, 64, 2, 3>;
  using KeyGradient = Float32KeyGradientConfig<Tf32, 32, 4, 1, 32, 2, 4>;
};
template <>
struct Tiles<Tf32, 64, Variant::narrow> {
  using Forward = ForwardConfig<Tf32, 64, 4, 1, 64, 1, 3>;
  using QueryGradient = QueryGradientConfig<Tf32, 64, 4, 1, 32, 2, 3>;
  using KeyGradient = Float32KeyGradientConfig<Tf32, 64, 4, 1, 32, 2, 3>;
};
template <>
struct Tiles<Tf32, 128, Variant::narrow> {
  using Forward = ForwardConfig<Tf32, 128, 4, 1, 32, 1, 3>;
  using QueryGradient = QueryGradientConfig<Tf32, 128, 4, 1, 32, 1, 2>;
  using KeyGradient = Float32KeyGradientConfig<Tf32, 128, 4, 1, 32, 1, 2>;
};

template <int kHeadDim>
struct Tf32x3Tiles;
template <>
struct Tf32x3Tiles<32> {
  using Forward = ForwardConfig<Tf32x3, 32, 4, 1, 64, 2, 4>;
  using QueryGradient = QueryGradientConfig<Tf32x3, 32, 4, 1, 32, 2, 4>;
  using KeyGradient = Float32KeyGradientConfig<Tf32x3, 32, 4, 1, 32, 2, 4>;
};
template <>
struct Tf32x3Tiles<64> {
  using Forward = ForwardConfig<Tf32x3, 64, 4, 1, 32, 2, 3>;
  using QueryGradient = QueryGradientConfig<Tf32x3, 64, 4, 1, 32, 2, 2>;
  using KeyGradient = Float32KeyGradientConfig<Tf32x3, 64, 4, 1, 32, 2, 2>;
};
template <>
struct Tf32x3Tiles<128> {
  using Forward = ForwardConfig<Tf32x3, 128, 4, 1, 32, 2, 2>;
  using QueryGradient = QueryGradientConfig<Tf32x3, 128, 4, 1, 32, 1, 2>;
  using KeyGradient = Float32KeyGradientConfig<Tf32x3, 128, 4, 1, 16, 2, 2>;
};

template <class E, int kHeadDim, Variant kVariant>
using TilesOf = std::conditional_t<std::is_same_v<E, Tf32x3>, Tf32x3Tiles<kHeadDim>, Tiles<E, kHeadDim, kVariant>>;

template <class Config>
KernelEntry make_forward_entry() {
  return {forward_kernel<Config>, Config::kThreads, int(sizeof(typename Config::Shared)),
          Config::kQueries,       Config::kWarps,   Config::kKeys};
}
template <class Config>
KernelEntry make_query_gradient_entry() {
  return {query_gradient_kernel<Config>,
          Config::kThreads,
          int(sizeof(typename Config::Shared)),
          Config::kQueries,
          Config::kWarps,
          Config::kKeys};
}
template <class Config>
KernelEntry make_key_gradient_entry() {
  void (*kernel)(const Parameters);
  if constexpr (kIsFloat32<typename Config::Element>)
    kernel = float32_key_gradient_kernel<Config>;
  else
    kernel = key_gradient_kernel<Config>;
  return {kernel,        Config::kThreads,  int(sizeof(typename Config::Shared)),
          Config::kKeys, Config::kKeyWarps, Config::kQueries};
}

template <class E, int kHeadDim>
KernelEntry forward_entry(Variant variant) {
  return variant == Variant::wide ? make_forward_entry<typename TilesOf<E, kHeadDim, Variant::wide>::Forward>()
                                  : make_forward_entry<typename TilesOf<E, kHeadDim, Variant::narrow>::Forward>();
}
template <class E, int kHeadDim>
KernelEntry query_gradient_entry(Variant variant) {
  return variant == Variant::wide
             ? make_query_gradient_entry<typename TilesOf<E, kHeadDim, Variant::wide>::QueryGradient>()
             : make_query_gradient_entry<typename TilesOf<E, kHeadDim, Variant::narrow>::QueryGradient>();
}
template <class E, int kHeadDim>
KernelEntry key_gradient_entry(Variant variant) {
  return variant == Variant::wide
             ? make_key_gradient_entry<typename TilesOf<E, kHeadDim, Variant::wide>::KeyGradient>()
             : make_key_gradient_entry<typename TilesOf<E, kHeadDim, Variant::narrow>::KeyGradient>();
}

template <class E, int kHeadDim>
KernelEntry accumulating_entry(Variant variant) {
  return variant == Variant::wide
             ? make_key_gradient_entry<typename TilesOf<E, kHeadDim, Variant::wide>::Accumulating>()
             : make_key_gradient_entry<typename TilesOf<E, kHeadDim, Variant::narrow>::Accumulating>();
}

}  // namespace natten::fused_sm80
