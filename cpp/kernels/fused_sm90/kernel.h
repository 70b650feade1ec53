// Fused neighborhood attention forward for Hopper: one persistent, warp-specialised kernel.
// Schedule, measurements and the meaning of the maps: docs/kernels/fused-hopper.md.
#pragma once

#include "kernels/fused_sm90/config.h"
#include "kernels/fused_sm90/consumer.h"
#include "kernels/fused_sm90/parameters.h"
#include "kernels/fused_sm90/producer.h"

namespace natten::fused_sm90 {

template <class Config>
__device__ __forceinline__ void init_barriers(const Parameters& p, SharedStorage<Config>& shared) {
  constexpr int kConsumerWarps = 4 * Config::kWarpgroups;
  for (int i = 0; i < Config::kStages; ++i) {
    ptx::barrier_init(shared.key_full[i], p.bias ? 2 : 1);  // the loader, and the writer of masks
    ptx::barrier_init(shared.value_full[i], 1);
    ptx::barrier_init(shared.key_empty[i], kConsumerWarps);
    ptx::barrier_init(shared.value_empty[i], kConsumerWarps);
  }
  for (int i = 0; i < Config::kQueryBuffers; ++i) {
    for (int w = 0; w < Config::kWarpgroups; ++w) {
      ptx::barrier_init(shared.query_full[i][w], 1);
      ptx::barrier_init(shared.query_empty[i][w], 1);
    }
  }
  for (int i = 0; i < kTileRecords; ++i) {
    ptx::barrier_init(shared.tile_full[i], 1);
    ptx::barrier_init(shared.tile_empty[i], kConsumerWarps + 3);  // and the three loaders
  }
  ptx::fence_barrier_init();
}

// Maps of one call.
struct Maps {
  CUtensorMap query[kGroupShapes], key[kGroupShapes], value[kGroupShapes], out[kGroupShapes];
  CUtensorMap additional_key[kGroupShapes], additional_value[kGroupShapes];  // shape 0 only
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    forward_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Parameters parameters) {
  static_assert(sizeof(SharedStorage<Config>) <= Config::kBlockBytes);
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  SharedStorage<Config>& shared = *reinterpret_cast<SharedStorage<Config>*>(shared_bytes);
  if (threadIdx.x == 0) init_barriers(parameters, shared);
  if constexpr (Config::kMasksByBias) {
    if (parameters.bias && threadIdx.x < kQueries) {
      write_query_slots(parameters, shared, threadIdx.x);
      ptx::fence_async_shared();
    }
  }
  __syncthreads();

  const int warpgroup = static_cast<int>(uniform(threadIdx.x / 128));
  if (warpgroup < Config::kWarpgroups) {
    ptx::register_allocate<Config::kConsumerRegisters>();
    Consumer<Config>(parameters, shared, warpgroup).run(maps.out);
  } else {
    ptx::register_release<Config::kProducerRegisters>();
    switch (threadIdx.x / 32 % 4) {
      case 0:
        load_boxes<Config, true>(parameters, maps.key, maps.additional_key[0], shared);
        break;
      case 1:
        load_queries(parameters, maps.query, shared);
        break;
      case 2:
        load_boxes<Config, false>(parameters, maps.value, maps.additional_value[0], shared);
        break;
      default:
        schedule_tiles(parameters, shared);
    }
  }
}

}  // namespace natten::fused_sm90
