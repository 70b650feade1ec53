// out[i] = scale * sum_w attention[i, w] value[begin(i) + w]: a warp multiplies the weights of its patch of 16 queries,
// gathered from shared memory where they lie as in memory, with the values of the keys of their windows, packed.
#pragma once

#include "kernels/gemm/patches.h"
#include "kernels/launch.h"

namespace natten::gemm {

// A slab of values: kSlices slices of kRowBytes of channels.
template <class P, int kChannels>
struct ValueRows {
  static constexpr int kRowBytes = kChannels * int(sizeof(typename P::Element)) < kSliceBytes ? 64 : kSliceBytes;
  static constexpr int kSlices = kChannels * int(sizeof(typename P::Element)) / kRowBytes;
  using Rows = tile::SharedTile<kRowBytes / 2>;
};

// `own`: element offset of the lane's query, -1 without one. Column blocks of 32-bit elements take every fourth
// channel.
template <class P, int kChannels>
__device__ __forceinline__ void store_sums(const float (&sums)[kChannels / 8][4], typename P::Element* out, int64_t own,
                                           int channels, float scale) {
  using T = typename P::Element;
  const int lane = threadIdx.x % 32, quad = lane % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t offset = __shfl_sync(~0u, own, lane / 4 + 8 * r);
    if (offset < 0) continue;
    if constexpr (kIs16Bit<P>) {
#pragma unroll
      for (int n = 0; n < kChannels / 8; ++n) {
        if (8 * n >= channels) break;
        *reinterpret_cast<uint32_t*>(out + offset + 8 * n + 2 * quad) =
            ptx::pack(sums[n][2 * r] * scale, sums[n][2 * r + 1] * scale, T());
      }
    } else {
#pragma unroll
      for (int s = 0; s < kChannels / 32; ++s) {
        const int channel = 32 * s + 8 * quad;
        if (channel >= channels) break;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          *reinterpret_cast<float4*>(out + offset + channel + 4 * e) =
              make_float4(sums[4 * s][2 * r + e] * scale, sums[4 * s + 1][2 * r + e] * scale,
                          sums[4 * s + 2][2 * r + e] * scale, sums[4 * s + 3][2 * r + e] * scale);
        }
      }
    }
  }
}

