// One stationary tile of the unfused operators. Their streams are never folded: a window's columns are contiguous in
// memory, and so they are among a block's lanes.
#pragma once

#include "kernels/cpu/tile_walk.h"

namespace natten::cpu::NATTEN_CPU_INSTRUCTION_SET {

// Calls run(lane of the block's row, slot in the attention row, count) for the columns of a query's window that are in
// the block; `row` is the streaming row.
template <class T, class Run>
NATTEN_INLINE void window_run(const Block<T>& block, const UnfusedTile& tile, int row, int r, int c, const Run& run) {
  const TileWindows& windows = tile.streams[0].windows;
  const int begin = larger(windows.column_begin[c], block.column_begin);
  const int end = smaller(windows.column_end[c], block.column_end);
  const int64_t slot =
      (static_cast<int64_t>(block.outer - windows.outer.begin) * tile.slots[1] + row - windows.row_begin[r]) *
          tile.slots[2] +
      begin - windows.column_begin[c];
  if (begin < end) run(begin - block.column_begin, slot, end - begin);
}

template <class E>
static void qk(const UnfusedTile& tile) {
  using T = Compute<E>;
  const int rows = tile.rows, columns = tile.columns, tokens = rows * columns;
  const Stream& stream = tile.streams[0];
  const TileWindows& windows = stream.windows;
  Scratch scratch(tile.scratch);
  T* query = scratch.take<T>(tokens * padded_channels<T>(tile.channels));
  T* scores = scratch.take<T>(tokens * kBlockLanes<T>);
  T* mask = scratch.take<T>(kMaskElements<T>);
  load_stationary<E>(tile.input, rows, columns, tile.channels, static_cast<T>(tile.scale), query);

  E outside;
  narrow(static_cast<T>(-__builtin_inff()), outside);
  const int64_t slots = static_cast<int64_t>(tile.slots[0]) * tile.slots[1] * tile.slots[2];
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) {
      const bool whole = windows.outer.end - windows.outer.begin == tile.slots[0] &&
                         windows.row_end[r] - windows.row_begin[r] == tile.slots[1] &&
                         windows.column_end[c] - windows.column_begin[c] == tile.slots[2];
      if (!whole) fill(token<E>(tile.attention, r, c), slots, outside);
    }
  }

  walk<T>(stream, rows, columns, mask, [&](const Block<T>& block) {
    block_scores(block, stream, rows, columns, tile.channels, query, stream.first_transposed, false, scores);
    for (int r = 0; r < rows; ++r) {
      const RowRange seen = rows_seen(block, stream, r);
      for (int row = seen.begin; row < seen.end; ++row) {
        for (int c = 0; c < columns; ++c) {
          const T* own = scores + (r * columns + c) * kBlockLanes<T> + (row - block.row_begin) * block.lanes;
          window_run(block, tile, row, r, c, [&](int lane, int64_t slot, int count) {
            E* attention = token<E>(tile.attention, r, c) + slot;
            if (tile.bias) {
              const E* bias = static_cast<const E*>(tile.bias) + block.outer * tile.bias_stride[0] +
                              (row - r) * tile.bias_stride[1] + block.column_begin + lane - c;
              for (int i = 0; i < count; ++i) narrow(own[lane + i] + widen(bias[i]), attention[i]);
            } else {
              for (int i = 0; i < count; ++i) narrow(own[lane + i], attention[i]);
            }
          });
        }
      }
    }
  });
}

template <class E>
static void av(const UnfusedTile& tile) {
  using T = Compute<E>;
  const int rows = tile.rows, columns = tile.columns, tokens = rows * columns;
  const int padded = padded_channels<T>(tile.channels);
  const Stream& stream = tile.streams[0];
  Scratch scratch(tile.scratch);
  T* out = scratch.take<T>(tokens * padded);
  T* weights = scratch.take<T>(tokens * kBlockLanes<T>);
  T* mask = scratch.take<T>(kMaskElements<T>);
  fill(out, static_cast<int64_t>(tokens) * padded, T(0));

  walk<T>(stream, rows, columns, mask, [&](const Block<T>& block) {
    for (int r = 0; r < rows; ++r) {
      const RowRange seen = rows_seen(block, stream, r);
      for (int row = seen.begin; row < seen.end; ++row) {
        for (int c = 0; c < columns; ++c) {
          T* own = weights + (r * columns + c) * kBlockLanes<T> + (row - block.row_begin) * block.lanes;
          fill(own, block.lanes, T(0));
          window_run(block, tile, row, r, c, [&](int lane, int64_t slot, int count) {
            const E* attention = token<E>(tile.attention, r, c) + slot;
            for (int i = 0; i < count; ++i) own[lane + i] = widen(attention[i]);
          });
        }
      }
    }
    block_combine(block, stream, rows, columns, tile.channels, weights, stream.first_rows, out);
  });

  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c)
      store_channels(out + (r * columns + c) * padded, static_cast<T>(tile.scale), tile.channels,
                     token<E>(tile.result, r, c));
}

// Keys stationary; the streams are the input of the query heads that share the key head.
template <class E>
static void inverse_av(const UnfusedTile& tile) {
  using T = Compute<E>;
  const int rows = tile.rows, columns = tile.columns, tokens = rows * columns;
  const int padded = padded_channels<T>(tile.channels);
  Scratch scratch(tile.scratch);
  T* sum = scratch.take<T>(tokens * padded);
  T* weights = scratch.take<T>(tokens * kBlockLanes<T>);
  T* mask = scratch.take<T>(kMaskElements<T>);
  fill(sum, static_cast<int64_t>(tokens) * padded, T(0));

  for (int s = 0; s < tile.stream_count; ++s) {
    const Stream& stream = tile.streams[s];
    const TileWindows& windows = stream.windows;
    const E* attention = static_cast<const E*>(tile.attention.data) + s * tile.attention_head_stride;
    walk<T>(stream, rows, columns, mask, [&](const Block<T>& block) {
      for (int r = 0; r < rows; ++r) {
        const RowRange seen = rows_seen(block, stream, r);
        for (int row = seen.begin; row < seen.end; ++row) {
          const int64_t row_slot =
              static_cast<int64_t>(tile.own_outer - tile.window_begin[0][block.outer]) * tile.slots[1] + tile.own_row +
              r - tile.window_begin[1][row];
          const E* attention_row = attention + block.outer * tile.attention_outer_stride +
                                   row * tile.attention.row_stride + row_slot * tile.slots[2];
          for (int c = 0; c < columns; ++c) {
            T* own = weights + (r * columns + c) * kBlockLanes<T> + (row - block.row_begin) * block.lanes;
            fill(own, block.lanes, T(0));
            const int begin = larger(windows.column_begin[c], block.column_begin);
            const int end = smaller(windows.column_end[c], block.column_end);
            for (int column = begin; column < end; ++column)
              own[column - block.column_begin] =
                  widen(attention_row[column * tile.attention.column_stride + tile.own_column + c -
                                      tile.window_begin[2][column]]);
          }
        }
      }
      block_combine(block, stream, rows, columns, tile.channels, weights, stream.first_rows, sum);
    });
  }

  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c)
      store_channels(sum + (r * columns + c) * padded, static_cast<T>(tile.scale), tile.channels,
                     token<E>(tile.result, r, c));
}

}  // namespace natten::cpu::NATTEN_CPU_INSTRUCTION_SET
