// out[j] = scale * sum over the queries i that see key j of attention[i, j - begin(i)] input[i], summed over the query heads
// of j's head: a block owns 64 keys and walks the boxes of 64 queries that see some of them. Every weight is read by one
// block only. Of a query's weights, those of the tile's keys are one piece per row of keys along the last axis.
#pragma once

#include "kernels/gemm/av.h"

namespace natten::gemm {

constexpr int kMostRows = kTokens / kRun;  // of keys along the last axis in a tile

// A query of a box, as a key tile sees it.
struct SeeingQuery {
  Mask seen;              // keys of the tile inside its window
  int64_t weights_bytes;  // where the weight of a key at the tile's origin lies
  short first, last;      // seen keys of a row: coordinates [first, last) along the last axis
};

struct KeyTile {
  TokenTile tile;
  Range needed[kAxes];             // positions of the queries that see some of the keys
  int origin[kAxes];               // position of the tile's first key
  Mask below[kAxes][kTokens + 1];  // keys of the tile whose coordinate on the axis is below v
  int row_bytes[kMostRows];        // weights from the origin to the first key of a row of keys
  int64_t out[kTokens];            // element offset of the key's sum; -1: no such key
  BoxTokens box;                   // of queries
  BoxSource inputs, attention;
  SeeingQuery queries[3][kTokens];  // of the box being multiplied, the one before and the one after
};

// By the whole block; synchronises. False if the tile is empty.
__device__ inline bool make_key_tile(KeyTile& keys, const UnfusedArguments& args, const Plan& plan, int element_bytes,
                                     unsigned block) {
  const Problem& problem = args.problem;
  locate_tile(keys.tile, problem, plan.grid, Side::keys, block);
  make_box_tokens(keys.box, plan);
  __syncthreads();
  const TokenTile& tile = keys.tile;
  if (tile.empty()) return false;
  if (threadIdx.x < kAxes) {
    const int a = threadIdx.x;
    const Group& group = tile.group[a];
    const int first = group.kv_position + tile.first[a];
    const Range all = inverse_union(group, first, first + tile.count[a] - 1);
    keys.needed[a] = {max_int(all.begin, group.q_position), min_int(all.end, group.q_position + group.q_count)};
    keys.origin[a] = first;
  }
  int width = 1;
#pragma unroll
  for (int a = kAxes - 1; a >= 0; --a) {
    const int extent = plan.grid.tile(a);
    for (int v = threadIdx.x; v <= extent; v += kThreads) {
      // No query sees a key that does not exist.
      keys.below[a][v] = tokens_below(min_int(v, tile.count[a]), width, width * extent, kTokens);
    }
    width *= extent;
  }
  if (threadIdx.x < kTokens >> plan.grid.tile_log2[2]) {
    const int row = threadIdx.x, y = row & (plan.grid.tile(1) - 1), x = row >> plan.grid.tile_log2[1];
    keys.row_bytes[row] = (x * args.slots[1] + y) * args.slots[2] * element_bytes;
  }
  if (threadIdx.x < kTokens) {
    int position[kAxes];
    bool exists = true;
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      const int coordinate = plan.grid.coordinate(threadIdx.x, a);
      exists = exists && coordinate < tile.count[a];
      position[a] = tile.group[a].kv_position + tile.first[a] + coordinate;
    }
    keys.out[threadIdx.x] = exists ? token_offset(tile, problem, args.c, Side::keys, position) : -1;
  }
  __syncthreads();
  make_box_source(keys.inputs, tile, plan, problem, args.b, Side::queries, element_bytes, keys.needed);
  make_box_source(keys.attention, tile, plan, problem, args.a, Side::queries, element_bytes, keys.needed);
  __syncthreads();
  return true;
}

// Describes the queries of the box at walk.origin, two threads a query; the caller synchronises.
__device__ __forceinline__ void find_seen(KeyTile& keys, int buffer, const UnfusedArguments& args, const Plan& plan,
                                          const Walk& walk, int element_bytes) {
  const int row = threadIdx.x / 2, half = threadIdx.x % 2;
  SeeingQuery& query = keys.queries[buffer][row];
  int64_t weights = 0;
  bool exists = row < plan.box_tokens();
  uint32_t seen = ~0u;
  int low = 0, high = 0;
#pragma unroll
  for (int a = 0; a < kAxes; ++a) {
    const int position = walk.origin[a] + box_coordinate(plan, row, a);
    exists = exists && position < walk.end[a];
    const Range range = window(keys.tile.group[a], position);
    low = min_int(max_int(range.begin - keys.origin[a], 0), plan.grid.tile(a));
    high = min_int(max_int(range.end - keys.origin[a], low), plan.grid.tile(a));
    seen &= keys.below[a][high].half[half] ^ keys.below[a][low].half[half];
    weights = weights * args.slots[a] + (keys.origin[a] - range.begin);
  }
  query.seen.half[half] = exists ? seen : 0;
  if (half == 0) {
    query.weights_bytes = weights * element_bytes + keys.attention.offset_bytes(walk.origin, walk.begin) +
                          keys.attention.token_bytes[row];
  } else {
    query.first = short(low);
    query.last = short(min_int(high, keys.tile.count[2]));
  }
}

