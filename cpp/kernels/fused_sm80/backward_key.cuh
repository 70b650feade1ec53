// Key and value gradients: a block owns a tile of keys and walks the boxes of queries that attend them, once for every
// query head of the group. docs/kernels/fused-sm80.md explains the schedule.
//
// Scores are computed transposed, S^T = K Q^T, so that keys are rows here as queries are in the other passes, and the
// same masks serve. The warps form a grid of kKeyWarps x kSideWarps: for the scores they share out keys and queries,
// for the gradients keys and channels; P^T and dS^T change hands in shared memory.
//
// With kAccumulate the block also adds dQ = dS K of every box to float32 accumulators in global memory: five products
// in all instead of the seven of two kernels, but sums in the order in which blocks come.
#pragma once

#include "kernels/fused_sm80/walk.cuh"
#include "ptx/barrier.h"
#include "ptx/math.h"
#include "ptx/mma.h"

namespace natten::fused_sm80 {

template <class Element_, int kHeadDim_, int kKeys_, int kQueries_, int kKeyWarps_, int kSideWarps_, int kQueryStages_,
          int kGradStages_, int kBlocksPerSm_, bool kAccumulate_ = false>
struct KeyGradientConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kKeys = kKeys_;        // of the owned tile
  static constexpr int kQueries = kQueries_;  // of a box
  static constexpr int kKeyWarps = kKeyWarps_, kSideWarps = kSideWarps_, kWarps = kKeyWarps * kSideWarps;
  static constexpr int kQueryStages = kQueryStages_;  // boxes of queries in flight
  static constexpr int kGradStages = kGradStages_;    // boxes of output gradients in flight
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr bool kAccumulate = kAccumulate_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kKeysPerWarp = kKeys / kKeyWarps;
  static constexpr int kQueriesPerWarp = kQueries / kSideWarps;
  static constexpr int kChannelsPerWarp = kHeadDim / kSideWarps;
  static_assert(kKeysPerWarp % 16 == 0 && kQueriesPerWarp % 16 == 0 && kChannelsPerWarp % 16 == 0);
  static_assert(kKeysPerWarp <= 32, "a lane looks after one row of its warp");

  struct Shared {
    alignas(128) char key[kKeys * kHeadDim * 2];
    alignas(128) char value[kKeys * kHeadDim * 2];
    alignas(128) char query[kQueryStages][kQueries * kHeadDim * 2];
    alignas(128) char grad_out[kGradStages][kQueries * kHeadDim * 2];
    alignas(128) char weights[kKeys * kQueries * 2];        // P^T
    alignas(128) char grad_scores[kKeys * kQueries * 2];    // dS^T, unscaled
    alignas(16) float2 statistics[kQueryStages][kQueries];  // logsumexp * log2(e), delta
    Block<kKeys> block;
    QueryWalk<kQueries, kAccumulate> walk;
  };
};

// Zeros a warp's part of a score tile.
template <int kQueries, int kRows, int kColumns>
__device__ __forceinline__ void clear_rows(char* tile, int first_row, int side_warp, int lane) {
  constexpr int kChunks = kColumns / 8;
  for (int i = lane; i < kRows * kChunks; i += 32)
    *reinterpret_cast<uint4*>(tile + tile::SharedTile<kQueries>::offset(first_row + i / kChunks,
                                                                        side_warp * kChunks + i % kChunks)) = uint4{};
}

