// attention[i, w] = scale * query[i] . key[begin(i) + w] + bias: a warp multiplies its patch of 16 queries with the
// keys of their windows, packed, into a dense matrix in shared memory; window slots are copied from there.
#pragma once

#include "kernels/gemm/patches.h"
#include "kernels/launch.h"

namespace natten::gemm {

// Positional bias of the pairs of a patch's queries and keys.
template <class T>
struct Bias {
  const T* table;  // of the head, at the entry of relative position 0
  int strides[kAxes];
  int least, most;  // entries that exist, from `table`

  __device__ __forceinline__ Bias(const UnfusedArguments& args, int head) : table(static_cast<const T*>(args.rpb)) {
    strides[2] = 1;
    strides[1] = 2 * args.slots[2] - 1;
    strides[0] = strides[1] * (2 * args.slots[1] - 1);
    const int entries = strides[0] * (2 * args.slots[0] - 1);
    least = 0;
    for (int a = 0; a < kAxes; ++a) least -= (args.slots[a] - 1) * strides[a];
    most = entries - 1 + least;
    table += int64_t(head) * entries - least;
  }
  __device__ __forceinline__ int offset(const int (&position)[kAxes]) const {
    return position[0] * strides[0] + position[1] * strides[1] + position[2] * strides[2];
  }
  // Of a key from a query; pairs outside windows read some entry.
  __device__ __forceinline__ float operator()(int key_offset, int query_offset) const {
    return widen(table[min_int(max_int(key_offset - query_offset, least), most)]);
  }
};

template <class P, int kRowBytes>
__global__ void __launch_bounds__(kThreads, 4)
    qk_kernel(const __grid_constant__ UnfusedArguments args, const __grid_constant__ PatchPlan plan) {
  using T = typename P::Element;
  using Rows = tile::SharedTile<kRowBytes / 2>;
  extern __shared__ __align__(128) char shared_bytes[];
  __shared__ PatchTile shared;
  const Problem& problem = args.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4;
  const int chunks = problem.head_dim * int(sizeof(T)) / 16;
  const int slices = ceil_div(chunks, Rows::kChunks);
  const int slice_bytes = plan.slab_rows * kRowBytes;
  const int weight_bytes = kPatch * plan.row_words * 4;
  char* queries = shared_bytes + warp * slices * kPatch * kRowBytes;
  char* stages = shared_bytes + kWarps * slices * kPatch * kRowBytes;
  char* weights = stages + kStages * slices * slice_bytes + warp * weight_bytes;
  const PatchTables tables(stages + kStages * slices * slice_bytes + kWarps * weight_bytes, plan);
  const unsigned tile_index = blockIdx.x % plan.tiles;
  if (!make_patch_tile(shared, tables, args, plan, args.b, sizeof(T), tile_index)) return;
  const TokenTile& tile = shared.tile;
  const int first_item = blockIdx.x / plan.tiles * plan.items_per_block;
  const int last_item = min_int(first_item + plan.items_per_block, plan.items);

  const SlabLoader<kRowBytes> loader(shared, problem, args.b, static_cast<const char*>(args.b.data), sizeof(T), chunks);
  const auto load_slab = [&](const Step& step, int stage) {
    loader.load(ptx::shared_address(stages) + stage * slices * slice_bytes, plan, shared, tables, step.origin,
                item_offset(plan, args.b, step.item, Side::keys) * int64_t(sizeof(T)));
  };
  Step step(shared.slots, first_item);
  load_slab(step, 0);

  const int slots[kAxes] = {args.slots[0], args.slots[1], args.slots[2]};
  const Patch patch(tile, plan, slots);
  const int64_t query = token_offset(tile, problem, args.a, Side::queries, patch.position);
  const auto load_queries = [&](int item) {
    const int chunk = lane % Rows::kChunks;
    const char* data = static_cast<const char*>(args.a.data) + chunk * 16;
    const int64_t own = (item_offset(plan, args.a, item, Side::queries) + query) * int64_t(sizeof(T));
#pragma unroll
    for (int first = 0; first < kPatch; first += 32 / Rows::kChunks) {
      const int row = first + lane / Rows::kChunks;
      const char* source = data + __shfl_sync(~0u, own, row);
      uint32_t target = ptx::shared_address(queries) + Rows::offset(row, chunk);
#pragma unroll 1
      for (int s = 0; s < slices; ++s) {
        ptx::cp_async_16(target, source, s * Rows::kChunks + chunk < chunks);
        source += kRowBytes;
        target += kPatch * kRowBytes;
      }
    }
  };
  load_queries(first_item);
  T* attention = static_cast<T*>(args.c.data) + token_offset(tile, problem, args.c, Side::queries, patch.position);
  const ColumnBits inner = find_inner_columns(plan, patch, slots);
  const int own_shift = slot_shift(plan, patch, slots) * int(sizeof(T));
  const float scale = float(problem.scale);
  const T minus_infinity = narrow<T>(-INFINITY);

  for (int stage = 0; step.item < last_item; stage ^= 1) {
    const PatchKeys keys(plan, patch, step.origin);
    const int item = step.item;
    const bool last_slab = !step.next_slab(plan, shared.slots);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    const uint32_t slab = ptx::shared_address(stages) + stage * slices * slice_bytes;
    if (step.item < last_item) load_slab(step, stage ^ 1);
    if (!patch.any) continue;
    const OwnStretch stretch =
        find_stretch(shared, 0, plan, patch, keys, slots, attention + item_offset(plan, args.c, item, Side::queries));
    const int own_target = (lane % kPatch) * plan.row_words * 4 + stretch.alignment + own_shift;
    char* const target[2] = {weights + __shfl_sync(~0u, own_target, lane / 4),
                             weights + __shfl_sync(~0u, own_target, lane / 4 + 8)};

    // Scores of all queries of the patch with 16 kGroups keys.
    const auto multiply_keys = [&](auto groups, int first) {
      constexpr int kGroups = decltype(groups)::value;
      uint32_t address[kGroups];
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
        const int i = first + 16 * n + lane % 8 + lane / 16 * 8;
        address[n] = slab + Rows::offset(keys.row(plan, tables, i), lane / 8 % 2);
      }
      float scores[2 * kGroups][4] = {};
#pragma unroll 1
      for (int s = 0; s < slices; ++s) {
        float chain[P::kSplit ? 2 * kGroups : 1][4] = {};  // see multiply
        const uint32_t query_slice = ptx::shared_address(queries) + s * kPatch * kRowBytes;
#pragma unroll
        for (int k = 0; k < kRowBytes / 32; ++k) {
          uint32_t raw[4];
          Rows::load_a(raw, query_slice, 0, k, lane);
          const Operand<P> a = make_operand<P>(raw);
#pragma unroll
          for (int n = 0; n < kGroups; ++n) {
            ptx::ldmatrix_x4(raw, (address[n] ^ (k << 5)) + s * slice_bytes);
            const Operand<P> b = make_operand<P>(raw);
            float (&even)[4] = P::kSplit ? chain[P::kSplit ? 2 * n : 0] : scores[2 * n];
            float (&odd)[4] = P::kSplit ? chain[P::kSplit ? 2 * n + 1 : 0] : scores[2 * n + 1];
            multiply<P, 0, 1>(even, a, b);
            multiply<P, 2, 3>(odd, a, b);
          }
        }
        if constexpr (P::kSplit) {
#pragma unroll
          for (int n = 0; n < 2 * kGroups; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) scores[n][i] += chain[n][i];
          }
        }
      }
      if (args.rpb != nullptr) {
        uint32_t batch = item;
        const Bias<T> bias(args, plan.by_heads.peel(batch));
        const int own = bias.offset(patch.position);
        const int query_offset[2] = {__shfl_sync(~0u, own, lane / 4), __shfl_sync(~0u, own, lane / 4 + 8)};
#pragma unroll
        for (int n = 0; n < 2 * kGroups; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            uint32_t rest = first + 8 * n + 2 * quad + e;
            const int z = keys.low[2] + plan.by_keys[2].peel(rest), y = keys.low[1] + plan.by_keys[1].peel(rest);
            const int key_offset = bias.offset({keys.low[0] + int(rest), y, z});
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              scores[n][2 * r + e] = scores[n][2 * r + e] * scale + bias(key_offset, query_offset[r]);
            }
          }
        }
      }
      const float remaining_scale = args.rpb != nullptr ? 1.0f : scale;  // scores are scaled before the bias is added
      const ColumnBits columns{{inner.of[0] >> first / 8, inner.of[1] >> first / 8}};
