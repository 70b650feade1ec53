// The producer warpgroup's roles: a scheduler warp that works out each tile, a warp each for queries, keys and values.
#pragma once

#include "kernels/fused_sm90/bias.h"
#include "kernels/fused_sm90/config.h"
#include "kernels/fused_sm90/parameters.h"
#include "ptx/barrier.h"
#include "ptx/tma.h"

namespace natten::fused_sm90 {

constexpr unsigned kWarp = 0xFFFFFFFFu;

__device__ __forceinline__ int sum_lanes(int x) { return __reduce_add_sync(kWarp, x); }

// Writes the record of every tile of this block: where its queries lie, which keys they need, and each query's window.
// Lanes 0..2 work on one axis each, lane 3 on heads and batch.
template <class Config>
__device__ __forceinline__ void schedule_tiles(const Parameters& p, SharedStorage<Config>& shared) {
  const int lane = threadIdx.x % 32;
  const int a = min(lane, kAxes - 1), own_digit = min(lane, kDigits - 1);
  const bool is_axis = lane < kAxes, is_head = lane == kAxes;
  const int first_entry = (a > 0 ? p.tile_box[0] : 0) + (a > 1 ? p.tile_box[1] : 0);  // of axis a in TileRecord::window
  const int entries = p.tile_box[0] + p.tile_box[1] + p.tile_box[2];
  int known_group = -1;
  Ring<kTileRecords> ring;
  const int blocks = static_cast<int>(gridDim.x);
  // Which tile of a wave a block takes moves on from wave to wave. Otherwise, where the number of blocks is a multiple
  // of the tiles along an axis, some blocks would get nothing but the most expensive ones.
  constexpr int kRotation = 21;
  for (int wave = 0, within = blockIdx.x; wave < p.tiles; wave += blocks, within = (within + kRotation) % blocks) {
    const int t = wave + within;
    if (t >= p.tiles) break;
    uint32_t higher = p.digit_weight[own_digit].quotient(t);
    const int digit = static_cast<int>(p.digit_radix[own_digit].peel(higher));
    const int head = __shfl_sync(kWarp, digit, kHead), batch = __shfl_sync(kWarp, digit, kBatch);
    const int group_index = __shfl_sync(kWarp, digit, kGroupX - a);
    if (__any_sync(kWarp, group_index != known_group)) {
      if (is_axis) shared.group[a] = make_group(p.axis[a], group_index);
      known_group = group_index;
      __syncwarp();
    }
    const Group& group = shared.group[a];
    const int first = __shfl_sync(kWarp, digit, kTileX - a) * p.tile_box[a];
    if (__any_sync(kWarp, first >= group.q_count)) continue;  // dilation groups may be shorter than the longest

    const int head_kv = head / p.head_group;
    const auto fold = [&](const FoldUnits& units, int index, int head_index) {
      return sum_lanes(is_axis ? units.axis[a] * index : is_head ? units.head * head_index + units.batch * batch : 0);
    };
    const int query_fold = fold(p.query, group.q_first, head), out_fold = fold(p.out, group.q_first, head);
    const int key_fold = fold(p.key, group.kv_first, head_kv), value_fold = fold(p.value, group.kv_first, head_kv);
    const auto shape = [&](int count, int length) {
      return sum_lanes(is_axis && count < ceil_div(length, p.axis[a].dilation) ? 1 << a : 0);
    };
    const int query_shape = shape(group.q_count, p.axis[a].q_length),
              key_shape = shape(group.kv_count, p.axis[a].kv_length);

    ptx::barrier_wait(shared.tile_empty[ring.slot], ring.parity ^ 1);
    TileRecord& record = shared.tile[ring.slot];
    if (is_axis) {
      record.query_origin[a] = first;
      record.query_end[a] = group.q_count;
    }
    __syncwarp();
    // Windows of every query coordinate of the tile, axis after axis.
#pragma unroll 1
    for (int entry = lane; entry < entries; entry += 32) {
      const int axis = entry < p.tile_box[0] ? 0 : entry < p.tile_box[0] + p.tile_box[1] ? 1 : 2;
      const int within = entry - (axis > 0 ? p.tile_box[0] : 0) - (axis > 1 ? p.tile_box[1] : 0);
      const Group& g = shared.group[axis];
      const Range w = window(g, g.q_position + min(record.query_origin[axis] + within, g.q_count - 1));
      record.window[entry] = {w.begin - g.kv_position, w.end - g.kv_position};
    }
    __syncwarp();
    const Range first_window = record.window[first_entry], last_window = record.window[first_entry + p.tile_box[a] - 1];
    const int boxes = ceil_div(last_window.end - first_window.begin, p.key_box[a]);
    const int box_steps = __shfl_sync(kWarp, boxes, 0) * __shfl_sync(kWarp, boxes, 1) * __shfl_sync(kWarp, boxes, 2);
    // 64-bit offsets are summed by hand.
    int64_t origin = is_axis ? p.logsumexp_axis[a] * (group.q_first + static_cast<int64_t>(first) * p.axis[a].dilation)
                     : is_head ? p.logsumexp_head * head + p.logsumexp_batch * batch
                               : 0;
    origin += __shfl_xor_sync(kWarp, origin, 1);
    origin += __shfl_xor_sync(kWarp, origin, 2);
    if (is_axis) {
      record.box_count[a] = boxes;
      record.key_begin[a] = first_window.begin;
      record.common[a] = {last_window.begin, first_window.end};
      if (a == p.pair_axis) {  // each warpgroup's own windows
        const int own_box = p.warpgroup_box[a];
        for (int w = 0; w < Config::kWarpgroups; ++w) {
          const Range w0 = record.window[first_entry + w * own_box],
                      w1 = record.window[first_entry + (w + 1) * own_box - 1];
          const bool live = first + w * own_box < group.q_count;
          record.needed_by[w] = {w0.begin, live ? w1.end : w0.begin};
          record.common_to[w] = {w1.begin, w0.end};
        }
      }
    }
    if (lane == 0) {
      record.query_fold = query_fold;
      record.out_fold = out_fold;
      record.key_fold = key_fold;
      record.value_fold = value_fold;
      record.additional_key_fold = p.additional_key.head * head_kv + p.additional_key.batch * batch;
      record.additional_value_fold = p.additional_value.head * head_kv + p.additional_value.batch * batch;
      record.query_shape = query_shape;
      record.key_shape = key_shape;
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

// Which warpgroups need a key box (bit 2 w), and which of them without a mask (bit 2 w + 1).
template <class Config>
__device__ __forceinline__ int box_flags(const Parameters& p, const TileRecord& record, int x, int y, int z) {
  const auto inside = [&](int a, int begin, Range r) { return begin >= r.begin && begin + p.key_box[a] <= r.end; };
  const int pair = p.pair_axis;
  const int begin = pair == 0 ? x : pair == 1 ? y : z, end = begin + p.key_box[pair];
  const bool common = (pair == 0 || inside(0, x, record.common[0])) && (pair == 1 || inside(1, y, record.common[1])) &&
                      (pair == 2 || inside(2, z, record.common[2]));
  int flags = 0;
#pragma unroll
  for (int w = 0; w < Config::kWarpgroups; ++w) {
    const Range needed = record.needed_by[w];
    if (begin < needed.end && end > needed.begin) flags |= 1 << 2 * w;
    if (common && inside(pair, begin, record.common_to[w])) flags |= 2 << 2 * w;
  }
  return flags;
}

// Masks of a tile's boxes, in step with the key loader. Lane i prepares step i of 32, as there.
template <class Config>
__device__ __forceinline__ void write_masks(const Parameters& p, const TileRecord& record,
                                            SharedStorage<Config>& shared, const SlotWriter<Config>& writer,
                                            Ring<Config::kStages>& ring) {
  constexpr int kIndexBits = 9;
  static_assert(kKeyVectors <= 1 << kIndexBits);
  const int lane = threadIdx.x % 32;
  const KeyVectors vectors = write_key_vectors(p, record, shared);
  const int box_steps = record.box_steps, steps = box_steps + p.additional_steps;
  const int count_x = record.box_count[0], count_y = record.box_count[1];
  for (int base = 0; base < steps; base += 32) {
    const int step = base + lane, row = step / count_x, plane = row / count_y;
    const int x = (step - row * count_x) * p.key_box[0], y = (row - plane * count_y) * p.key_box[1],
              z = plane * p.key_box[2];
    const int flags =
        box_flags<Config>(p, record, record.key_begin[0] + x, record.key_begin[1] + y, record.key_begin[2] + z);
    int packed = vectors.x + x | vectors.y + y << kIndexBits | vectors.z + z << 2 * kIndexBits;
#pragma unroll
    for (int w = 0; w < Config::kWarpgroups; ++w) {
      if ((flags >> 2 * w & 3) == 1) packed |= 1 << 3 * kIndexBits + w;
    }
    const int count = min(32, steps - base);
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const int masked = __shfl_sync(kWarp, packed, i);
      const int left = p.additional - (base + i - box_steps) * Config::kKeys;
      ptx::barrier_wait(shared.key_empty[ring.slot], ring.parity ^ 1);
      if (base + i < box_steps) {
        if (masked >> 3 * kIndexBits != 0) {
          constexpr int kIndex = (1 << kIndexBits) - 1;
          writer.write(shared, p.pair_axis, vectors.pair_pitch, ring.slot, masked >> 3 * kIndexBits, masked & kIndex,
                       masked >> kIndexBits & kIndex, masked >> 2 * kIndexBits & kIndex);
          ptx::fence_async_shared();
        }
      } else if (left < Config::kKeys) {
        writer.write_tail(shared, ring.slot, left);
        ptx::fence_async_shared();
      }
      __syncwarp();
      if (lane == 0) ptx::barrier_arrive(shared.key_full[ring.slot]);
      ring.advance();
    }
  }
}

template <class Config>
__device__ __forceinline__ void load_queries(const Parameters& p, const CUtensorMap (&maps)[kGroupShapes],
                                             SharedStorage<Config>& shared) {
  Ring<Config::kQueryBuffers> ring;
  Ring<Config::kStages> mask_ring;
  const SlotWriter<Config> slot_writer(p);
  for_each_tile(shared, [&](const TileRecord& record) {
    if (threadIdx.x % 32 == 0) {
      for (int w = 0; w < Config::kWarpgroups; ++w) {
        ptx::BoxCoordinate c = query_box(p, record, w, record.query_fold);
        uint64_t& full = shared.query_full[ring.slot][w];
        ptx::barrier_wait(shared.query_empty[ring.slot][w], ring.parity ^ 1);
        ptx::barrier_arrive_expect(full, Config::kQueryBytes);
#pragma unroll
        for (int chunk = 0; chunk < Config::kChunks; ++chunk, c.channel += Config::kChunk) {
          ptx::tensor_load(shared.query[ring.slot][w] + chunk * kQueries * Config::kRowBytes, maps[record.query_shape],
                           full, c);
        }
      }
    }
    ring.advance();
    if constexpr (Config::kMasksByBias) {
      if (p.bias) write_masks(p, record, shared, slot_writer, mask_ring);
    }
  });
}

// Loads keys, or values, box by box: x fastest, so that masks change along one axis most of the time. Lane i prepares
// and issues step i of 32: divisions stay out of the chain of copies. The key loader also writes the step records.
template <class Config, bool kKeys>
__device__ __forceinline__ void load_boxes(const Parameters& p, const CUtensorMap (&maps)[kGroupShapes],
                                           const CUtensorMap& additional_map, SharedStorage<Config>& shared) {
  const int lane = threadIdx.x % 32;
  uint64_t* const full = kKeys ? shared.key_full : shared.value_full;
  uint64_t* const empty = kKeys ? shared.key_empty : shared.value_empty;
  uint8_t (*const destination)[Config::kKeyBytes] = kKeys ? shared.key : shared.value;
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
        c = {0, fold, record.key_begin[2] + plane * p.key_box[2],
             record.key_begin[1] + (row - plane * count_y) * p.key_box[1],
             record.key_begin[0] + (step - row * count_x) * p.key_box[0]};
        if constexpr (kKeys) {
          info = {c.x, c.y, c.z, box_flags<Config>(p, record, c.x, c.y, c.z)};
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
      const CUtensorMap* const source = additional ? &additional_map : &maps[record.key_shape];
      const int count = min(32, steps - base);
      for (int i = 0; i < count; ++i) {
        if (lane == i) {
          ptx::barrier_wait(empty[ring.slot], ring.parity ^ 1);
          if constexpr (kKeys) shared.step[ring.slot] = info;
          ptx::barrier_arrive_expect(full[ring.slot], Config::kKeyBytes);
#pragma unroll
          for (int chunk = 0; chunk < Config::kChunks; ++chunk) {
            c.channel = chunk * Config::kChunk;
            ptx::tensor_load(destination[ring.slot] + chunk * Config::kKeys * Config::kRowBytes, *source,
                             full[ring.slot], c);
          }
        }
        __syncwarp();
        ring.advance();
      }
    }
  });
}

}  // namespace natten::fused_sm90
