// out[j] = scale * sum over the queries i that see key j of attention[i, j - begin(i)] input[i], summed over the query heads
// of j's head: a block owns 64 keys and walks the boxes of 64 queries that see some of them. The weights of a box are
// gathered into a dense, zero-filled matrix in shared memory; every weight is read by one block only.
#pragma once

#include "kernels/gemm/av.h"

namespace natten::gemm {

struct KeyTile {
  TokenTile tile;
  Range needed[kAxes];          // positions of the queries that see some of the keys
  int origin[kAxes];            // position of the tile's first key
  uint64_t below[kAxes][kTokens + 1];  // keys of the tile whose coordinate on the axis is below v
  int weight[kTokens];          // of a key: its weight's number in the window of a query whose window begins at `origin`
  int64_t out[kTokens];         // element offset of the key's sum; -1: no such key
  BoxTokens box;                // of queries
  // Of the current box's queries: the keys that each sees, and the offset of the weight of a key at `origin`.
  uint64_t seen[kTokens];
  int64_t weights[kTokens];
};

// By the whole block; synchronises. False if the tile is empty.
__device__ inline bool make_key_tile(KeyTile& keys, const UnfusedArguments& args, const Plan& plan, int element_bytes,
                                     unsigned block) {
  const Problem& problem = args.problem;
  locate_tile(keys.tile, problem, plan.grid, Side::keys, block);
  make_box_tokens(keys.box, plan, problem, args.b, element_bytes);
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
#pragma unroll
  for (int a = 0; a < kAxes; ++a) {
    const int width = a == 2 ? 1 : a == 1 ? plan.grid.tile(2) : plan.grid.tile(1) * plan.grid.tile(2);
    for (int v = threadIdx.x; v <= plan.grid.tile(a); v += kThreads) {
      const int reached = min_int(v, tile.count[a]);  // no query sees a key that does not exist
      uint64_t mask = reached * width >= 64 ? ~uint64_t(0) : (uint64_t(1) << (reached * width)) - 1;
      for (int period = width * plan.grid.tile(a); period < kTokens; period *= 2) mask |= mask << period;
      keys.below[a][v] = mask;
    }
  }
  if (threadIdx.x < kTokens) {
    const int row = threadIdx.x;
    int position[kAxes], coordinate[kAxes];
    bool exists = true;
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      coordinate[a] = plan.grid.coordinate(row, a);
      exists = exists && coordinate[a] < tile.count[a];
      position[a] = tile.group[a].kv_position + tile.first[a] + coordinate[a];
    }
    keys.weight[row] = (coordinate[0] * args.slots[1] + coordinate[1]) * args.slots[2] + coordinate[2];
    keys.out[row] = exists ? token_offset(tile, problem, args.c, Side::keys, position) : -1;
  }
  __syncthreads();
  return true;
}

// Fills `seen` and `weights` for the box of queries at `origin`; the caller synchronises.
__device__ __forceinline__ void find_seen(KeyTile& keys, const UnfusedArguments& args, const Plan& plan,
                                          const int (&origin)[kAxes]) {
  if (threadIdx.x >= kTokens) return;
  const int row = threadIdx.x;
  int position[kAxes];
  int64_t weights = 0;
  bool exists = row < plan.box_tokens();
  uint64_t seen = ~uint64_t(0);
#pragma unroll
  for (int a = 0; a < kAxes; ++a) {
    const int shift = a == 2 ? 0 : a == 1 ? plan.box_log2[2] : plan.box_log2[1] + plan.box_log2[2];
    position[a] = origin[a] + (row >> shift & (plan.box(a) - 1));
    exists = exists && position[a] < keys.needed[a].end;
    const Range range = window(keys.tile.group[a], position[a]);
    const int low = min_int(max_int(range.begin - keys.origin[a], 0), plan.grid.tile(a));
    const int high = min_int(max_int(range.end - keys.origin[a], low), plan.grid.tile(a));
    seen &= keys.below[a][high] ^ keys.below[a][low];
    weights = weights * args.slots[a] + (keys.origin[a] - range.begin);
  }
  keys.seen[row] = exists ? seen : 0;
  keys.weights[row] = weights + token_offset(keys.tile, args.problem, args.a, Side::queries, position);
}

