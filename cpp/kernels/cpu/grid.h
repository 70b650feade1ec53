// How a problem falls into dilation groups, stationary tiles and packed streams. Host only, no instruction set in it.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels/cpu/tile.h"

namespace natten::cpu {

// The streaming tokens that every stationary token of one axis of one dilation group sees; counted from the first that
// was passed.
struct Windows {
  std::vector<int> begin, end;
  int streaming_count;
  int count() const { return static_cast<int>(begin.size()); }
};

struct AxisGroup {
  Group group;
  Windows of_queries, of_keys;
};

inline AxisGroup make_axis_group(const Axis& axis, int index) {
  AxisGroup result;
  const Group g = result.group = make_group(axis, index);
  result.of_queries.streaming_count = g.kv_count;
  for (int i = 0; i < g.q_count; ++i) {
    const Range keys = window(g, g.q_position + i);
    result.of_queries.begin.push_back(keys.begin - g.kv_position);
    result.of_queries.end.push_back(keys.end - g.kv_position);
  }
  result.of_keys.streaming_count = g.q_count;
  for (int j = 0; j < g.kv_count; ++j) {
    // Only queries that were passed; an empty range keeps the ends monotone.
    const Range queries = inverse_window(g, g.kv_position + j);
    const int begin = std::clamp(queries.begin - g.q_position, 0, g.q_count);
    result.of_keys.begin.push_back(begin);
    result.of_keys.end.push_back(std::clamp(queries.end - g.q_position, begin, g.q_count));
  }
  return result;
}

// One dilation group of the problem: a group of every axis.
struct GridGroup {
  const AxisGroup* axis[kAxes];
};

class GroupedProblem {
 public:
  explicit GroupedProblem(const Problem& problem) {
    for (int a = 0; a < kAxes; ++a)
      for (int index = 0; index < problem.axis[a].dilation; ++index)
        axes_[a].push_back(make_axis_group(problem.axis[a], index));
    for (const AxisGroup& x : axes_[0])
      for (const AxisGroup& y : axes_[1])
        for (const AxisGroup& z : axes_[2]) groups_.push_back({{&x, &y, &z}});
  }
  GroupedProblem(const GroupedProblem&) = delete;
  GroupedProblem& operator=(const GroupedProblem&) = delete;

  const std::vector<GridGroup>& groups() const { return groups_; }

 private:
  std::vector<AxisGroup> axes_[kAxes];
  std::vector<GridGroup> groups_;
};

// Which side is stationary.
enum class Stationary { queries, keys };

inline const Windows& windows_of(const GridGroup& group, int axis, Stationary side) {
  return side == Stationary::queries ? group.axis[axis]->of_queries : group.axis[axis]->of_keys;
}

// Items of all groups in one sequence.
class GroupedItems {
 public:
  void add_group(int64_t count) { first_.push_back(first_.back() + count); }
  int64_t count() const { return first_.back(); }
  int64_t first(int group) const { return first_[group]; }
  int group_of(int64_t item) const {
    return static_cast<int>(std::upper_bound(first_.begin(), first_.end(), item) - first_.begin()) - 1;
  }

 private:
  std::vector<int64_t> first_ = {0};
};

// Where a tile, or a folded row, stands in its group.
struct TilePlace {
  int group;
  int outer, row, column;
  int rows, columns;
};

// The packed form of one head's streaming side; every folded row of every group has the same size.
class PackedLayout {
 public:
  PackedLayout(const std::vector<GridGroup>& groups, Stationary side, int fold, int lanes) {
    int most_columns = 0;
    for (const GridGroup& group : groups) {
      PackedGrid grid{};
      for (int a = 0; a < kAxes; ++a) grid.extent[a] = windows_of(group, a, side).streaming_count;
      most_columns = std::max(most_columns, grid.extent[2]);
      add(grid, fold);
    }
    finish(most_columns * fold, lanes);
  }
  // Tokens without windows: additional keys.
  PackedLayout(int tokens, int lanes) {
    add(PackedGrid{{1, 1, tokens}, 1, 1, 0, 0}, 1);
    finish(tokens, lanes);
  }

  const PackedGrid& grid(int group) const { return grids_[group]; }
  const GroupedItems& rows() const { return rows_; }
  TilePlace place(int64_t row) const {
    TilePlace place;
    place.group = rows_.group_of(row);
    const PackedGrid& grid = grids_[place.group];
    const int64_t in_group = row - rows_.first(place.group);
    place.outer = static_cast<int>(in_group / grid.folded_rows);
    place.row = static_cast<int>(in_group % grid.folded_rows) * grid.fold;
    place.column = 0;
    place.rows = std::min(grid.fold, grid.extent[1] - place.row);
    place.columns = grid.extent[2];
    return place;
  }

