// The gradient kernels for Hopper: warp-specialised, a block per tile. Schedule and measurements:
// docs/kernels/fused-hopper-backward.md.
#pragma once

#include <type_traits>

#include "kernels/fused_sm90/backward_accumulator.h"
#include "kernels/fused_sm90/backward_consumer.h"
#include "kernels/fused_sm90/backward_loader.h"

namespace natten::fused_sm90 {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    gradient_kernel(const __grid_constant__ GradientMaps maps, const __grid_constant__ GradientParameters parameters) {
  static_assert(sizeof(GradientStorage<Config>) <= kMaxSharedBytes);
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  GradientStorage<Config>& shared = *reinterpret_cast<GradientStorage<Config>*>(shared_bytes);
  constexpr GradientShape kShape = Config::kSelf;
  const int warpgroup = static_cast<int>(uniform(threadIdx.x / 128));
  if (threadIdx.x == 0) {
    for (int i = 0; i < Config::kStages; ++i) {
      ptx::barrier_init(shared.full[i], 1);
      ptx::barrier_init(shared.empty[i], 4 * Config::kWarpgroups);
    }
    for (int w = 0; w < Config::kWarpgroups; ++w) {
      ptx::barrier_init(shared.own_full[w], 1);
    }
    if constexpr (Config::kAccumulates) {
      auto& accumulator = shared.accumulator;
      for (int i = 0; i < AccumulatorStorage<Config>::kSteps; ++i) {
        ptx::barrier_init(accumulator.step_full[i], 1);
        ptx::barrier_init(accumulator.step_empty[i], 4);
      }
      for (int w = 0; w < Config::kWarpgroups; ++w) {
        ptx::barrier_init(accumulator.scores_full[w], 4);
        ptx::barrier_init(accumulator.scores_empty[w], 4);
      }
    }
    ptx::fence_barrier_init();
  }
  constexpr int kLoader = Config::kThreads / 128 - 1;
  if (warpgroup == kLoader && threadIdx.x % 128 < 32) locate_tile(parameters, shared);
  __syncthreads();
  if (shared.tile.box_steps < 0) return;
  if (warpgroup < Config::kWarpgroups) {
    ptx::register_allocate<kShape.consumer_registers>();
    GradientConsumer<Config>(parameters, shared, warpgroup).run(maps);
  } else if (warpgroup < kLoader) {
    if constexpr (Config::kAccumulates) {
      ptx::register_release<kShape.accumulator_registers>();
      Accumulator<Config>(parameters, maps, shared).run();
    }
  } else {
    ptx::register_release<kShape.producer_registers>();
    if (threadIdx.x % 128 < 32) Loader<Config>(parameters, maps, shared).run();
  }
}

template <typename Element>
GradientKernelInfo gradient_kernel_of(int head_dim, Pass pass) {
  const auto info = [](auto config) -> GradientKernelInfo {
    using Self = decltype(config);
    return {reinterpret_cast<const void*>(&gradient_kernel<Self>), Self::kThreads,
            static_cast<int>(sizeof(GradientStorage<Self>))};
  };
  const auto of_class = [&](auto head_dim_class) -> GradientKernelInfo {
    constexpr int kClass = decltype(head_dim_class)::value;
    switch (pass) {
      case Pass::queries:
        return info(GradientConfig<Element, kClass, Pass::queries>());
      case Pass::keys:
        return info(GradientConfig<Element, kClass, Pass::keys>());
      default:
        return info(GradientConfig<Element, kClass, Pass::all>());
    }
  };
  return head_dim == 64 ? of_class(std::integral_constant<int, 64>()) : of_class(std::integral_constant<int, 128>());
}

}  // namespace natten::fused_sm90
