// The small kernels around the gradient kernels: what they need per query beforehand, and the sums over parts after.
#pragma once

#include "kernels/fused_sm80/parameters.h"
#include "ptx/math.h"
#include "tile/scalar.h"
#include "tile/softmax.h"

namespace natten::fused_sm80 {

constexpr int kRowThreads = 256;

// Eight elements of a row.
template <class Element>
union Chunk {
  uint4 words[sizeof(Element) / 2];
  Element element[8];

  __device__ __forceinline__ void load(const char* address) {
#pragma unroll
    for (int i = 0; i < int(sizeof(Element) / 2); ++i) words[i] = reinterpret_cast<const uint4*>(address)[i];
  }
  __device__ __forceinline__ void store(char* address) const {
#pragma unroll
    for (int i = 0; i < int(sizeof(Element) / 2); ++i) reinterpret_cast<uint4*>(address)[i] = words[i];
  }
};

struct StatisticsParameters {
  Tensor grad_out, out, logsumexp, grad_logsumexp;  // grad_logsumexp.data may be null
  float2* statistics;                               // [B, X, Y, Z, H] contiguous
  Divisor blocks_per_item, heads, length[kAxes];    // length: queries per axis
  int rows_per_item, lanes, head_dim_v;             // lanes: threads per row, a power of two
};

// statistics = {logsumexp * log2(e), delta}, delta = rowsum(grad_out * out) - grad_logsumexp.
template <class Element>
__global__ void __launch_bounds__(kRowThreads) statistics_kernel(const __grid_constant__ StatisticsParameters p) {
  uint32_t batch = blockIdx.x;
  const int block_in_item = p.blocks_per_item.peel(batch);
  const int row = block_in_item * (kRowThreads / p.lanes) + threadIdx.x / p.lanes, lane = threadIdx.x % p.lanes;
  const bool exists = row < p.rows_per_item;
  uint32_t index = exists ? row : 0;
  const int head = p.heads.peel(index);
  const int z = p.length[2].peel(index), y = p.length[1].peel(index), x = index;
  auto address = [&](const Tensor& t) {
    return t.data + batch * t.batch + head * t.head + x * t.axis[0] + y * t.axis[1] + z * t.axis[2];
  };
  float sum = 0.f;
  if (exists && lane * 8 < p.head_dim_v) {
    Chunk<Element> grad, out;
    grad.load(address(p.grad_out) + lane * sizeof(grad));
    out.load(address(p.out) + lane * sizeof(out));
#pragma unroll
    for (int e = 0; e < 8; ++e) sum += widen(grad.element[e]) * widen(out.element[e]);
  }
  for (int distance = p.lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (!exists || lane != 0) return;
  if (p.grad_logsumexp.data != nullptr) sum -= *reinterpret_cast<const float*>(address(p.grad_logsumexp));
  const float logsumexp = *reinterpret_cast<const float*>(address(p.logsumexp));
  p.statistics[int64_t(batch) * p.rows_per_item + row] = make_float2(logsumexp * tile::kLog2E, sum);
}

struct ConvertParameters {
  const float* accumulator;  // [B, X, Y, Z, H, D rounded up to 16], channels as accumulate_query_gradient leaves them
  Tensor grad_query;
  Divisor blocks_per_item, tiles_per_row, heads, length[kAxes];  // tiles of 16 channels
  int tiles_per_item, head_dim;
  float scale;
};

// grad_query = scale * accumulator, in order and rounded. A thread converts 16 channels.
template <class Element>
__global__ void __launch_bounds__(kRowThreads) convert_kernel(const __grid_constant__ ConvertParameters p) {
  uint32_t batch = blockIdx.x;
  const int tile = p.blocks_per_item.peel(batch) * kRowThreads + threadIdx.x;
  if (tile >= p.tiles_per_item) return;
  uint32_t index = tile;
  const int channel = p.tiles_per_row.peel(index) * 16, head = p.heads.peel(index);
  const int z = p.length[2].peel(index), y = p.length[1].peel(index), x = index;
  const float4* source =
      reinterpret_cast<const float4*>(p.accumulator + (int64_t(batch) * p.tiles_per_item + tile) * 16);
  Chunk<Element> low, high;
#pragma unroll
  for (int quad = 0; quad < 4; ++quad) {
    const float4 values = source[quad];
    low.element[2 * quad] = narrow<Element>(values.x * p.scale);
    low.element[2 * quad + 1] = narrow<Element>(values.y * p.scale);
    high.element[2 * quad] = narrow<Element>(values.z * p.scale);
    high.element[2 * quad + 1] = narrow<Element>(values.w * p.scale);
  }
  const Tensor& t = p.grad_query;
  char* row = t.data + batch * t.batch + head * t.head + x * t.axis[0] + y * t.axis[1] + z * t.axis[2] + channel * 2;
  low.store(row);
  if (channel + 8 < p.head_dim) high.store(row + 16);
}

struct SumPartsParameters {
  const float* partial;  // [part, B, S, Hkv, D + Dv]
  int64_t part_stride;
  int parts, head_dim;
  int64_t chunks;  // of 8 channels, in one part
  Divisor chunks_per_row, heads, additional;
  Tensor grad_key, grad_value;  // [B, S, Hkv, C]
};

template <class Element>
__global__ void __launch_bounds__(kRowThreads) sum_parts_kernel(const __grid_constant__ SumPartsParameters p) {
  const int64_t chunk = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (chunk >= p.chunks) return;
  float sum[8] = {};
  for (int part = 0; part < p.parts; ++part) {
    const float* source = p.partial + part * p.part_stride + chunk * 8;
#pragma unroll
    for (int e = 0; e < 8; ++e) sum[e] += source[e];
  }
  uint32_t index = uint32_t(chunk);
  int channel = p.chunks_per_row.peel(index) * 8;
  const int head = p.heads.peel(index), token = p.additional.peel(index);
  const bool value = channel >= p.head_dim;
  const Tensor& t = value ? p.grad_value : p.grad_key;
  if (value) channel -= p.head_dim;
  Chunk<Element> result;
#pragma unroll
  for (int e = 0; e < 8; ++e) result.element[e] = narrow<Element>(sum[e]);
  result.store(t.data + index * t.batch + head * t.head + token * t.axis[2] + channel * sizeof(Element));
}

}  // namespace natten::fused_sm80
