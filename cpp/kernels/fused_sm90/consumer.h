// A consumer warpgroup: attention of one 64-query box over the key boxes that the producer brings.
//
// Per step j: S = Q K_j^T, P = softmax step, O += P V_j. With Config::kOverlap the product S_{j+1} and then P_j V_j are
// issued together, and the maxima of softmax j + 1 are found while the tensor cores still work on P_j V_j. Its
// exponentials come after that (the compiler moves the wait before them; forced beside it, they slow all but D 64
// down).
#pragma once

#include "kernels/fused_sm90/bias.h"
#include "kernels/fused_sm90/config.h"
#include "kernels/fused_sm90/mask.h"
#include "kernels/fused_sm90/parameters.h"
#include "kernels/fused_sm90/producer.h"
#include "kernels/fused_sm90/softmax.h"
#include "ptx/barrier.h"
#include "ptx/math.h"
#include "ptx/tma.h"
#include "ptx/wgmma.h"

namespace natten::fused_sm90 {

// Values that every lane computes alike, told so to the compiler: descriptors and branches then live in uniform
// registers.
__device__ __forceinline__ uint32_t uniform(uint32_t x) { return __shfl_sync(kWarp, x, 0); }

template <class Config>
struct Consumer {
  static constexpr int kHeadDim = Config::kHeadDim, kKeys = Config::kKeys, kChunk = Config::kChunk;
  static constexpr int kRowBytes = Config::kRowBytes;
  using Element = typename Config::Element;
  using Scores = float[kKeys / 2];

  const Parameters& p;
  SharedStorage<Config>& shared;
  const int warpgroup, warp, lane;
  const uint32_t key_low, value_low;  // matrix descriptors of stage 0
  uint32_t key_slots_low, query_slots_low;
  uint32_t query_low;
  Ring<Config::kStages> ring;  // the step at hand
  StepRecord box;
  bool biased, masked;  // how the box's mask is applied: by tensor core, or score by score
  Mask mask;
  Softmax softmax;
  float out[kHeadDim / 2];
  uint32_t probabilities[kKeys / 16][4];

  __device__ __forceinline__ Consumer(const Parameters& parameters, SharedStorage<Config>& storage, int warpgroup_index)
      : p(parameters),
        shared(storage),
        warpgroup(warpgroup_index),
        warp(threadIdx.x % 128 / 32),
        lane(threadIdx.x % 32),
        key_low(ptx::matrix_descriptor_low(ptx::shared_address(storage.key), 16)),
        value_low(ptx::matrix_descriptor_low(ptx::shared_address(storage.value), kKeys * kRowBytes)),
        mask(parameters, warpgroup_index, warp, lane) {
    if constexpr (Config::kMasksByBias) {
      using Halves = SlotHalves<Config>;
      const int common = Halves::shared_half(p.pair_axis), own = Halves::own_half(p.pair_axis, warpgroup);
      const int half_xy = p.pair_axis == 2 ? common : own, half_z = p.pair_axis == 2 ? own : common;
      key_slots_low = ptx::matrix_descriptor_low(ptx::shared_address(shared.bias.key_slots) + half_xy * Halves::kBytes,
                                                 (half_z - half_xy) * Halves::kBytes);
      query_slots_low = ptx::matrix_descriptor_low(ptx::shared_address(shared.bias.query_slots), kQueries * 16);
    }
  }

  __device__ __forceinline__ void release(uint64_t& barrier) const {
    if (lane == 0) ptx::barrier_arrive(barrier);
  }

  // Waits for the keys of the step at hand and says whether this warpgroup needs them.
  __device__ __forceinline__ bool fetch() {
    ptx::barrier_wait(shared.key_full[ring.slot], ring.parity);
    box = shared.step[ring.slot];
    const uint32_t flags = uniform(static_cast<uint32_t>(box.flags) >> 2 * warpgroup);
    const bool partial = !(flags & 2);
    biased = Config::kMasksByBias && partial && p.bias;
    masked = partial && !biased;
    return flags & 1;
  }

  __device__ __forceinline__ void skip() {
    release(shared.key_empty[ring.slot]);
    ptx::barrier_wait(shared.value_full[ring.slot], ring.parity);
    release(shared.value_empty[ring.slot]);
    ring.advance();
  }

  // S = Q K^T, plus the box's mask
  template <bool kBiased>
  __device__ __forceinline__ void issue_scores(Scores& scores) {
    const uint32_t key = uniform(key_low + ring.slot * (Config::kKeyBytes >> 4));
    ptx::wgmma_fence();
    if constexpr (kBiased) {
      const uint32_t slots = uniform(key_slots_low + ring.slot * (Config::kKeySlotBytes >> 4));
      ptx::wgmma_shared<Element, kKeys>(scores, ptx::matrix_descriptor<16>(uniform(query_slots_low)),
                                        ptx::matrix_descriptor<16>(slots), 0);
    }
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      const int chunk = 16 * k / kChunk, within = 16 * k % kChunk * 2;
      ptx::wgmma_shared<Element, kKeys>(
          scores, ptx::matrix_descriptor<kRowBytes>(query_low + ((chunk * kQueries * kRowBytes + within) >> 4)),
          ptx::matrix_descriptor<kRowBytes>(key + ((chunk * kKeys * kRowBytes + within) >> 4)), k > 0 || kBiased);
    }
    ptx::wgmma_commit();
  }

