// One stationary tile of the fused operator: forward, dQ, and dK with dV.
#pragma once

#include "kernels/cpu/tile_walk.h"

namespace natten::cpu::NATTEN_CPU_INSTRUCTION_SET {

// Scores are kept in base 2: stationary operands are multiplied by scale * log2(e) once.
constexpr double kLog2E = 1.44269504088896340736, kLn2 = 0.69314718055994530942;

NATTEN_INLINE float natural_logarithm(float x) { return __builtin_logf(x); }
NATTEN_INLINE double natural_logarithm(double x) { return __builtin_log(x); }

// Online softmax of one query, whose weights so far are relative to `largest`.
template <class T>
struct Softmax {
  T largest;
  T lane_sums[kLanes<T>];  // of the weights
};

// Turns a query's `count` scores into weights. Returns the factor of what was accumulated before. Without branches:
// which block raises the maximum cannot be predicted.
template <class T>
NATTEN_INLINE T update_softmax(Softmax<T>& softmax, T* scores, int count) {
  constexpr int L = kLanes<T>;
  const T lowest = -__builtin_inff();
  Vector<T> most = load(scores);
  for (int lane = L; lane < count; lane += L) most = maximum<T>(most, load(scores + lane));
  const T block_largest = horizontal_maximum<T>(most);
  const T largest = block_largest > softmax.largest ? block_largest : softmax.largest;
  // All masked so far: any finite number makes the weights 0.
  const T reference = largest == lowest ? T(0) : largest;
  const Vector<T> factor = exp2(broadcast(softmax.largest - reference));
  Vector<T> sums = load(softmax.lane_sums) * factor;
  for (int lane = 0; lane < count; lane += L) {
    const Vector<T> weight = exp2(load(scores + lane) - reference);
    sums += weight;
    store(scores + lane, weight);
  }
  store(softmax.lane_sums, sums);
  softmax.largest = largest;
  return factor[0];
}

template <class E>
static void forward(const Tile& tile) {
  using T = Compute<E>;
  constexpr int L = kLanes<T>;
  const int rows = tile.rows, columns = tile.columns, tokens = rows * columns;
  const int padded = padded_channels<T>(tile.second_channels);
  Scratch scratch(tile.scratch);
  T* query = scratch.take<T>(tokens * padded_channels<T>(tile.first_channels));
  T* out = scratch.take<T>(tokens * padded);
  T* scores = scratch.take<T>(tokens * kBlockLanes<T>);
  T* mask = scratch.take<T>(kMaskElements<T>);
  T* factors = scratch.take<T>(tokens);
  Softmax<T>* softmax = scratch.take<Softmax<T>>(tokens);

  load_stationary<E>(tile.first, rows, columns, tile.first_channels, static_cast<T>(tile.scale * kLog2E), query);
  fill(out, static_cast<int64_t>(tokens) * padded, T(0));
  for (int i = 0; i < tokens; ++i) {
    softmax[i].largest = -__builtin_inff();
    fill(softmax[i].lane_sums, L, T(0));
  }

  for (int s = 0; s < tile.stream_count; ++s) {
    const Stream& stream = tile.streams[s];
    walk<T>(stream, rows, columns, mask, [&](const Block<T>& block) {
      block_scores(block, stream, rows, columns, tile.first_channels, query, stream.first_transposed, true, scores);
      for (int r = 0; r < rows; ++r) {
        const RowRange seen = rows_seen(block, stream, r);
        if (seen.begin >= seen.end) continue;
        for (int i = r * columns; i < (r + 1) * columns; ++i) {
          T* own = scores + i * kBlockLanes<T> + (seen.begin - block.row_begin) * block.lanes;
          factors[i] = update_softmax(softmax[i], own, (seen.end - seen.begin) * block.lanes);
        }
      }
      block_combine(block, stream, rows, columns, tile.second_channels, scores, stream.second_rows, out, factors);
    });
  }

  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) {
      const int i = r * columns + c;
      const T sum = horizontal_sum<T>(load(softmax[i].lane_sums));
      store_channels(out + i * padded, 1 / sum, tile.second_channels, token<E>(tile.first_result, r, c));
      *token<T>(tile.logsumexp, r, c) = softmax[i].largest * static_cast<T>(kLn2) + natural_logarithm(sum);
    }
  }
}