template <class P, int kChannels>
__global__ void __launch_bounds__(kThreads, kChannels <= 64 ? 3 : 2)
    inverse_av_kernel(const __grid_constant__ UnfusedArguments args, const __grid_constant__ Plan plan) {
  using T = typename P::Element;
  constexpr int kStageBytes = kSlices<P, kChannels> * kTileBytes;
  constexpr int kWeightBytes = kTokens / (kSliceBytes / int(sizeof(T))) * kTileBytes;
  extern __shared__ __align__(128) char shared_bytes[];
  __shared__ KeyTile keys;
  const Problem& problem = args.problem;
  const unsigned channel_block = blockIdx.x % plan.channel_blocks;
  if (!make_key_tile(keys, args, plan, sizeof(T), blockIdx.x / plan.channel_blocks)) return;
  const TokenTile& tile = keys.tile;
  const int first_channel = channel_block * kChannels;
  const int channels = min_int(problem.head_dim - first_channel, kChannels);
  const int chunks = channels * int(sizeof(T)) / 16;
  char* dense = shared_bytes;  // [64 queries, 64 keys]
  char* input_stages = dense + kWeightBytes;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // A thread gathers the weights of one key for every other query.
  constexpr int kGathered = kTokens * kTokens / kThreads;
  const int key = threadIdx.x % kTokens, first_query = threadIdx.x / kTokens;
  T gathered[kGathered];
  const T* key_weights = static_cast<const T*>(args.a.data) + tile.batch * args.a.batch_stride + keys.weight[key];
  const char* input = static_cast<const char*>(args.b.data) +
                      (tile.batch * args.b.batch_stride + first_channel) * int64_t(sizeof(T));

  const auto load_box = [&](int head, const int (&origin)[kAxes], int stage) {
    const uint64_t mask = keys.box.inside(plan, origin, [&](int a) { return keys.needed[a]; });
    const int64_t source = head * args.b.head_stride + token_offset(tile, problem, args.b, Side::queries, origin);
#pragma unroll
    for (int s = 0; s < kSlices<P, kChannels>; ++s) {
      load_slice(input_stages + stage * kStageBytes + s * kTileBytes, input + source * int64_t(sizeof(T)),
                 keys.box.offset_bytes, mask, kTokens, s * 8, chunks);
    }
    ptx::cp_async_commit();
    const T* head_weights = key_weights + head * args.a.head_stride;
    const uint32_t* seen = reinterpret_cast<const uint32_t*>(keys.seen) + key / 32;
#pragma unroll
    for (int i = 0; i < kGathered; ++i) {
      const int query = first_query + i * (kThreads / kTokens);
      gathered[i] = seen[2 * query] >> key % 32 & 1 ? head_weights[keys.weights[query]] : narrow<T>(0);
      // Few addresses at a time: all at once, they would not fit the registers.
      if (i % 8 == 7) asm volatile("" ::: "memory");
    }
  };

  float sums[kChannels / 8][4] = {};
  const int group_heads = problem.heads / problem.heads_kv;
  int head = tile.head * group_heads;
  const int last_head = head + group_heads - 1;
  Walk walk;
  walk.start(keys.needed);
  bool more = keys.needed[0].size() > 0 && keys.needed[1].size() > 0 && keys.needed[2].size() > 0;
  if (more) {
    find_seen(keys, args, plan, walk.origin);
    __syncthreads();
    load_box(head, walk.origin, 0);
  }
  for (int parity = 0; more; parity ^= 1) {
    // Which 16 queries have a weight for this warp's 16 keys.
    const uint64_t warp_keys = uint64_t(0xffff) << 16 * warp;
    const unsigned seeing[2] = {__ballot_sync(~0u, (keys.seen[lane] & warp_keys) != 0),
                                __ballot_sync(~0u, (keys.seen[lane + 32] & warp_keys) != 0)};
    __syncthreads();  // everyone is done with the dense matrix and with `seen`
#pragma unroll
    for (int i = 0; i < kGathered; ++i) {
      const int query = first_query + i * (kThreads / kTokens);
      *reinterpret_cast<T*>(dense + slice_offset<T>(query, key)) = gathered[i];
    }
    int turned;
    if (!walk.next(plan, turned)) more = ++head <= last_head;
    if (more) find_seen(keys, args, plan, walk.origin);
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (more) load_box(head, walk.origin, parity ^ 1);

    const char* inputs = input_stages + parity * kStageBytes;
#pragma unroll
    for (int k = 0; k < kTokens / kDepth<P>; ++k) {
      if ((seeing[k * kDepth<P> / 32] >> k * kDepth<P> % 32 & ((1 << kDepth<P>)-1)) == 0) continue;
      uint32_t raw[4];
      load_rows_transposed<P>(raw, dense, kDepth<P> * k, 16 * warp, lane);
      const Operand<P> a = make_operand<P>(raw);
#pragma unroll
      for (int n = 0; n < kChannels / 16; ++n) {
        uint32_t b[4];
        load_rows<P>(b, inputs, kDepth<P> * k, 16 * n, lane);
        multiply<P>(sums[2 * n], a, b[0], b[1]);
        multiply<P>(sums[2 * n + 1], a, b[2], b[3]);
      }
    }
  }

  const int64_t out_offset[2] = {keys.out[warp * 16 + lane / 4], keys.out[warp * 16 + lane / 4 + 8]};
  T* out = static_cast<T*>(args.c.data) + tile.batch * args.c.batch_stride + tile.head * args.c.head_stride +
           first_channel;
  store_rows<P, kChannels>(sums, out, out_offset, channels, float(problem.scale));
}

template <class P, int kChannels>
void launch_inverse_av(const UnfusedArguments& args, cudaStream_t stream) {
  using T = typename P::Element;
  Plan plan = plan_key_tiles(args, sizeof(T));
  plan.channel_blocks = ceil_div(args.problem.head_dim, kChannels);
  const int bytes = kTokens * kTokens * int(sizeof(T)) + 2 * kSlices<P, kChannels> * kTileBytes;
  allow_shared_memory(inverse_av_kernel<P, kChannels>, bytes, "gemm inverse_av");
  const unsigned blocks = grid_size(tile_count(args.problem, plan.grid) * plan.channel_blocks, "gemm inverse_av");
  inverse_av_kernel<P, kChannels><<<blocks, kThreads, bytes, stream>>>(args, plan);
  check_launch("gemm inverse_av");
}

template <class P>
void inverse_av(const UnfusedArguments& args, cudaStream_t stream) {
  const int d = args.problem.head_dim;
  d <= 32   ? launch_inverse_av<P, 32>(args, stream)
  : d <= 64 ? launch_inverse_av<P, 64>(args, stream)
            : launch_inverse_av<P, 128>(args, stream);
}

}  // namespace natten::gemm
