// What the driver (driver.h) hands to the code that is compiled once per instruction set: plain data, no functions.
//
// A pass over one dilation group has a stationary side, cut into tiles, and a streaming side, packed for vectors. In
// the forward pass and for dQ queries are stationary and keys stream; for dK and dV it is the other way round, through
// the inverse windows. Both sides are dense grids [axis 0, rows (axis 1), columns (axis 2)].
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/arguments.h"

namespace natten::cpu {

constexpr int kTileTokens = 24;   // most stationary tokens of a tile, rows x columns at one position of axis 0
constexpr int kBlockBytes = 512;  // of scores per stationary token that exist at a time
constexpr int kScratchAlignment = 64;

// A streaming grid in packed form. `fold` neighbouring rows are interleaved into one folded row, so that narrow windows
// fill a vector: lane position = column * fold + row % fold. Rows and columns past the grid are zero.
//   transposed: [axis 0, folded rows, channels, pitch]           vectors run along tokens
//   rows:       [axis 0, folded rows, row_tokens, padded channels]  vectors run along channels
struct PackedGrid {
  int extent[kAxes];
  int fold;
  int folded_rows;
  int64_t pitch;
  int row_tokens;
};

// Streaming tokens that the tokens of a stationary tile see: a range per axis, each end non-decreasing, possibly empty.
struct TileWindows {
  Range outer;
  const int *row_begin, *row_end;        // [tile rows]
  const int *column_begin, *column_end;  // [tile columns]
};

// The streaming operands, in the type that is computed in. `first` is the key (query) side of the scores, `second` the
// value (gradient of the output) side. What a pass does not need is null.
struct Stream {
  PackedGrid grid;
  TileWindows windows;
  const void *first_transposed, *first_rows, *second_transposed, *second_rows;
  const void *logsumexp, *delta;  // [axis 0, folded rows, pitch], logsumexp in base 2
};

// Tokens of a tile in a tensor: data + row * row_stride + column * column_stride, in elements.
struct TileTokens {
  void* data;
  int64_t row_stride, column_stride;
};

struct Tile {
  int rows, columns;
  int first_channels, second_channels;  // D, Dv
  double scale;
  const Stream* streams;  // added up one after the other
  int stream_count;
  TileTokens first, second;                // stationary operands: query (and grad_out), or key and value
  TileTokens first_result, second_result;  // out, or grad_query, or grad_key and grad_value
  TileTokens logsumexp;                    // forward: result
  // Backward, queries stationary: statistics of the tile's own tokens, at the tile's axis 0, and where the tile begins.
  const void *own_logsumexp, *own_delta;
  PackedGrid own_grid;
  int own_row, own_column;
  void* scratch;
};

// A tile of an unfused operator.
struct UnfusedTile {
  int rows, columns;
  int channels;
  double scale;
  const Stream* streams;  // one; for inverse_av one for each query head of the key head
  int stream_count;
  TileTokens input, result;
  TileTokens attention;  // of the tile when queries are stationary, else of the group's first query
  int64_t attention_outer_stride, attention_head_stride;
  int slots[kAxes];
  const void* bias;  // qk: entry of the tile's first query and key 0 of the stream; null without
  int64_t bias_stride[kAxes];
  const int* window_begin[kAxes];      // inverse_av: begin of every streaming query's window
  int own_outer, own_row, own_column;  // inverse_av: where the tile begins, in its grid
  void* scratch;
};

// One folded row to pack.
struct PackedRow {
  TileTokens tokens;
  int rows, columns;  // rows: those of the `fold` that exist
  int channels;
  PackedGrid grid;
  void *transposed, *row_major;  // either may be null
  void* scratch;
};

// logsumexp and delta of one folded row of queries.
struct StatisticsRow {
  TileTokens out, grad_out, logsumexp, grad_logsumexp;
  int rows, columns, channels;
  PackedGrid grid;
  void *logsumexp_result, *delta_result;
};

// The code of one instruction set for one element type.
struct TileKernels {
  int lanes;         // of a vector of the type that is computed in
  int accumulators;  // vectors that a matrix product keeps in registers
  void (*pack)(const PackedRow&);
  void (*statistics)(const StatisticsRow&);
  void (*forward)(const Tile&);
  void (*backward_query)(const Tile&);
  void (*backward_key)(const Tile&);
  void (*qk)(const UnfusedTile&);
  void (*av)(const UnfusedTile&);
  void (*inverse_av)(const UnfusedTile&);
};

namespace baseline {
const TileKernels& tile_kernels(ScalarType type);
}
namespace avx2 {
const TileKernels& tile_kernels(ScalarType type);
}
namespace avx512 {
const TileKernels& tile_kernels(ScalarType type);
}

}  // namespace natten::cpu