// Queries stationary: dQ = scale dS K with dS = P (dP - delta), P = exp(S - logsumexp), dP = dO V^T.
template <class E>
static void backward_query(const Tile& tile) {
  using T = Compute<E>;
  constexpr int L = kLanes<T>;
  const int rows = tile.rows, columns = tile.columns, tokens = rows * columns;
  const int padded = padded_channels<T>(tile.first_channels);
  Scratch scratch(tile.scratch);
  T* query = scratch.take<T>(tokens * padded);
  T* grad_out = scratch.take<T>(tokens * padded_channels<T>(tile.second_channels));
  T* grad_query = scratch.take<T>(tokens * padded);
  T* scores = scratch.take<T>(tokens * kBlockLanes<T>);
  T* grad_weights = scratch.take<T>(tokens * kBlockLanes<T>);
  T* mask = scratch.take<T>(kMaskElements<T>);

  load_stationary<E>(tile.first, rows, columns, tile.first_channels, static_cast<T>(tile.scale * kLog2E), query);
  load_stationary<E>(tile.second, rows, columns, tile.second_channels, T(1), grad_out);
  fill(grad_query, static_cast<int64_t>(tokens) * padded, T(0));

  for (int s = 0; s < tile.stream_count; ++s) {
    const Stream& stream = tile.streams[s];
    walk<T>(stream, rows, columns, mask, [&](const Block<T>& block) {
      block_scores(block, stream, rows, columns, tile.first_channels, query, stream.first_transposed, true, scores);
      block_scores(block, stream, rows, columns, tile.second_channels, grad_out, stream.second_transposed, false,
                   grad_weights);
      for (int r = 0; r < rows; ++r) {
        const RowRange seen = rows_seen(block, stream, r);
        const int fold = tile.own_grid.fold, row = tile.own_row + r;
        for (int c = 0; c < columns; ++c) {
          const int64_t position = row / fold * tile.own_grid.pitch + (tile.own_column + c) * fold + row % fold;
          const T logsumexp = static_cast<const T*>(tile.own_logsumexp)[position];
          const T delta = static_cast<const T*>(tile.own_delta)[position];
          const int64_t own = (r * columns + c) * kBlockLanes<T>;
          for (int lane = (seen.begin - block.row_begin) * block.lanes;
               lane < (seen.end - block.row_begin) * block.lanes; lane += L) {
            const Vector<T> weight = exp2(load(scores + own + lane) - logsumexp);
            store(scores + own + lane, weight * (load(grad_weights + own + lane) - delta));
          }
        }
      }
      block_combine(block, stream, rows, columns, tile.first_channels, scores, stream.first_rows, grad_query);
    });
  }

  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c)
      store_channels(grad_query + (r * columns + c) * padded, static_cast<T>(tile.scale), tile.first_channels,
                     token<E>(tile.first_result, r, c));
}

// Keys stationary, queries stream through the inverse windows: dK = scale dS^T Q, dV = P^T dO.
template <class E>
static void backward_key(const Tile& tile) {
  using T = Compute<E>;
  constexpr int L = kLanes<T>;
  const int rows = tile.rows, columns = tile.columns, tokens = rows * columns;
  const int padded_first = padded_channels<T>(tile.first_channels);
  const int padded_second = padded_channels<T>(tile.second_channels);
  Scratch scratch(tile.scratch);
  T* key = scratch.take<T>(tokens * padded_first);
  T* value = scratch.take<T>(tokens * padded_second);
  T* grad_key = scratch.take<T>(tokens * padded_first);
  T* grad_value = scratch.take<T>(tokens * padded_second);
  T* scores = scratch.take<T>(tokens * kBlockLanes<T>);
  T* grad_weights = scratch.take<T>(tokens * kBlockLanes<T>);
  T* mask = scratch.take<T>(kMaskElements<T>);

  load_stationary<E>(tile.first, rows, columns, tile.first_channels, static_cast<T>(tile.scale * kLog2E), key);
  load_stationary<E>(tile.second, rows, columns, tile.second_channels, T(1), value);
  fill(grad_key, static_cast<int64_t>(tokens) * padded_first, T(0));
  fill(grad_value, static_cast<int64_t>(tokens) * padded_second, T(0));

  for (int s = 0; s < tile.stream_count; ++s) {
    const Stream& stream = tile.streams[s];
    const PackedGrid& grid = stream.grid;
    walk<T>(stream, rows, columns, mask, [&](const Block<T>& block) {
      block_scores(block, stream, rows, columns, tile.first_channels, key, stream.first_transposed, true, scores);
      block_scores(block, stream, rows, columns, tile.second_channels, value, stream.second_transposed, false,
                   grad_weights);
      for (int r = 0; r < rows; ++r) {
        const RowRange seen = rows_seen(block, stream, r);
        for (int row = seen.begin; row < seen.end; ++row) {
          const int64_t folded_row = static_cast<int64_t>(block.outer) * grid.folded_rows + row;
          const int64_t position = folded_row * grid.pitch + static_cast<int64_t>(block.column_begin) * grid.fold;
          const T* logsumexp = static_cast<const T*>(stream.logsumexp) + position;
          const T* delta = static_cast<const T*>(stream.delta) + position;
          for (int c = 0; c < columns; ++c) {
            const int64_t own = (r * columns + c) * kBlockLanes<T> + (row - block.row_begin) * block.lanes;
            for (int lane = 0; lane < block.lanes; lane += L) {
              const Vector<T> weight = exp2(load(scores + own + lane) - load(logsumexp + lane));
              const Vector<T> grad_weight = load(grad_weights + own + lane) - load(delta + lane);
              store(scores + own + lane, weight);
              store(grad_weights + own + lane, weight * grad_weight);
            }
          }
        }
      }
      block_combine(block, stream, rows, columns, tile.second_channels, scores, stream.second_rows, grad_value);
      block_combine(block, stream, rows, columns, tile.first_channels, grad_weights, stream.first_rows, grad_key);
    });
  }

  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) {
      const int i = r * columns + c;
      store_channels(grad_key + i * padded_first, static_cast<T>(tile.scale), tile.first_channels,
                     token<E>(tile.first_result, r, c));
      store_channels(grad_value + i * padded_second, T(1), tile.second_channels, token<E>(tile.second_result, r, c));
    }
  }
}

}  // namespace natten::cpu::NATTEN_CPU_INSTRUCTION_SET