template <class P, int kChannels>
__global__ void __launch_bounds__(kThreads, kChannels <= 64 ? 4
                                            : P::kSplit     ? 2
                                                            : 3)
    av_kernel(const __grid_constant__ UnfusedArguments args, const __grid_constant__ PatchPlan plan) {
  using T = typename P::Element;
  using Rows = typename ValueRows<P, kChannels>::Rows;
  constexpr int kRowBytes = ValueRows<P, kChannels>::kRowBytes, kSlices = ValueRows<P, kChannels>::kSlices;
  extern __shared__ __align__(128) char shared_bytes[];
  __shared__ PatchTile shared;
  const Problem& problem = args.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4;
  const int slice_bytes = plan.slab_rows * kRowBytes;
  const int row_bytes = plan.row_words * 4, weight_bytes = kPatch * row_bytes;
  char* stages = shared_bytes;
  char* all_weights = stages + kStages * kSlices * slice_bytes;  // [kStages, kWarps, kPatch, row_bytes]
  const PatchTables tables(all_weights + kStages * kWarps * weight_bytes, plan);
  const unsigned channel_block = blockIdx.x % plan.channel_blocks, block = blockIdx.x / plan.channel_blocks;
  if (!make_patch_tile(shared, tables, args, plan, args.b, sizeof(T), block % plan.tiles)) return;
  const TokenTile& tile = shared.tile;
  const int first_item = block / plan.tiles * plan.items_per_block;
  const int last_item = min_int(first_item + plan.items_per_block, plan.items);
  const int first_channel = channel_block * kChannels;
  const int channels = min_int(problem.head_dim - first_channel, kChannels);

  const SlabLoader<kRowBytes> loader(shared, problem, args.b,
                                     static_cast<const char*>(args.b.data) + first_channel * int(sizeof(T)), sizeof(T),
                                     channels * int(sizeof(T)) / 16);
  const auto load_slab = [&](const Step& step, int stage) {
    loader.load(ptx::shared_address(stages) + stage * kSlices * slice_bytes, plan, shared, tables, step.origin,
                item_offset(plan, args.b, step.item, Side::keys) * int64_t(sizeof(T)));
  };
  Step step(shared.slots, first_item);
  load_slab(step, 0);

  const int slots[kAxes] = {args.slots[0], args.slots[1], args.slots[2]};
  const Patch patch(tile, plan, slots);
  const T* attention =
      static_cast<const T*>(args.a.data) + token_offset(tile, problem, args.a, Side::queries, patch.position);
  const int64_t out = patch.exists ? token_offset(tile, problem, args.c, Side::queries, patch.position) : -1;
  const float scale = float(problem.scale);
  const ColumnBits inner = find_inner_columns(plan, patch, slots);
  const int own_shift = slot_shift(plan, patch, slots) * int(sizeof(T));

  // The patch's part of a slab; starts copying its weights.
  struct Part {
    SlabKeys keys;
    OwnStretch stretch;
  };
  const auto load_weights = [&](const Step& step, int stage) {
    const PatchKeys keys(plan, patch, step.origin);
    Part part{};
    if (!patch.any || keys.count == 0 || !keys.needed) return part;
    part.stretch = find_stretch(shared, stage, plan, patch, keys, slots,
                                attention + item_offset(plan, args.a, step.item, Side::queries));
    for_words<true, kIs16Bit<P>>(
        all_weights + (stage * kWarps + warp) * weight_bytes, shared, stage, plan, args.a.data, plan.weights_end,
        [](const char* to, const char* from) { ptx::cp_async_4(ptx::shared_address(to), from); },
        [](char* to, const char* from) {
          *reinterpret_cast<uint16_t*>(to) = *reinterpret_cast<const uint16_t*>(from);
        });
    part.keys = keys;
    return part;
  };
  Part next = load_weights(step, 0);
  ptx::cp_async_commit();

  float sums[kChannels / 8][4] = {};
  for (int stage = 0; step.item < last_item; stage ^= 1) {
    const int item = step.item;
    const bool last_slab = !step.next_slab(plan, shared.slots);
    const Part part = next;
    const SlabKeys now = part.keys;
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (step.item < last_item) {
      load_slab(step, stage ^ 1);
      next = load_weights(step, stage ^ 1);
    }
    ptx::cp_async_commit();

    const uint32_t slab = ptx::shared_address(stages) + stage * kSlices * slice_bytes;
    char* own_weights = all_weights + (stage * kWarps + warp) * weight_bytes;
    if (now.count > 0 && !patch.whole) erase_empty_slots(own_weights, shared, stage, plan, narrow<T>(0));
    const int own_place = (lane % kPatch) * row_bytes + part.stretch.alignment + own_shift;
    const char* weights[2];
    ColumnBits columns;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = lane / 4 + 8 * r;
      weights[r] = own_weights + __shfl_sync(~0u, own_place, query);
      columns.of[r] = inner.of[r] & ColumnBits::below(__shfl_sync(~0u, part.stretch.end, query)) &
                      ~ColumnBits::below(__shfl_sync(~0u, part.stretch.begin, query));
    }
    if constexpr (kIs16Bit<P>) {
      const auto multiply_keys = [&](auto groups, int first) {
        constexpr int kGroups = decltype(groups)::value;  // of 16 keys
        uint32_t a[kGroups][4], address[kGroups];
#pragma unroll
        for (int k = 0; k < kGroups; ++k) {
          address[k] = slab + Rows::offset(now.row(plan, tables, first + 16 * k + lane % 16), lane / 16);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int column = first + 16 * k + i / 2 * 8;
            const uint16_t* place =
                reinterpret_cast<const uint16_t*>(weights[i % 2] + tables.key_slot[column + 2 * quad]);
            const uint32_t low = columns.keeps(column / 8, i % 2, 0) ? place[0] : 0;
            const uint32_t high = columns.keeps(column / 8, i % 2, 1) ? place[1] : 0;
            a[k][i] = high << 16 | low;
          }
        }
#pragma unroll
        for (int k = 0; k < kGroups; ++k) {
#pragma unroll
          for (int n = 0; n < kChannels / 16; ++n) {
            constexpr int kPerSlice = kRowBytes / 32;
            uint32_t b[4];
            ptx::ldmatrix_x4_transposed(b, (address[k] ^ (n % kPerSlice << 5)) + n / kPerSlice * slice_bytes);
            ptx::mma_m16n8k16(sums[2 * n], a[k], b[0], b[1], T());
            ptx::mma_m16n8k16(sums[2 * n + 1], a[k], b[2], b[3], T());
          }
        }
      };
      int first = 0;
      for (; first + 16 < now.count; first += 32) multiply_keys(std::integral_constant<int, 2>(), first);
      if (first < now.count) multiply_keys(std::integral_constant<int, 1>(), first);
    } else {
      // An mma's keys in the order 0, 2, 4, 6, 1, 3, 5, 7: a lane holds keys 2 quad and the next, and loads of four
      // channels at a time spread over all banks. Its column blocks take every fourth channel.
      constexpr int kChain = 4;  // products of 8 keys, see multiply
      for (int first = 0; first < now.count; first += 8 * kChain) {
        float chain[P::kSplit ? kChannels / 8 : 1][4] = {};
#pragma unroll
        for (int k = 0; k < kChain; ++k) {
          const int key = first + 8 * k;
          if (key >= now.count) break;
          const int slot = tables.key_slot[key + 2 * quad];
          uint32_t raw[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint32_t* place = reinterpret_cast<const uint32_t*>(weights[i % 2] + slot);
            raw[i] = columns.keeps(key / 8, i % 2, i / 2) ? place[i / 2] : 0;
          }
          const Operand<P> a = make_operand<P>(raw);
          const char* rows[2];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            rows[r] = stages + (slab - ptx::shared_address(stages)) +
                      Rows::offset(now.row(plan, tables, key + 2 * quad + r), lane / 4);
          }
#pragma unroll
          for (int s = 0; s < kSlices; ++s) {
            const uint4 b0 = *reinterpret_cast<const uint4*>(rows[0] + s * slice_bytes);
            const uint4 b1 = *reinterpret_cast<const uint4*>(rows[1] + s * slice_bytes);
            const uint32_t even[4] = {b0.x, b1.x, b0.y, b1.y}, odd[4] = {b0.z, b1.z, b0.w, b1.w};
            const Operand<P> b[2] = {make_operand<P>(even), make_operand<P>(odd)};
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int n = 4 * s + 2 * i;
              multiply<P, 0, 1>(P::kSplit ? chain[P::kSplit ? n : 0] : sums[n], a, b[i]);
              multiply<P, 2, 3>(P::kSplit ? chain[P::kSplit ? n + 1 : 0] : sums[n + 1], a, b[i]);
            }
          }
        }
        if constexpr (P::kSplit) {
#pragma unroll
          for (int n = 0; n < kChannels / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[n][i] += chain[n][i];
          }
        }
      }
    }
    __syncwarp();
    if (last_slab) {
      T* item_out = static_cast<T*>(args.c.data) + item_offset(plan, args.c, item, Side::queries) + first_channel;
      store_sums<P, kChannels>(sums, item_out, out, channels, scale);
#pragma unroll
      for (int n = 0; n < kChannels / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[n][i] = 0;
      }
    }
  }
}

template <class P, int kChannels>
void launch_av(const UnfusedArguments& args, cudaStream_t stream) {
  using T = typename P::Element;
  constexpr int kRowBytes = ValueRows<P, kChannels>::kRowBytes * ValueRows<P, kChannels>::kSlices;
  PatchPlan plan = plan_patches(args, sizeof(T), kRowBytes, kStages, int(sizeof(PatchTile)),
                                ceil_div(args.problem.head_dim, kChannels));
  int64_t last = (args.problem.batch - 1) * args.a.batch_stride + (args.problem.heads - 1) * args.a.head_stride;
  for (int a = 0; a < kAxes; ++a) last += (args.problem.axis[a].q_length - 1) * args.a.axis_stride[a];
  plan.weights_end = static_cast<const T*>(args.a.data) + last + args.slots[0] * args.slots[1] * args.slots[2];
  const int bytes = int(patch_bytes(plan, kRowBytes, kStages));
  allow_shared_memory(av_kernel<P, kChannels>, bytes, "gemm av");
  const unsigned blocks = grid_size(block_count(plan), "gemm av");
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
