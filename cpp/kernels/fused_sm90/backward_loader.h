// The producer warp of the gradient kernels: works out tiles, and brings what the other roles need of them.
#pragma once

#include "kernels/fused_sm90/backward_config.h"
#include "kernels/fused_sm90/producer.h"
#include "ptx/barrier.h"
#include "ptx/tma.h"

namespace natten::fused_sm90 {

// Works out the block's tile: where its rows lie, which boxes it walks, and each row's range in them; -1 boxes if its
// dilation group is too short to have it. Every lane of one warp; lanes 0..2 work on one axis each, lane 3 on heads and
// batch.
template <class Config>
__device__ __forceinline__ void locate_tile(const GradientParameters& p, GradientStorage<Config>& shared) {
  constexpr bool kOwnsKeys = Config::kOwnsKeys;
  const int lane = threadIdx.x % 32;
  const int a = min(lane, kAxes - 1), own_digit = min(lane, kDigits - 1);
  const bool is_axis = lane < kAxes, is_head = lane == kAxes;
  TileRecord& record = shared.tile;
  uint32_t higher = p.digit_weight[own_digit].quotient(blockIdx.x);
  const int digit = static_cast<int>(p.digit_radix[own_digit].peel(higher));
  const int head = __shfl_sync(kWarp, digit, kHead), batch = __shfl_sync(kWarp, digit, kBatch);
  const int group_index = __shfl_sync(kWarp, digit, kGroupX - a);
  if (is_axis) shared.group[a] = make_group(p.axis[a], group_index);
  __syncwarp();
  const Group& group = shared.group[a];
  const int count = kOwnsKeys ? group.kv_count : group.q_count;
  const int first = __shfl_sync(kWarp, digit, kTileX - a) * p.tile_box[a];
  if (__any_sync(kWarp, first >= count)) {
    if (lane == 0) record.box_steps = -1;
    return;
  }
  const auto shape = [&](int present, int length) {
    return sum_lanes(is_axis && present < ceil_div(length, p.axis[a].dilation) ? 1 << a : 0);
  };
  const int query_shape = shape(group.q_count, p.axis[a].q_length),
            key_shape = shape(group.kv_count, p.axis[a].kv_length);
  const int walked_head = kOwnsKeys ? head * p.head_group : head / p.head_group;
#pragma unroll
  for (int o = 0; o < kOperands; ++o) {
    const bool walked = o == kWalkedScores || o == kWalkedGrads || (kOwnsKeys && o == kStatistics) || o == kAccumulator;
    const int index = walked == kOwnsKeys ? group.q_first : group.kv_first;
    const FoldUnits& units = p.operand[o];
    const int fold = sum_lanes(is_axis   ? units.axis[a] * index
                               : is_head ? units.head * (walked ? walked_head : head) + units.batch * batch
                                         : 0);
    if (lane == 0) shared.fold[o] = fold;
  }
  if (is_axis) {
    record.query_origin[a] = first;
    record.query_end[a] = count;
  }
  __syncwarp();
  const int entries = p.tile_box[0] + p.tile_box[1] + p.tile_box[2];
#pragma unroll 1
  for (int entry = lane; entry < entries; entry += 32) {
    const int axis = entry < p.tile_box[0] ? 0 : entry < p.tile_box[0] + p.tile_box[1] ? 1 : 2;
    const int within = entry - (axis > 0 ? p.tile_box[0] : 0) - (axis > 1 ? p.tile_box[1] : 0);
    const Group& g = shared.group[axis];
    const int row = min(record.query_origin[axis] + within, record.query_end[axis] - 1);
    record.window[entry] = related<Config::kOwned>(g, (kOwnsKeys ? g.kv_position : g.q_position) + row);
  }
  __syncwarp();
  const int first_entry = (a > 0 ? p.tile_box[0] : 0) + (a > 1 ? p.tile_box[1] : 0);  // of axis a in TileRecord::window
  const Range first_window = record.window[first_entry], last_window = record.window[first_entry + p.tile_box[a] - 1];
  const int boxes = ceil_div(max(last_window.end - first_window.begin, 0), p.key_box[a]);
  const int box_steps = __shfl_sync(kWarp, boxes, 0) * __shfl_sync(kWarp, boxes, 1) * __shfl_sync(kWarp, boxes, 2);
  if (is_axis) {
    record.box_count[a] = boxes;
    record.key_begin[a] = first_window.begin;
    record.common[a] = {last_window.begin, first_window.end};
    if (a == p.pair_axis) {  // each warpgroup's own
      const int own_box = p.warpgroup_box[a];
      for (int w = 0; w < Config::kWarpgroups; ++w) {
        const Range w0 = record.window[first_entry + w * own_box],
                    w1 = record.window[first_entry + (w + 1) * own_box - 1];
        const bool live = first + w * own_box < count;
        record.needed_by[w] = {w0.begin, live ? w1.end : w0.begin};
        record.common_to[w] = {w1.begin, w0.end};
      }
    }
  }
  if (lane == 0) {
    record.query_shape = kOwnsKeys ? key_shape : query_shape;
    record.key_shape = kOwnsKeys ? query_shape : key_shape;
    record.box_steps = box_steps;
  }
}

// A tile of kRows rows, chunk after chunk of channels.
template <class Config, int kRows>
__device__ __forceinline__ void load_rows(uint8_t* destination, const CUtensorMap& map, uint64_t& barrier,
                                          ptx::BoxCoordinate c) {
#pragma unroll
  for (int chunk = 0; chunk < Config::kChunks; ++chunk, c.channel += Config::kChunk) {
    ptx::tensor_load(destination + chunk * kRows * Config::kRowBytes, map, barrier, c);
  }
}

// The owned rows, and box after box of the walk, x fastest, once for each query head that reads the keys. Lane i
// prepares step i of 32: divisions stay out of the chain of copies.
template <class Config>
class Loader {
 public:
  __device__ __forceinline__ Loader(const GradientParameters& p, const GradientMaps& maps,
                                    GradientStorage<Config>& shared)
      : p(p), maps(maps), shared(shared), lane(threadIdx.x % 32) {}

