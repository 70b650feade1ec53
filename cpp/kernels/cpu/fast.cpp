// The driver of the vectorised kernels: packs what streams, cuts what is stationary into tiles and spreads both over
// the threads. No result depends on the number of threads: every token's sums are one tile's, in one order.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "kernels/cpu/grid.h"
#include "kernels/cpu/parallel.h"
#include "kernels/families.h"

namespace natten::cpu {
namespace {

// Packed operands that exist at a time. More heads than fit are worked on one after the other, in the same memory.
constexpr int64_t kWaveBytes = int64_t(16) << 20;

enum class InstructionSet { baseline, avx2, avx512 };

InstructionSet detect_instruction_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma"))
    return InstructionSet::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::avx2;
#endif
  return InstructionSet::baseline;
}

InstructionSet chosen_instruction_set() {
  static const InstructionSet chosen = detect_instruction_set();
  return chosen;
}

const TileKernels& kernels_for(ScalarType type) {
  switch (chosen_instruction_set()) {
#if defined(__x86_64__)
    case InstructionSet::avx512:
      return avx512::tile_kernels(type);
    case InstructionSet::avx2:
      return avx2::tile_kernels(type);
#endif
    default:
      return baseline::tile_kernels(type);
  }
}

int element_bytes(ScalarType type) { return type == ScalarType::float64 ? 8 : type == ScalarType::float32 ? 4 : 2; }
int compute_bytes(ScalarType type) { return type == ScalarType::float64 ? 8 : 4; }

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes) { grow(bytes); }
  char* grow(int64_t bytes) {
    if (bytes > bytes_) {
      data_.reset();
      bytes_ = (bytes + kScratchAlignment - 1) / kScratchAlignment * kScratchAlignment;
      data_.reset(static_cast<char*>(std::aligned_alloc(kScratchAlignment, bytes_)));
      if (!data_) throw std::bad_alloc();
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
char* thread_scratch(int head_dim, int head_dim_v) {
  static thread_local Buffer buffer;
  const int64_t operands = int64_t(2) * kTileTokens * (head_dim + head_dim_v + 32) * 8;
  const int64_t scores = int64_t(4) * kTileTokens * kBlockBytes;
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

GroupTokens group_tokens(const TensorView& view, const Problem& problem, const GridGroup& group, Stationary side,
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

// Instructions of a vector of scores between the products: running maximum, exponential, sum; counted in the machine
// code.
constexpr int kForwardSoftmax = 18, kBackwardSoftmax = 20;
// The same for scores, or weights, that are copied from or to the attention tensor element by element.
constexpr int kUnfusedCopy = 30;
// Additional keys of one tile.
constexpr int kAdditionalTile = 8;

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

 private:
  int heads_kv_;
  int64_t heads_, most_, first_ = 0;
  Buffer memory_;  // of a head that is larger than a wave
};

}  // namespace

const char* instruction_set() {
  switch (chosen_instruction_set()) {
    case InstructionSet::avx512:
      return "avx512";
    case InstructionSet::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

void forward(const ForwardArguments& arguments) {
  const Context context(arguments.problem);
  const Problem& problem = arguments.problem;
  const int d = problem.head_dim, dv = problem.head_dim_v;
  const int additional = static_cast<int>(problem.additional);
  const int lanes = context.kernels.lanes;
  const TileShape shape = context.tile_shape(Stationary::queries, {d, context.vectors(dv), kForwardSoftmax}, true);
  const Tiling tiling(context.groups, Stationary::queries, shape);
  const PackedLayout layout(context.groups, Stationary::queries, shape.fold, lanes),
      additional_layout(additional, lanes);
  const WholeGrid additional_grid(additional_layout.grid(0));
  PackedOperand keys(layout, d, true, false, context.compute), values(layout, dv, false, true, context.compute);
  PackedOperand additional_keys(additional_layout, d, true, false, context.compute);
  PackedOperand additional_values(additional_layout, dv, false, true, context.compute);
  Waves waves(problem, {{&keys, 1}, {&values, 1}, {&additional_keys, 1}, {&additional_values, 1}});

  waves.run([&] {
    waves.parallel(layout.rows().count(), [&](const KeyHead& head, int64_t in_wave, int64_t row) {
      const int group = layout.rows().group_of(row);
      keys.pack(context, in_wave, row, context.keys(arguments.key, group, head));
      values.pack(context, in_wave, row, context.keys(arguments.value, group, head));
    });
    waves.parallel(additional ? 1 : 0, [&](const KeyHead& head, int64_t in_wave, int64_t) {
      additional_keys.pack(context, in_wave, 0, context.additional(arguments.additional_keys, head));
      additional_values.pack(context, in_wave, 0, context.additional(arguments.additional_values, head));
    });
    waves.parallel(context.group_heads * tiling.count(), [&](const KeyHead& head, int64_t in_wave, int64_t item) {
      const TilePlace place = tiling.place(item % tiling.count());
      const int query_head = head.head * context.group_heads + static_cast<int>(item / tiling.count());
      const int64_t first_row = layout.rows().first(place.group);
      Stream streams[2] = {};
      streams[0].grid = layout.grid(place.group);
      streams[0].windows = tile_windows(context.groups[place.group], Stationary::queries, place);
      streams[0].first_transposed = keys.transposed(in_wave, first_row);
      streams[0].second_rows = values.row_major(in_wave, first_row);
      streams[1].grid = additional_layout.grid(0);
      streams[1].windows = additional_grid.windows();
      streams[1].first_transposed = additional_keys.transposed(in_wave);
      streams[1].second_rows = additional_values.row_major(in_wave);

      Tile tile = context.tile(place, streams, additional ? 2 : 1);
      tile.first = context.queries(arguments.query, place.group, head.batch, query_head).tile(place);
      tile.first_result = context.queries(arguments.out, place.group, head.batch, query_head).tile(place);
      tile.logsumexp = context.statistics(arguments.logsumexp, place.group, head.batch, query_head).tile(place);
      context.kernels.forward(tile);
    });
  });
}

void backward(const BackwardArguments& arguments) {
  const Context context(arguments.problem);
  const Problem& problem = arguments.problem;
  const int d = problem.head_dim, dv = problem.head_dim_v, group_heads = context.group_heads;
  const int additional = static_cast<int>(problem.additional);
  const int lanes = context.kernels.lanes, compute = context.compute;
  const TileShape query_shape =
      context.tile_shape(Stationary::queries, {d + dv, context.vectors(d), kBackwardSoftmax}, true);
  const TileShape key_shape =
      context.tile_shape(Stationary::keys, {d + dv, context.vectors(d) + context.vectors(dv), kBackwardSoftmax}, true);
  const Tiling query_tiling(context.groups, Stationary::queries, query_shape);
  const Tiling key_tiling(context.groups, Stationary::keys, key_shape);
  const Tiling additional_tiling(additional, kAdditionalTile);
  const PackedLayout key_layout(context.groups, Stationary::queries, query_shape.fold, lanes);
  const PackedLayout query_layout(context.groups, Stationary::keys, key_shape.fold, lanes);
  const PackedLayout additional_layout(additional, lanes);
  const WholeGrid additional_grid(additional_layout.grid(0));
  const int groups = static_cast<int>(context.groups.size());
  std::vector<WholeGrid> query_grids;
  for (int group = 0; group < groups; ++group) query_grids.emplace_back(query_layout.grid(group));

  PackedOperand keys(key_layout, d, true, true, compute), values(key_layout, dv, true, false, compute);
  PackedOperand additional_keys(additional_layout, d, true, true, compute);
  PackedOperand additional_values(additional_layout, dv, true, false, compute);
  PackedOperand queries(query_layout, d, true, true, compute), grad_out(query_layout, dv, true, true, compute);
  // One channel, transposed: logsumexp and delta of a folded row as vectors.
  PackedOperand logsumexp(query_layout, 1, true, false, compute), delta(query_layout, 1, true, false, compute);
  Waves waves(problem, {{&keys, 1},
                        {&values, 1},
                        {&additional_keys, 1},
                        {&additional_values, 1},
                        {&queries, group_heads},
                        {&grad_out, group_heads},
                        {&logsumexp, group_heads},
                        {&delta, group_heads}});

  const auto key_stream = [&](int64_t in_wave, const TilePlace& place) {
    const int64_t first_row = key_layout.rows().first(place.group);
    Stream stream{};
    stream.grid = key_layout.grid(place.group);
    stream.windows = tile_windows(context.groups[place.group], Stationary::queries, place);
    stream.first_transposed = keys.transposed(in_wave, first_row);
    stream.first_rows = keys.row_major(in_wave, first_row);
    stream.second_transposed = values.transposed(in_wave, first_row);
    return stream;
  };
  const auto additional_stream = [&](int64_t in_wave) {
    Stream stream{};
    stream.grid = additional_layout.grid(0);
    stream.windows = additional_grid.windows();
    stream.first_transposed = additional_keys.transposed(in_wave);
    stream.first_rows = additional_keys.row_major(in_wave);
    stream.second_transposed = additional_values.transposed(in_wave);
    return stream;
  };
  const auto query_stream = [&](int64_t in_wave, int query_head, int group, const TileWindows& windows) {
    const int64_t first_row = query_layout.rows().first(group), head = in_wave * group_heads + query_head;
    Stream stream{};
    stream.grid = query_layout.grid(group);
    stream.windows = windows;
    stream.first_transposed = queries.transposed(head, first_row);
    stream.first_rows = queries.row_major(head, first_row);
    stream.second_transposed = grad_out.transposed(head, first_row);
    stream.second_rows = grad_out.row_major(head, first_row);
    stream.logsumexp = logsumexp.transposed(head, first_row);
    stream.delta = delta.transposed(head, first_row);
    return stream;
  };

  waves.run([&] {
    waves.parallel(key_layout.rows().count(), [&](const KeyHead& head, int64_t in_wave, int64_t row) {
      const int group = key_layout.rows().group_of(row);
      keys.pack(context, in_wave, row, context.keys(arguments.key, group, head));
      values.pack(context, in_wave, row, context.keys(arguments.value, group, head));
    });
    waves.parallel(additional ? 1 : 0, [&](const KeyHead& head, int64_t in_wave, int64_t) {
      additional_keys.pack(context, in_wave, 0, context.additional(arguments.additional_keys, head));
      additional_values.pack(context, in_wave, 0, context.additional(arguments.additional_values, head));
    });
    const int64_t query_rows = query_layout.rows().count();
    waves.parallel(group_heads * query_rows, [&](const KeyHead& head, int64_t in_wave, int64_t item) {
      const int64_t row = item % query_rows, packed_head = in_wave * group_heads + item / query_rows;
      const int group = query_layout.rows().group_of(row);
      const int query_head = head.head * group_heads + static_cast<int>(item / query_rows);
      const GroupTokens grad_out_tokens = context.queries(arguments.grad_out, group, head.batch, query_head);
      queries.pack(context, packed_head, row, context.queries(arguments.query, group, head.batch, query_head));
      grad_out.pack(context, packed_head, row, grad_out_tokens);

      const TilePlace place = query_layout.place(row);
      StatisticsRow statistics;
      statistics.out = context.queries(arguments.out, group, head.batch, query_head).tile(place);
      statistics.grad_out = grad_out_tokens.tile(place);
      statistics.logsumexp = context.statistics(arguments.logsumexp, group, head.batch, query_head).tile(place);
      statistics.grad_logsumexp =
          context.statistics(arguments.grad_logsumexp, group, head.batch, query_head).tile(place);
      statistics.rows = place.rows;
      statistics.columns = place.columns;
      statistics.channels = dv;
      statistics.grid = query_layout.grid(group);
      statistics.logsumexp_result = logsumexp.transposed(packed_head, row);
      statistics.delta_result = delta.transposed(packed_head, row);
      context.kernels.statistics(statistics);
    });

    waves.parallel(group_heads * query_tiling.count(), [&](const KeyHead& head, int64_t in_wave, int64_t item) {
      const TilePlace place = query_tiling.place(item % query_tiling.count());
      const int in_group = static_cast<int>(item / query_tiling.count());
      const int query_head = head.head * group_heads + in_group;
      const Stream streams[2] = {key_stream(in_wave, place), additional_stream(in_wave)};
      Tile tile = context.tile(place, streams, additional ? 2 : 1);
      tile.first = context.queries(arguments.query, place.group, head.batch, query_head).tile(place);
      tile.second = context.queries(arguments.grad_out, place.group, head.batch, query_head).tile(place);
      tile.first_result = context.queries(arguments.grad_query, place.group, head.batch, query_head).tile(place);
      tile.own_grid = query_layout.grid(place.group);
      tile.own_row = place.row;
      tile.own_column = place.column;
      const int64_t own_rows =
          query_layout.rows().first(place.group) + int64_t(place.outer) * tile.own_grid.folded_rows;
      tile.own_logsumexp = logsumexp.transposed(in_wave * group_heads + in_group, own_rows);
      tile.own_delta = delta.transposed(in_wave * group_heads + in_group, own_rows);
      context.kernels.backward_query(tile);
    });

    waves.parallel(key_tiling.count(), [&](const KeyHead& head, int64_t in_wave, int64_t item) {
      const TilePlace place = key_tiling.place(item);
      const TileWindows windows = tile_windows(context.groups[place.group], Stationary::keys, place);
      std::vector<Stream> streams;
      for (int h = 0; h < group_heads; ++h) streams.push_back(query_stream(in_wave, h, place.group, windows));
      Tile tile = context.tile(place, streams.data(), group_heads);
      tile.first = context.keys(arguments.key, place.group, head).tile(place);
      tile.second = context.keys(arguments.value, place.group, head).tile(place);
      tile.first_result = context.keys(arguments.grad_key, place.group, head).tile(place);
      tile.second_result = context.keys(arguments.grad_value, place.group, head).tile(place);
      context.kernels.backward_key(tile);
    });

    waves.parallel(additional_tiling.count(), [&](const KeyHead& head, int64_t in_wave, int64_t item) {
      const TilePlace place = additional_tiling.place(item);
      std::vector<Stream> streams;
      for (int h = 0; h < group_heads; ++h)
        for (int group = 0; group < groups; ++group)
          streams.push_back(query_stream(in_wave, h, group, query_grids[group].windows()));
      Tile tile = context.tile(place, streams.data(), static_cast<int>(streams.size()));
      tile.first = context.additional(arguments.additional_keys, head).tile(place);
      tile.second = context.additional(arguments.additional_values, head).tile(place);
      tile.first_result = context.additional(arguments.grad_additional_keys, head).tile(place);
      tile.second_result = context.additional(arguments.grad_additional_values, head).tile(place);
      context.kernels.backward_key(tile);
    });
  });
}

void qk(const UnfusedArguments& arguments) {
  const Context context(arguments.problem);
  const Problem& problem = arguments.problem;
  const TileShape shape = context.tile_shape(Stationary::queries, {problem.head_dim, 0, kUnfusedCopy}, false);
  const Tiling tiling(context.groups, Stationary::queries, shape);
  const PackedLayout layout(context.groups, Stationary::queries, shape.fold, context.kernels.lanes);
  PackedOperand keys(layout, problem.head_dim, true, false, context.compute);
  Waves waves(problem, {{&keys, 1}});
  waves.run([&] {
    waves.parallel(layout.rows().count(), [&](const KeyHead& head, int64_t in_wave, int64_t row) {
      keys.pack(context, in_wave, row, context.keys(arguments.b, layout.rows().group_of(row), head));
    });
    waves.parallel(context.group_heads * tiling.count(), [&](const KeyHead& head, int64_t in_wave, int64_t item) {
      const TilePlace place = tiling.place(item % tiling.count());
      const int query_head = head.head * context.group_heads + static_cast<int>(item / tiling.count());
      Stream stream{};
      stream.grid = layout.grid(place.group);
      stream.windows = tile_windows(context.groups[place.group], Stationary::queries, place);
      stream.first_transposed = keys.transposed(in_wave, layout.rows().first(place.group));
      UnfusedTile tile = context.unfused_tile(place, &stream, 1, arguments);
      tile.input = context.queries(arguments.a, place.group, head.batch, query_head).tile(place);
      tile.attention = context.queries(arguments.c, place.group, head.batch, query_head).tile(place);
      if (arguments.rpb) {
        const int first[kAxes] = {place.outer, place.row, place.column};
        int64_t offset = query_head, stride = 1;
        for (int a = 0; a < kAxes; ++a) {
          const Group& g = context.groups[place.group].axis[a]->group;
          offset = offset * (2 * g.kernel_size - 1) + g.kv_position - (g.q_position + first[a]) + g.kernel_size - 1;
        }
        for (int a = kAxes - 1; a >= 0; --a) {
          tile.bias_stride[a] = stride;
          stride *= 2 * context.groups[place.group].axis[a]->group.kernel_size - 1;
        }
        tile.bias = static_cast<const char*>(arguments.rpb) + offset * context.element;
      }
      context.kernels.qk(tile);
    });
  });
}

void av(const UnfusedArguments& arguments) {
  const Context context(arguments.problem);
  const Problem& problem = arguments.problem;
  const TileShape shape =
      context.tile_shape(Stationary::queries, {0, context.vectors(problem.head_dim), kUnfusedCopy}, false);
  const Tiling tiling(context.groups, Stationary::queries, shape);
  const PackedLayout layout(context.groups, Stationary::queries, shape.fold, context.kernels.lanes);
  PackedOperand values(layout, problem.head_dim, false, true, context.compute);
  Waves waves(problem, {{&values, 1}});
  waves.run([&] {
    waves.parallel(layout.rows().count(), [&](const KeyHead& head, int64_t in_wave, int64_t row) {
      values.pack(context, in_wave, row, context.keys(arguments.b, layout.rows().group_of(row), head));
    });
    waves.parallel(context.group_heads * tiling.count(), [&](const KeyHead& head, int64_t in_wave, int64_t item) {
      const TilePlace place = tiling.place(item % tiling.count());
      const int query_head = head.head * context.group_heads + static_cast<int>(item / tiling.count());
      Stream stream{};
      stream.grid = layout.grid(place.group);
      stream.windows = tile_windows(context.groups[place.group], Stationary::queries, place);
      stream.first_rows = values.row_major(in_wave, layout.rows().first(place.group));
      UnfusedTile tile = context.unfused_tile(place, &stream, 1, arguments);
      tile.attention = context.queries(arguments.a, place.group, head.batch, query_head).tile(place);
      tile.result = context.queries(arguments.c, place.group, head.batch, query_head).tile(place);
      context.kernels.av(tile);
    });
  });
}

void inverse_av(const UnfusedArguments& arguments) {
  const Context context(arguments.problem);
  const Problem& problem = arguments.problem;
  const int group_heads = context.group_heads;
  const TileShape shape =
      context.tile_shape(Stationary::keys, {0, context.vectors(problem.head_dim), kUnfusedCopy}, false);
  const Tiling tiling(context.groups, Stationary::keys, shape);
  const PackedLayout layout(context.groups, Stationary::keys, shape.fold, context.kernels.lanes);
  PackedOperand inputs(layout, problem.head_dim, false, true, context.compute);
  Waves waves(problem, {{&inputs, group_heads}});
  const int64_t rows = layout.rows().count();
  waves.run([&] {
    waves.parallel(group_heads * rows, [&](const KeyHead& head, int64_t in_wave, int64_t item) {
      const int in_group = static_cast<int>(item / rows);
      inputs.pack(context, in_wave * group_heads + in_group, item % rows,
                  context.queries(arguments.b, layout.rows().group_of(item % rows), head.batch,
                                  head.head * group_heads + in_group));
    });
    waves.parallel(tiling.count(), [&](const KeyHead& head, int64_t in_wave, int64_t item) {
      const TilePlace place = tiling.place(item);
      const GridGroup& group = context.groups[place.group];
      std::vector<Stream> streams(group_heads, Stream{});
      for (int h = 0; h < group_heads; ++h) {
        streams[h].grid = layout.grid(place.group);
        streams[h].windows = tile_windows(group, Stationary::keys, place);
        streams[h].first_rows = inputs.row_major(in_wave * group_heads + h, layout.rows().first(place.group));
      }
      UnfusedTile tile = context.unfused_tile(place, streams.data(), group_heads, arguments);
      const GroupTokens attention = context.queries(arguments.a, place.group, head.batch, head.head * group_heads);
      tile.attention = {attention.data, attention.stride[1], attention.stride[2]};
      tile.attention_outer_stride = attention.stride[0];
      tile.attention_head_stride = arguments.a.head_stride;
      for (int a = 0; a < kAxes; ++a) tile.window_begin[a] = group.axis[a]->of_queries.begin.data();
      tile.own_outer = place.outer;
      tile.own_row = place.row;
      tile.own_column = place.column;
      tile.result = context.keys(arguments.c, place.group, head).tile(place);
      context.kernels.inverse_av(tile);
    });
  });
}

}  // namespace natten::cpu
