// Key and value gradients in float32: a block owns a tile of keys and walks the boxes of queries that attend them, once
// for every query head of the group.
//
// As in backward_key.cuh scores are computed transposed, S^T = K Q^T; but here each warp keeps the keys that it
// computed them for: tf32 products take P^T and dS^T as the accumulators hold them, so nothing changes hands.
#pragma once

#include "kernels/fused_sm80/products.cuh"
#include "kernels/fused_sm80/walk.cuh"

namespace natten::fused_sm80 {

template <class Element_, int kHeadDim_, int kWarps_, int kRowTiles_, int kQueries_, int kStages_, int kBlocksPerSm_>
struct Float32KeyGradientConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kKeyWarps = kWarps_;
  static constexpr int kRowTiles = kRowTiles_;  // tiles of 16 keys per warp
  static constexpr int kQueries = kQueries_;    // of a box
  static constexpr int kStages = kStages_;      // boxes in flight
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kThreads = 32 * kKeyWarps;
  static constexpr int kRowsPerWarp = 16 * kRowTiles;
  static constexpr int kKeys = kRowsPerWarp * kKeyWarps;  // of the owned tile

  struct Shared {
    alignas(128) char key[kKeys * RowTile<Element, kHeadDim>::kRowBytes];
    alignas(128) char value[kKeys * RowTile<Element, kHeadDim>::kRowBytes];
    alignas(128) char query[kStages][kQueries * RowTile<Element, kHeadDim>::kRowBytes];
    alignas(128) char grad_out[kStages][kQueries * RowTile<Element, kHeadDim>::kRowBytes];
    alignas(16) float2 statistics[kStages][kQueries];  // logsumexp * log2(e), delta
    Block<kKeys> block;
    QueryWalk<kQueries, false> walk;
  };
};