#pragma unroll
      for (int n = 0; n < 2 * kGroups; ++n) {
        const int slot = tables.key_slot[first + 8 * n + 2 * quad];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float low = scores[n][2 * r] * remaining_scale, high = scores[n][2 * r + 1] * remaining_scale;
          T* place = reinterpret_cast<T*>(target[r] + slot);
          if (columns.keeps(n, r, 0)) place[0] = narrow<T>(low);
          if (columns.keeps(n, r, 1)) place[1] = narrow<T>(high);
        }
      }
    };
    for (int first = 0; keys.needed && first < keys.count;) {
      constexpr int kMost = P::kSplit ? 2 : 4;
      const int left = keys.count - first;
      if (left > 16 * (kMost - 1)) {
        multiply_keys(std::integral_constant<int, kMost>(), first);
        first += 16 * kMost;
      } else if (kMost > 2 && left > 16) {
        multiply_keys(std::integral_constant<int, 2>(), first);
        first += 32;
      } else {
        multiply_keys(std::integral_constant<int, 1>(), first);
        first += 16;
      }
    }
    if (last_slab && step.item < last_item) {
      __syncwarp();
      load_queries(step.item);
    }
    if (keys.count == 0) continue;
    __syncwarp();
    if (!patch.whole) erase_empty_slots(weights, shared, 0, plan, minus_infinity);
    for_words<false, kIs16Bit<P>>(
        weights, shared, 0, plan, nullptr, nullptr,
        [](const char* from, char* to) { *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(from); },
        [](const char* from, char* to) {
          *reinterpret_cast<uint16_t*>(to) = *reinterpret_cast<const uint16_t*>(from);
        });
    __syncwarp();
  }
}

template <class P, int kRowBytes>
void launch_qk(const UnfusedArguments& args, cudaStream_t stream) {
  using T = typename P::Element;
  const int slices = ceil_div(args.problem.head_dim * int(sizeof(T)), kRowBytes);
  const int queries = kWarps * kPatch * slices * kRowBytes;
  const PatchPlan plan = plan_patches(args, sizeof(T), slices * kRowBytes, 1, queries + int(sizeof(PatchTile)), 1);
  const int bytes = queries + int(patch_bytes(plan, slices * kRowBytes, 1));
  allow_shared_memory(qk_kernel<P, kRowBytes>, bytes, "gemm qk");
  const unsigned blocks = grid_size(block_count(plan), "gemm qk");
  qk_kernel<P, kRowBytes><<<blocks, kThreads, bytes, stream>>>(args, plan);
  check_launch("gemm qk");
}

template <class P>
void qk(const UnfusedArguments& args, cudaStream_t stream) {
  // Rows of 16-bit elements may be short.
  if constexpr (kIs16Bit<P>) {
    if (args.problem.head_dim <= 32) return launch_qk<P, 64>(args, stream);
  }
  launch_qk<P, 128>(args, stream);
}

}  // namespace natten::gemm
