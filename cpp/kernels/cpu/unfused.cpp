// The unfused operators. Their streams are not folded, so that a window's columns are contiguous.
#include "kernels/cpu/driver.h"
#include "kernels/families.h"

namespace natten::cpu {
namespace {

// Instructions of a vector of scores, or weights, that is copied from or to the attention tensor element by element.
constexpr int kUnfusedCopy = 30;

}  // namespace

void qk(const UnfusedArguments& arguments) {
  const Context context(arguments.problem);
  const Problem& problem = arguments.problem;
  const TileShape shape = context.tile_shape(Stationary::queries, {problem.head_dim, 0, kUnfusedCopy}, false);
  const Tiling tiling(context.groups, Stationary::queries, shape);
  const PackedLayout layout(context.groups, Stationary::queries, shape.fold, context.kernels.lanes);
  PackedOperand keys(layout, problem.head_dim, true, false, context.compute);
  Waves waves(problem, {{&keys, 1}});
  waves.run([&] {
    waves.parallel_packing(layout.rows().count(), [&](const KeyHead& head, int64_t in_wave, int64_t row) {
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
    waves.parallel_packing(layout.rows().count(), [&](const KeyHead& head, int64_t in_wave, int64_t row) {
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
    waves.parallel_packing(group_heads * rows, [&](const KeyHead& head, int64_t in_wave, int64_t item) {
      const int in_group = static_cast<int>(item % group_heads);
      const int64_t row = item / group_heads;
      inputs.pack(
          context, in_wave * group_heads + in_group, row,
          context.queries(arguments.b, layout.rows().group_of(row), head.batch, head.head * group_heads + in_group));
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
