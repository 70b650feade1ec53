// Everything that is compiled once per instruction set. The including file defines the namespace, the width of a vector
// and how many of them a matrix product may keep in registers. Nothing here has external linkage but `tile_kernels`,
// and nothing calls inline functions or templates of another namespace: the linker keeps one copy of those, of
// whichever instruction set.
#pragma once

#include "kernels/cpu/attention_tiles.h"
#include "kernels/cpu/unfused_tiles.h"

namespace natten::cpu::NATTEN_CPU_INSTRUCTION_SET {

template <class E>
constexpr TileKernels kTileKernels = {kLanes<Compute<E>>, kAccumulators,   pack<E>, statistics<E>, forward<E>,
                                      backward_query<E>,  backward_key<E>, qk<E>,   av<E>,         inverse_av<E>};

const TileKernels& tile_kernels(ScalarType type) {
  switch (type) {
    case ScalarType::float64:
      return kTileKernels<double>;
    case ScalarType::float16:
      return kTileKernels<Half>;
    case ScalarType::bfloat16:
      return kTileKernels<BFloat16>;
    case ScalarType::float32:
      break;
  }
  return kTileKernels<float>;
}

}  // namespace natten::cpu::NATTEN_CPU_INSTRUCTION_SET
