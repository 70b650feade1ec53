// attention[i, w] = scale * query[i] . key[begin(i) + w] + bias: dense products of 64 queries with boxes of 64 keys,
// whose useful scores are scattered into window slots in shared memory and leave as long stretches.
#pragma once

#include "kernels/gemm/boxes.h"
#include "kernels/launch.h"

namespace natten::gemm {

constexpr int kKeyStages = 2;

template <class P>
__global__ void __launch_bounds__(kThreads, 5)
    qk_kernel(const __grid_constant__ UnfusedArguments args, const __grid_constant__ Plan plan) {
  using T = typename P::Element;
  extern __shared__ __align__(128) char shared_bytes[];
  __shared__ QueryTile queries;
  const Problem& problem = args.problem;
  if (!make_query_tile(queries, args, plan, args.c, args.b, sizeof(T), blockIdx.x)) return;
  const TokenTile& tile = queries.tile;
  const int chunks = problem.head_dim * int(sizeof(T)) / 16;
  const int slices = (chunks + 7) / 8;
  char* query_slices = shared_bytes;
  char* key_stages = query_slices + slices * kTileBytes;
  char* slab = key_stages + kKeyStages * kTileBytes;
  T* attention = static_cast<T*>(args.c.data);

  // Weights that no key claims are -inf.
  const T empty = narrow<T>(-INFINITY);
  uint4 empty_chunk;
#pragma unroll
  for (int i = 0; i < 16 / int(sizeof(T)); ++i) reinterpret_cast<T*>(&empty_chunk)[i] = empty;
  for (int at = threadIdx.x * 16; at < kTokens * plan.slab_pitch_bytes; at += kThreads * 16) {
    *reinterpret_cast<uint4*>(slab + at) = empty_chunk;
  }

  // Queries. A tile is a box too, of its own shape: each row finds its own address.
  {
    const char* source = static_cast<const char*>(args.a.data);
    const int chunk = threadIdx.x % 8;
    for (int row = threadIdx.x / 8; row < kTokens; row += kThreads / 8) {
      const bool exists = queries.attention[row] >= 0;
      const int position[kAxes] = {queries.position[0][row], queries.position[1][row], queries.position[2][row]};
      const int64_t offset = tile.batch * args.a.batch_stride + tile.head * args.a.head_stride +
                             token_offset(tile, problem, args.a, Side::queries, position);
      for (int c = chunk; c < (chunks + 1) / 2 * 2; c += 8) {
        ptx::cp_async_16(ptx::shared_address(query_slices + c / 8 * kTileBytes) + Slice::offset(row, c % 8),
                         source + offset * int64_t(sizeof(T)) + c * 16, exists && c < chunks);
      }
    }
  }

  // Keys arrive in stages: one slice of one box each.
  const char* key =
      static_cast<const char*>(args.b.data) +
      (tile.batch * args.b.batch_stride + tile.head / (problem.heads / problem.heads_kv) * args.b.head_stride) *
          int64_t(sizeof(T));
  Walk load, walk;
  load.start(queries.walked);
  walk.start(queries.walked);
  bool loading = true;
  int load_slice_index = 0, load_stage = 0;
  const auto load_next = [&] {
    if (loading) {
      load_box<1>(key_stages + load_stage * kTileBytes, key + queries.keys.offset_bytes(load.origin, load.begin),
                  queries.keys, queries.box, plan, load.origin, queries.needed, load_slice_index * 8, chunks);
      load_stage = load_stage + 1 == kKeyStages ? 0 : load_stage + 1;
      if (++load_slice_index == slices) {
        int turned;
        load_slice_index = 0;
        loading = load.next(plan, turned);
      }
    }
    ptx::cp_async_commit();
  };
  for (int i = 0; i < kKeyStages - 1; ++i) load_next();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4;
  const int rows[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
  const int slots[kAxes] = {args.slots[0], args.slots[1], args.slots[2]};
  const SlabLayout layout(slots, plan.slab_axis);
  const unsigned row_offset[2] = {layout.query_offset(queries, rows[0]), layout.query_offset(queries, rows[1])};
  const float scale = float(problem.scale);
  const T* bias = static_cast<const T*>(args.rpb);
  const int bias_strides[kAxes] = {(2 * slots[1] - 1) * (2 * slots[2] - 1), 2 * slots[2] - 1, 1};
  if (bias != nullptr) {
    bias += int64_t(tile.head) * (2 * slots[0] - 1) * bias_strides[0];
    for (int a = 0; a < kAxes; ++a) bias += (slots[a] - 1) * bias_strides[a];  // entry of the query's own position
  }
  const float score_scale = bias != nullptr ? 1.0f : scale;  // the scores are scaled before the bias is added
  int bias_row[2] = {0, 0};
  for (int a = 0; a < kAxes; ++a) {
    for (int r = 0; r < 2; ++r) bias_row[r] += queries.position[a][rows[r]] * bias_strides[a];
  }

  int parity = 0, stage = 0, turned = -1;
  T* targets[2];
  for (bool more = true; more; parity ^= 1) {
    if (turned <= plan.slab_axis) {  // a new slab
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const Stretch stretch = find_stretch(queries, layout, plan, slots, walk.origin, rows[r]);
        targets[r] = reinterpret_cast<T*>(slab + rows[r] * plan.slab_pitch_bytes +
                                          shift_bytes(attention, queries, stretch, rows[r]));
      }
    }
    queries.find_attended(plan, walk.origin, parity);

    float scores[kTokens / 8][4] = {};
    Mask attended[2] = {}, warp_attended = {};
    for (int s = 0; s < slices; ++s) {
      ptx::cp_async_wait<kKeyStages - 2>();
      __syncthreads();
      load_next();
      if (s == 0) {
        attended[0] = queries.attended[parity][rows[0]];
        attended[1] = queries.attended[parity][rows[1]];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          warp_attended.half[h] = __reduce_or_sync(~0u, attended[0].half[h] | attended[1].half[h]);
        }
      }
      if ((warp_attended.half[0] | warp_attended.half[1]) != 0) {
        const uint32_t query_base = ptx::shared_address(query_slices + s * kTileBytes);
        const uint32_t key_base = ptx::shared_address(key_stages + stage * kTileBytes);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (2 * k >= chunks - s * 8) break;
          uint32_t raw[4];
          Slice::load_a(raw, query_base, warp * 16, k, lane);
          const Operand<P> a = make_operand<P>(raw);
#pragma unroll
          for (int n = 0; n < kTokens / 16; ++n) {
            if ((warp_attended.half[n / 2] >> n % 2 * 16 & 0xffff) == 0) continue;
            uint32_t b[4];
            Slice::load_b(b, key_base, n * 16, k, lane);
            multiply<P>(scores[2 * n], a, b[0], b[1]);
            multiply<P>(scores[2 * n + 1], a, b[2], b[3]);
          }
        }
      }
      stage = stage + 1 == kKeyStages ? 0 : stage + 1;
    }

