// Forward: a block owns a tile of queries and walks boxes of keys (FlashAttention-2's schedule over spatial boxes).
// docs/kernels/fused-sm80.md explains the schedule.
#pragma once

#include "kernels/fused_sm80/products.cuh"
#include "kernels/fused_sm80/walk.cuh"
#include "tile/softmax.h"

namespace natten::fused_sm80 {

template <class Element_, int kHeadDim_, int kWarps_, int kRowTiles_, int kKeys_, int kStages_, int kBlocksPerSm_>
struct ForwardConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;  // D and Dv, padded with zeros
  static constexpr int kWarps = kWarps_;
  static constexpr int kRowTiles = kRowTiles_;  // tiles of 16 queries per warp
  static constexpr int kKeys = kKeys_;          // of a box
  // 2: keys and values are loaded a whole box ahead, one barrier a box. 1: keys are loaded during the second product,
  // values during the first, in half the shared memory.
  static constexpr int kStages = kStages_;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowsPerWarp = 16 * kRowTiles;
  static constexpr int kQueries = kRowsPerWarp * kWarps;

  struct Shared {
    alignas(128) char query[kQueries * RowTile<Element, kHeadDim>::kRowBytes];
    alignas(128) char key[kStages][kKeys * RowTile<Element, kHeadDim>::kRowBytes];
    alignas(128) char value[kStages][kKeys * RowTile<Element, kHeadDim>::kRowBytes];
    Block<kQueries> block;
    KeyWalk<kKeys> walk;
  };
  static_assert(kStages == 1 || kStages == 2);
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    forward_kernel(const __grid_constant__ Parameters p) {
  using Element = typename Config::Element;
  using Shared = typename Config::Shared;
  constexpr int kD = Config::kHeadDim, kKeys = Config::kKeys, kStages = Config::kStages;
  constexpr int kRowTiles = Config::kRowTiles, kRowsPerWarp = Config::kRowsPerWarp;
  constexpr int kColumns = RowTile<Element, kD>::kColumns;
  using Load = Loader<kColumns, Config::kThreads>;

  extern __shared__ __align__(128) char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  Block<Config::kQueries>& block = shared.block;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4;

  // ---- which queries, which keys
  if (warp == 0) block.template locate<false>(p);
  shared.walk.fill_run_offsets(p);
  __syncthreads();
  if (block.empty()) return;

  const Load load;
  const uint32_t query_tile = ptx::shared_address(shared.query);
  const int first_row = warp * kRowsPerWarp;
  const OwnRows<kRowsPerWarp> rows(p, block, warp, lane);
  rows.template load<kColumns>(shared.query, first_row, p.query, block.own_origin(p.query, block.head), p.columns,
                               lane);
  if (warp == 0) shared.walk.start(p, block);
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    load.template zero_padding<kKeys>(shared.key[stage], p.columns);
    load.template zero_padding<kKeys>(shared.value[stage], p.columns_v);
  }
  block.template fill_table<false>(p);
  __syncthreads();
  const int steps = shared.walk.steps;
  auto load_keys = [&](int n) {
    if (n < steps) shared.walk.load(n, 0, ptx::shared_address(shared.key[n % kStages]), p, block, load);
    ptx::cp_async_commit();
  };
  auto load_values = [&](int n) {
    if (n < steps) shared.walk.load(n, 1, ptx::shared_address(shared.value[n % kStages]), p, block, load);
    ptx::cp_async_commit();
  };
  auto load_both = [&](int n) {
    if (n < steps)
      shared.walk.load_both(n, ptx::shared_address(shared.key[n % kStages]),
                            ptx::shared_address(shared.value[n % kStages]), p, block, load);
    ptx::cp_async_commit();
  };
  // The first group holds the queries too.
  if constexpr (kStages == 1)
    load_keys(0);
  else
    load_both(0);
  const RowIndex row_index(p, rows.coordinates);
  const WarpBounds bounds = WarpBounds::make(p, block, warp, lane);
  const int own_extent = (lane & 3) == kAxes ? 1 : p.box.extent(lane & 3);

