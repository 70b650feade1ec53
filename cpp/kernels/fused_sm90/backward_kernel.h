// The gradient kernels for Hopper: warp-specialised, a block per tile. Deterministic: a block owns what it writes.
// Schedule and measurements: docs/kernels/fused-hopper-backward.md.
#pragma once

#include "kernels/fused_sm90/backward_config.h"
#include "kernels/fused_sm90/consumer.h"

namespace natten::fused_sm90 {

// Works out the block's tile: where its rows lie, which boxes it walks, and each row's range in them. Every lane of one
// warp; lanes 0..2 work on one axis each, lane 3 on heads and batch.
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
  if (__any_sync(kWarp, first >= count)) {  // dilation groups may be shorter than the longest
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
    const bool walked = o == kWalkedScores || o == kWalkedGrads || (kOwnsKeys && o == kStatistics);
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

// The producer: the owned tile, then box after box of the walk, x fastest, once for each query head that reads the
// keys. Lane i prepares and issues step i of 32: divisions stay out of the chain of copies.
template <class Config>
__device__ __forceinline__ void load_tile(const GradientParameters& p, const GradientMaps& maps,
                                          GradientStorage<Config>& shared) {
  const int lane = threadIdx.x % 32;
  const TileRecord& record = shared.tile;
  if (lane == 0) {
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
  const int count_x = record.box_count[0], count_y = record.box_count[1], steps = record.box_steps;
  Ring<Config::kStages> ring;
#pragma unroll 1
  for (int round = 0; round < p.rounds; ++round) {
#pragma unroll 1
    for (int base = 0; base < steps; base += 32) {
      const int step = base + lane, row = step / count_x, plane = row / count_y;
      ptx::BoxCoordinate c = {0, 0, record.key_begin[2] + plane * p.key_box[2],
                              record.key_begin[1] + (row - plane * count_y) * p.key_box[1],
                              record.key_begin[0] + (step - row * count_x) * p.key_box[0]};
      const StepRecord info = {c.x, c.y, c.z, box_flags<Config>(p, record, c.x, c.y, c.z)};
      const int count = min(32, steps - base);
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        if (lane == i) {
          uint64_t& full = shared.full[ring.slot];
          ptx::barrier_wait(shared.empty[ring.slot], ring.parity ^ 1);
          shared.step[ring.slot] = info;
          ptx::barrier_arrive_expect(full, Config::kStageBytes);
#pragma unroll
          for (int o = 0; o < 2; ++o) {
            c.fold = shared.fold[kWalkedScores + o] + round * p.operand[kWalkedScores + o].head;
            load_rows<Config, Config::kWalked>(shared.walked[ring.slot][o],
                                               maps.operand[kWalkedScores + o][record.key_shape], full, c);
          }
          if constexpr (Config::kOwnsKeys) {
            c.fold = shared.fold[kStatistics] + round * p.operand[kStatistics].head;
            ptx::tensor_load(shared.statistics[ring.slot], maps.operand[kStatistics][record.key_shape], full, c);
          }
        }
        __syncwarp();
        ring.advance();
      }
    }
  }
}

// {logsumexp * log2(e), delta} of a row.
__device__ __forceinline__ float2 statistics_of(const uint8_t* statistics, int row) {
  return *reinterpret_cast<const float2*>(statistics + row * kStatisticsRowBytes + (row / 2 % 4) * 16);
}

// A consumer warpgroup: the gradients of 64 rows.
template <class Config>
struct GradientConsumer {
  static constexpr bool kOwnsKeys = Config::kOwnsKeys;
  static constexpr int kHeadDim = Config::kHeadDim, kWalked = Config::kWalked, kRowBytes = Config::kRowBytes;
  static constexpr int kChunk = Config::kChunk;
  using Element = typename Config::Element;
  using Scores = float[kWalked / 2];
  using Operands = uint32_t[kWalked / 16][4];
  using Gradient = float[kHeadDim / 2];

  const GradientParameters& p;
  GradientStorage<Config>& shared;
  const int warpgroup, warp, lane;
  const uint32_t own_low, walked_low, walked_transposed_low;  // matrix descriptors of the first operand, first stage
  Ring<Config::kStages> ring;
  Mask mask;
  float2 own_statistics[2];  // of the thread's rows, where queries are owned
  Gradient scores_gradient;  // dK or dQ
  Gradient grads_gradient;   // dV

  __device__ __forceinline__ GradientConsumer(const GradientParameters& parameters, GradientStorage<Config>& storage,
                                              int warpgroup_index)
      : p(parameters),
        shared(storage),
        warpgroup(warpgroup_index),
        warp(threadIdx.x % 128 / 32),
        lane(threadIdx.x % 32),
        own_low(uniform(ptx::matrix_descriptor_low(ptx::shared_address(storage.own[warpgroup_index]), 16))),
        walked_low(ptx::matrix_descriptor_low(ptx::shared_address(storage.walked), 16)),
        walked_transposed_low(ptx::matrix_descriptor_low(ptx::shared_address(storage.walked), kWalked * kRowBytes)),
        mask(parameters, warpgroup_index, warp, lane) {}

  // scores = own[o] walked[o]^T
  __device__ __forceinline__ void issue_scores(Scores& scores, int o) {
    const uint32_t own = own_low + o * (Config::kOwnBytes >> 4);
    const uint32_t walked = uniform(walked_low + (2 * ring.slot + o) * (Config::kWalkedBytes >> 4));
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      const int chunk = 16 * k / kChunk, within = 16 * k % kChunk * 2;
      ptx::wgmma_shared<Element, kWalked>(
          scores, ptx::matrix_descriptor<kRowBytes>(own + ((chunk * kQueries * kRowBytes + within) >> 4)),
          ptx::matrix_descriptor<kRowBytes>(walked + ((chunk * kWalked * kRowBytes + within) >> 4)), k > 0);
    }
    ptx::wgmma_commit();
  }

  // gradient += operands walked[o]
  __device__ __forceinline__ void issue_gradient(Gradient& gradient, const Operands& operands, int o) {
    const uint32_t walked = uniform(walked_transposed_low + (2 * ring.slot + o) * (Config::kWalkedBytes >> 4));
#pragma unroll
    for (int k = 0; k < kWalked / 16; ++k) {
      ptx::wgmma_registers<Element, kHeadDim>(gradient, operands[k],
                                              ptx::matrix_descriptor<kRowBytes>(walked + ((16 * k * kRowBytes) >> 4)));
    }
    ptx::wgmma_commit();
  }

  static __device__ __forceinline__ void round(Operands& operands, const Scores& scores) {
#pragma unroll
    for (int i = 0; i < kWalked / 4; ++i)
      operands[i / 4][i % 4] = ptx::pack(scores[2 * i], scores[2 * i + 1], Element());
  }

  // Calls f(score index, column) for the thread's scores.
  template <class Function>
  static __device__ __forceinline__ void for_columns(Function f) {
#pragma unroll
    for (int j = 0; j < kWalked / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) f(4 * j + c, 8 * j + 2 * (threadIdx.x % 4) + c);
    }
  }