    if ((warp_attended.half[0] | warp_attended.half[1]) != 0) {
      if (bias != nullptr) {
#pragma unroll
        for (int j = 0; j < kTokens / kRun; ++j) {
          int relative = 2 * quad;
#pragma unroll
          for (int a = 0; a < kAxes; ++a) {
            relative += (walk.origin[a] + box_coordinate(plan, j * kRun, a)) * bias_strides[a];
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (attended[i / 2].half[j / 4] >> (j % 4 * kRun + 2 * quad + i % 2) & 1) {
              scores[j][i] = scores[j][i] * scale + widen(bias[relative + i % 2 - bias_row[i / 2]]);
            }
          }
        }
      }
      const unsigned box_offset = layout.box_offset(walk.origin);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        T* target = targets[r] + int(box_offset - row_offset[r]) + 2 * quad;
        const uint32_t own[2] = {attended[r].half[0] >> 2 * quad, attended[r].half[1] >> 2 * quad};
#pragma unroll
        for (int j = 0; j < kTokens / kRun; ++j) {
          if ((warp_attended.half[j / 4] >> j % 4 * kRun & 0xff) == 0) continue;
          T* run = target + queries.run_slot[j];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (own[j / 4] >> (j % 4 * kRun + e) & 1) run[e] = narrow<T>(scores[j][2 * r + e] * score_scale);
          }
        }
      }
    }

    int origin[kAxes] = {walk.origin[0], walk.origin[1], walk.origin[2]};
    more = walk.next(plan, turned);
    if (!more || turned <= plan.slab_axis) {
      __syncthreads();
      for_slab(
          slab, attention, queries, layout, plan, slots, origin,
          [&](char* shared, char* global) {
            *reinterpret_cast<uint4*>(global) = *reinterpret_cast<const uint4*>(shared);
            *reinterpret_cast<uint4*>(shared) = empty_chunk;
          },
          [&](char* shared, char* global) {
            *reinterpret_cast<T*>(global) = *reinterpret_cast<const T*>(shared);
            *reinterpret_cast<T*>(shared) = empty;
          });
      __syncthreads();
    }
  }
  ptx::cp_async_wait<0>();
}

template <class P>
void qk(const UnfusedArguments& args, cudaStream_t stream) {
  using T = typename P::Element;
  const Problem& problem = args.problem;
  const int slices = ceil_div(problem.head_dim * int(sizeof(T)), kSliceBytes);
  const int resident = (slices + kKeyStages) * kTileBytes;
  const Plan plan = plan_query_tiles(args, sizeof(T), resident + int(sizeof(QueryTile)));
  const int bytes = resident + kTokens * plan.slab_pitch_bytes;
  allow_shared_memory(qk_kernel<P>, bytes, "gemm qk");
  const unsigned blocks = grid_size(tile_count(problem, plan.grid), "gemm qk");
  qk_kernel<P><<<blocks, kThreads, bytes, stream>>>(args, plan);
  check_launch("gemm qk");
}

}  // namespace natten::gemm
