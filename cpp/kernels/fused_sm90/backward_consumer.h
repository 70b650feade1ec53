// A consumer warpgroup of the gradient kernels: the gradients of the 64 rows that it owns.
#pragma once

#include "kernels/fused_sm90/backward_config.h"
#include "kernels/fused_sm90/consumer.h"
#include "ptx/barrier.h"
#include "ptx/math.h"
#include "ptx/memory.h"
#include "ptx/tma.h"
#include "ptx/wgmma.h"

namespace natten::fused_sm90 {

// {logsumexp * log2(e), delta} of a row.
__device__ __forceinline__ float2 statistics_of(const uint8_t* statistics, int row) {
  return *reinterpret_cast<const float2*>(statistics + row * kStatisticsBytes);
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
  Ring<1> published;  // dS handed over
  Mask mask;
  float2 own_statistics[2];  // of the thread's rows, where queries are owned
  Gradient scores_gradient;  // dK or dQ
  Gradient grads_gradient;   // dV
  Operands grad_scores;      // dS
  int pending = -1;          // stage that the product with dS still reads

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
  __device__ __forceinline__ void issue_scores(Scores& scores, int o, int slot) {
    const uint32_t own = own_low + o * (Config::kOwnBytes >> 4);
    const uint32_t walked = uniform(walked_low + (2 * slot + o) * (Config::kWalkedBytes >> 4));
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
  __device__ __forceinline__ void issue_gradient(Gradient& gradient, const Operands& operands, int o, int slot) {
    const uint32_t walked = uniform(walked_transposed_low + (2 * slot + o) * (Config::kWalkedBytes >> 4));
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

  // The same from rounded P.
  __device__ __forceinline__ void score_gradients(Scores& grads, const Operands& probabilities) const {
    const uint8_t* const statistics = shared.statistics[ring.slot];
#pragma unroll
    for (int j = 0; j < kWalked / 8; ++j) {
      const int column = 8 * j + 2 * (threadIdx.x % 4);
      const float delta[2] = {statistics_of(statistics, column).y, statistics_of(statistics, column + 1).y};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float2 probability = ptx::unpack(probabilities[j / 2][2 * (j % 2) + r], Element());
        grads[4 * j + 2 * r] = probability.x * (grads[4 * j + 2 * r] - delta[0]);
        grads[4 * j + 2 * r + 1] = probability.y * (grads[4 * j + 2 * r + 1] - delta[1]);
      }
    }
  }

  // A step of Pass::all. S and dP are never in flight together, and dS is made from rounded P: that is what registers
  // allow. The last product runs on while the next step's scores are issued behind it.
  __device__ __forceinline__ void accumulating_step(const StepRecord& box, bool masked) {
    Scores scores, grads;
    Operands probabilities;
    MaskBits bits;
    ptx::wgmma_fence();
    issue_scores(scores, 0, ring.slot);
    if (masked) bits = mask.of(p, shared.tile, box);
    ptx::wgmma_wait<0>();
    ptx::pin(scores);
    finish_pending();
    if (masked) bits.apply(scores);
    exponentials(scores);
    round(probabilities, scores);
    ptx::pin(probabilities);
    ptx::pin(grads_gradient);
    ptx::wgmma_fence();
    issue_scores(grads, 1, ring.slot);
    issue_gradient(grads_gradient, probabilities, 1, ring.slot);
    ptx::wgmma_wait<1>();
    ptx::pin(grads);
    score_gradients(grads, probabilities);
    round(grad_scores, grads);
    ptx::wgmma_wait<0>();
    ptx::pin(grads_gradient);
    ptx::pin(probabilities);
    publish(grad_scores);
    ptx::pin(grad_scores);
    ptx::pin(scores_gradient);
    ptx::wgmma_fence();
    issue_gradient(scores_gradient, grad_scores, 0, ring.slot);
    pending = ring.slot;
  }

  // After a wait for the last product of the step before.
  __device__ __forceinline__ void finish_pending() {
    ptx::pin(scores_gradient);
    ptx::pin(grad_scores);
    if (pending >= 0) release(pending);
    pending = -1;
  }

  __device__ __forceinline__ void release(int slot) {
    if (lane == 0) ptx::barrier_arrive(shared.empty[slot]);
  }

  // Waits for the step at hand and says whether this warpgroup needs it.
  __device__ __forceinline__ bool fetch(StepRecord& box, bool& masked) {
    ptx::barrier_wait(shared.full[ring.slot], ring.parity);
    box = shared.step[ring.slot];
    const uint32_t flags = uniform(static_cast<uint32_t>(box.flags) >> 2 * warpgroup);
    masked = !(flags & 2);
    return flags & 1;
  }

  __device__ __forceinline__ void accumulating_walk(int steps) {
    StepRecord box;
    bool masked;
#pragma unroll 1
    for (int j = 0; j < steps; ++j) {
      if (fetch(box, masked)) {
        accumulating_step(box, masked);
      } else {
        ptx::wgmma_wait<0>();
        finish_pending();
        release(ring.slot);
      }
      ring.advance();
    }
    ptx::wgmma_wait<0>();
    finish_pending();
  }

  // A step of the other passes.
  __device__ __forceinline__ void step(const StepRecord& box, bool masked) {
    Scores scores, grads;
    Operands probabilities;
    MaskBits bits;
    ptx::wgmma_fence();
    issue_scores(scores, 0, ring.slot);
    issue_scores(grads, 1, ring.slot);
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
      issue_gradient(grads_gradient, probabilities, 1, ring.slot);
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
    issue_gradient(scores_gradient, grad_scores, 0, ring.slot);
    ptx::wgmma_wait<0>();
    ptx::pin(scores_gradient);
    ptx::pin(grad_scores);
    if constexpr (kOwnsKeys) {
      ptx::pin(grads_gradient);
      ptx::pin(probabilities);
    }
  }

  // Hands dS, queries by keys, to the warpgroup that multiplies it with the keys.
  __device__ __forceinline__ void publish(const Operands& grad_scores) {
    auto& accumulator = shared.accumulator;
    ptx::barrier_wait(accumulator.scores_empty[warpgroup], published.parity ^ 1);
    const int row = lane / 16 * 8 + lane % 8;  // a query; this warp's keys are two 16-byte pieces of it
    const uint32_t address = ptx::shared_address(accumulator.scores[warpgroup]) + row * 2 * kQueries +
                             ((2 * warp + lane / 8 % 2) ^ (row & 7)) * 16;
#pragma unroll
    for (int k = 0; k < kWalked / 16; ++k) ptx::stmatrix_x4_transposed(address + 16 * k * 2 * kQueries, grad_scores[k]);
    ptx::fence_async_shared();
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(accumulator.scores_full[warpgroup]);
    published.advance();
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
      const uint32_t rounded[4] = {
          ptx::pack(g[0] * scale, g[1] * scale, Element()), ptx::pack(g[2] * scale, g[3] * scale, Element()),
          ptx::pack(g[4] * scale, g[5] * scale, Element()), ptx::pack(g[6] * scale, g[7] * scale, Element())};
      ptx::stmatrix_x4(row_address + chunk * kQueries * kRowBytes + (((within + lane / 16) ^ (row & 7)) << 4), rounded);
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

  __device__ __forceinline__ void walk(int steps) {
    StepRecord box;
    bool masked;
#pragma unroll 1
    for (int j = 0; j < steps; ++j) {
      if (fetch(box, masked)) step(box, masked);
      release(ring.slot);
      ring.advance();
    }
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
    if constexpr (Config::kAccumulates) {
      accumulating_walk(steps);
      // The last product with the keys is done.
      ptx::barrier_wait(shared.accumulator.scores_empty[warpgroup], published.parity ^ 1);
    } else {
      walk(steps);
    }
    ptx::named_barrier_sync(1 + warpgroup, 128);  // every warp is done with the operands
    store(scores_gradient, p.gradient_scale, 0, maps);
    if constexpr (kOwnsKeys) store(grads_gradient, 1.f, 1, maps);
    if (warp == 0 && lane == 0) ptx::tensor_store_wait_read();
  }
};

}  // namespace natten::fused_sm90