  // scores = P, from S
  __device__ __forceinline__ void exponentials(Scores& scores) const {
    if constexpr (kOwnsKeys) {
      const uint8_t* const statistics = shared.statistics[ring.slot];
      for_columns([&](int i, int column) {
        const float logsumexp = statistics_of(statistics, column).x;
        scores[i] = ptx::exp2(fmaf(scores[i], p.scale_log2, -logsumexp));
        scores[i + 2] = ptx::exp2(fmaf(scores[i + 2], p.scale_log2, -logsumexp));
      });
    } else {
#pragma unroll
      for (int i = 0; i < kWalked / 2; ++i) {
        scores[i] = ptx::exp2(fmaf(scores[i], p.scale_log2, -own_statistics[i / 2 % 2].x));
      }
    }
  }

  // grads = dS = P (dP - delta), from dP
  __device__ __forceinline__ void score_gradients(Scores& grads, const Scores& scores) const {
    if constexpr (kOwnsKeys) {
      const uint8_t* const statistics = shared.statistics[ring.slot];
      for_columns([&](int i, int column) {
        const float delta = statistics_of(statistics, column).y;
        grads[i] = scores[i] * (grads[i] - delta);
        grads[i + 2] = scores[i + 2] * (grads[i + 2] - delta);
      });
    } else {
#pragma unroll
      for (int i = 0; i < kWalked / 2; ++i) grads[i] = scores[i] * (grads[i] - own_statistics[i / 2 % 2].y);
    }
  }

  __device__ __forceinline__ void step(const StepRecord& box, bool masked) {
    Scores scores, grads;
    Operands probabilities, grad_scores;
    MaskBits bits;
    ptx::wgmma_fence();
    issue_scores(scores, 0);
    issue_scores(grads, 1);
    if (masked) bits = mask.of(p, shared.tile, box);
    ptx::wgmma_wait<1>();
    ptx::pin(scores);
    if (masked) bits.apply(scores);
    exponentials(scores);
    if constexpr (kOwnsKeys) {
      round(probabilities, scores);
      ptx::pin(probabilities);
      ptx::pin(grads_gradient);
      ptx::wgmma_fence();
      issue_gradient(grads_gradient, probabilities, 1);
      ptx::wgmma_wait<1>();
    } else {
      ptx::wgmma_wait<0>();
    }
    ptx::pin(grads);
    score_gradients(grads, scores);
    round(grad_scores, grads);
    ptx::pin(grad_scores);
    ptx::pin(scores_gradient);
    ptx::wgmma_fence();
    issue_gradient(scores_gradient, grad_scores, 0);
    ptx::wgmma_wait<0>();
    ptx::pin(scores_gradient);
    ptx::pin(grad_scores);
    if constexpr (kOwnsKeys) {
      ptx::pin(grads_gradient);
      ptx::pin(probabilities);
    }
  }

