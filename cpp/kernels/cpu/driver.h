// What the operators have in common: packs what streams, cuts what is stationary into tiles and spreads both over the
// threads. No result depends on the number of threads: every token's sums are one tile's, in one order.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "kernels/cpu/grid.h"
#include "kernels/cpu/parallel.h"

namespace natten::cpu {

// The tile functions of the best instruction set that the processor has.
const TileKernels& kernels_for(ScalarType type);

// Packed operands that exist at a time. More heads than fit are worked on one after the other, in the same memory.
constexpr int64_t kWaveBytes = int64_t(16) << 20;

inline int element_bytes(ScalarType type) {
  return type == ScalarType::float64 ? 8 : type == ScalarType::float32 ? 4 : 2;
}
inline int compute_bytes(ScalarType type) { return type == ScalarType::float64 ? 8 : 4; }

// Memory that is kept until more is asked for.
class Buffer {
 public:
  // At least `bytes`, with contents of no meaning.
  char* grow(int64_t bytes) {
    if (bytes > bytes_) {
      data_.reset();
      bytes_ = 0;
      const int64_t rounded = (bytes + kScratchAlignment - 1) / kScratchAlignment * kScratchAlignment;
      data_.reset(static_cast<char*>(std::aligned_alloc(kScratchAlignment, rounded)));
      if (!data_) throw std::bad_alloc();
      bytes_ = rounded;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(char* data) const { std::free(data); }
  };
  std::unique_ptr<char, Free> data_;
  int64_t bytes_ = 0;
};

// What the tile functions need for one tile or one packed row, whatever the operator.
inline char* thread_scratch(int head_dim, int head_dim_v) {
  static thread_local Buffer buffer;
  const int64_t operands = int64_t(2) * kTileTokens * (head_dim + head_dim_v + 32) * 8;
  const int64_t scores = int64_t(3) * kTileTokens * kBlockBytes;  // two of them, and the mask
  const int64_t softmax = int64_t(kTileTokens) * 4 * kScratchAlignment;
  return buffer.grow(operands + scores + softmax + 16 * kScratchAlignment);
}

// Tokens of one head and one dilation group in a tensor.
struct GroupTokens {
  char* data;
  int64_t stride[kAxes];  // elements, between neighbours in the group
  int bytes;

  char* at(int outer, int row, int column) const {
    return data + (outer * stride[0] + row * stride[1] + column * stride[2]) * bytes;
  }
  TileTokens tile(const TilePlace& place) const {
    return {data ? at(place.outer, place.row, place.column) : nullptr, stride[1], stride[2]};
  }
};

inline GroupTokens group_tokens(const TensorView& view, const Problem& problem, const GridGroup& group, Stationary side,
                                int64_t batch, int head, int bytes) {
  GroupTokens tokens;
  int64_t offset = batch * view.batch_stride + head * view.head_stride;
  for (int a = 0; a < kAxes; ++a) {
    const Group& g = group.axis[a]->group;
    offset += (side == Stationary::queries ? g.q_first : g.kv_first) * view.axis_stride[a];
    tokens.stride[a] = view.axis_stride[a] * problem.axis[a].dilation;
  }
  tokens.bytes = bytes;
  tokens.data = view.data ? static_cast<char*>(view.data) + offset * bytes : nullptr;
  return tokens;
}

// A key head of the batch.
struct KeyHead {
  int64_t batch;
  int head;
};

// What every operator has in common.
struct Context {
  explicit Context(const Problem& p)
      : problem(p),
        kernels(kernels_for(p.type)),
        element(element_bytes(p.type)),
        compute(compute_bytes(p.type)),
        group_heads(p.heads_kv ? p.heads / p.heads_kv : 0),
        grouped(p),
        groups(grouped.groups()) {}

  int vectors(int channels) const { return ceil_div(channels, kernels.lanes); }
  TileShape tile_shape(Stationary side, const TileWork& work, bool may_fold) const {
    const auto tokens = [side](const GridGroup& group) {
      int64_t count = 1;
      for (int a = 0; a < kAxes; ++a) count *= windows_of(group, a, side).count();
      return count;
    };
    const GridGroup& largest = *std::max_element(
        groups.begin(), groups.end(), [&](const auto& one, const auto& other) { return tokens(one) < tokens(other); });
    return choose_tile(largest, side, work, kernels.lanes, kernels.accumulators, may_fold ? kernels.lanes : 1);
  }
  GroupTokens queries(const TensorView& view, int group, int64_t batch, int head) const {
    return group_tokens(view, problem, groups[group], Stationary::queries, batch, head, element);
  }
  GroupTokens statistics(const TensorView& view, int group, int64_t batch, int head) const {
    return group_tokens(view, problem, groups[group], Stationary::queries, batch, head, compute);
  }
  GroupTokens keys(const TensorView& view, int group, const KeyHead& head) const {
    return group_tokens(view, problem, groups[group], Stationary::keys, head.batch, head.head, element);
  }
  // Additional keys or values [B, S, Hkv, D].
  GroupTokens additional(const TensorView& view, const KeyHead& head) const {
    const int64_t offset = head.batch * view.batch_stride + head.head * view.head_stride;
    return {static_cast<char*>(view.data) + offset * element, {0, 0, view.axis_stride[2]}, element};
  }
  void* scratch() const { return thread_scratch(problem.head_dim, problem.head_dim_v); }