  __device__ __forceinline__ void run() {
    load_own();
    const int steps = shared.tile.box_steps * p.rounds;
#pragma unroll 1
    for (int j = 0; j < steps; ++j) load(j);
  }

 private:
  __device__ __forceinline__ void load_own() {
    if (lane != 0) return;
    const TileRecord& record = shared.tile;
    for (int w = 0; w < Config::kWarpgroups; ++w) {
      uint64_t& full = shared.own_full[w];
      ptx::barrier_arrive_expect(full, 2 * Config::kOwnBytes + Config::kOwnStatisticsBytes);
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        load_rows<Config, kQueries>(shared.own[w][o], maps.operand[kOwnScores + o][record.query_shape], full,
                                    query_box(p, record, w, shared.fold[kOwnScores + o]));
      }
      if constexpr (!Config::kOwnsKeys) {
        ptx::tensor_load(shared.statistics[w], maps.operand[kStatistics][record.query_shape], full,
                         query_box(p, record, w, shared.fold[kStatistics]));
      }
    }
  }

  // Step `step`, counted over all walks; they come in order.
  __device__ __forceinline__ void load(int step) {
    if (step % 32 == 0) prepare(step + lane);
    if (lane == 0) {
      const StepRecord info = shared.prepared[step % 32];
      const int round = info.flags >> kRoundBit;
      uint64_t& full = shared.full[ring.slot];
      ptx::barrier_wait(shared.empty[ring.slot], ring.parity ^ 1);
      shared.step[ring.slot] = info;
      if constexpr (Config::kAccumulates) {
        ptx::barrier_wait(shared.accumulator.step_empty[accumulator_steps.slot], accumulator_steps.parity ^ 1);
        shared.accumulator.step[accumulator_steps.slot] = info;
        ptx::barrier_arrive(shared.accumulator.step_full[accumulator_steps.slot]);
      }
      ptx::barrier_arrive_expect(full, Config::kStageBytes);
      ptx::BoxCoordinate c = {0, 0, info.z, info.y, info.x};
      const int shape = shared.tile.key_shape;
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        c.fold = shared.fold[kWalkedScores + o] + round * p.operand[kWalkedScores + o].head;
        load_rows<Config, Config::kWalked>(shared.walked[ring.slot][o], maps.operand[kWalkedScores + o][shape], full,
                                           c);
      }
      if constexpr (Config::kOwnsKeys) {
        c.fold = shared.fold[kStatistics] + round * p.operand[kStatistics].head;
        ptx::tensor_load(shared.statistics[ring.slot], maps.operand[kStatistics][shape], full, c);
      }
    }
    __syncwarp();
    ring.advance();
    accumulator_steps.advance();
  }

  __device__ __forceinline__ void prepare(int step) {
    const TileRecord& record = shared.tile;
    const int round = step / record.box_steps;
    const int within = step - round * record.box_steps, row = within / record.box_count[0],
              plane = row / record.box_count[1];
    StepRecord info;
    info.x = record.key_begin[0] + (within - row * record.box_count[0]) * p.key_box[0];
    info.y = record.key_begin[1] + (row - plane * record.box_count[1]) * p.key_box[1];
    info.z = record.key_begin[2] + plane * p.key_box[2];
    info.flags = box_flags<Config>(p, record, info.x, info.y, info.z) | round << kRoundBit;
    shared.prepared[lane] = info;
    __syncwarp();
  }

  const GradientParameters& p;
  const GradientMaps& maps;
  GradientStorage<Config>& shared;
  const int lane;
  Ring<Config::kStages> ring;
  Ring<AccumulatorStorage<Config>::kSteps> accumulator_steps;
};

}  // namespace natten::fused_sm90
