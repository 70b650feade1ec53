// The producer warpgroup's roles: a scheduler warp that works out each tile, a warp each for queries, keys and values.
#pragma once

#include "kernels/fused_sm90/config.h"
#include "kernels/fused_sm90/parameters.h"
#include "ptx/barrier.h"
#include "ptx/tma.h"

namespace natten::fused_sm90 {

constexpr unsigned kWarp = 0xFFFFFFFFu;

// Local index of a group's position 0 in the folded map, and how far the map's positions are shifted (see maps.h).
struct Fold {
  int index, shift;
};
__device__ __forceinline__ Fold fold_group(int first, int count, int length, int dilation) {
  const int shorter = length / dilation;
  const int longer = (length + dilation - 1) / dilation;
  return {first + (longer > shorter && count > shorter ? dilation : 0), longer - count};
}

__device__ __forceinline__ int sum_lanes(int x) { return __reduce_add_sync(kWarp, x); }

// Writes the record of every tile of this block: where its queries lie, which keys they need, and each query's window.
// Lanes 0..2 work on one axis each, so that integer divisions run side by side.
template <class Config>
__device__ __forceinline__ void schedule_tiles(const Parameters& p, SharedStorage<Config>& shared) {
  const int lane = threadIdx.x % 32;
  const int a = min(lane, kAxes - 1);
  const bool is_axis = lane < kAxes;
  const int own_digit = min(lane, kDigits - 1);
  Ring<kTileRecords> ring;
  for (int t = blockIdx.x; t < p.tiles; t += gridDim.x) {
    const Axis& axis = p.axis[a];
    const int digit = t / p.digit_weight[own_digit] % p.digit_radix[own_digit];
    const int head = __shfl_sync(kWarp, digit, kHead), batch = __shfl_sync(kWarp, digit, kBatch);
    const Group group = make_group(axis, __shfl_sync(kWarp, digit, kGroupX - a));
    const int first = __shfl_sync(kWarp, digit, kTileX - a) * p.tile_box[a];
    if (__any_sync(kWarp, first >= group.q_count)) continue;  // dilation groups may be shorter than the longest

    const Fold query = fold_group(group.q_first, group.q_count, axis.q_length, axis.dilation);
    const Fold key = fold_group(group.kv_first, group.kv_count, axis.kv_length, axis.dilation);
    const int last = min(first + p.tile_box[a], group.q_count) - 1;
    const int to_key = key.shift - group.kv_position;  // key position -> coordinate in the folded map
    const Range first_window = window(group, group.q_position + first), last_window = window(group, group.q_position + last);
    const int key_begin = first_window.begin + to_key;
    const int boxes = ceil_div(last_window.end - first_window.begin, p.key_box[a]);
    const int head_kv = head / p.head_group;
    const bool lane_3 = lane == kAxes;
    auto fold_coordinate = [&](const FoldUnits& units, int index, int head_index) {
      return sum_lanes(is_axis  ? units.axis[a] * index
                       : lane_3 ? units.head * head_index + units.batch * batch
                                : 0);
    };
    const int query_fold = fold_coordinate(p.query, query.index, head);
    const int out_fold = fold_coordinate(p.out, query.index, head);
    const int key_fold = fold_coordinate(p.key, key.index, head_kv);
    const int value_fold = fold_coordinate(p.value, key.index, head_kv);
    const int box_steps = __shfl_sync(kWarp, boxes, 0) * __shfl_sync(kWarp, boxes, 1) * __shfl_sync(kWarp, boxes, 2);

    ptx::barrier_wait(shared.tile_empty[ring.slot], ring.parity ^ 1);
    TileRecord& record = shared.tile[ring.slot];
    if (is_axis) {
      record.query_origin[a] = first + query.shift;
      record.query_end[a] = group.q_count + query.shift;
      record.box_count[a] = boxes;
      record.key_begin[a] = key_begin;
      record.common[a] = {last_window.begin + to_key, first_window.end + to_key};
    }
    // One lane per warpgroup: its own queries along the pair axis.
    {
      const int pair = p.pair_axis;
      const int count = __shfl_sync(kWarp, group.q_count, pair), pair_first = __shfl_sync(kWarp, first, pair);
      const int pair_to_key = __shfl_sync(kWarp, to_key, pair);
      const int own_box = p.warpgroup_box[pair];
      const Group pair_group = make_group(p.axis[pair], __shfl_sync(kWarp, digit, kGroupX - pair));
      if (lane < Config::kWarpgroups) {
        const int begin = pair_first + lane * own_box, end = min(begin + own_box, count);
        Range needed = {0, 0}, common = {0, 0};
        if (begin < end) {
          const Range w0 = window(pair_group, pair_group.q_position + begin);
          const Range w1 = window(pair_group, pair_group.q_position + end - 1);
          needed = {w0.begin + pair_to_key, w1.end + pair_to_key};
          common = {w1.begin + pair_to_key, w0.end + pair_to_key};
        }
        record.needed_by[lane] = needed;
        record.common_to[lane] = common;
      }
    }
    // Windows of every query coordinate of the tile, axis after axis.
    const int entries = p.tile_box[0] + p.tile_box[1] + p.tile_box[2];
#pragma unroll 1
    for (int base = 0; base < entries; base += 32) {
      const int entry = base + lane;
      const int entry_axis = entry < p.tile_box[0] ? 0 : entry < p.tile_box[0] + p.tile_box[1] ? 1 : 2;
      const int within = entry - (entry_axis > 0 ? p.tile_box[0] : 0) - (entry_axis > 1 ? p.tile_box[1] : 0);
      Group g;
      g.length = __shfl_sync(kWarp, group.length, entry_axis);
      g.kernel_size = __shfl_sync(kWarp, group.kernel_size, entry_axis);
      g.stride = p.axis[entry_axis].stride;
      g.causal = p.axis[entry_axis].causal;
      const int position = __shfl_sync(kWarp, group.q_position, entry_axis);
      const int index = min(__shfl_sync(kWarp, first, entry_axis) + within, __shfl_sync(kWarp, last, entry_axis));
      const int shift = __shfl_sync(kWarp, to_key, entry_axis);
      const Range w = window(g, position + index);
      if (entry < entries) record.window[entry] = {w.begin + shift, w.end + shift};
    }
    // Offset of the first query's logsumexp: 64-bit, so summed by hand.
    int64_t origin = is_axis ? p.logsumexp_axis[a] * (group.q_first + static_cast<int64_t>(first) * axis.dilation)
                     : lane_3 ? p.logsumexp_head * head + p.logsumexp_batch * batch
                              : 0;
    origin += __shfl_xor_sync(kWarp, origin, 1);
    origin += __shfl_xor_sync(kWarp, origin, 2);
    if (lane == 0) {
      record.query_fold = query_fold;
      record.out_fold = out_fold;
      record.key_fold = key_fold;
      record.value_fold = value_fold;
      record.additional_key_fold = p.additional_key.head * head_kv + p.additional_key.batch * batch;
      record.additional_value_fold = p.additional_value.head * head_kv + p.additional_value.batch * batch;
      record.box_steps = box_steps;
      record.logsumexp_origin = origin;
    }
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(shared.tile_full[ring.slot]);
    ring.advance();
  }
  ptx::barrier_wait(shared.tile_empty[ring.slot], ring.parity ^ 1);
  if (lane == 0) {
    shared.tile[ring.slot].box_steps = -1;
    ptx::barrier_arrive(shared.tile_full[ring.slot]);
  }
}

// Calls f(record) for each tile of this block; every lane of the warp.
template <class Config, class Function>
__device__ __forceinline__ void for_each_tile(SharedStorage<Config>& shared, Function f) {
  const int lane = threadIdx.x % 32;
  for (Ring<kTileRecords> ring;; ring.advance()) {
    ptx::barrier_wait(shared.tile_full[ring.slot], ring.parity);
    const TileRecord& record = shared.tile[ring.slot];
    if (record.box_steps < 0) break;
    f(record);
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(shared.tile_empty[ring.slot]);
  }
}

// Origin of a warpgroup's query box.
__device__ __forceinline__ ptx::BoxCoordinate query_box(const Parameters& p, const TileRecord& record, int warpgroup,
                                                        int fold) {
  const int step = warpgroup * p.warpgroup_box[p.pair_axis];
  return {0, fold, record.query_origin[2] + (p.pair_axis == 2 ? step : 0),
          record.query_origin[1] + (p.pair_axis == 1 ? step : 0),
          record.query_origin[0] + (p.pair_axis == 0 ? step : 0)};
}

template <class Config>
__device__ __forceinline__ void load_queries(const Parameters& p, const CUtensorMap& map, SharedStorage<Config>& shared) {
  Ring<Config::kQueryBuffers> ring;
  for_each_tile(shared, [&](const TileRecord& record) {
    if (threadIdx.x % 32 == 0) {
      for (int w = 0; w < Config::kWarpgroups; ++w) {
        ptx::BoxCoordinate c = query_box(p, record, w, record.query_fold);
        uint64_t& full = shared.query_full[ring.slot][w];
        ptx::barrier_wait(shared.query_empty[ring.slot][w], ring.parity ^ 1);
        ptx::barrier_arrive_expect(full, Config::kQueryBytes);
#pragma unroll
        for (int chunk = 0; chunk < Config::kChunks; ++chunk, c.channel += Config::kChunk) {
          ptx::tensor_load(shared.query[ring.slot][w] + chunk * kQueries * Config::kRowBytes, map, full, c);
        }
      }
    }
    ring.advance();
  });
}

// Loads keys, or values, box by box: x fastest, so that masks change along one axis most of the time. Lane i prepares and
// issues step i of 32: divisions stay out of the chain of copies. The key loader also writes the step records.
template <class Config, bool kKeys>
__device__ __forceinline__ void load_boxes(const Parameters& p, const CUtensorMap& map, const CUtensorMap& additional_map,
                                           SharedStorage<Config>& shared) {
  const int lane = threadIdx.x % 32;
  uint64_t* const full = kKeys ? shared.key_full : shared.value_full;
  uint64_t* const empty = kKeys ? shared.key_empty : shared.value_empty;
  uint8_t(*const destination)[Config::kKeyBytes] = kKeys ? shared.key : shared.value;
  Ring<Config::kStages> ring;
  for_each_tile(shared, [&](const TileRecord& record) {
    const int box_steps = record.box_steps, steps = box_steps + p.additional_steps;
    const int count_x = record.box_count[0], count_y = record.box_count[1];
    const int fold = kKeys ? record.key_fold : record.value_fold;
    const int additional_fold = kKeys ? record.additional_key_fold : record.additional_value_fold;
    for (int base = 0; base < steps; base += 32) {
      const int step = base + lane;
      const bool additional = step >= box_steps;
      ptx::BoxCoordinate c;
      StepRecord info;
      if (!additional) {
        const int row = step / count_x, plane = row / count_y;
        c = {0, fold, record.key_begin[2] + plane * p.key_box[2], record.key_begin[1] + (row - plane * count_y) * p.key_box[1],
             record.key_begin[0] + (step - row * count_x) * p.key_box[0]};
        if constexpr (kKeys) {
          const auto inside = [&](int a, int begin, Range r) { return begin >= r.begin && begin + p.key_box[a] <= r.end; };
          const int pair = p.pair_axis;
          const int pair_begin = pair == 0 ? c.x : pair == 1 ? c.y : c.z, pair_end = pair_begin + p.key_box[pair];
          const bool common = (pair == 0 || inside(0, c.x, record.common[0])) &&
                              (pair == 1 || inside(1, c.y, record.common[1])) &&
                              (pair == 2 || inside(2, c.z, record.common[2]));
          int flags = 0;
#pragma unroll
          for (int w = 0; w < Config::kWarpgroups; ++w) {
            const Range needed = record.needed_by[w], own = record.common_to[w];
            if (pair_begin < needed.end && pair_end > needed.begin) flags |= 1 << 2 * w;
            if (common && inside(pair, pair_begin, own)) flags |= 2 << 2 * w;
          }
          info = {c.x, c.y, c.z, flags};
        }
      } else {
        const int first = (step - box_steps) * Config::kKeys;
        c = {0, additional_fold, first, 0, 0};
        if constexpr (kKeys) {
          int flags = kAdditionalStep;
          for (int w = 0; w < Config::kWarpgroups; ++w) {
            if (record.needed_by[w].size() > 0) flags |= 1 << 2 * w;
            if (p.additional - first >= Config::kKeys) flags |= 2 << 2 * w;
          }
          info = {0, 0, p.additional - first, flags};
        }
      }
      const CUtensorMap* const source = additional ? &additional_map : &map;
      const int count = min(32, steps - base);
      for (int i = 0; i < count; ++i) {
        if (lane == i) {
          ptx::barrier_wait(empty[ring.slot], ring.parity ^ 1);
          if constexpr (kKeys) shared.step[ring.slot] = info;
          ptx::barrier_arrive_expect(full[ring.slot], Config::kKeyBytes);
#pragma unroll
          for (int chunk = 0; chunk < Config::kChunks; ++chunk) {
            c.channel = chunk * Config::kChunk;
            ptx::tensor_load(destination[ring.slot] + chunk * Config::kKeys * Config::kRowBytes, *source, full[ring.slot], c);
          }
        }
        __syncwarp();
        ring.advance();
      }
    }
  });
}

}  // namespace natten::fused_sm90