  Tile tile(const TilePlace& place, const Stream* streams, int stream_count) const {
    Tile tile{};
    tile.rows = place.rows;
    tile.columns = place.columns;
    tile.first_channels = problem.head_dim;
    tile.second_channels = problem.head_dim_v;
    tile.scale = problem.scale;
    tile.streams = streams;
    tile.stream_count = stream_count;
    tile.scratch = scratch();
    return tile;
  }
  UnfusedTile unfused_tile(const TilePlace& place, const Stream* streams, int stream_count,
                           const UnfusedArguments& arguments) const {
    UnfusedTile tile{};
    tile.rows = place.rows;
    tile.columns = place.columns;
    tile.channels = problem.head_dim;
    tile.scale = problem.scale;
    tile.streams = streams;
    tile.stream_count = stream_count;
    std::copy(arguments.slots, arguments.slots + kAxes, tile.slots);
    tile.scratch = scratch();
    return tile;
  }

  const Problem& problem;
  const TileKernels& kernels;
  const int element, compute;
  const int group_heads;
  const GroupedProblem grouped;
  const std::vector<GridGroup>& groups;
};

// One operand of all heads of a wave, packed both ways or one way.
class PackedOperand {
 public:
  PackedOperand(const PackedLayout& layout, int channels, bool transposed, bool row_major, int bytes)
      : layout_(layout), channels_(channels), bytes_(bytes) {
    transposed_bytes_ = transposed ? layout.transposed_elements(channels) * bytes : 0;
    head_bytes_ = align(transposed_bytes_) + (row_major ? align(layout.row_major_elements(channels) * bytes) : 0);
    transposed_ = transposed;
    row_major_ = row_major;
  }
  int64_t head_bytes() const { return head_bytes_; }
  void place(char* data) { data_ = data; }

  void* transposed(int64_t head, int64_t row = 0) const {
    return transposed_ ? data_ + head * head_bytes_ + row * layout_.transposed_row(channels_) * bytes_ : nullptr;
  }
  void* row_major(int64_t head, int64_t row = 0) const {
    return row_major_
               ? data_ + head * head_bytes_ + align(transposed_bytes_) + row * layout_.row_major_row(channels_) * bytes_
               : nullptr;
  }
  // Packs folded row `row` of the head from the tokens of the row's group.
  void pack(const Context& context, int64_t head, int64_t row, const GroupTokens& tokens) const {
    const TilePlace place = layout_.place(row);
    PackedRow packed;
    packed.tokens = tokens.tile(place);
    packed.rows = place.rows;
    packed.columns = place.columns;
    packed.channels = channels_;
    packed.grid = layout_.grid(place.group);
    packed.transposed = transposed(head, row);
    packed.row_major = row_major(head, row);
    packed.scratch = context.scratch();
    context.kernels.pack(packed);
  }

 private:
  static int64_t align(int64_t bytes) {
    return (bytes + kScratchAlignment - 1) / kScratchAlignment * kScratchAlignment;
  }

  const PackedLayout& layout_;
  int channels_, bytes_;
  bool transposed_, row_major_;
  int64_t transposed_bytes_, head_bytes_;
  char* data_ = nullptr;
};

// Windows of any tile that sees all of a grid.
class WholeGrid {
 public:
  explicit WholeGrid(const PackedGrid& grid)
      : outer_(grid.extent[0]),
        zero_(kTileTokens, 0),
        rows_(kTileTokens, grid.extent[1]),
        columns_(kTileTokens, grid.extent[2]) {}
  TileWindows windows() const { return {{0, outer_}, zero_.data(), rows_.data(), zero_.data(), columns_.data()}; }

 private:
  int outer_;
  std::vector<int> zero_, rows_, columns_;
};

// Works on all key heads in waves whose packed operands fit kWaveBytes.
class Waves {
 public:
  // `operands`: what is packed, and how many heads of it there are for each key head.
  struct Operand {
    PackedOperand* packed;
    int heads;
  };
  Waves(const Problem& problem, const std::vector<Operand>& operands)
      : heads_kv_(problem.heads_kv), heads_(problem.batch * problem.heads_kv) {
    int64_t bytes = 0;
    for (const Operand& operand : operands) bytes += operand.heads * operand.packed->head_bytes();
    most_ = std::min(heads_, std::max<int64_t>(1, kWaveBytes / std::max<int64_t>(1, bytes)));
    // Fresh pages cost more than a small problem's arithmetic: each calling thread keeps one wave's memory.
    static thread_local Buffer kept;
    char* data = (most_ * bytes <= kWaveBytes ? kept : memory_).grow(std::max<int64_t>(1, most_ * bytes));
    for (const Operand& operand : operands) {
      operand.packed->place(data);
      data += most_ * operand.heads * operand.packed->head_bytes();
    }
  }
  // Calls run() for every wave.
  template <class Run>
  void run(const Run& run) {
    for (first_ = 0; first_ < heads_; first_ += most_) run();
  }
  // Calls body(key head, its number in the wave, item) for all key heads of the wave, on all threads.
  template <class Body>
  void parallel(int64_t items, const Body& body) const {
    if (items == 0) return;
    parallel_for(std::min(most_, heads_ - first_) * items, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t in_wave = i / items, head = first_ + in_wave;
        body(KeyHead{head / heads_kv_, static_cast<int>(head % heads_kv_)}, in_wave, i % items);
      }
    });
  }
  // The same with the heads innermost: in the tensors, heads of a token are neighbours.
  template <class Body>
  void parallel_packing(int64_t items, const Body& body) const {
    const int64_t heads = std::min(most_, heads_ - first_);
    if (items == 0) return;
    parallel_for(heads * items, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t in_wave = i % heads, head = first_ + in_wave;
        body(KeyHead{head / heads_kv_, static_cast<int>(head % heads_kv_)}, in_wave, i / heads);
      }
    });
  }

 private:
  int heads_kv_;
  int64_t heads_, most_, first_ = 0;
  Buffer memory_;  // of a head that is larger than a wave
};

}  // namespace natten::cpu
