// The warpgroup of Pass::all that adds to the gradients of the queries: dQ += dS K.
#pragma once

#include "kernels/fused_sm90/backward_config.h"
#include "kernels/fused_sm90/consumer.h"
#include "ptx/barrier.h"
#include "ptx/tma.h"
#include "ptx/wgmma.h"

namespace natten::fused_sm90 {

// Step by step: dS from the consumers, the step's part of dQ through shared memory to the copy engine.
template <class Config>
class Accumulator {
  using Storage = AccumulatorStorage<Config>;

 public:
  __device__ __forceinline__ Accumulator(const GradientParameters& p, const GradientMaps& maps,
                                         GradientStorage<Config>& shared)
      : p(p),
        maps(maps),
        shared(shared),
        storage(shared.accumulator),
        warp(threadIdx.x % 128 / 32),
        lane(threadIdx.x % 32) {}

  __device__ __forceinline__ void run() {
    const int steps = static_cast<int>(uniform(shared.tile.box_steps * p.rounds));
    if (steps > 0) {
      for (int w = 0; w < Config::kWarpgroups; ++w) ptx::barrier_wait(shared.own_full[w], 0);
    }
    Ring<Storage::kSteps> ring;
#pragma unroll 1
    for (int j = 0; j < steps; ++j) {
      ptx::barrier_wait(storage.step_full[ring.slot], ring.parity);
      const StepRecord box = storage.step[ring.slot];
      __syncwarp();
      if (lane == 0) ptx::barrier_arrive(storage.step_empty[ring.slot]);
      ring.advance();
      accumulate(box);
    }
    if (warp == 0 && lane == 0) ptx::tensor_store_wait_read();
  }

 private:
  static constexpr int kHeadDim = Config::kHeadDim, kRowBytes = Config::kRowBytes, kBlockChannels = 32;
  static constexpr int kParts = Config::kWalked / 64 * Config::kChunks;  // of 64 queries and 64 channels

  __device__ __forceinline__ void synchronize() { ptx::named_barrier_sync(1 + Config::kWarpgroups, 128); }

  __device__ __forceinline__ void accumulate(const StepRecord& box) {
    bool needed[Config::kWarpgroups];
    const uint32_t flags = uniform(box.flags);
#pragma unroll
    for (int w = 0; w < Config::kWarpgroups; ++w) {
      needed[w] = flags >> 2 * w & 1;
      if (needed[w]) ptx::barrier_wait(storage.scores_full[w], published[w].parity);
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int rows = 64 * (part / Config::kChunks), chunk = part % Config::kChunks;
      float gradient[Config::kChunk / 2];
      int accumulate = 0;
#pragma unroll
      for (int w = 0; w < Config::kWarpgroups; ++w) {
        if (!needed[w]) continue;
        const uint32_t scores =
            uniform(ptx::matrix_descriptor_low(ptx::shared_address(storage.scores[w]) + rows * 2 * kQueries, 16));
        const uint32_t keys = uniform(
            ptx::matrix_descriptor_low(ptx::shared_address(shared.own[w][0]) + chunk * kQueries * kRowBytes, 16));
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < kQueries / 16; ++k) {
          ptx::wgmma_shared<typename Config::Element, Config::kChunk, true>(
              gradient, ptx::matrix_descriptor<2 * kQueries>(scores + ((16 * k * 2) >> 4)),
              ptx::matrix_descriptor<kRowBytes>(keys + ((16 * k * kRowBytes) >> 4)), accumulate);
          accumulate = 1;
        }
        ptx::wgmma_commit();
      }
      ptx::wgmma_wait<0>();
      ptx::pin(gradient);
      if (part == kParts - 1) {
#pragma unroll
        for (int w = 0; w < Config::kWarpgroups; ++w) {
          if (!needed[w]) continue;
          if (lane == 0) ptx::barrier_arrive(storage.scores_empty[w]);
          published[w].advance();
        }
      }
      if (part == 0) {
        if (warp == 0 && lane == 0) ptx::tensor_store_wait_read();  // of the step before
        synchronize();
      }
      stage(gradient, rows, chunk);
    }
    ptx::fence_async_shared();
    synchronize();
    if (warp != 0 || lane != 0) return;
    ptx::BoxCoordinate c = {0, shared.fold[kAccumulator] + (box.flags >> kRoundBit) * p.operand[kAccumulator].head,
                            box.z, box.y, box.x};
#pragma unroll
    for (int block = 0; block < kHeadDim / kBlockChannels; ++block, c.channel += kBlockChannels) {
      ptx::tensor_reduce_add(storage.sum + block * Config::kWalked * 128,
                             maps.operand[kAccumulator][shared.tile.key_shape], c);
    }
    ptx::tensor_store_commit();
  }

  // To blocks of 32 channels, swizzled. Every other row writes its columns in another order, which spreads the eight
  // rows of a warp over all banks.
  __device__ __forceinline__ void stage(const float (&gradient)[Config::kChunk / 2], int rows, int chunk) {
    const int row = rows + warp * 16 + lane / 4;
    const bool odd = row & 1;
    uint8_t* const destination = storage.sum + (chunk * 2 * Config::kWalked + row) * 128 + lane % 2 * 8;
    const int unit = (lane % 4 / 2) ^ (odd ? 4 : 0) ^ (row & 7);
#pragma unroll
    for (int j = 0; j < Config::kChunk / 8; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int here = 4 * j + 2 * r, there = 4 * (j ^ 2) + 2 * r;
        *reinterpret_cast<float2*>(destination + (j / 4 * Config::kWalked + 8 * r) * 128 +
                                   ((2 * (j % 4) ^ unit) << 4)) =
            make_float2(odd ? gradient[there] : gradient[here], odd ? gradient[there + 1] : gradient[here + 1]);
      }
    }
  }

  const GradientParameters& p;
  const GradientMaps& maps;
  GradientStorage<Config>& shared;
  Storage& storage;
  const int warp, lane;
  Ring<1> published[Config::kWarpgroups];
};

}  // namespace natten::fused_sm90