  float out[kRowTiles][kD / 8][4] = {};
  tile::OnlineSoftmax<kRowTiles> softmax;
  const float scale_log2 = fmaxf(fabsf(p.scale_log2), 1e-30f);  // zero times -infinity would be NaN

#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // what this step waits for has come; the values of the step before are used up
    if constexpr (kStages == 1) {
      load_values(step);
    } else {
      load_both(step + 1);
    }
    shared.walk.enter_ahead(step, p, block);

    if (step == 0 && p.scale < 0) {  // softmax wants a positive scale: move the sign into this warp's queries
      constexpr uint32_t kSigns = kIsFloat32<Element> ? 0x80000000u : 0x80008000u;
      uint32_t* words = reinterpret_cast<uint32_t*>(shared.query) + first_row * (kColumns / 2);
      for (int i = lane; i < kRowsPerWarp * (kColumns / 2); i += 32) words[i] ^= kSigns;
      __syncwarp();
    }
    const int4 box = shared.walk.at(step);
    const int own_origin = (lane & 3) == 0 ? box.x : (lane & 3) == 1 ? box.y : (lane & 3) == 2 ? box.z : 0;
    const bool needed = (box.w & kAdditionalBox) != 0 || bounds.needs(own_origin, own_extent);

    float s[kRowTiles][kKeys / 8][4];
    if (needed) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) s[i][j][e] = 0.f;
      multiply_rows<Element, kD>(s, query_tile, first_row, ptx::shared_address(shared.key[step % kStages]), 0, lane);
    }
    if constexpr (kStages == 1) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // values of this step have come; its keys are used up
      load_keys(step + 1);
    }

    if (needed) {
      if (box.w & kAdditionalBox) {
        if ((box.w & kWholeBox) == 0) {
          const tile::RowMask mask{0xffffu, uint32_t(p.additional - box.z) << 16};
          const uint32_t words = tile::column_words(mask, 1, quad);
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
            for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
              for (int e = 0; e < 4; ++e)
                if (!tile::keeps(words, j, e & 1)) s[i][j][e] = -INFINITY;
        }
      } else if (!bounds.full(own_origin, own_extent)) {
        const tile::RowMask mask = row_index.mask(p, block, {box.x, box.y, box.z});
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int row_lane = 16 * i + 8 * r + lane / 4;
            const tile::RowMask row{__shfl_sync(~0u, mask.planes, row_lane), __shfl_sync(~0u, mask.z_range, row_lane)};
            const uint32_t words = tile::column_words(row, p.box.replicate_z, quad);
#pragma unroll
            for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
              for (int e = 0; e < 2; ++e)
                if (!tile::keeps(words, j, e)) s[i][j][2 * r + e] = -INFINITY;
          }
      }
      softmax.weights(s, scale_log2, [&](int i, int r, float factor) {
#pragma unroll
        for (int j = 0; j < kD / 8; ++j) {
          out[i][j][2 * r] *= factor;
          out[i][j][2 * r + 1] *= factor;
        }
      });
      multiply_weights<Element, kD>(out, s, ptx::shared_address(shared.value[step % kStages]), lane);
    }
  }

  // ---- results: through this warp's rows of the query tile, which no other warp reads
  softmax.finish();
  ptx::cp_async_wait<0>();
  const float logsumexp = softmax.logsumexp_of_lane(lane, scale_log2);
  __syncwarp();  // every lane has read its queries
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float inverse = ptx::reciprocal(softmax.sum[i][r]);
      put_row<Element, kD>(shared.query, first_row + 16 * i + 8 * r + lane / 4, out[i], r, inverse, quad);
    }
  __syncwarp();
  rows.template store<kColumns>(shared.query, first_row, p.out, block.own_origin(p.out, block.head), p.columns_v, lane);
  if (lane < kRowsPerWarp && block.contains(rows.coordinates)) {
    const char* address = block.own_origin(p.logsumexp, block.head) + box_offset(p.logsumexp, rows.coordinates);
    *reinterpret_cast<float*>(const_cast<char*>(address)) = logsumexp;
  }
}

}  // namespace natten::fused_sm80