  // O += P V
  __device__ __forceinline__ void issue_out(int slot) {
    const uint32_t value = uniform(value_low + slot * (Config::kKeyBytes >> 4));
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      ptx::wgmma_registers<Element, kHeadDim>(out, probabilities[k],
                                              ptx::matrix_descriptor<kRowBytes>(value + ((16 * k * kRowBytes) >> 4)));
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void round_probabilities(const Scores& scores) {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i)
      probabilities[i / 4][i % 4] = ptx::pack(scores[2 * i], scores[2 * i + 1], Element());
  }

  __device__ __forceinline__ void finish_out(const Ring<Config::kStages>& at) {
    ptx::barrier_wait(shared.value_full[at.slot], at.parity);
    ptx::pin(out);
    ptx::pin(probabilities);
    issue_out(at.slot);
    ptx::wgmma_wait<0>();
    ptx::pin(out);
    ptx::pin(probabilities);
    release(shared.value_empty[at.slot]);
  }

  // One step. `previous` is the step whose P V is still to be done, and runs beside this step's softmax; the first of a
  // run of needed steps has none. Masked boxes have code of their own because wgmma tolerates no branch inside a group.
  template <bool kBiased, bool kFirst>
  __device__ __forceinline__ void step(const TileRecord& tile, const Ring<Config::kStages>& previous) {
    Scores scores;
    MaskBits bits;
    if constexpr (!kFirst) {
      ptx::pin(out);
      ptx::pin(probabilities);
    }
    issue_scores<kBiased>(scores);
    if constexpr (!kFirst) {
      ptx::barrier_wait(shared.value_full[previous.slot], previous.parity);
      issue_out(previous.slot);
    }
    if constexpr (!kBiased) {
      if (masked) bits = mask.of(p, tile, box);
    }
    ptx::wgmma_wait<kFirst ? 0 : 1>();
    ptx::pin(scores);
    release(shared.key_empty[ring.slot]);
    if constexpr (!kBiased) {
      if (masked) bits.apply(scores);
    }
    softmax.update(scores, p.scale_log2, p.slack);
    if constexpr (!kFirst) {
      ptx::wgmma_wait<0>();
      ptx::pin(out);
      ptx::pin(probabilities);
      release(shared.value_empty[previous.slot]);
    }
    softmax.rescale(out);
    round_probabilities(scores);
  }

  template <bool kFirst>
  __device__ __forceinline__ void any_step(const TileRecord& tile, const Ring<Config::kStages>& previous) {
    if constexpr (Config::kMasksByBias) {
      if (biased) {
        step<true, kFirst>(tile, previous);
        return;
      }
    }
    step<false, kFirst>(tile, previous);
  }

  __device__ __forceinline__ void attend(const TileRecord& tile, int steps) {
    int j = 0;
    while (j < steps) {
      if (!fetch()) {
        skip();
        ++j;
        continue;
      }
      any_step<true>(tile, ring);
      Ring<Config::kStages> previous = ring;
      ring.advance();
      ++j;
      bool needed = false;
      if constexpr (Config::kOverlap) {
        if (j < steps) needed = fetch();
#pragma unroll 1
        while (needed) {
          any_step<false>(tile, previous);
          previous = ring;
          ring.advance();
          if (++j >= steps) break;
          needed = fetch();
        }
      }
      finish_out(previous);
      if (Config::kOverlap && j < steps) {  // fetched, but not needed
        skip();
        ++j;
      }
    }
  }

