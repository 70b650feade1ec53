// out[j] = scale * sum over the queries i that see key j of attention[i, j - begin(i)] input[i], summed over the query
// heads of j's head: a block owns 64 keys and walks the boxes of 64 queries that see some of them. The weights of a box
// are gathered into a dense, zero-filled matrix in shared memory; every weight is read by one block only.
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

// d += a b, with a chain of its own.
template <class P, int kFirst, int kSecond>
__device__ __forceinline__ void add_product(float (&d)[4], const Operand<P>& a, const Operand<P>& b) {
  if constexpr (P::kSplit) {
    float chain[4] = {};
    multiply<P, kFirst, kSecond>(chain, a, b);
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += chain[i];
  } else {
    multiply<P, kFirst, kSecond>(d, a, b);
  }
}

struct KeyTile {
  TokenTile tile;
  Range needed[kAxes];             // positions of the queries that see some of the keys
  int origin[kAxes];               // position of the tile's first key
  Mask below[kAxes][kTokens + 1];  // keys of the tile whose coordinate on the axis is below v
  int weight[kTokens];             // of a key: its slot in the window of a query whose window begins at `origin`
  int64_t out[kTokens];            // element offset of the key's sum; -1: no such key
  BoxTokens box;                   // of queries
  BoxSource inputs, attention;
  // Of the current box's queries: the keys that each sees, and where the weight of a key at `origin` lies.
  Mask seen[kTokens];
  int64_t weights_bytes[kTokens];
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
  make_box_source(keys.inputs, tile, plan, problem, args.b, Side::queries, element_bytes, keys.needed);
  make_box_source(keys.attention, tile, plan, problem, args.a, Side::queries, element_bytes, keys.needed);
  __syncthreads();
  return true;
}

// Fills `seen` and `weights_bytes` for the box of queries at `origin`, two threads a query; the caller synchronises.
__device__ __forceinline__ void find_seen(KeyTile& keys, const UnfusedArguments& args, const Plan& plan,
                                          const Walk& walk, int element_bytes) {
  const int row = threadIdx.x / 2, half = threadIdx.x % 2;
  int64_t weights = 0;
  bool exists = row < plan.box_tokens();
  uint32_t seen = ~0u;
#pragma unroll
  for (int a = 0; a < kAxes; ++a) {
    if (a < plan.first_axis) continue;
    const int position = walk.origin[a] + box_coordinate(plan, row, a);
    exists = exists && position < walk.end[a];
    const Range range = window(keys.tile.group[a], position);
    const int low = min_int(max_int(range.begin - keys.origin[a], 0), plan.grid.tile(a));
    const int high = min_int(max_int(range.end - keys.origin[a], low), plan.grid.tile(a));
    seen &= keys.below[a][high].half[half] ^ keys.below[a][low].half[half];
    weights = weights * args.slots[a] + (keys.origin[a] - range.begin);
  }
  keys.seen[row].half[half] = exists ? seen : 0;
  if (half == 0) {
    keys.weights_bytes[row] = weights * element_bytes + keys.attention.offset_bytes(walk.origin, walk.begin) +
                              keys.attention.token_bytes[row];
  }
}

template <class P, int kChannels>
__global__ void __launch_bounds__(kThreads, kChannels <= 32 && !P::kSplit ? 4
                                            : kChannels <= 64             ? 3
                                                                          : 2)
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
  // Bits in registers of their own: packed in pairs, they would be waited for as soon as they are asked for.
  using Bits = std::conditional_t<kIs16Bit<P>, uint16_t, uint32_t>;
  uint32_t gathered[kGathered];
  const char* key_weights = reinterpret_cast<const char*>(static_cast<const T*>(args.a.data) +
                                                          tile.batch * args.a.batch_stride + keys.weight[key]);
  const char* input =
      static_cast<const char*>(args.b.data) + (tile.batch * args.b.batch_stride + first_channel) * int64_t(sizeof(T));

  Walk walk;
  walk.start(keys.needed);
  const auto load_next = [&](int head, int stage) {
    const int64_t source =
        head * args.b.head_stride * int64_t(sizeof(T)) + keys.inputs.offset_bytes(walk.origin, walk.begin);
    load_box<kSlices<P, kChannels>>(input_stages + stage * kStageBytes, input + source, keys.inputs, keys.box, plan,
                                    walk.origin, keys.needed, 0, chunks);
    ptx::cp_async_commit();
    const char* head_weights = key_weights + head * args.a.head_stride * int64_t(sizeof(T));
#pragma unroll
    for (int i = 0; i < kGathered; ++i) {
      const int query = first_query + i * (kThreads / kTokens);
      const bool seen = keys.seen[query].half[key / 32] >> key % 32 & 1;
      gathered[i] = seen ? *reinterpret_cast<const Bits*>(head_weights + keys.weights_bytes[query]) : 0;
      // Few addresses at a time: all at once, they would not fit the registers.
      if (i % 8 == 7) asm volatile("" ::: "memory");
    }
  };

  float sums[kChannels / 8][4] = {};
  const int group_heads = problem.heads / problem.heads_kv;
  int head = tile.head * group_heads;
  bool more = keys.needed[0].size() > 0 && keys.needed[1].size() > 0 && keys.needed[2].size() > 0;
  if (more) {
    find_seen(keys, args, plan, walk, sizeof(T));
    __syncthreads();
    load_next(head, 0);
  }
  for (int parity = 0; more; parity ^= 1) {
    // Which 16 queries have a weight for this warp's 16 keys.
    const uint32_t warp_keys = 0xffffu << warp % 2 * 16;
    const unsigned seeing[2] = {__ballot_sync(~0u, (keys.seen[lane].half[warp / 2] & warp_keys) != 0),
                                __ballot_sync(~0u, (keys.seen[lane + 32].half[warp / 2] & warp_keys) != 0)};
    __syncthreads();  // everyone is done with the dense matrix and with `seen`
#pragma unroll
    for (int i = 0; i < kGathered; ++i) {
      const int query = first_query + i * (kThreads / kTokens);
      *reinterpret_cast<Bits*>(dense + slice_offset<T>(query, key)) = Bits(gathered[i]);
    }
    int turned;
    if (!walk.next(plan, turned)) more = ++head < (tile.head + 1) * group_heads;
    if (more) find_seen(keys, args, plan, walk, sizeof(T));
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (more) load_next(head, parity ^ 1);

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
        const Operand<P> operand = make_operand<P>(b);
        add_product<P, 0, 1>(sums[2 * n], a, operand);
        add_product<P, 2, 3>(sums[2 * n + 1], a, operand);
      }
    }
  }

  const int64_t out_offset[2] = {keys.out[warp * 16 + lane / 4], keys.out[warp * 16 + lane / 4 + 8]};
  T* out =
      static_cast<T*>(args.c.data) + tile.batch * args.c.batch_stride + tile.head * args.c.head_stride + first_channel;
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