  // Stages a gradient where the operand was (swizzled like the maps) and hands it to the copy engine.
  __device__ __forceinline__ void store(const Gradient& gradient, float scale, int o, const GradientMaps& maps) {
    uint8_t* const staging = shared.own[warpgroup][o];
    const int row = warp * 16 + lane % 16;
    const uint32_t row_address = ptx::shared_address(staging) + row * kRowBytes;
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      const int chunk = 16 * k / kChunk, within = 16 * k % kChunk / 8;
      const float* g = gradient + 8 * k;
      asm volatile(
          "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
              row_address + chunk * kQueries * kRowBytes + (((within + lane / 16) ^ (row & 7)) << 4)),
          "r"(ptx::pack(g[0] * scale, g[1] * scale, Element())), "r"(ptx::pack(g[2] * scale, g[3] * scale, Element())),
          "r"(ptx::pack(g[4] * scale, g[5] * scale, Element())), "r"(ptx::pack(g[6] * scale, g[7] * scale, Element()))
          : "memory");
    }
    ptx::fence_async_shared();
    ptx::named_barrier_sync(1 + warpgroup, 128);
    if (warp != 0 || lane != 0) return;
    const TileRecord& tile = shared.tile;
    ptx::BoxCoordinate c = query_box(p, tile, warpgroup, shared.fold[kScoresGradient + o]);
    if (c.x < tile.query_end[0] && c.y < tile.query_end[1] && c.z < tile.query_end[2]) {
#pragma unroll
      for (int chunk = 0; chunk < Config::kChunks; ++chunk, c.channel += kChunk) {
        ptx::tensor_store(staging + chunk * kQueries * kRowBytes, maps.operand[kScoresGradient + o][tile.query_shape],
                          c);
      }
    }
    ptx::tensor_store_commit();
  }

  __device__ __forceinline__ void run(const GradientMaps& maps) {
    mask.begin_tile();
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) {
      scores_gradient[i] = 0.f;
      if constexpr (kOwnsKeys) grads_gradient[i] = 0.f;
    }
    ptx::barrier_wait(shared.own_full[warpgroup], 0);
    if constexpr (!kOwnsKeys) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        own_statistics[r] = statistics_of(shared.statistics[warpgroup], warp * 16 + lane / 4 + 8 * r);
      }
    }
    const int steps = static_cast<int>(uniform(shared.tile.box_steps * p.rounds));
#pragma unroll 1
    for (int j = 0; j < steps; ++j) {
      ptx::barrier_wait(shared.full[ring.slot], ring.parity);
      const StepRecord box = shared.step[ring.slot];
      const uint32_t flags = uniform(static_cast<uint32_t>(box.flags) >> 2 * warpgroup);
      if (flags & 1) step(box, !(flags & 2));
      if (lane == 0) ptx::barrier_arrive(shared.empty[ring.slot]);
      ring.advance();
    }
    ptx::named_barrier_sync(1 + warpgroup, 128);  // every warp is done with the operands
    store(scores_gradient, p.gradient_scale, 0, maps);
    if constexpr (kOwnsKeys) store(grads_gradient, 1.f, 1, maps);
    if (warp == 0 && lane == 0) ptx::tensor_store_wait();
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    gradient_kernel(const __grid_constant__ GradientMaps maps, const __grid_constant__ GradientParameters parameters) {
  static_assert(sizeof(GradientStorage<Config>) <= kMaxSharedBytes);
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  GradientStorage<Config>& shared = *reinterpret_cast<GradientStorage<Config>*>(shared_bytes);
  const int warpgroup = static_cast<int>(uniform(threadIdx.x / 128));
  if (threadIdx.x == 0) {
    for (int i = 0; i < Config::kStages; ++i) {
      ptx::barrier_init(shared.full[i], 1);
      ptx::barrier_init(shared.empty[i], 4 * Config::kWarpgroups);
    }
    for (int w = 0; w < Config::kWarpgroups; ++w) ptx::barrier_init(shared.own_full[w], 1);
    ptx::fence_barrier_init();
  }
  if (warpgroup == Config::kWarpgroups && threadIdx.x % 128 < 32) locate_tile(parameters, shared);
  __syncthreads();
  if (shared.tile.box_steps < 0) return;
  if (warpgroup < Config::kWarpgroups) {
    ptx::register_allocate<Config::kSelf.consumer_registers>();
    GradientConsumer<Config>(parameters, shared, warpgroup).run(maps);
  } else {
    ptx::register_release<Config::kSelf.producer_registers>();
    if (threadIdx.x % 128 < 32) load_tile(parameters, maps, shared);
  }
}

template <typename Element>
GradientKernelInfo gradient_kernel_of(int head_dim, Side owned) {
  const auto info = [](auto config) -> GradientKernelInfo {
    using Self = decltype(config);
    return {reinterpret_cast<const void*>(&gradient_kernel<Self>), Self::kThreads,
            static_cast<int>(sizeof(GradientStorage<Self>))};
  };
  if (head_dim == 64) {
    return owned == Side::keys ? info(GradientConfig<Element, 64, Side::keys>())
                               : info(GradientConfig<Element, 64, Side::queries>());
  }
  return owned == Side::keys ? info(GradientConfig<Element, 128, Side::keys>())
                             : info(GradientConfig<Element, 128, Side::queries>());
}

}  // namespace natten::fused_sm90