// A piece keeps its address modulo 16, so it takes 16 bytes more than its weights. Rows of pieces, one per query, are
// spread so that the queries of a quad fall into different banks.
__host__ __device__ constexpr int piece_pitch(int row_keys, int element_bytes) { return row_keys * element_bytes + 16; }
__host__ __device__ constexpr int query_pitch(int row_keys, int element_bytes) {
  return (kTokens / row_keys * piece_pitch(row_keys, element_bytes) + 47) / 64 * 64 + 16;
}

// Starts copying the pieces of a box's queries. Eight lanes share a query; neighbours take neighbouring chunks.
__device__ __forceinline__ void load_pieces(char* pieces, const char* attention, const KeyTile& keys, int buffer,
                                            const Plan& plan, int element_bytes) {
  constexpr int kLanes = 8;
  const int row_keys = plan.grid.tile(2), rows = kTokens >> plan.grid.tile_log2[2];
  const int pitch = piece_pitch(row_keys, element_bytes), chunks = pitch / 16;
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int i = 0; i < kTokens / (kThreads / kLanes); ++i) {
    const int q = threadIdx.x / kLanes + i * (kThreads / kLanes);
    const SeeingQuery& query = keys.queries[buffer][q];
    if ((query.seen.half[0] | query.seen.half[1]) == 0) continue;
    const int begin = query.first * element_bytes, end = query.last * element_bytes;
    const uint32_t target = ptx::shared_address(pieces) + q * query_pitch(row_keys, element_bytes);
    int row = 0, chunk = lane;
    while (chunk >= chunks) chunk -= chunks, ++row;
    while (row < rows) {
      const int first_key = row * row_keys + query.first;
      const int64_t piece = query.weights_bytes + keys.row_bytes[row];
      const int at = chunk * 16 - int(reinterpret_cast<uintptr_t>(attention + piece) % 16);
      if ((query.seen.half[first_key / 32] >> first_key % 32 & 1) && at < end && at + 16 > begin) {
        ptx::cp_async_16_head(target + row * pitch + chunk * 16, attention + piece + at, min_int(end - at, 16));
      }
      chunk += kLanes;
      while (chunk >= chunks) chunk -= chunks, ++row;
    }
  }
}

