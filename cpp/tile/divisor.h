// Division by a number that is known on the host: one multiplication on the device.
#pragma once

#include <cstdint>

namespace natten {

// Exact for numerators below 2^31 (Granlund and Montgomery 1994, round-up method).
struct Divisor {
  uint32_t value = 1, multiplier = 1, shift = 0;

  Divisor() = default;
  explicit Divisor(uint32_t divisor) : value(divisor) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    multiplier = uint32_t(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
  }

#if defined(__CUDACC__)
  __device__ __forceinline__ uint32_t quotient(uint32_t numerator) const {
    return (__umulhi(numerator, multiplier) + numerator) >> shift;
  }
  // Divides `numerator` and returns the remainder: peels one digit off a mixed-radix index.
  __device__ __forceinline__ uint32_t peel(uint32_t& numerator) const {
    const uint32_t quotient_ = quotient(numerator), remainder = numerator - quotient_ * value;
    numerator = quotient_;
    return remainder;
  }
#endif
};

}  // namespace natten