// Adds dS K of the box to the accumulators. Within 16 channels, lane `quad` of a row has its four values side by side:
// channels 2 quad, 2 quad + 1, 2 quad + 8, 2 quad + 9 (the conversion kernel puts them in order).
template <class Config>
__device__ __forceinline__ void accumulate_query_gradient(const typename Config::Shared& shared, const Parameters& p,
                                                          int step, int warp, int lane) {
  using Element = typename Config::Element;
  constexpr int kD = Config::kHeadDim, kQueries = Config::kQueries, kKeys = Config::kKeys;
  using Tile = tile::SharedTile<kD>;
  using ScoreTile = tile::SharedTile<kQueries>;
  // Units of 32 queries x 32 channels, dealt to the warps.
  constexpr int kQueryUnits = kQueries / 32, kUnits = kQueryUnits * (kD / 32);
  const uint32_t key_tile = ptx::shared_address(shared.key), grad_scores = ptx::shared_address(shared.grad_scores);
  const int4 box = shared.walk.at(step);
#pragma unroll 1
  for (int unit = warp; unit < kUnits; unit += Config::kWarps) {
    const int first_query_tile = unit % kQueryUnits * 2, first_channel_tile = unit / kQueryUnits * 2;
    float grad[2][4][4] = {};
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) ScoreTile::load_a_transposed(a[i], grad_scores, 16 * k, first_query_tile + i, lane);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        uint32_t b[4];
        Tile::load_b_transposed(b, key_tile, 16 * k, first_channel_tile + n, lane);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          ptx::mma_m16n8k16(grad[i][2 * n], a[i], b[0], b[1], Element());
          ptx::mma_m16n8k16(grad[i][2 * n + 1], a[i], b[2], b[3], Element());
        }
      }
    }
    const int within = lane / 4;
    const char* source =
        shared.walk.source[step % shared.walk.kRing][3] + within * p.accumulator.step[2] + (lane % 4) * 16;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int run = 2 * (first_query_tile + i) + r;
        if ((box.w & kWholeBox) == 0 && within >= shared.walk.existing_rows(p, shared.block.size, box, run)) continue;
        const char* row = source + shared.walk.run_offset[3][run];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int channel_tile = first_channel_tile + n;
          const float values[4] = {grad[i][2 * n][2 * r], grad[i][2 * n][2 * r + 1], grad[i][2 * n + 1][2 * r],
                                   grad[i][2 * n + 1][2 * r + 1]};
          // Queries that attend none of these keys have zeros only.
          const bool any = values[0] != 0.f || values[1] != 0.f || values[2] != 0.f || values[3] != 0.f;
          if (any && 16 * channel_tile < p.head_dim)
            ptx::reduce_add(reinterpret_cast<float*>(const_cast<char*>(row)) + 16 * channel_tile, values);
        }
      }
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    key_gradient_kernel(const __grid_constant__ Parameters p) {
  using Element = typename Config::Element;
  using Shared = typename Config::Shared;
  constexpr int kD = Config::kHeadDim, kQueries = Config::kQueries;
  constexpr int kKeysPerWarp = Config::kKeysPerWarp, kRowTiles = kKeysPerWarp / 16;
  constexpr int kColumnBlocks = Config::kQueriesPerWarp / 8, kChannelBlocks = Config::kChannelsPerWarp / 8;
  constexpr int kQueryStages = Config::kQueryStages, kGradStages = Config::kGradStages;
  using Tile = tile::SharedTile<kD>;
  using ScoreTile = tile::SharedTile<kQueries>;
  using Load = Loader<kD, Config::kThreads>;

  extern __shared__ __align__(128) char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  Block<Config::kKeys>& block = shared.block;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4;
  const int key_warp = warp / Config::kSideWarps, side_warp = warp % Config::kSideWarps;
  const int first_row = key_warp * kKeysPerWarp;

  if (warp == 0) block.template locate<true>(p);
  shared.walk.fill_run_offsets(p);
  __syncthreads();
  if (block.empty()) return;

  const Load load;
  const uint32_t key_tile = ptx::shared_address(shared.key), value_tile = ptx::shared_address(shared.value);
  const OwnRows<kKeysPerWarp> rows(p, block, key_warp, lane);
  if (side_warp == 0)
    rows.template load<kD>(shared.key, first_row, p.key, block.own_origin(p.key, block.head), p.head_dim, lane);
  else if (side_warp == 1)
    rows.template load<kD>(shared.value, first_row, p.value, block.own_origin(p.value, block.head), p.head_dim_v, lane);
  if (warp == 0) shared.walk.start(p, block);
#pragma unroll
  for (int stage = 0; stage < kQueryStages; ++stage)
    load.template zero_padding<kQueries>(shared.query[stage], p.head_dim);
#pragma unroll
  for (int stage = 0; stage < kGradStages; ++stage)
    load.template zero_padding<kQueries>(shared.grad_out[stage], p.head_dim_v);
  block.template fill_table<true>(p);
  __syncthreads();
  const int steps = shared.walk.steps;
  auto load_queries = [&](int n) {
    if (n < steps) {
      const int stage = n % kQueryStages;
      if (load.chunk * 8 < p.head_dim)
        shared.walk.load(n, 0, ptx::shared_address(shared.query[stage]), p, block.size, p.query, load);
      shared.walk.load_statistics(n, ptx::shared_address(shared.statistics[stage]), p, block.size);
    }
    ptx::cp_async_commit();
  };
  auto load_grad_out = [&](int n) {
    if (n < steps && load.chunk * 8 < p.head_dim_v)
      shared.walk.load(n, 1, ptx::shared_address(shared.grad_out[n % kGradStages]), p, block.size, p.grad_out, load);
    ptx::cp_async_commit();
  };
  load_queries(0);
  load_grad_out(0);

  const RowIndex row_index(p, rows.coordinates);
  const WarpBounds bounds = WarpBounds::make(p, block, key_warp, lane);
  const int own_extent = (lane & 3) == kAxes ? 1 : p.box.extent(lane & 3);
  const uint32_t weights_tile = ptx::shared_address(shared.weights);
  const uint32_t grad_scores_tile = ptx::shared_address(shared.grad_scores);

  float grad_key[kRowTiles][kChannelBlocks][4] = {}, grad_value[kRowTiles][kChannelBlocks][4] = {};

#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this step's box has come; the one before is used up
    if constexpr (kQueryStages > 1) load_queries(step + 1);
    if constexpr (kGradStages > 1) load_grad_out(step + 1);
    shared.walk.enter_ahead(step, p, block);

    const int4 box = shared.walk.at(step);
    const int own_origin = (lane & 3) == 0 ? box.x : (lane & 3) == 1 ? box.y : (lane & 3) == 2 ? box.z : 0;
    const bool needed = bounds.needs(own_origin, own_extent);
    const uint32_t query_tile = ptx::shared_address(shared.query[step % kQueryStages]);
    const uint32_t grad_out_tile = ptx::shared_address(shared.grad_out[step % kGradStages]);
    if (needed) {
      float s[kRowTiles][kColumnBlocks][4] = {}, ds[kRowTiles][kColumnBlocks][4] = {};
      const int first_column = side_warp * Config::kQueriesPerWarp;
#pragma unroll
      for (int k = 0; k < kD / 16; ++k) {
        uint32_t a[kRowTiles][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) Tile::load_a(a[i], key_tile, first_row + 16 * i, k, lane);
#pragma unroll
        for (int n = 0; n < kColumnBlocks / 2; ++n) {
          uint32_t b[4];
          Tile::load_b(b, query_tile, first_column + 16 * n, k, lane);
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) {
            ptx::mma_m16n8k16(s[i][2 * n], a[i], b[0], b[1], Element());
            ptx::mma_m16n8k16(s[i][2 * n + 1], a[i], b[2], b[3], Element());
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kD / 16; ++k) {
        uint32_t a[kRowTiles][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) Tile::load_a(a[i], value_tile, first_row + 16 * i, k, lane);
#pragma unroll
        for (int n = 0; n < kColumnBlocks / 2; ++n) {
          uint32_t b[4];
          Tile::load_b(b, grad_out_tile, first_column + 16 * n, k, lane);
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) {
            ptx::mma_m16n8k16(ds[i][2 * n], a[i], b[0], b[1], Element());
            ptx::mma_m16n8k16(ds[i][2 * n + 1], a[i], b[2], b[3], Element());
          }
        }
      }
      // p = exp(s - logsumexp), ds = p (dp - delta)
      const float2* statistics = shared.statistics[step % kQueryStages] + first_column + 2 * quad;
#pragma unroll
      for (int j = 0; j < kColumnBlocks; ++j) {
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
            const uint32_t words = tile::column_words(row, p.box.replicate_z, quad) >> (first_column / 8);
#pragma unroll
            for (int j = 0; j < kColumnBlocks; ++j)
#pragma unroll
              for (int e = 0; e < 2; ++e)
                if (!tile::keeps(words, j, e)) s[i][j][2 * r + e] = ds[i][j][2 * r + e] = 0.f;
          }
      }
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int j = 0; j < kColumnBlocks; ++j) {
            const uint32_t offset =
                ScoreTile::offset(first_row + 16 * i + 8 * r + lane / 4, first_column / 8 + j) + 4 * quad;
            *reinterpret_cast<uint32_t*>(shared.weights + offset) =
                ptx::pack(s[i][j][2 * r], s[i][j][2 * r + 1], Element());
            *reinterpret_cast<uint32_t*>(shared.grad_scores + offset) =
                ptx::pack(ds[i][j][2 * r], ds[i][j][2 * r + 1], Element());
          }
    } else if constexpr (Config::kAccumulate) {
      clear_rows<kQueries, kKeysPerWarp, Config::kQueriesPerWarp>(shared.grad_scores, first_row, side_warp, lane);
    }
    // The warps that share these keys exchange what they computed; for dQ, all warps do.
    if constexpr (Config::kAccumulate)
      __syncthreads();
    else if (needed)
      ptx::named_barrier_sync(1 + key_warp, 32 * Config::kSideWarps);
    if (needed) {
      const int first_channel_tile = side_warp * (kChannelBlocks / 2);
#pragma unroll
      for (int k = 0; k < kQueries / 16; ++k) {
        uint32_t a[kRowTiles][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) ScoreTile::load_a(a[i], weights_tile, first_row + 16 * i, k, lane);
#pragma unroll
        for (int n = 0; n < kChannelBlocks / 2; ++n) {
          uint32_t b[4];
          Tile::load_b_transposed(b, grad_out_tile, 16 * k, first_channel_tile + n, lane);
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) {
            ptx::mma_m16n8k16(grad_value[i][2 * n], a[i], b[0], b[1], Element());
            ptx::mma_m16n8k16(grad_value[i][2 * n + 1], a[i], b[2], b[3], Element());
          }
        }
      }
    }
    if constexpr (kGradStages == 1) {
      __syncthreads();  // the output gradients are used up
      load_grad_out(step + 1);
    }
    if (needed) {
      const int first_channel_tile = side_warp * (kChannelBlocks / 2);
#pragma unroll
      for (int k = 0; k < kQueries / 16; ++k) {
        uint32_t a[kRowTiles][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) ScoreTile::load_a(a[i], grad_scores_tile, first_row + 16 * i, k, lane);
#pragma unroll
        for (int n = 0; n < kChannelBlocks / 2; ++n) {
          uint32_t b[4];
          Tile::load_b_transposed(b, query_tile, 16 * k, first_channel_tile + n, lane);
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) {
            ptx::mma_m16n8k16(grad_key[i][2 * n], a[i], b[0], b[1], Element());
            ptx::mma_m16n8k16(grad_key[i][2 * n + 1], a[i], b[2], b[3], Element());
          }
        }
      }
    }
    if constexpr (Config::kAccumulate) accumulate_query_gradient<Config>(shared, p, step, warp, lane);
    if constexpr (kQueryStages == 1) {
      __syncthreads();  // the queries are used up
      load_queries(step + 1);
    }
  }

  // ---- results
  ptx::cp_async_wait<0>();
  if (p.partial != nullptr) {
    const int channels = p.head_dim + p.head_dim_v;
    const int64_t item = (int64_t(block.part) * p.partial_batch + block.batch) * p.additional;
    const int first_channel = side_warp * Config::kChannelsPerWarp + 2 * quad;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = 16 * i + 8 * r + lane / 4;
        const int3 c = p.owned.coordinates(key_warp, row);
        if (!block.contains(c)) continue;
        float* destination =
            p.partial + ((item + block.own_first[2] + c.z) * int(p.heads.value) + block.head) * channels;
#pragma unroll
        for (int j = 0; j < kChannelBlocks; ++j) {
          const int channel = first_channel + 8 * j;
          if (channel < p.head_dim)
            *reinterpret_cast<float2*>(destination + channel) =
                make_float2(grad_key[i][j][2 * r] * p.scale, grad_key[i][j][2 * r + 1] * p.scale);
          if (channel < p.head_dim_v)
            *reinterpret_cast<float2*>(destination + p.head_dim + channel) =
                make_float2(grad_value[i][j][2 * r], grad_value[i][j][2 * r + 1]);
        }
      }
    return;
  }
  __syncthreads();  // the key and value tiles are used up: they take the results to whole rows
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int j = 0; j < kChannelBlocks; ++j) {
        const uint32_t offset =
            Tile::offset(first_row + 16 * i + 8 * r + lane / 4, side_warp * kChannelBlocks + j) + 4 * quad;
        *reinterpret_cast<uint32_t*>(shared.key + offset) =
            ptx::pack(grad_key[i][j][2 * r] * p.scale, grad_key[i][j][2 * r + 1] * p.scale, Element());
        *reinterpret_cast<uint32_t*>(shared.value + offset) =
            ptx::pack(grad_value[i][j][2 * r], grad_value[i][j][2 * r + 1], Element());
      }
  __syncthreads();
  if (side_warp == 0)
    rows.template store<kD>(shared.key, first_row, p.grad_key, block.own_origin(p.grad_key, block.head), p.head_dim,
                            lane);
  else if (side_warp == 1)
    rows.template store<kD>(shared.value, first_row, p.grad_value, block.own_origin(p.grad_value, block.head),
                            p.head_dim_v, lane);
}

}  // namespace natten::fused_sm80