template <class P, int kChannels>
__global__ void __launch_bounds__(kThreads, kChannels <= 64 ? 4 : 3)
    inverse_av_kernel(const __grid_constant__ UnfusedArguments args, const __grid_constant__ Plan plan) {
  using T = typename P::Element;
  constexpr int kStageBytes = kSlices<P, kChannels> * kTileBytes;
  extern __shared__ __align__(128) char shared_bytes[];
  __shared__ KeyTile keys;
  const Problem& problem = args.problem;
  const unsigned channel_block = blockIdx.x % plan.channel_blocks;
  if (!make_key_tile(keys, args, plan, sizeof(T), blockIdx.x / plan.channel_blocks)) return;
  const TokenTile& tile = keys.tile;
  const int first_channel = channel_block * kChannels;
  const int channels = min_int(problem.head_dim - first_channel, kChannels);
  const int chunks = channels * int(sizeof(T)) / 16;
  const int row_keys = plan.grid.tile(2);
  const int pitch = query_pitch(row_keys, sizeof(T));
  char* input_stages = shared_bytes;
  char* piece_stages = input_stages + 2 * kStageBytes;

  const char* attention = reinterpret_cast<const char*>(static_cast<const T*>(args.a.data) +
                                                        tile.batch * args.a.batch_stride);
  const char* input = static_cast<const char*>(args.b.data) +
                      (tile.batch * args.b.batch_stride + first_channel) * int64_t(sizeof(T));
  Walk walk;
  walk.start(keys.needed);
  const auto load_next = [&](int head, int stage, int buffer) {
    const int64_t source = head * args.b.head_stride * int64_t(sizeof(T)) +
                           keys.inputs.offset_bytes(walk.origin, walk.begin);
    load_box<kSlices<P, kChannels>>(input_stages + stage * kStageBytes, input + source, keys.inputs, keys.box, plan,
                                    walk.origin, keys.needed, 0, chunks);
    load_pieces(piece_stages + stage * kTokens * pitch, attention + head * args.a.head_stride * int64_t(sizeof(T)),
                keys, buffer, plan, sizeof(T));
    ptx::cp_async_commit();
  };

  // The two keys of this thread: where their weights lie among a query's pieces, but for the pieces' alignment.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4;
  const int own_key[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
  int key_offset[2], key_row_bytes[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = own_key[r] >> plan.grid.tile_log2[2];
    key_offset[r] = row * piece_pitch(row_keys, sizeof(T)) + (own_key[r] & (row_keys - 1)) * int(sizeof(T));
    key_row_bytes[r] = keys.row_bytes[row];
  }

  float sums[kChannels / 8][4] = {};
  const int group_heads = problem.heads / problem.heads_kv;
  int head = tile.head * group_heads;
  const int last_head = head + group_heads - 1;
  bool more = keys.needed[0].size() > 0 && keys.needed[1].size() > 0 && keys.needed[2].size() > 0;
  if (more) {
    find_seen(keys, 0, args, plan, walk, sizeof(T));
    __syncthreads();
    load_next(head, 0, 0);
  }
  int stage = 0, buffer = 0;
  while (more) {
    const int next_buffer = buffer == 2 ? 0 : buffer + 1;
    // The alignment of the pieces loaded for this head.
    const int head_alignment =
        int((reinterpret_cast<uintptr_t>(attention) + head * args.a.head_stride * int64_t(sizeof(T))) % 16);
    int turned;
    if (!walk.next(plan, turned)) more = ++head <= last_head;
    if (more) find_seen(keys, next_buffer, args, plan, walk, sizeof(T));
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (more) load_next(head, stage ^ 1, next_buffer);

    const SeeingQuery* queries = keys.queries[buffer];
    const char* pieces = piece_stages + stage * kTokens * pitch;
    const char* inputs = input_stages + stage * kStageBytes;
    // Which queries have a weight for this warp's 16 keys.
    const uint32_t warp_keys = 0xffffu << warp % 2 * 16;
    const unsigned seeing[2] = {__ballot_sync(~0u, (queries[lane].seen.half[warp / 2] & warp_keys) != 0),
                                __ballot_sync(~0u, (queries[lane + 32].seen.half[warp / 2] & warp_keys) != 0)};
    // Weight of query q for this thread's key r; zero if it does not see it, whatever its piece holds.
    const auto weight = [&](int q, int r) {
      const SeeingQuery& query = queries[q];
      const int shift = (int(query.weights_bytes) + key_row_bytes[r] + head_alignment) & 15;
      const bool seen = query.seen.half[warp / 2] >> own_key[r] % 32 & 1;
      return seen ? *reinterpret_cast<const T*>(pieces + q * pitch + key_offset[r] + shift) : narrow<T>(0);
    };
#pragma unroll
    for (int k = 0; k < kTokens / kDepth<P>; ++k) {
      constexpr uint32_t kSome = (1 << kDepth<P>)-1;
      if ((seeing[k * kDepth<P> / 32] >> k * kDepth<P> % 32 & kSome) == 0) continue;
      uint32_t raw[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kIs16Bit<P>) {
          const int q = kDepth<P> * k + i / 2 * 8 + 2 * quad;
          const T pair[2] = {weight(q, i % 2), weight(q + 1, i % 2)};
          raw[i] = uint32_t(reinterpret_cast<const uint16_t&>(pair[1])) << 16 |
                   reinterpret_cast<const uint16_t&>(pair[0]);
        } else {
          raw[i] = __float_as_uint(weight(kDepth<P> * k + 2 * quad + i / 2, i % 2));
        }
      }
      const Operand<P> a = make_operand<P>(raw);
#pragma unroll
      for (int n = 0; n < kChannels / 16; ++n) {
        uint32_t b[4];
        load_rows<P>(b, inputs, kDepth<P> * k, 16 * n, lane);
        multiply<P>(sums[2 * n], a, b[0], b[1]);
        multiply<P>(sums[2 * n + 1], a, b[2], b[3]);
      }
    }
    stage ^= 1;
    buffer = next_buffer;
  }

  const int64_t out_offset[2] = {keys.out[own_key[0]], keys.out[own_key[1]]};
  T* out = static_cast<T*>(args.c.data) + tile.batch * args.c.batch_stride + tile.head * args.c.head_stride +
           first_channel;
  store_rows<P, kChannels>(sums, out, out_offset, channels, float(problem.scale));
}

template <class P, int kChannels>
void launch_inverse_av(const UnfusedArguments& args, cudaStream_t stream) {
  using T = typename P::Element;
  Plan plan = plan_key_tiles(args, sizeof(T));
  plan.channel_blocks = ceil_div(args.problem.head_dim, kChannels);
  const int bytes = 2 * (kSlices<P, kChannels> * kTileBytes + kTokens * query_pitch(plan.grid.tile(2), sizeof(T)));
  allow_shared_memory(inverse_av_kernel<P, kChannels>, bytes, "gemm inverse_av");
  const unsigned blocks = grid_size(tile_count(args.problem, plan.grid) * plan.channel_blocks, "gemm inverse_av");
  inverse_av_kernel<P, kChannels><<<blocks, kThreads, bytes, stream>>>(args, plan);
  check_launch("gemm inverse_av");
}

// Longer heads are shared out over several blocks; shared memory holds less of 32-bit elements.
template <class P>
void inverse_av(const UnfusedArguments& args, cudaStream_t stream) {
  const int d = args.problem.head_dim;
  if (d <= 32) {
    launch_inverse_av<P, 32>(args, stream);
  } else if (d <= 64 || !kIs16Bit<P>) {
    launch_inverse_av<P, 64>(args, stream);
  } else {
    launch_inverse_av<P, 128>(args, stream);
  }
}

}  // namespace natten::gemm
