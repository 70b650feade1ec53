// Key and value gradients by patches: a warp owns 16 keys and walks the queries that attend them, once for every query
// head of the group. Scores are computed transposed, S^T = K Q^T: P^T and dS^T come out of the accumulators as the A
// operands of dV += P^T dO and dK += dS^T Q.
#pragma once

#include "kernels/fused_sm80/patch_backward.cuh"

namespace natten::fused_sm80::gradient {

template <class Element_, int kHeadDim_, int kMostWarps_, int kBlocksPerSm_>
struct PatchKeyGradientConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kMostWarps = kMostWarps_;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  // Of shared memory beside the slabs: statistics of a chunk, or own rows.
  static constexpr int kStatisticsBytes = tile::kMostChunk * 8, kOwnBytes = OwnRows<kHeadDim>::kBytes;
  static constexpr int kWarpBytes = kStatisticsBytes > kOwnBytes ? kStatisticsBytes : kOwnBytes;
};

// Dynamic shared memory: each warp's own rows, or its statistics of a chunk, for every pair of columns {logsumexp,
// logsumexp, -delta, -delta}; offsets of a slab's rows; slabs, in each the rows of queries, then of output gradients.
template <class Config>
__global__ void __launch_bounds__(32 * Config::kMostWarps, Config::kBlocksPerSm)
    patch_key_gradient_kernel(const __grid_constant__ PatchParameters p) {
  using Element = typename Config::Element;
  constexpr int kD = Config::kHeadDim;
  using Rows = SlabRows<kD>;

  extern __shared__ __align__(128) char memory[];
  __shared__ PatchBlock block;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4;

  if (warp == 0) block.locate<true>(p);
  __syncthreads();
  if (block.empty()) return;

  char* const own_buffer = memory + warp * Config::kWarpBytes;
  float* const statistics = reinterpret_cast<float*>(own_buffer);
  RowOffsets* const offsets = reinterpret_cast<RowOffsets*>(memory + blockDim.x / 32 * Config::kWarpBytes);
  const int tensor_bytes = p.slab_rows * Rows::kRowBytes, slab_bytes = kWalkedTensors * tensor_bytes;
  char* const slabs = reinterpret_cast<char*>(offsets + p.slab_rows);
  fill_row_offsets<kD, kQuery, kGradOut>(offsets, p, block);
  block.fill_windows<true>(p);
  const OwnPatch own(p, block, warp, lane);
  // Rows of the 16 columns of a step: as the B operand by rows, lane l addresses row lane_row; transposed, row l % 16.
  const int lane_row = (lane & 7) + ((lane >> 4) << 3), transposed_lane = (lane & 7) | (lane & 8) << 1;
  tile::PatchMask mask;
  if (warp == 0) block.fill_base<true>(p, 0);
  __syncthreads();

  // Step n is slab n % block.slabs of query head n / block.slabs % p.heads_per_kv of the item's group, and so on.
  const int rounds = block.nothing_to_walk() ? 0 : p.heads_per_kv;
  int next_item = 0, next_round = 0, next_slab = 0, next_stage = 0;
  auto load_next = [&] {
    if (next_item < block.items && rounds > 0) {
      load_slab<kD, kQuery, kGradOut, true>(p, block, offsets, next_item, next_round, next_slab,
                                            ptx::shared_address(slabs) + next_stage * slab_bytes, tensor_bytes);
      if (++next_slab == block.slabs) {
        next_slab = 0;
        if (++next_round == rounds) {
          next_round = 0;
          ++next_item;
        }
      }
      next_stage ^= p.stages - 1;
    }
    ptx::cp_async_commit();
  };
  load_next();
  int stage = 0;
  bool mask_is_known = false;
#pragma unroll 1
  for (int item = 0; item < block.items; ++item) {
    if (warp == 0) block.fill_base<true>(p, item + 1);
    OwnRows<kD> own_key, own_value;
    own_key.load(p, block, own, kKey, item, p.head_dim, lane);
    own_value.load(p, block, own, kValue, item, p.head_dim_v, lane);
    uint32_t key[kD / 16][4], value[kD / 16][4];
    own_key.fragments(key, own_buffer, lane);
    own_value.fragments(value, own_buffer, lane);
    if (rounds == 0) __syncthreads();  // for the addresses of the next item
    float grad_key[kD / 8][4] = {}, grad_value[kD / 8][4] = {};
    int n = 0;
#pragma unroll 1
    for (int step = 0; step < rounds * block.slabs; ++step) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // this slab has come; the one before is used up
      if (p.stages > 1) load_next();
      if (own.any()) {
        const char* slab_statistics = slabs + stage * slab_bytes + Rows::kChannelBytes;
        const uint32_t slab = ptx::shared_address(slabs) + stage * slab_bytes;
        for_chunks<Rows::kRowBytes>(
            p, block, own, n, mask, mask_is_known, lane, [&](const ColumnOffsets& offset, int columns) {
              __syncwarp();
              for (int column = lane; column < ((columns + 15) & ~15); column += 32) {
                const float2 of_query = *reinterpret_cast<const float2*>(slab_statistics + offset.of(column));
                float* pair = statistics + (column >> 1) * 4 + (column & 1);
                pair[0] = of_query.x;
                pair[2] = -of_query.y;
              }
              __syncwarp();
#pragma unroll 1
              for (int first = 0; first < columns; first += 16) {
                const uint32_t row = slab + offset.of(first + lane_row), address = row + (lane >> 3 & 1) * 16;
                const uint32_t transposed = __shfl_sync(~0u, row, transposed_lane) + (lane >> 4) * 16;
                float4 of_columns[2];
                float s[2][4] = {}, ds[2][4];
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                  of_columns[j] = *reinterpret_cast<const float4*>(statistics + 2 * first + 16 * j + 4 * quad);
                  ds[j][0] = ds[j][2] = of_columns[j].z;
                  ds[j][1] = ds[j][3] = of_columns[j].w;
                }
#pragma unroll
                for (int k = 0; k < kD / 16; ++k) {
                  uint32_t b[4];
                  ptx::ldmatrix_x4(b, address + 32 * k);
                  ptx::mma_m16n8k16(s[0], key[k], b[0], b[1], Element());
                  ptx::mma_m16n8k16(s[1], key[k], b[2], b[3], Element());
                }
#pragma unroll
                for (int k = 0; k < kD / 16; ++k) {
                  uint32_t b[4];
                  ptx::ldmatrix_x4(b, address + tensor_bytes + 32 * k);
                  ptx::mma_m16n8k16(ds[0], value[k], b[0], b[1], Element());
                  ptx::mma_m16n8k16(ds[1], value[k], b[2], b[3], Element());
                }
                const PairMask pairs(mask, first);
                uint32_t weights[4], grad_scores[4];
#pragma unroll
                for (int j = 0; j < 2; ++j)
#pragma unroll
                  for (int r = 0; r < 2; ++r) {
                    const uint32_t keep = pairs.keep(j, r);
                    const float low = ptx::exp2(fmaf(s[j][2 * r], p.scale_log2, -of_columns[j].x));
                    const float high = ptx::exp2(fmaf(s[j][2 * r + 1], p.scale_log2, -of_columns[j].y));
                    weights[2 * j + r] = ptx::pack(low, high, Element()) & keep;
                    grad_scores[2 * j + r] = ptx::pack(low * ds[j][2 * r], high * ds[j][2 * r + 1], Element()) & keep;
                  }
#pragma unroll
                for (int k = 0; k < kD / 16; ++k) {
                  uint32_t b[4];
                  ptx::ldmatrix_x4_transposed(b, transposed + tensor_bytes + 32 * k);
                  ptx::mma_m16n8k16(grad_value[2 * k], weights, b[0], b[1], Element());
                  ptx::mma_m16n8k16(grad_value[2 * k + 1], weights, b[2], b[3], Element());
                }
#pragma unroll
                for (int k = 0; k < kD / 16; ++k) {
                  uint32_t b[4];
                  ptx::ldmatrix_x4_transposed(b, transposed + 32 * k);
                  ptx::mma_m16n8k16(grad_key[2 * k], grad_scores, b[0], b[1], Element());
                  ptx::mma_m16n8k16(grad_key[2 * k + 1], grad_scores, b[2], b[3], Element());
                }
              }
            });
      }
      mask_is_known = block.single_chunk();
      if (++n == block.slabs) n = 0;
      stage ^= p.stages - 1;
      if (p.stages == 1) {
        __syncthreads();  // the slab is used up
        load_next();
      }
    }
    if (own.any()) {
      store_own_rows<Element, kD>(grad_key, p.scale, p, block, own, kGradKey, item, p.head_dim, own_buffer, lane);
      store_own_rows<Element, kD>(grad_value, 1.f, p, block, own, kGradValue, item, p.head_dim_v, own_buffer, lane);
    }
  }
}

}  // namespace natten::fused_sm80::gradient
