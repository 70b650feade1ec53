// Query gradient by patches: a warp owns 16 queries and walks the keys of the union of their windows. It also forms the
// statistics of its queries, which the key gradient kernel reads afterwards.
#pragma once

#include "kernels/fused_sm80/patch_backward.cuh"

namespace natten::fused_sm80::gradient {

template <class Element_, int kHeadDim_, int kMostWarps_, int kBlocksPerSm_>
struct PatchQueryGradientConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kMostWarps = kMostWarps_;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kWarpBytes = OwnRows<kHeadDim>::kBytes;  // of shared memory beside the slabs
};

// Dynamic shared memory: each warp's own rows; offsets of a slab's rows; slabs, in each the rows of keys, then of
// values.
template <class Config>
__global__ void __launch_bounds__(32 * Config::kMostWarps, Config::kBlocksPerSm)
    patch_query_gradient_kernel(const __grid_constant__ PatchParameters p) {
  using Element = typename Config::Element;
  constexpr int kD = Config::kHeadDim;
  using Rows = SlabRows<kD>;

  extern __shared__ __align__(128) char memory[];
  __shared__ PatchBlock block;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4;

  if (warp == 0) block.locate<false>(p);
  __syncthreads();
  if (block.empty()) return;

  char* const own_buffer = memory + warp * Config::kWarpBytes;
  RowOffsets* const offsets = reinterpret_cast<RowOffsets*>(memory + blockDim.x / 32 * Config::kWarpBytes);
  const int tensor_bytes = p.slab_rows * Rows::kRowBytes, slab_bytes = kWalkedTensors * tensor_bytes;
  const uint32_t slabs = ptx::shared_address(offsets + p.slab_rows);
  fill_row_offsets<kD, kKey, kValue>(offsets, p, block);
  block.fill_windows<false>(p);
  const OwnPatch own(p, block, warp, lane);
  // Rows of the 16 columns of a step: as the B operand by rows, lane l addresses row lane_row; transposed, row l % 16.
  const int lane_row = (lane & 7) + ((lane >> 4) << 3), transposed_lane = (lane & 7) | (lane & 8) << 1;
  tile::PatchMask mask;
  if (warp == 0) block.fill_base<false>(p, 0);
  __syncthreads();

  // Step n is slab n % block.slabs of item n / block.slabs.
  int next_item = 0, next_slab = 0, next_stage = 0;
  auto load_next = [&] {
    if (next_item < block.items) {
      load_slab<kD, kKey, kValue, false>(p, block, offsets, next_item, 0, next_slab, slabs + next_stage * slab_bytes,
                                         tensor_bytes);
      if (++next_slab == block.slabs) {
        next_slab = 0;
        ++next_item;
      }
      next_stage ^= p.stages - 1;
    }
    ptx::cp_async_commit();
  };
  load_next();
  int stage = 0;
#pragma unroll 1
  for (int item = 0; item < block.items; ++item) {
    if (warp == 0) block.fill_base<false>(p, item + 1);
    OwnRows<kD> own_query, own_grad_out, own_out;
    own_query.load(p, block, own, kQuery, item, p.head_dim, lane);
    own_grad_out.load(p, block, own, kGradOut, item, p.head_dim_v, lane);
    own_out.load(p, block, own, kOut, item, p.head_dim_v, lane);
    const float own_logsumexp = tile::kLog2E * *reinterpret_cast<const float*>(own.address(p, block, kLogsumexp, item));
    float own_delta = 0.f;
    if (p.tensor[kGradLogsumexp].data != nullptr)
      own_delta = -*reinterpret_cast<const float*>(own.address(p, block, kGradLogsumexp, item));
    uint32_t query[kD / 16][4], grad_out[kD / 16][4], out[kD / 16][4];
    own_query.fragments(query, own_buffer, lane);
    own_grad_out.fragments(grad_out, own_buffer, lane);
    own_out.fragments(out, own_buffer, lane);

    // delta = rowsum(grad_out * out) - grad_logsumexp: the diagonal of grad_out out^T, whose B operand has the layout
    // of half an A operand.
    float logsumexp[2], minus_delta[4];
    float products[2][4] = {};
#pragma unroll
    for (int k = 0; k < kD / 16; ++k)
#pragma unroll
      for (int r = 0; r < 2; ++r) ptx::mma_m16n8k16(products[r], grad_out[k], out[k][r], out[k][2 + r], Element());
    // Row g of the diagonal stands in lane 4 g + g / 2, rows 8 further in the same.
    const float low = group & 1 ? products[0][1] : products[0][0], high = group & 1 ? products[1][3] : products[1][2];
    const int diagonal = 4 * (lane & 7) + (lane & 7) / 2;
    const float low_sum = __shfl_sync(~0u, low, diagonal), high_sum = __shfl_sync(~0u, high, diagonal);
    own_delta += lane & 8 ? high_sum : low_sum;
    if (lane < 16 && (own.exist >> lane & 1))
      *reinterpret_cast<float2*>(own.address(p, block, kStatistics, item)) = make_float2(own_logsumexp, own_delta);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      logsumexp[r] = __shfl_sync(~0u, own_logsumexp, group + 8 * r);
      minus_delta[2 * r] = minus_delta[2 * r + 1] = -__shfl_sync(~0u, own_delta, group + 8 * r);
    }

    float grad[kD / 8][4] = {};
#pragma unroll 1
    for (int n = 0; n < block.slabs; ++n) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // this slab has come; the one before is used up
      if (p.stages > 1) load_next();
      if (own.any()) {
        const uint32_t slab = slabs + stage * slab_bytes;
        for_chunks<Rows::kRowBytes>(
            p, block, own, n, mask, item > 0 && block.single_chunk(), lane,
            [&](const ColumnOffsets& offset, int columns) {
#pragma unroll 1
              for (int first = 0; first < columns; first += 16) {
                const uint32_t row = slab + offset.of(first + lane_row), address = row + (lane >> 3 & 1) * 16;
                const uint32_t transposed = __shfl_sync(~0u, row, transposed_lane) + (lane >> 4) * 16;
                float s[2][4] = {}, ds[2][4];
#pragma unroll
                for (int k = 0; k < kD / 16; ++k) {
                  uint32_t b[4];
                  ptx::ldmatrix_x4(b, address + 32 * k);
                  ptx::mma_m16n8k16(s[0], query[k], b[0], b[1], Element());
                  ptx::mma_m16n8k16(s[1], query[k], b[2], b[3], Element());
                }
#pragma unroll
                for (int k = 0; k < kD / 16; ++k) {
                  uint32_t b[4];
                  ptx::ldmatrix_x4(b, address + tensor_bytes + 32 * k);
                  ptx::mma_m16n8k16(ds[0], grad_out[k], b[0], b[1], k == 0 ? minus_delta : ds[0], Element());
                  ptx::mma_m16n8k16(ds[1], grad_out[k], b[2], b[3], k == 0 ? minus_delta : ds[1], Element());
                }
                const PairMask pairs(mask, first);
                uint32_t a[4];
#pragma unroll
                for (int j = 0; j < 2; ++j)
#pragma unroll
                  for (int r = 0; r < 2; ++r) {
#pragma unroll
                    for (int e = 2 * r; e < 2 * r + 2; ++e)
                      ds[j][e] *= ptx::exp2(fmaf(s[j][e], p.scale_log2, -logsumexp[r]));
                    a[2 * j + r] = ptx::pack(ds[j][2 * r], ds[j][2 * r + 1], Element()) & pairs.keep(j, r);
                  }
#pragma unroll
                for (int k = 0; k < kD / 16; ++k) {
                  uint32_t b[4];
                  ptx::ldmatrix_x4_transposed(b, transposed + 32 * k);
                  ptx::mma_m16n8k16(grad[2 * k], a, b[0], b[1], Element());
                  ptx::mma_m16n8k16(grad[2 * k + 1], a, b[2], b[3], Element());
                }
              }
            });
      }
      stage ^= p.stages - 1;
      if (p.stages == 1) {
        __syncthreads();  // the slab is used up
        load_next();
      }
    }
    if (own.any())
      store_own_rows<Element, kD>(grad, p.scale, p, block, own, kGradQuery, item, p.head_dim, own_buffer, lane);
  }
}

}  // namespace natten::fused_sm80::gradient
