// Query gradient, deterministic form: a block owns a tile of queries and walks the boxes of keys that they attend.
#pragma once

#include "kernels/fused_sm80/products.cuh"
#include "kernels/fused_sm80/walk.cuh"

namespace natten::fused_sm80 {

template <class Element_, int kHeadDim_, int kWarps_, int kRowTiles_, int kKeys_, int kStages_, int kBlocksPerSm_>
struct QueryGradientConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kKeys = kKeys_;
  static constexpr int kStages = kStages_;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowsPerWarp = 16 * kRowTiles;
  static constexpr int kQueries = kRowsPerWarp * kWarps;

  struct Shared {
    alignas(128) char query[kQueries * RowTile<Element, kHeadDim>::kRowBytes];
    alignas(128) char grad_out[kQueries * RowTile<Element, kHeadDim>::kRowBytes];
    alignas(128) char key[kStages][kKeys * RowTile<Element, kHeadDim>::kRowBytes];
    alignas(128) char value[kStages][kKeys * RowTile<Element, kHeadDim>::kRowBytes];
    Block<kQueries> block;
    KeyWalk<kKeys> walk;
  };
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    query_gradient_kernel(const __grid_constant__ Parameters p) {
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

  if (warp == 0) block.template locate<false>(p);
  shared.walk.fill_run_offsets(p);
  __syncthreads();
  if (block.empty()) return;

  const Load load;
  const uint32_t query_tile = ptx::shared_address(shared.query), grad_out_tile = ptx::shared_address(shared.grad_out);
  const int first_row = warp * kRowsPerWarp;
  const OwnRows<kRowsPerWarp> rows(p, block, warp, lane);
  rows.template load<kColumns>(shared.query, first_row, p.query, block.own_origin(p.query, block.head), p.columns,
                               lane);
  rows.template load<kColumns>(shared.grad_out, first_row, p.grad_out, block.own_origin(p.grad_out, block.head),
                               p.columns_v, lane);
  float2 own_statistics{0.f, 0.f};
  if (block.contains(rows.coordinates))
    own_statistics = *reinterpret_cast<const float2*>(block.own_origin(p.statistics, block.head) +
                                                      box_offset(p.statistics, rows.coordinates));
  if (warp == 0) shared.walk.start(p, block);
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    load.template zero_padding<kKeys>(shared.key[stage], p.columns);
    load.template zero_padding<kKeys>(shared.value[stage], p.columns_v);
  }
  block.template fill_table<false>(p);
  __syncthreads();
  const int steps = shared.walk.steps;
  auto load_step = [&](int n) {
    if (n < steps)
      shared.walk.load_both(n, ptx::shared_address(shared.key[n % kStages]),
                            ptx::shared_address(shared.value[n % kStages]), p, block, load);
    ptx::cp_async_commit();
  };
  load_step(0);

  const RowIndex row_index(p, rows.coordinates);
  const WarpBounds bounds = WarpBounds::make(p, block, warp, lane);
  const int own_extent = (lane & 3) == kAxes ? 1 : p.box.extent(lane & 3);

  float logsumexp[kRowTiles][2], delta[kRowTiles][2];
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      logsumexp[i][r] = __shfl_sync(~0u, own_statistics.x, 16 * i + 8 * r + lane / 4);
      delta[i][r] = __shfl_sync(~0u, own_statistics.y, 16 * i + 8 * r + lane / 4);
    }
  float grad[kRowTiles][kD / 8][4] = {};

#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this step's keys and values have come; those of the step before are used up
    if constexpr (kStages > 1) load_step(step + 1);
    shared.walk.enter_ahead(step, p, block);

    const int4 box = shared.walk.at(step);
    const int own_origin = (lane & 3) == 0 ? box.x : (lane & 3) == 1 ? box.y : (lane & 3) == 2 ? box.z : 0;
    const bool additional = (box.w & kAdditionalBox) != 0;
    if (additional || bounds.needs(own_origin, own_extent)) {
      const uint32_t key_tile = ptx::shared_address(shared.key[step % kStages]);
      const uint32_t value_tile = ptx::shared_address(shared.value[step % kStages]);
      float s[kRowTiles][kKeys / 8][4] = {}, ds[kRowTiles][kKeys / 8][4] = {};
      multiply_rows<Element, kD>(s, query_tile, first_row, key_tile, 0, lane);
      multiply_rows<Element, kD>(ds, grad_out_tile, first_row, value_tile, 0, lane);
      // ds = p (dp - delta)
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            ds[i][j][e] =
                ptx::exp2(fmaf(s[i][j][e], p.scale_log2, -logsumexp[i][e / 2])) * (ds[i][j][e] - delta[i][e / 2]);
      if (additional ? (box.w & kWholeBox) == 0 : !bounds.full(own_origin, own_extent)) {
        const tile::RowMask mask = additional ? tile::RowMask{0xffffu, uint32_t(min(p.additional - box.z, kKeys)) << 16}
                                              : row_index.mask(p, block, {box.x, box.y, box.z});
        const uint32_t replicate_z = additional ? 1 : p.box.replicate_z;
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int row_lane = 16 * i + 8 * r + lane / 4;
            const tile::RowMask row{__shfl_sync(~0u, mask.planes, row_lane), __shfl_sync(~0u, mask.z_range, row_lane)};
            const uint32_t words = tile::column_words(row, replicate_z, quad);
#pragma unroll
            for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
              for (int e = 0; e < 2; ++e)
                if (!tile::keeps(words, j, e)) ds[i][j][2 * r + e] = 0.f;
          }
      }
      multiply_weights<Element, kD>(grad, ds, key_tile, lane);
    }
    if constexpr (kStages == 1) {
      __syncthreads();
      load_step(step + 1);
    }
  }

  ptx::cp_async_wait<0>();
  __syncwarp();  // every lane has read the rows that results replace
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r)
      put_row<Element, kD>(shared.query, first_row + 16 * i + 8 * r + lane / 4, grad[i], r, p.scale, quad);
  __syncwarp();
  rows.template store<kColumns>(shared.query, first_row, p.grad_query, block.own_origin(p.grad_query, block.head),
                                p.columns, lane);
}

}  // namespace natten::fused_sm80
