// Selection without a branch.
#pragma once

#include <cstdint>

namespace natten::ptx {

// The compiler may turn `c ? a : b` next to a shuffle into divergent branches, which cost far more than the select.
__device__ __forceinline__ float select(bool condition, float a, float b) {
  float result;
  asm("{ .reg .pred p; setp.ne.u32 p, %3, 0; selp.f32 %0, %1, %2, p; }"
      : "=f"(result)
      : "f"(a), "f"(b), "r"(uint32_t(condition)));
  return result;
}
__device__ __forceinline__ double select(bool condition, double a, double b) {
  double result;
  asm("{ .reg .pred p; setp.ne.u32 p, %3, 0; selp.f64 %0, %1, %2, p; }"
      : "=d"(result)
      : "d"(a), "d"(b), "r"(uint32_t(condition)));
  return result;
}

}  // namespace natten::ptx
