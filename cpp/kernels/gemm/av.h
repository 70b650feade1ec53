// out[i] = scale * sum_w attention[i, w] value[begin(i) + w]: the weights of 64 queries are staged in shared memory as
// they lie in memory, gathered from there into the operand of dense products with boxes of 64 values.
#pragma once

#include "kernels/gemm/boxes.h"
#include "kernels/launch.h"

namespace natten::gemm {

template <class P, int kChannels>
constexpr int kSlices = kChannels * int(sizeof(typename P::Element)) > kSliceBytes
                            ? kChannels * int(sizeof(typename P::Element)) / kSliceBytes
                            : 1;

// Writes a tile's sums: row r of `offset` is the element offset of a token of `out`, -1 where there is none.
template <class P, int kChannels>
__device__ __forceinline__ void store_rows(const float (&sums)[kChannels / 8][4], typename P::Element* out,
                                           const int64_t (&offset)[2], int channels, float scale) {
  using T = typename P::Element;
  const int quad = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (offset[r] < 0) continue;
#pragma unroll
    for (int n = 0; n < kChannels / 8; ++n) {
      if (n * 8 >= channels) break;
      struct alignas(2 * sizeof(T)) Pair {
        T first, second;
      };
      *reinterpret_cast<Pair*>(out + offset[r] + n * 8 + 2 * quad) = {narrow<T>(sums[n][2 * r] * scale),
                                                                      narrow<T>(sums[n][2 * r + 1] * scale)};
    }
  }
}

template <class P, int kChannels>
__global__ void __launch_bounds__(kThreads, kChannels <= 64 ? 4
                                            : P::kSplit     ? 2
                                                            : 3)
    av_kernel(const __grid_constant__ UnfusedArguments args, const __grid_constant__ Plan plan) {
  using T = typename P::Element;
  constexpr int kStageBytes = kSlices<P, kChannels> * kTileBytes;
  extern __shared__ __align__(128) char shared_bytes[];
  __shared__ QueryTile queries;
  const Problem& problem = args.problem;
  const unsigned channel_block = blockIdx.x % plan.channel_blocks;
  if (!make_query_tile(queries, args, plan, args.a, args.b, sizeof(T), blockIdx.x / plan.channel_blocks)) return;
  const TokenTile& tile = queries.tile;
  const int first_channel = channel_block * kChannels;
  const int channels = min_int(problem.head_dim - first_channel, kChannels);
  const int chunks = channels * int(sizeof(T)) / 16;
  char* value_stages = shared_bytes;
  char* slab = value_stages + 2 * kStageBytes;
  const T* attention = static_cast<const T*>(args.a.data);

  const char* value = static_cast<const char*>(args.b.data) +
                      (tile.batch * args.b.batch_stride +
                       tile.head / (problem.heads / problem.heads_kv) * args.b.head_stride + first_channel) *
                          int64_t(sizeof(T));
  Walk walk;
  walk.start(queries.walked);
  const auto load_values = [&](const int (&origin)[kAxes], int stage) {
    load_box<kSlices<P, kChannels>>(value_stages + stage * kStageBytes,
                                    value + queries.keys.offset_bytes(origin, walk.begin), queries.keys, queries.box,
                                    plan, origin, queries.needed, 0, chunks);
    ptx::cp_async_commit();
  };

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4;
  const int rows[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
  const int slots[kAxes] = {args.slots[0], args.slots[1], args.slots[2]};
  const SlabLayout layout(slots, plan.slab_axis);
  const unsigned row_offset[2] = {layout.query_offset(queries, rows[0]), layout.query_offset(queries, rows[1])};

  float sums[kChannels / 8][4] = {};
  load_values(walk.origin, 0);
  int parity = 0, turned = -1;
  const T* sources[2];
  for (bool more = true; more; parity ^= 1) {
    if (turned <= plan.slab_axis) {  // a new slab
      if (turned >= 0) __syncthreads();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const Stretch stretch = find_stretch(queries, layout, plan, slots, walk.origin, rows[r]);
        sources[r] = reinterpret_cast<const T*>(slab + rows[r] * plan.slab_pitch_bytes +
                                                shift_bytes(attention, queries, stretch, rows[r]));
      }
      for_slab(
          slab, attention, queries, layout, plan, slots, walk.origin,
          [&](char* shared, const char* global) { ptx::cp_async_16(ptx::shared_address(shared), global, true); },
          [&](char* shared, const char* global) {
            *reinterpret_cast<T*>(shared) = *reinterpret_cast<const T*>(global);
          });
      ptx::cp_async_commit();
    }
    queries.find_attended(plan, walk.origin, parity);
    ptx::cp_async_wait<0>();
    __syncthreads();

    const unsigned box_offset = layout.box_offset(walk.origin);
    more = walk.next(plan, turned);
    if (more) load_values(walk.origin, parity ^ 1);

    const Mask attended[2] = {queries.attended[parity][rows[0]], queries.attended[parity][rows[1]]};
    Mask warp_attended;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      warp_attended.half[h] = __reduce_or_sync(~0u, attended[0].half[h] | attended[1].half[h]);
    }
    if ((warp_attended.half[0] | warp_attended.half[1]) == 0) continue;
    const char* values = value_stages + parity * kStageBytes;
    const T* source[2];
    Mask own[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      source[r] = sources[r] + int(box_offset - row_offset[r]) + 2 * quad;
      own[r] = {{attended[r].half[0] >> 2 * quad, attended[r].half[1] >> 2 * quad}};
    }
    // Weight of row r and key 8 run + 2 quad + e; zero outside the window, whatever its slot holds.
    const auto weight = [&](int r, int run, int offset, int e) {
      return own[r].half[run / 4] >> (run % 4 * kRun + e) & 1 ? source[r][offset + e] : narrow<T>(0);
    };
#pragma unroll
    for (int k = 0; k < kTokens / kDepth<P>; ++k) {
      constexpr uint32_t kSome = (1 << kDepth<P>)-1;
      if ((warp_attended.half[k * kDepth<P> / 32] >> k * kDepth<P> % 32 & kSome) == 0) continue;
      uint32_t raw[4];
      if constexpr (kIs16Bit<P>) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int run = 2 * k + half, offset = queries.run_slot[run];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const T pair[2] = {weight(r, run, offset, 0), weight(r, run, offset, 1)};
            raw[2 * half + r] =
                uint32_t(reinterpret_cast<const uint16_t&>(pair[1])) << 16 | reinterpret_cast<const uint16_t&>(pair[0]);
          }
        }
      } else {
        const int offset = queries.run_slot[k];
#pragma unroll
        for (int i = 0; i < 4; ++i) raw[i] = __float_as_uint(weight(i % 2, k, offset, i / 2));
      }
      const Operand<P> a = make_operand<P>(raw);
