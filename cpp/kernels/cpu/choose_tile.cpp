// The shape of a stationary tile and the fold of its stream, from a count of vector instructions.
#include "kernels/cpu/grid.h"

namespace natten::cpu {
namespace {

constexpr int kMostVectors = 4;  // of one register block, as in products.h
constexpr int kMostSampledTiles = 64;

// In slots of a processor that does two vector instructions a cycle; fitted to measured times of all shapes.
constexpr double kTileCost = 1500;          // of a tile, besides its products
constexpr double kRowCost = 150;            // of one of its rows, at a position of axis 0
constexpr double kCallCost = 30;            // of a call of a product
constexpr double kLatencyAccumulators = 8;  // multiply-adds in flight: two a cycle, four cycles each
constexpr double kScoresLoadCost = 4;       // of a streamed vector, which comes from the second cache,
constexpr double kCombineLoadCost = 2;      // and which other rows of the tile have brought to the first

// Slots per multiply-add of a register block of m tokens x n vectors: latency or loads may be the limit.
double block_cost(int m, int n, int parts, double load_cost) {
  const double products = m * n;
  return std::max({products, kLatencyAccumulators / parts, load_cost * n + m}) / products;
}

// Size of the nearly equal parts, of at most `most`, that `total` is cut into.
int part(int total, int most) { return total ? ceil_div(total, ceil_div(total, most)) : 1; }

struct AxisCost {
  double seen;      // rows, or columns, that the average token sees
  double together;  // that the average tile sees
  double lanes;     // `together`, in whole vectors
};

// Averages over tiles of `tile` tokens, the stream `fold` interleaved; of a long axis, over a sample of its tiles.
AxisCost axis_cost(const Windows& windows, int tile, int fold, int lanes) {
  const int tiles = ceil_div(windows.count(), tile), step = ceil_div(tiles, kMostSampledTiles);
  AxisCost sum{};
  int tokens = 0;
  for (int first = 0; first < windows.count(); first += step * tile) {
    const int end = std::min(first + tile, windows.count());
    const int together = windows.end[end - 1] - windows.begin[first];
    sum.together += double(together) * (end - first);
    sum.lanes += double(ceil_div(together * fold, lanes) * lanes) * (end - first);
    for (int i = first; i < end; ++i)
      if (windows.begin[i] < windows.end[i]) sum.seen += ceil_div(windows.end[i], fold) - windows.begin[i] / fold;
    tokens += end - first;
  }
  const double count = std::max(tokens, 1);
  return {sum.seen / count, sum.together / count, sum.lanes / count};
}

}  // namespace

TileShape choose_tile(const GridGroup& group, Stationary side, const TileWork& work, int lanes, int accumulators,
                      int most_fold) {
  const Windows &row_windows = windows_of(group, 1, side), &column_windows = windows_of(group, 2, side);
  const double outer = std::max(axis_cost(windows_of(group, 0, side), 1, 1, 1).seen, 1.0);
  TileShape best{1, 1, 1};
  double best_cost = -1;
  for (const int columns : {1, 2, 3, 4, 6, 8, 12, 16, 24}) {
    if (columns > std::max(column_windows.count(), 1)) continue;
    const int rows = part(std::max(row_windows.count(), 1), kTileTokens / columns);
    for (int fold = 1; fold <= std::min(most_fold, lanes / 2); fold *= 2) {
      if (fold > 1 && fold >= 2 * row_windows.streaming_count) continue;
      const AxisCost row = axis_cost(row_windows, rows, fold, 1);
      const AxisCost column = axis_cost(column_windows, columns, fold, lanes);
      // Tokens that take part in the product with one streaming row.
      const double folded_together = row.together / fold + 1;
      const int tokens = std::clamp(int(rows * row.seen / folded_together), 1, rows) * columns;
      const int vectors = std::max(int(column.lanes / lanes), 1);
      const int n = part(vectors, kMostVectors);
      const int m = part(tokens, accumulators / n);
      const int combine_n = part(work.combine_vectors, kMostVectors);
      const int combine_m = part(columns, accumulators / combine_n);
      const int parts = combine_m * combine_n <= accumulators / 3 ? 2 : 1;
      const double per_row =
          column.lanes / lanes * (work.score_channels * block_cost(m, n, 1, kScoresLoadCost) + work.softmax) +
          column.together * fold * work.combine_vectors * block_cost(combine_m, combine_n, parts, kCombineLoadCost);
      const double calls = (ceil_div(vectors, n) + 1.0) * kCallCost / tokens;
      const double cost = row.seen * (per_row + calls) + kRowCost / columns + kTileCost / (rows * columns) / outer;
      if (best_cost < 0 || cost < best_cost) {
        best_cost = cost;
        best = {rows, columns, fold};
      }
    }
  }
  return best;
}

}  // namespace natten::cpu
