// The two matrix products that everything consists of, each a register block of M tokens x N vectors.
#pragma once

#include "kernels/cpu/tile.h"
#include "kernels/cpu/vector.h"

namespace natten::cpu::NATTEN_CPU_INSTRUCTION_SET {

constexpr int kAccumulators = NATTEN_CPU_ACCUMULATORS;
constexpr int kMostVectors = 4;

template <class T>
constexpr int kBlockLanes = kBlockBytes / static_cast<int>(sizeof(T));

// out[i, lane] = min(mask[i, lane], sum over channels of stationary[i, channel] * streaming[channel, lane])
// A stationary operand is stored [channels / lanes, tokens, lanes]: a token's broadcasts are then at constant offsets.
template <class T>
struct Scores {
  const T* stationary;
  int64_t stationary_step;  // between blocks of channels
  const T* streaming;
  int64_t pitch;
  int channels;
  const T* mask;  // null: nothing is masked
  int64_t mask_pitch;
  T* out;  // [M, kBlockLanes]
};

template <class T, int M, int N>
static void scores(const Scores<T>& a) {
  constexpr int L = kLanes<T>;
  Vector<T> sum[M][N];
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[i][n] = Vector<T>{};
  const T* streaming = a.streaming;
  const T* stationary = a.stationary;
  T* out = a.out;
  for (int channel = 0; channel < a.channels; channel += L) {
    const T* last = stationary + (a.channels - channel < L ? a.channels - channel : L);
    for (const T* q = stationary; q != last; ++q) {
      Vector<T> k[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) k[n] = load(streaming + n * L);
#pragma GCC unroll 32
      for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sum[i][n] = q[i * L] * k[n] + sum[i][n];
      streaming += a.pitch;
    }
    stationary += a.stationary_step;
  }
  if (a.mask) {
#pragma GCC unroll 32
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[i][n] = minimum<T>(sum[i][n], load(a.mask + i * a.mask_pitch + n * L));
  }
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(out + i * kBlockLanes<T> + n * L, sum[i][n]);
}

// out[i, channel] = factors[i] * out[i, channel] + sum over rows r and t < count of weights[i, r, t] * values[r, t,
// channel]
template <class T>
struct Combination {
  const T* weights;  // [M, kBlockLanes]
  int64_t weights_row_step;
  int rows, count;
  const T* values;
  int64_t values_row_step, values_pitch;
  T* out;
  int64_t out_pitch;
  const T* factors;  // null: 1
};

template <class T, int M, int N>
static void combine(const Combination<T>& a) {
  constexpr int L = kLanes<T>;
  // With few accumulators the latency of the multiply-add would be the limit: even and odd t are summed apart.
  constexpr int kParts = M * N <= kAccumulators / 3 ? 2 : 1;
  Vector<T> sum[kParts][M][N];
  T* out = a.out;
  const int64_t out_pitch = a.out_pitch;
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i) {
    const T factor = a.factors ? a.factors[i] : T(1);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      sum[0][i][n] = load(out + i * out_pitch + n * L) * factor;
      if constexpr (kParts == 2) sum[1][i][n] = Vector<T>{};
    }
  }
  for (int r = 0; r < a.rows; ++r) {
    const T* weights = a.weights + r * a.weights_row_step;
    const T* values = a.values + r * a.values_row_step;
    const T* last = weights + a.count / kParts * kParts;
    for (; weights != last; weights += kParts) {
#pragma GCC unroll 2
      for (int part = 0; part < kParts; ++part) {
        Vector<T> v[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) v[n] = load(values + n * L);
#pragma GCC unroll 32
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n) sum[part][i][n] = weights[i * kBlockLanes<T> + part] * v[n] + sum[part][i][n];
        values += a.values_pitch;
      }
    }
    if (kParts == 2 && a.count % 2) {
#pragma GCC unroll 32
      for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sum[0][i][n] = weights[i * kBlockLanes<T>] * load(values + n * L) + sum[0][i][n];
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
      store(out + i * out_pitch + n * L, kParts == 2 ? sum[0][i][n] + sum[kParts - 1][i][n] : sum[0][i][n]);
}

// Every register block that fits, [N - 1][M - 1].
template <class T>
struct ProductTable {
  void (*scores[kMostVectors][kAccumulators])(const Scores<T>&);
  void (*combine[kMostVectors][kAccumulators])(const Combination<T>&);
};

template <class T, int N, std::size_t... I>
constexpr void fill_products(ProductTable<T>& table, std::index_sequence<I...>) {
  ((table.scores[N - 1][I] = scores<T, I + 1, N>), ...);
  ((table.combine[N - 1][I] = combine<T, I + 1, N>), ...);
}

template <class T>
constexpr ProductTable<T> make_product_table() {
  ProductTable<T> table{};
  fill_products<T, 1>(table, std::make_index_sequence<kAccumulators>());
  fill_products<T, 2>(table, std::make_index_sequence<kAccumulators / 2>());
  fill_products<T, 3>(table, std::make_index_sequence<kAccumulators / 3>());
  fill_products<T, 4>(table, std::make_index_sequence<kAccumulators / 4>());
  return table;
}

template <class T>
constexpr ProductTable<T> kProducts = make_product_table<T>();

// Cuts `total` into the fewest parts of at most `most`, nearly equal: the size of the next part.
NATTEN_INLINE int next_part(int total, int most) {
  const int parts = (total + most - 1) / most;
  return (total + parts - 1) / parts;
}

template <class T>
NATTEN_INLINE void multiply_scores(const Scores<T>& a, int tokens, int vectors) {
  for (int v = 0; v < vectors;) {
    const int n = next_part(vectors - v, kMostVectors);
    for (int i = 0; i < tokens;) {
      const int m = next_part(tokens - i, kAccumulators / n);
      Scores<T> part = a;
      part.stationary += i * kLanes<T>;
      part.streaming += v * kLanes<T>;
      if (part.mask) part.mask += i * a.mask_pitch + v * kLanes<T>;
      part.out += i * kBlockLanes<T> + v * kLanes<T>;
      kProducts<T>.scores[n - 1][m - 1](part);
      i += m;
    }
    v += n;
  }
}

template <class T>
NATTEN_INLINE void multiply_combine(const Combination<T>& a, int tokens, int vectors) {
  for (int v = 0; v < vectors;) {
    const int n = next_part(vectors - v, kMostVectors);
    for (int i = 0; i < tokens;) {
      const int m = next_part(tokens - i, kAccumulators / n);
      Combination<T> part = a;
      part.weights += i * kBlockLanes<T>;
      part.values += v * kLanes<T>;
      part.out += i * a.out_pitch + v * kLanes<T>;
      if (part.factors) part.factors += i;
      kProducts<T>.combine[n - 1][m - 1](part);
      i += m;
    }
    v += n;
  }
}

}  // namespace natten::cpu::NATTEN_CPU_INSTRUCTION_SET
