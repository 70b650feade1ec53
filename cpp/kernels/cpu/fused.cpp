// The fused operator: softmax(scale Q K^T) V and its gradients.
#include "kernels/cpu/driver.h"
#include "kernels/families.h"

namespace natten::cpu {
namespace {

// Instructions of a vector of scores between the products: running maximum, exponential, sum; counted in the machine
// code.
constexpr int kForwardSoftmax = 18, kBackwardSoftmax = 20;

// Additional keys of one tile.
constexpr int kAdditionalTile = 8;

TileShape forward_tile(const Context& context) {
  const Problem& problem = context.problem;
  const TileWork work{problem.head_dim, context.vectors(problem.head_dim_v), kForwardSoftmax};
  return context.tile_shape(Stationary::queries, work, true);
}

}  // namespace

std::vector<int> forward_plan(const Problem& problem) {
  const TileShape shape = forward_tile(Context(problem));
  return {shape.rows, shape.columns, shape.fold};
}

void forward(const ForwardArguments& arguments) {
  const Context context(arguments.problem);
  const Problem& problem = arguments.problem;
  const int d = problem.head_dim, dv = problem.head_dim_v;
  const int additional = static_cast<int>(problem.additional);
  const int lanes = context.kernels.lanes;
  const TileShape shape = forward_tile(context);
  const Tiling tiling(context.groups, Stationary::queries, shape);
  const PackedLayout layout(context.groups, Stationary::queries, shape.fold, lanes),
      additional_layout(additional, lanes);
  const WholeGrid additional_grid(additional_layout.grid(0));
  PackedOperand keys(layout, d, true, false, context.compute), values(layout, dv, false, true, context.compute);
  PackedOperand additional_keys(additional_layout, d, true, false, context.compute);
  PackedOperand additional_values(additional_layout, dv, false, true, context.compute);
  Waves waves(problem, {{&keys, 1}, {&values, 1}, {&additional_keys, 1}, {&additional_values, 1}});

  waves.run([&] {
    waves.parallel_packing(layout.rows().count(), [&](const KeyHead& head, int64_t in_wave, int64_t row) {
      const int group = layout.rows().group_of(row);
      keys.pack(context, in_wave, row, context.keys(arguments.key, group, head));
      values.pack(context, in_wave, row, context.keys(arguments.value, group, head));
    });
    waves.parallel_packing(additional ? 1 : 0, [&](const KeyHead& head, int64_t in_wave, int64_t) {
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
    waves.parallel_packing(key_layout.rows().count(), [&](const KeyHead& head, int64_t in_wave, int64_t row) {
      const int group = key_layout.rows().group_of(row);
      keys.pack(context, in_wave, row, context.keys(arguments.key, group, head));
      values.pack(context, in_wave, row, context.keys(arguments.value, group, head));
    });
    waves.parallel_packing(additional ? 1 : 0, [&](const KeyHead& head, int64_t in_wave, int64_t) {
      additional_keys.pack(context, in_wave, 0, context.additional(arguments.additional_keys, head));
      additional_values.pack(context, in_wave, 0, context.additional(arguments.additional_values, head));
    });
    const int64_t query_rows = query_layout.rows().count();
    waves.parallel_packing(group_heads * query_rows, [&](const KeyHead& head, int64_t in_wave, int64_t item) {
      const int in_group = static_cast<int>(item % group_heads);
      const int64_t row = item / group_heads, packed_head = in_wave * group_heads + in_group;
      const int group = query_layout.rows().group_of(row);
      const int query_head = head.head * group_heads + in_group;
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

}  // namespace natten::cpu
