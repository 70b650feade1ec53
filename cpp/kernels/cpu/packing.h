// Between tensors of any element type and the packed operands.
#pragma once

#include "kernels/cpu/element.h"
#include "kernels/cpu/tile.h"
#include "kernels/cpu/vector.h"

namespace natten::cpu::NATTEN_CPU_INSTRUCTION_SET {

template <class T>
constexpr int padded_channels(int channels) {
  return (channels + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// Hands out pieces of a scratch buffer.
class Scratch {
 public:
  explicit Scratch(void* data) : next_(static_cast<char*>(data)) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += (count * static_cast<int64_t>(sizeof(T)) + kScratchAlignment - 1) / kScratchAlignment * kScratchAlignment;
    return piece;
  }

 private:
  char* next_;
};

template <class T>
NATTEN_INLINE void fill(T* data, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) data[i] = value;
}

template <class E>
NATTEN_INLINE E* token(const TileTokens& tokens, int row, int column) {
  return static_cast<E*>(tokens.data) + row * tokens.row_stride + column * tokens.column_stride;
}

// Tokens of one head lie far apart in memory, which the hardware does not foresee.
template <class E>
NATTEN_INLINE void prefetch_channels(const E* source, int channels) {
  for (int c = 0; c < channels; c += 64 / static_cast<int>(sizeof(E))) __builtin_prefetch(source + c);
}

// Channels of one token, padded with zeros to whole vectors.
template <class E, class T>
NATTEN_INLINE void load_channels(const E* source, int channels, T* result) {
  for (int c = 0; c < channels; ++c) result[c] = widen(source[c]);
  for (int c = channels; c < padded_channels<T>(channels); ++c) result[c] = 0;
}

template <class E, class T>
NATTEN_INLINE void store_channels(const T* values, T factor, int channels, E* result) {
  for (int c = 0; c < channels; ++c) narrow(values[c] * factor, result[c]);
}

// A tile's tokens as a stationary operand of `multiply_scores`: [channels / lanes, tokens, lanes].
template <class E, class T>
static void load_stationary(const TileTokens& tokens, int rows, int columns, int channels, T factor, T* result) {
  constexpr int L = kLanes<T>;
  const int64_t step = static_cast<int64_t>(rows) * columns * L;
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c) prefetch_channels(token<E>(tokens, r, c), channels);
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) {
      const E* source = token<E>(tokens, r, c);
      T* target = result + (r * columns + c) * L;
      int channel = 0;
      for (; channel + L <= channels; channel += L, target += step)
        for (int l = 0; l < L; ++l) target[l] = widen(source[channel + l]) * factor;
      if (channel < channels)
        for (int l = 0; l < L; ++l) target[l] = channel + l < channels ? widen(source[channel + l]) * factor : T(0);
    }
  }
}

template <class E>
static void pack(const PackedRow& row) {
  using T = Compute<E>;
  constexpr int L = kLanes<T>;
  const PackedGrid& grid = row.grid;
  const int padded = padded_channels<T>(row.channels), fold = grid.fold;
  T* transposed = static_cast<T*>(row.transposed);
  const int fold_bits = __builtin_ctz(fold);
  for (int position = 0; position < grid.row_tokens; position += L) {
    T* block = row.row_major ? static_cast<T*>(row.row_major) + static_cast<int64_t>(position) * padded
                             : static_cast<T*>(row.scratch);
    for (int i = position + L; i < position + 2 * L; ++i)
      if ((i >> fold_bits) < row.columns && (i & (fold - 1)) < row.rows)
        prefetch_channels(token<E>(row.tokens, i & (fold - 1), i >> fold_bits), row.channels);
    for (int i = 0; i < L; ++i) {
      const int column = (position + i) >> fold_bits, r = (position + i) & (fold - 1);
      if (column < row.columns && r < row.rows)
        load_channels(token<E>(row.tokens, r, column), row.channels, block + i * padded);
      else
        fill(block + i * padded, padded, T(0));
    }
    if (!transposed) continue;
    for (int channel = 0; channel < row.channels; channel += L) {
      Vector<T> square[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) square[i] = load(block + i * padded + channel);
      transpose<T>(square);
      const int count = row.channels - channel < L ? row.channels - channel : L;
      if (count == L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store(transposed + (channel + i) * grid.pitch + position, square[i]);
      } else {
        for (int i = 0; i < count; ++i) store(transposed + (channel + i) * grid.pitch + position, square[i]);
      }
    }
  }
  if (!transposed) return;
  for (int channel = 0; channel < row.channels; ++channel)
    for (int64_t position = grid.row_tokens; position < grid.pitch; position += L)
      store(transposed + channel * grid.pitch + position, Vector<T>{});
}

// delta = rowsum(dO O) - grad_logsumexp, and the logarithm changes its base to 2.
template <class E>
static void statistics(const StatisticsRow& row) {
  using T = Compute<E>;
  T* logsumexp = static_cast<T*>(row.logsumexp_result);
  T* delta = static_cast<T*>(row.delta_result);
  fill(logsumexp, row.grid.pitch, T(0));
  fill(delta, row.grid.pitch, T(0));
  for (int r = 0; r < row.rows; ++r) {
    for (int c = 0; c < row.columns; ++c) {
      const E* out = token<E>(row.out, r, c);
      const E* grad_out = token<E>(row.grad_out, r, c);
      T partial[16] = {};
      int channel = 0;
      for (; channel + 16 <= row.channels; channel += 16)
        for (int l = 0; l < 16; ++l) partial[l] += widen(out[channel + l]) * widen(grad_out[channel + l]);
      T sum = 0;
      for (; channel < row.channels; ++channel) sum += widen(out[channel]) * widen(grad_out[channel]);
      for (int l = 0; l < 16; ++l) sum += partial[l];
      if (row.grad_logsumexp.data) sum -= *token<T>(row.grad_logsumexp, r, c);
      const int position = c * row.grid.fold + r;
      delta[position] = sum;
      logsumexp[position] = *token<T>(row.logsumexp, r, c) * static_cast<T>(1.44269504088896340736);
    }
  }
}

}  // namespace natten::cpu::NATTEN_CPU_INSTRUCTION_SET
