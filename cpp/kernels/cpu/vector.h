// Vectors of NATTEN_CPU_VECTOR_BYTES, through the compilers' vector extension: arithmetic operators work on them, a
// scalar operand is broadcast, and a * b + c becomes one fused multiply-add where the instruction set has it.
#pragma once

#include <cstdint>
#include <utility>

namespace natten::cpu::NATTEN_CPU_INSTRUCTION_SET {

template <class T>
struct VectorTypes;
template <>
struct VectorTypes<float> {
  typedef float Vector __attribute__((vector_size(NATTEN_CPU_VECTOR_BYTES), may_alias));
  typedef float Unaligned __attribute__((vector_size(NATTEN_CPU_VECTOR_BYTES), may_alias, aligned(4)));
  typedef int32_t Integer __attribute__((vector_size(NATTEN_CPU_VECTOR_BYTES), may_alias));
  using Scalar = int32_t;
};
template <>
struct VectorTypes<double> {
  typedef double Vector __attribute__((vector_size(NATTEN_CPU_VECTOR_BYTES), may_alias));
  typedef double Unaligned __attribute__((vector_size(NATTEN_CPU_VECTOR_BYTES), may_alias, aligned(8)));
  typedef int64_t Integer __attribute__((vector_size(NATTEN_CPU_VECTOR_BYTES), may_alias));
  using Scalar = int64_t;
};
template <class T>
using Vector = typename VectorTypes<T>::Vector;
template <class T>
using IntegerVector = typename VectorTypes<T>::Integer;

template <class T>
constexpr int kLanes = NATTEN_CPU_VECTOR_BYTES / static_cast<int>(sizeof(T));

#define NATTEN_INLINE static inline __attribute__((always_inline))

template <class T>
NATTEN_INLINE Vector<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorTypes<T>::Unaligned*>(p);
}
template <class T>
NATTEN_INLINE void store(T* p, Vector<T> v) {
  *reinterpret_cast<typename VectorTypes<T>::Unaligned*>(p) = v;
}
template <class T>
NATTEN_INLINE Vector<T> broadcast(T value) {
  return value - Vector<T>{};
}
template <class T>
NATTEN_INLINE Vector<T> maximum(Vector<T> a, Vector<T> b) {
  return a > b ? a : b;
}

// Where `a` is NaN, `b`.
template <class T>
NATTEN_INLINE Vector<T> minimum(Vector<T> a, Vector<T> b) {
  return a < b ? a : b;
}

template <class T>
NATTEN_INLINE IntegerVector<T> lane_numbers() {
  IntegerVector<T> result;
  for (int i = 0; i < kLanes<T>; ++i) result[i] = i;
  return result;
}

// Lane i of the result is lane i ^ Distance.
template <int Distance, class V, std::size_t... I>
NATTEN_INLINE V exchange_lanes(V v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, (I ^ Distance)...);
}

template <class T, int Distance = kLanes<T> / 2>
NATTEN_INLINE T horizontal_sum(Vector<T> v) {
  if constexpr (Distance == 0) {
    return v[0];
  } else {
    return horizontal_sum<T, Distance / 2>(v + exchange_lanes<Distance>(v, std::make_index_sequence<kLanes<T>>()));
  }
}
template <class T, int Distance = kLanes<T> / 2>
NATTEN_INLINE T horizontal_maximum(Vector<T> v) {
  if constexpr (Distance == 0) {
    return v[0];
  } else {
    const Vector<T> other = exchange_lanes<Distance>(v, std::make_index_sequence<kLanes<T>>());
    return horizontal_maximum<T, Distance / 2>(maximum<T>(v, other));
  }
}

// One step of a transposition: rows a = r[i], b = r[i + Distance] swap their off-diagonal blocks.
template <int Distance, class V, std::size_t... I>
NATTEN_INLINE void exchange_blocks(V& a, V& b, std::index_sequence<I...>) {
  constexpr std::size_t count = sizeof...(I);
  const V low = __builtin_shufflevector(a, b, (I & Distance ? count + I - Distance : I)...);
  const V high = __builtin_shufflevector(a, b, (I & Distance ? count + I : I + Distance)...);
  a = low;
  b = high;
}

template <class T, int Distance = 1>
NATTEN_INLINE void transpose(Vector<T> (&rows)[kLanes<T>]) {
  if constexpr (Distance < kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i)
      if (!(i & Distance))
        exchange_blocks<Distance>(rows[i], rows[i + Distance], std::make_index_sequence<kLanes<T>>());
    transpose<T, Distance * 2>(rows);
  }
}

// 2^x for x <= 0 (and moderately above), exactly 0 for x <= -127 (-1023) and so for -infinity; NaN stays NaN.
// x = n + f with |f| <= 1/2; 2^f by a minimax polynomial of relative error 1.9e-9 (3.1e-18), found with the Remez
// algorithm; 2^n by its exponent bits, which adding `round` leaves, biased, in the low bits of the sum.
NATTEN_INLINE Vector<float> exp2(Vector<float> x) {
  const float round = 0x1.8p23f + 127.0f;
  x = x < -127.0f ? broadcast(-127.0f) : x;
  const Vector<float> shifted = x + round;
  const Vector<float> f = x - (shifted - round);
  const Vector<float> power = (Vector<float>)((IntegerVector<float>)shifted << 23);
  Vector<float> p = f * 0.00015345812161311629f + 0.0013399931177239738f;
  p = p * f + 0.0096184889563311816f;
  p = p * f + 0.055503287771053248f;
  p = p * f + 0.24022646890645521f;
  p = p * f + 0.69314720573719576f;
  p = p * f + 1.0000000005541648f;
  return p * power;
}
NATTEN_INLINE Vector<double> exp2(Vector<double> x) {
  const double round = 0x1.8p52 + 1023.0;
  x = x < -1023.0 ? broadcast(-1023.0) : x;
  const Vector<double> shifted = x + round;
  const Vector<double> f = x - (shifted - round);
  const Vector<double> power = (Vector<double>)((IntegerVector<double>)shifted << 52);
  Vector<double> p = f * 4.4352827069572771511e-10 + 7.0741056135081427963e-9;
  p = p * f + 1.0178198021671930844e-7;
  p = p * f + 1.321543308967639918e-6;
  p = p * f + 0.000015252733489988525649;
  p = p * f + 0.00015403530462514432062;
  p = p * f + 0.0013333558146789921722;
  p = p * f + 0.0096181291075883352443;
  p = p * f + 0.055504108664819921605;
  p = p * f + 0.24022650695910156204;
  p = p * f + 0.69314718055994533046;
  p = p * f + 0.9999999999999999971;
  return p * power;
}

}  // namespace natten::cpu::NATTEN_CPU_INSTRUCTION_SET