  // Normalises, stages the tile in its query buffer (swizzled like the maps), and hands it to the copy engine.
  __device__ __forceinline__ void store(const TileRecord& tile, const CUtensorMap (&out_maps)[kGroupShapes],
                                        uint8_t* staging) {
    float reciprocal[2];
    softmax.finish(reciprocal);
    ptx::named_barrier_sync(1 + warpgroup, 128);  // every warp is done with the queries
    const int row = warp * 16 + lane % 16;
    const int swizzle = kRowBytes == 128 ? row & 7 : row >> 1 & 3;
    const uint32_t row_address = ptx::shared_address(staging) + row * kRowBytes;
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      const int chunk = 16 * k / kChunk, within = 16 * k % kChunk / 8;
      const float* o = out + 8 * k;
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                       row_address + chunk * kQueries * kRowBytes + (((within + lane / 16) ^ swizzle) << 4)),
                   "r"(ptx::pack(o[0] * reciprocal[0], o[1] * reciprocal[0], Element())),
                   "r"(ptx::pack(o[2] * reciprocal[1], o[3] * reciprocal[1], Element())),
                   "r"(ptx::pack(o[4] * reciprocal[0], o[5] * reciprocal[0], Element())),
                   "r"(ptx::pack(o[6] * reciprocal[1], o[7] * reciprocal[1], Element()))
                   : "memory");
    }
    ptx::fence_async_shared();
    ptx::named_barrier_sync(1 + warpgroup, 128);
    if (warp == 0 && lane == 0) {
      ptx::BoxCoordinate c = query_box(p, tile, warpgroup, tile.out_fold);
      if (c.x < tile.query_end[0] && c.y < tile.query_end[1] && c.z < tile.query_end[2]) {
#pragma unroll
        for (int chunk = 0; chunk < Config::kChunks; ++chunk, c.channel += kChunk) {
          ptx::tensor_store(staging + chunk * kQueries * kRowBytes, out_maps[tile.query_shape], c);
        }
      }
      ptx::tensor_store_commit();
    }
    if (p.logsumexp != nullptr) store_logsumexp(tile);
  }

  // Box coordinates of a row of the warpgroup's tile.
  struct Coordinate {
    int x, y, z;
  };
  __device__ __forceinline__ Coordinate coordinate_of(int row) const {
    return {row >> (p.log2_z + p.log2_y), row >> p.log2_z & ((1 << p.log2_y) - 1), row & ((1 << p.log2_z) - 1)};
  }

  // Sixteen lanes write a row each. A row's statistics are with lanes 4 (row % 8) .. + 3, element row / 8.
  __device__ __forceinline__ void store_logsumexp(const TileRecord& tile) const {
    const float low = __shfl_sync(kWarp, softmax.logsumexp(0, p.scale_log2), 4 * (lane % 8));
    const float high = __shfl_sync(kWarp, softmax.logsumexp(1, p.scale_log2), 4 * (lane % 8));
    if (lane >= 16) return;
    const int row = warp * 16 + lane;
    const ptx::BoxCoordinate origin = query_box(p, tile, warpgroup, 0);
    const Coordinate c = coordinate_of(row);
    if (origin.x + c.x < tile.query_end[0] && origin.y + c.y < tile.query_end[1] &&
        origin.z + c.z < tile.query_end[2]) {
      p.logsumexp[tile.logsumexp_origin + shared.logsumexp_offset[warpgroup * kQueries + row]] = lane < 8 ? low : high;
    }
  }

  // Offsets that store_logsumexp adds; every thread of the warp reads only what its warp wrote.
  __device__ __forceinline__ void prepare_logsumexp() {
    const int row = warp * 16 + lane % 16, step = warpgroup * p.warpgroup_box[p.pair_axis];
    const Coordinate c = coordinate_of(row);
    const int position[kAxes] = {c.x + (p.pair_axis == 0 ? step : 0), c.y + (p.pair_axis == 1 ? step : 0),
                                 c.z + (p.pair_axis == 2 ? step : 0)};
    int64_t offset = 0;
#pragma unroll
    for (int a = 0; a < kAxes; ++a) offset += p.logsumexp_axis[a] * p.axis[a].dilation * position[a];
    shared.logsumexp_offset[warpgroup * kQueries + row] = offset;
    __syncwarp();
  }

  __device__ __forceinline__ void run(const CUtensorMap (&out_maps)[kGroupShapes]) {
    prepare_logsumexp();
    Ring<kTileRecords> tiles;
    Ring<Config::kQueryBuffers> queries;
    while (true) {
      ptx::barrier_wait(shared.tile_full[tiles.slot], tiles.parity);
      const TileRecord& tile = shared.tile[tiles.slot];
      const int box_steps = static_cast<int>(uniform(tile.box_steps));
      if (box_steps < 0) break;
      softmax.begin(p.lowest);
      mask.begin_tile();
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) out[i] = 0.f;
      uint8_t* const query = shared.query[queries.slot][warpgroup];
      query_low = uniform(ptx::matrix_descriptor_low(ptx::shared_address(query), 16));
      ptx::barrier_wait(shared.query_full[queries.slot][warpgroup], queries.parity);
      attend(tile, box_steps + p.additional_steps);
      store(tile, out_maps, query);
      if (warp == 0 && lane == 0) {
        ptx::tensor_store_wait_read();
        ptx::barrier_arrive(shared.query_empty[queries.slot][warpgroup]);
      }
      release(shared.tile_empty[tiles.slot]);
      tiles.advance();
      queries.advance();
    }
    if (warp == 0 && lane == 0) ptx::tensor_store_wait();
  }
};

}  // namespace natten::fused_sm90