#pragma unroll
      for (int n = 0; n < kChannels / 16; ++n) {
        uint32_t b[4];
        load_rows<P>(b, values, kDepth<P> * k, 16 * n, lane);
        multiply<P>(sums[2 * n], a, b[0], b[1]);
        multiply<P>(sums[2 * n + 1], a, b[2], b[3]);
      }
    }
  }

  int64_t out_offset[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int position[kAxes] = {queries.position[0][rows[r]], queries.position[1][rows[r]],
                                 queries.position[2][rows[r]]};
    out_offset[r] = queries.attention[rows[r]] < 0 ? -1 : token_offset(tile, problem, args.c, Side::queries, position);
  }
  T* out =
      static_cast<T*>(args.c.data) + tile.batch * args.c.batch_stride + tile.head * args.c.head_stride + first_channel;
  store_rows<P, kChannels>(sums, out, out_offset, channels, float(problem.scale));
}

template <class P, int kChannels>
void launch_av(const UnfusedArguments& args, cudaStream_t stream) {
  using T = typename P::Element;
  const int resident = 2 * kSlices<P, kChannels> * kTileBytes;
  Plan plan = plan_query_tiles(args, sizeof(T), resident + int(sizeof(QueryTile)));
  plan.channel_blocks = ceil_div(args.problem.head_dim, kChannels);
  const int bytes = resident + kTokens * plan.slab_pitch_bytes;
  allow_shared_memory(av_kernel<P, kChannels>, bytes, "gemm av");
  const unsigned blocks = grid_size(tile_count(args.problem, plan.grid) * plan.channel_blocks, "gemm av");
  av_kernel<P, kChannels><<<blocks, kThreads, bytes, stream>>>(args, plan);
  check_launch("gemm av");
}

// Heads of more than 128 channels are shared out over several blocks, each with its own copy of the weights.
template <class P>
void av(const UnfusedArguments& args, cudaStream_t stream) {
  const int d = args.problem.head_dim;
  d <= 32 ? launch_av<P, 32>(args, stream) : d <= 64 ? launch_av<P, 64>(args, stream) : launch_av<P, 128>(args, stream);
}

}  // namespace natten::gemm