  // Elements of all rows of a head.
  int64_t transposed_elements(int channels) const { return rows_.count() * transposed_row(channels); }
  int64_t row_major_elements(int channels) const { return rows_.count() * row_major_row(channels); }
  int64_t statistics_elements() const { return rows_.count() * pitch_; }
  // Elements of one folded row.
  int64_t transposed_row(int channels) const { return channels * pitch_; }
  int64_t row_major_row(int channels) const { return int64_t(row_tokens_) * ceil_div(channels, lanes_) * lanes_; }
  int64_t pitch() const { return pitch_; }

 private:
  void add(PackedGrid grid, int fold) {
    grid.fold = fold;
    grid.folded_rows = ceil_div(grid.extent[1], fold);
    rows_.add_group(int64_t(grid.extent[0]) * grid.folded_rows);
    grids_.push_back(grid);
  }
  void finish(int positions, int lanes) {
    lanes_ = lanes;
    row_tokens_ = ceil_div(positions, lanes) * lanes;
    // A load may begin at any position and reach `lanes - 1` past the last. An odd number of vectors keeps the channels
    // of a token from falling into few cache sets.
    pitch_ = int64_t(ceil_div(row_tokens_ + lanes - 1, lanes) | 1) * lanes;
    for (PackedGrid& grid : grids_) {
      grid.row_tokens = row_tokens_;
      grid.pitch = pitch_;
    }
  }

  std::vector<PackedGrid> grids_;
  GroupedItems rows_;
  int lanes_ = 1, row_tokens_ = 0;
  int64_t pitch_ = 0;
};

struct TileShape {
  int rows, columns;
  int fold;  // of the stream
};

class Tiling {
 public:
  Tiling(const std::vector<GridGroup>& groups, Stationary side, const TileShape& shape) : shape_(shape) {
    for (const GridGroup& group : groups) {
      extents_.push_back(
          {windows_of(group, 0, side).count(), windows_of(group, 1, side).count(), windows_of(group, 2, side).count()});
      tiles_.add_group(int64_t(extents_.back().outer) * row_tiles(extents_.back()) * column_tiles(extents_.back()));
    }
  }
  // Tokens in one row, without windows.
  Tiling(int tokens, int columns) : shape_{1, columns, 1} {
    extents_.push_back({1, 1, tokens});
    tiles_.add_group(column_tiles(extents_.back()));
  }

  int64_t count() const { return tiles_.count(); }

  // Tiles below each other follow one another: they share most of the columns they stream.
  TilePlace place(int64_t tile) const {
    TilePlace place;
    place.group = tiles_.group_of(tile);
    const Extent& extent = extents_[place.group];
    int64_t rest = tile - tiles_.first(place.group);
    place.row = static_cast<int>(rest % row_tiles(extent)) * shape_.rows;
    rest /= row_tiles(extent);
    place.column = static_cast<int>(rest % column_tiles(extent)) * shape_.columns;
    place.outer = static_cast<int>(rest / column_tiles(extent));
    place.rows = std::min(shape_.rows, extent.rows - place.row);
    place.columns = std::min(shape_.columns, extent.columns - place.column);
    return place;
  }

 private:
  struct Extent {
    int outer, rows, columns;
  };
  int row_tiles(const Extent& extent) const { return ceil_div(extent.rows, shape_.rows); }
  int column_tiles(const Extent& extent) const { return ceil_div(extent.columns, shape_.columns); }

  TileShape shape_;
  std::vector<Extent> extents_;
  GroupedItems tiles_;
};

inline TileWindows tile_windows(const GridGroup& group, Stationary side, const TilePlace& place) {
  const Windows &outer = windows_of(group, 0, side), &rows = windows_of(group, 1, side),
                &columns = windows_of(group, 2, side);
  return {{outer.begin[place.outer], outer.end[place.outer]},
          rows.begin.data() + place.row,
          rows.end.data() + place.row,
          columns.begin.data() + place.column,
          columns.end.data() + place.column};
}

// Work of one token in multiples of a vector instruction, from which `choose_tile` picks.
struct TileWork {
  int score_channels;   // of all products whose vectors run along tokens
  int combine_vectors;  // of all products whose vectors run along channels, per streaming token
  int softmax;          // per vector of scores
};

TileShape choose_tile(const GridGroup& group, Stationary side, const TileWork& work, int lanes, int accumulators,
                      int most_fold);

}  // namespace natten::cpu
