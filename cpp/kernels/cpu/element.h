// Element types of the tensors and their conversion to and from the type that is computed in.
// Every function has internal linkage: this header is compiled for several instruction sets, and the linker must never
// hand one object another object's copy. The conversions are free of branches so that loops over them vectorise.
#pragma once

#include <cstdint>

namespace natten::cpu {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// What elements of type E are computed in.
template <class E>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class E>
using Compute = typename ComputeType<E>::type;

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}
static inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

static inline double widen(double value) { return value; }
static inline float widen(float value) { return value; }
static inline float widen(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
static inline float widen(Half value) {
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  // 2^112 moves the exponent from bias 15 to bias 127, and makes normal numbers of the subnormal ones.
  const uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinity and NaN
  return float_of(finite | special | (value.bits & 0x8000u) << 16);
}

// Round to nearest, ties to even.
static inline void narrow(double value, double& result) { result = value; }
static inline void narrow(float value, float& result) { result = value; }
static inline void narrow(float value, BFloat16& result) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  result.bits = static_cast<uint16_t>(is_nan ? (bits >> 16 | 0x40u) : rounded);
}
static inline void narrow(float value, Half& result) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;  // 0.5 has the ulp of a subnormal half
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  result.bits = static_cast<uint16_t>((magnitude >= 0x47800000u ? special : finite) | (bits >> 16 & 0x8000u));
}

}  // namespace natten::cpu
