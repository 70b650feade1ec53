// The walk of a stationary tile over the streaming tokens that it sees, in blocks whose scores stay in the first cache.
#pragma once

#include "kernels/cpu/packing.h"
#include "kernels/cpu/products.h"

namespace natten::cpu::NATTEN_CPU_INSTRUCTION_SET {

// Folded rows [row_begin, row_end) at one position of axis 0, columns [column_begin, column_end). The scores of a
// stationary token are [row_end - row_begin, lanes] with pitch kBlockLanes.
template <class T>
struct Block {
  int outer;
  int row_begin, row_end;
  int column_begin, column_end;
  int lanes;
  const T* mask;  // null when every column of the block is in every window
  int count(const PackedGrid& grid) const { return (column_end - column_begin) * grid.fold; }
};

struct RowRange {
  int begin, end;
};

NATTEN_INLINE int smaller(int a, int b) { return a < b ? a : b; }
NATTEN_INLINE int larger(int a, int b) { return a > b ? a : b; }

// Folded rows of the block that tile row r sees.
template <class T>
NATTEN_INLINE RowRange rows_seen(const Block<T>& block, const Stream& stream, int r) {
  const int fold = stream.grid.fold, begin = stream.windows.row_begin[r], end = stream.windows.row_end[r];
  if (begin >= end) return {block.row_begin, block.row_begin};
  return {larger(begin / fold, block.row_begin), smaller((end + fold - 1) / fold, block.row_end)};
}

template <class T>
constexpr int64_t kMaskElements = kTileTokens * kBlockLanes<T>;

// +infinity inside a column's window and -infinity outside, [tile tokens, lanes]; the same for every tile row, so that
// any rows of the tile that go into a product together find theirs at the beginning.
template <class T>
NATTEN_INLINE void make_mask(const Block<T>& block, const Stream& stream, int rows, int columns, T* mask) {
  constexpr int L = kLanes<T>;
  const int fold = stream.grid.fold;
  for (int c = 0; c < columns; ++c) {
    const int begin = (larger(stream.windows.column_begin[c], block.column_begin) - block.column_begin) * fold;
    const int end = (smaller(stream.windows.column_end[c], block.column_end) - block.column_begin) * fold;
    for (int lane = 0; lane < block.lanes; lane += L) {
      const IntegerVector<T> number = lane_numbers<T>() + lane;
      const Vector<T> outside = broadcast<T>(-__builtin_inff());
      const Vector<T> value = ((number >= begin) & (number < end)) ? -outside : outside;
      for (int r = 0; r < rows; ++r) store(mask + (r * columns + c) * block.lanes + lane, value);
    }
  }
}

// Calls body(block) over everything that the tile sees in the stream. `mask` has kMaskElements.
template <class T, class Body>
NATTEN_INLINE void walk(const Stream& stream, int rows, int columns, T* mask, const Body& body) {
  constexpr int L = kLanes<T>;
  const TileWindows& windows = stream.windows;
  const int fold = stream.grid.fold;
  const int column_end = windows.column_end[columns - 1], row_end = (windows.row_end[rows - 1] + fold - 1) / fold;
  const int most_columns = kBlockLanes<T> / fold;
  Block<T> block;
  for (int column = windows.column_begin[0]; column < column_end; column = block.column_end) {
    block.column_begin = column;
    block.column_end = smaller(column + most_columns, column_end);
    block.lanes = (block.count(stream.grid) + L - 1) / L * L;
    const bool full = block.lanes == block.count(stream.grid) && windows.column_begin[columns - 1] <= column &&
                      windows.column_end[0] >= block.column_end;
    block.mask = full ? nullptr : mask;
    if (!full) make_mask(block, stream, rows, columns, mask);
    const int most_rows = kBlockLanes<T> / block.lanes;
    for (block.outer = windows.outer.begin; block.outer < windows.outer.end; ++block.outer) {
      for (int row = windows.row_begin[0] / fold; row < row_end; row = block.row_end) {
        block.row_begin = row;
        block.row_end = smaller(row + most_rows, row_end);
        body(block);
      }
    }
  }
}

// Scores of the block: a product with the transposed stream, for those tile rows that see the streaming row.
// Masked where `mask` says so and, in folded rows that a window covers in part, row by row.
template <class T>
NATTEN_INLINE void block_scores(const Block<T>& block, const Stream& stream, int rows, int columns, int channels,
                                const T* stationary, const void* transposed, bool masked, T* out) {
  constexpr int L = kLanes<T>;
  const PackedGrid& grid = stream.grid;
  const TileWindows& windows = stream.windows;
  const int fold = grid.fold;
  int first = 0, last = 0;  // tile rows that see the streaming row
  for (int row = block.row_begin; row < block.row_end; ++row) {
    while (first < rows && windows.row_end[first] <= row * fold) ++first;
    while (last < rows && windows.row_begin[last] < (row + 1) * fold) ++last;
    if (first >= last) continue;
    const int64_t folded_row = static_cast<int64_t>(block.outer) * grid.folded_rows + row;
    Scores<T> product;
    product.stationary = stationary + first * columns * L;
    product.stationary_step = static_cast<int64_t>(rows) * columns * L;
    product.streaming = static_cast<const T*>(transposed) + folded_row * channels * grid.pitch +
                        static_cast<int64_t>(block.column_begin) * fold;
    product.pitch = grid.pitch;
    product.channels = channels;
    product.mask = masked ? block.mask : nullptr;
    product.mask_pitch = block.lanes;
    product.out = out + first * columns * kBlockLanes<T> + (row - block.row_begin) * block.lanes;
    multiply_scores(product, (last - first) * columns, block.lanes / L);
  }
  if (!masked || fold == 1) return;
  const Vector<T> outside = broadcast<T>(-__builtin_inff());
  const IntegerVector<T> number = lane_numbers<T>() & (fold - 1);
  for (int r = 0; r < rows; ++r) {
    const int begin = windows.row_begin[r], end = windows.row_end[r];
    const RowRange seen = rows_seen(block, stream, r);
    for (int row : {begin / fold, (end - 1) / fold}) {
      if (row < seen.begin || row >= seen.end) continue;
      const int first_inside = begin - row * fold, first_after = end - row * fold;
      if (first_inside <= 0 && first_after >= fold) continue;
      const IntegerVector<T> inside = (number >= first_inside) & (number < first_after);
      for (int c = 0; c < columns; ++c) {
        T* scores = out + (r * columns + c) * kBlockLanes<T> + (row - block.row_begin) * block.lanes;
        for (int lane = 0; lane < block.lanes; lane += L) store(scores + lane, inside ? load(scores + lane) : outside);
      }
    }
  }
}

// out[token, channel] = factors[token] * out[token, channel] + weights * row-major stream, over the block; `factors`
// null: 1. Tokens that see nothing of the block are left alone.
template <class T>
NATTEN_INLINE void block_combine(const Block<T>& block, const Stream& stream, int rows, int columns, int channels,
                                 const T* weights, const void* row_major, T* out, const T* factors = nullptr) {
  const PackedGrid& grid = stream.grid;
  const int padded = padded_channels<T>(channels);
  for (int r = 0, next; r < rows; r = next) {
    // Neighbouring rows mostly see the same part of the block: one product then serves them all.
    const RowRange seen = rows_seen(block, stream, r);
    for (next = r + 1; next < rows; ++next) {
      const RowRange other = rows_seen(block, stream, next);
      if (other.begin != seen.begin || other.end != seen.end) break;
    }
    if (seen.begin >= seen.end) continue;
    const int64_t folded_row = static_cast<int64_t>(block.outer) * grid.folded_rows + seen.begin;
    Combination<T> product;
    product.weights = weights + r * columns * kBlockLanes<T> + (seen.begin - block.row_begin) * block.lanes;
    product.weights_row_step = block.lanes;
    product.rows = seen.end - seen.begin;
    product.count = block.count(grid);
    product.values_row_step = static_cast<int64_t>(grid.row_tokens) * padded;
    product.values_pitch = padded;
    product.values = static_cast<const T*>(row_major) + folded_row * product.values_row_step +
                     static_cast<int64_t>(block.column_begin) * grid.fold * padded;
    product.out = out + static_cast<int64_t>(r) * columns * padded;
    product.out_pitch = padded;
    product.factors = factors ? factors + r * columns : nullptr;
    multiply_combine(product, (next - r) * columns, padded / kLanes<T>);
  }
}

}  // namespace natten::cpu::NATTEN_CPU_INSTRUCTION_SET