// Rows of the additional keys' gradients, to be summed over the parts of the queries.
template <int kChannels>
__device__ __forceinline__ void put_partial(float* row, const float (&d)[kChannels / 8][4], int r, float factor,
                                            int channels, int quad) {
#pragma unroll
  for (int n = 0; n < kChannels / 16; ++n) {
    const int channel = 16 * n + 4 * quad;
    if (channel >= channels) continue;
    float2* pairs = reinterpret_cast<float2*>(row + channel);  // rows begin anywhere: at a multiple of 8 bytes
    pairs[0] = make_float2(d[2 * n][2 * r] * factor, d[2 * n + 1][2 * r] * factor);
    pairs[1] = make_float2(d[2 * n][2 * r + 1] * factor, d[2 * n + 1][2 * r + 1] * factor);
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    float32_key_gradient_kernel(const __grid_constant__ Parameters p) {
  using Element = typename Config::Element;
  using Shared = typename Config::Shared;
  constexpr int kD = Config::kHeadDim, kQueries = Config::kQueries, kStages = Config::kStages;
  constexpr int kRowTiles = Config::kRowTiles, kRowsPerWarp = Config::kRowsPerWarp, kBlocks = kQueries / 8;
  constexpr int kColumns = RowTile<Element, kD>::kColumns;
  using Load = Loader<kColumns, Config::kThreads>;

  extern __shared__ __align__(128) char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  Block<Config::kKeys>& block = shared.block;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4;
  const int first_row = warp * kRowsPerWarp;

  if (warp == 0) block.template locate<true>(p);
  shared.walk.fill_run_offsets(p);
  __syncthreads();
  if (block.empty()) return;

  const Load load;
  const uint32_t key_tile = ptx::shared_address(shared.key), value_tile = ptx::shared_address(shared.value);
  const OwnRows<kRowsPerWarp> rows(p, block, warp, lane);
  rows.template load<kColumns>(shared.key, first_row, p.key, block.own_origin(p.key, block.head), p.columns, lane);
  rows.template load<kColumns>(shared.value, first_row, p.value, block.own_origin(p.value, block.head), p.columns_v,
                               lane);
  if (warp == 0) shared.walk.start(p, block);
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    load.template zero_padding<kQueries>(shared.query[stage], p.columns);
    load.template zero_padding<kQueries>(shared.grad_out[stage], p.columns_v);
  }
  block.template fill_table<true>(p);
  __syncthreads();
  const int steps = shared.walk.steps;
  auto load_step = [&](int n) {
    if (n < steps) {
      const int stage = n % kStages;
      if (load.chunk * 8 < p.columns)
        shared.walk.load(n, 0, ptx::shared_address(shared.query[stage]), p, block.size, p.query, load);
      if (load.chunk * 8 < p.columns_v)
        shared.walk.load(n, 1, ptx::shared_address(shared.grad_out[stage]), p, block.size, p.grad_out, load);
      shared.walk.load_statistics(n, ptx::shared_address(shared.statistics[stage]), p, block.size);
    }
    ptx::cp_async_commit();
  };
  load_step(0);

  const RowIndex row_index(p, rows.coordinates);
  const WarpBounds bounds = WarpBounds::make(p, block, warp, lane);
  const int own_extent = (lane & 3) == kAxes ? 1 : p.box.extent(lane & 3);

  float grad_key[kRowTiles][kD / 8][4] = {}, grad_value[kRowTiles][kD / 8][4] = {};

#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this step's box has come; the one before is used up
    if constexpr (kStages > 1) load_step(step + 1);
    shared.walk.enter_ahead(step, p, block);

    const int4 box = shared.walk.at(step);
    const int own_origin = (lane & 3) == 0 ? box.x : (lane & 3) == 1 ? box.y : (lane & 3) == 2 ? box.z : 0;
    if (bounds.needs(own_origin, own_extent)) {
      const uint32_t query_tile = ptx::shared_address(shared.query[step % kStages]);
      const uint32_t grad_out_tile = ptx::shared_address(shared.grad_out[step % kStages]);
      float s[kRowTiles][kBlocks][4] = {}, ds[kRowTiles][kBlocks][4] = {};
      multiply_rows<Element, kD>(s, key_tile, first_row, query_tile, 0, lane);
      multiply_rows<Element, kD>(ds, value_tile, first_row, grad_out_tile, 0, lane);
      // p = exp(s - logsumexp), ds = p (dp - delta)
      const float2* statistics = shared.statistics[step % kStages] + 2 * quad;
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        const float4 pair = *reinterpret_cast<const float4*>(statistics + 8 * j);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            s[i][j][e] = ptx::exp2(fmaf(s[i][j][e], p.scale_log2, e % 2 ? -pair.z : -pair.x));
            ds[i][j][e] = s[i][j][e] * (ds[i][j][e] - (e % 2 ? pair.w : pair.y));
          }
      }
      if (!bounds.full(own_origin, own_extent)) {
        const tile::RowMask mask = row_index.mask(p, block, {box.x, box.y, box.z});
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int row_lane = 16 * i + 8 * r + lane / 4;
            const tile::RowMask row{__shfl_sync(~0u, mask.planes, row_lane), __shfl_sync(~0u, mask.z_range, row_lane)};
            const uint32_t words = tile::column_words(row, p.box.replicate_z, quad);
#pragma unroll
            for (int j = 0; j < kBlocks; ++j)
#pragma unroll
              for (int e = 0; e < 2; ++e)
                if (!tile::keeps(words, j, e)) s[i][j][2 * r + e] = ds[i][j][2 * r + e] = 0.f;
          }
      }
      multiply_weights<Element, kD>(grad_value, s, grad_out_tile, lane);
      multiply_weights<Element, kD>(grad_key, ds, query_tile, lane);
    }
    if constexpr (kStages == 1) {
      __syncthreads();
      load_step(step + 1);
    }
  }

  // ---- results: through this warp's rows of the tiles, which no other warp reads
  ptx::cp_async_wait<0>();
  __syncwarp();  // every lane has read the rows that results replace
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 16 * i + 8 * r + lane / 4;
      if (p.partial != nullptr) {
        const int64_t item = (int64_t(block.part) * p.partial_batch + block.batch) * p.additional;
        const int3 c = p.owned.coordinates(warp, row);
        if (!block.contains(c)) continue;
        float* destination = p.partial + ((item + block.own_first[2] + c.z) * int(p.heads.value) + block.head) *
                                             (p.head_dim + p.head_dim_v);
        put_partial<kD>(destination, grad_key[i], r, p.scale, p.head_dim, quad);
        put_partial<kD>(destination + p.head_dim, grad_value[i], r, 1.f, p.head_dim_v, quad);
      } else {
        put_row<Element, kD>(shared.key, first_row + row, grad_key[i], r, p.scale, quad);
        put_row<Element, kD>(shared.value, first_row + row, grad_value[i], r, 1.f, quad);
      }
    }
  if (p.partial != nullptr) return;
  __syncwarp();
  rows.template store<kColumns>(shared.key, first_row, p.grad_key, block.own_origin(p.grad_key, block.head), p.columns,
                                lane);
  rows.template store<kColumns>(shared.value, first_row, p.grad_value, block.own_origin(p.grad_value, block.head),
                                p.columns_v, lane);
}

}  // namespace natten::fused_sm80
