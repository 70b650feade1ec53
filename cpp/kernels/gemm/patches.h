// A warp's patch of queries and the keys that it meets, for qk and av: slabs of keys in shared memory, and where the
// weights of a patch's queries lie among a slab's.
#pragma once

#include "kernels/gemm/boxes.h"
#include "kernels/gemm/patch_plan.h"
#include "ptx/math.h"

namespace natten::gemm {

// What the warps of a block share beside slabs, in shared memory.
struct PatchTile {
  TokenTile tile;
  Range slots[kAxes];  // key positions that the queries' window slots stand for
  int end[kAxes];      // keys from here on are in no query's window

  // A stretch of a query's weights that a slab holds. In shared memory they lie as in memory, a whole number of words
  // apart. `weights` is the word of the first slot that any query of the patch may have in the slab.
  struct alignas(16) Stretch {
    char* weights;
    uint32_t bytes;  // the stretch's begin and, << 16, its end, counted from `weights`
  };
  // Two of each: av prepares one slab ahead.
  Stretch stretch[kStages][kWarps][kPatch];
  int limit[kStages][kWarps][kPatch][kAxes];  // a slot holds a key if its coordinates, from the first slot's, are below
};

// Tables in dynamic shared memory, the same for all patches and slabs.
struct PatchTables {
  int* source;         // [slab_rows] where a key of a slab lies, from the first, in units of 16 bytes
  uint16_t* key_row;   // [columns] slab row of a patch's key, from that of its first key in the slab
  uint16_t* key_slot;  // [columns] byte offset of its weight, from that of the key of a window's begin

  __device__ PatchTables(char* memory, const PatchPlan& plan)
      : source(reinterpret_cast<int*>(memory)),
        key_row(reinterpret_cast<uint16_t*>(source + plan.slab_rows)),
        key_slot(key_row + plan.columns) {}

  __device__ __forceinline__ void fill(const PatchPlan& plan, const Problem& problem, const TensorView& keys,
                                       const int (&slots)[kAxes], int element_bytes) {
    int64_t step[kAxes];
#pragma unroll
    for (int a = 0; a < kAxes; ++a) step[a] = keys.axis_stride[a] * problem.axis[a].dilation * element_bytes / 16;
#pragma unroll 1
    for (int i = threadIdx.x; i < plan.slab_rows; i += kThreads) {
      uint32_t rest = i;
      const int z = plan.by_slab[2].peel(rest), y = plan.by_slab[1].peel(rest);
      source[i] = int(int(rest) * step[0] + y * step[1] + z * step[2]);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < plan.columns; i += kThreads) {
      uint32_t rest = i;
      int row = 0, slot = 0, row_step = 1, slot_step = 1;
#pragma unroll
      for (int a = kAxes - 1; a >= 0; --a) {
        if (a < plan.split_axis) break;
        const int coordinate = a > plan.split_axis ? plan.by_keys[a].peel(rest) : rest;
        row += coordinate * row_step;
        slot += coordinate * slot_step;
        row_step *= plan.slab[a];
        slot_step *= slots[a];
      }
      key_row[i] = uint16_t(row);
      key_slot[i] = uint16_t(slot * element_bytes);
    }
  }
};

// By the whole block; synchronises. False if the tile is empty.
__device__ inline bool make_patch_tile(PatchTile& shared, PatchTables tables, const UnfusedArguments& args,
                                       const PatchPlan& plan, const TensorView& keys, int element_bytes,
                                       unsigned tile_index) {
  locate_tile(shared.tile, args.problem, plan.grid, Side::queries, tile_index);
  tables.fill(plan, args.problem, keys, args.slots, element_bytes);
  __syncthreads();
  const TokenTile& tile = shared.tile;
  if (tile.empty()) return false;
  if (threadIdx.x < kAxes) {
    const int a = threadIdx.x;
    const Group& group = tile.group[a];
    const int first = group.q_position + tile.first[a], last = first + tile.count[a] - 1;
    const Range last_window = window(group, last);
    shared.slots[a] = {window(group, first).begin, last_window.begin + args.slots[a]};
    shared.end[a] = last_window.end;
  }
  __syncthreads();
  return true;
}

// The queries of a warp, one per lane, the same in lanes l and l + 16; of the whole patch where it says so.
struct Patch {
  int position[kAxes], begin[kAxes], size[kAxes];
  bool exists;
  // The patch: the first key that a slot stands for, keys from `end` on being in no window; whether there is a query at
  // all, and whether all slots hold keys.
  int first[kAxes], end[kAxes];
  bool any, whole;

  __device__ __forceinline__ Patch(const TokenTile& tile, const PatchPlan& plan, const int (&slots)[kAxes]) {
    const int warp = threadIdx.x / 32, row = threadIdx.x % kPatch;
    int row_shift = 0, warp_shift = 0;
    exists = true;
    bool full = true;
#pragma unroll
    for (int a = kAxes - 1; a >= 0; --a) {
      const int across_log2 = plan.grid.tile_log2[a] - plan.patch_log2[a];
      const int within = row >> row_shift & ((1 << plan.patch_log2[a]) - 1);
      const int coordinate = ((warp >> warp_shift & ((1 << across_log2) - 1)) << plan.patch_log2[a]) + within;
      row_shift += plan.patch_log2[a];
      warp_shift += across_log2;
      exists = exists && coordinate < tile.count[a];
      position[a] = tile.group[a].q_position + tile.first[a] + min_int(coordinate, tile.count[a] - 1);
      const Range range = window(tile.group[a], position[a]);
      begin[a] = range.begin;
      size[a] = range.size();
      full = full && size[a] == slots[a];
      first[a] = __shfl_sync(~0u, begin[a], 0);
      end[a] = __shfl_sync(~0u, range.end, kPatch - 1);
    }
    any = __any_sync(~0u, exists);
    whole = __all_sync(~0u, full || !exists);
  }
};

// A block's work: all slabs of its first item, the last axis fastest, then of the next.
struct Step {
  int item;
  int origin[kAxes];

  __device__ __forceinline__ Step(const Range (&slots)[kAxes], int first_item)
      : item(first_item), origin{slots[0].begin, slots[1].begin, slots[2].begin} {}
  // False after the last slab of the item.
  __device__ __forceinline__ bool next_slab(const PatchPlan& plan, const Range (&slots)[kAxes]) {
#pragma unroll
    for (int a = kAxes - 1; a >= 0; --a) {
      origin[a] += plan.slab[a];
      if (origin[a] < slots[a].end) return true;
      origin[a] = slots[a].begin;
    }
    ++item;
    return false;
  }
};

// Element offset of an item in a tensor with query heads, or with K/V heads.
__device__ __forceinline__ int64_t item_offset(const PatchPlan& plan, const TensorView& view, int item, Side side) {
  uint32_t batch = item;
  uint32_t head = plan.by_heads.peel(batch);
  if (side == Side::keys) head = plan.by_group_heads.quotient(head);
  return batch * view.batch_stride + head * view.head_stride;
}

// Rows of keys in shared memory: slices of kRowBytes of channels of all keys of a slab.
template <int kRowBytes>
struct SlabLoader {
  using Rows = tile::SharedTile<kRowBytes / 2>;
  static constexpr int kStep = kThreads / Rows::kChunks;  // keys that the block's threads copy at a time
  static_assert(kStep % 8 == 0, "a thread's chunk keeps its place in a row");
  const char* first;   // the thread's chunk of the key at the begin of the tile's slots
  int step[kAxes];     // from position to position, in units of 16 bytes
  int chunks, slices;  // 16-byte chunks of a key

  __device__ __forceinline__ SlabLoader(const PatchTile& shared, const Problem& problem, const TensorView& view,
                                        const char* keys, int element_bytes, int chunks_)
      : chunks(chunks_), slices(ceil_div(chunks_, Rows::kChunks)) {
    const int begin[kAxes] = {shared.slots[0].begin, shared.slots[1].begin, shared.slots[2].begin};
    first = keys + token_offset(shared.tile, problem, view, Side::keys, begin) * element_bytes +
            threadIdx.x % Rows::kChunks * 16;
#pragma unroll
    for (int a = 0; a < kAxes; ++a) step[a] = int(view.axis_stride[a] * problem.axis[a].dilation * element_bytes / 16);
  }

  // Starts copying a slab; keys that no query needs, and channels past the end, become zeros.
  __device__ __forceinline__ void load(uint32_t stage, const PatchPlan& plan, const PatchTile& shared,
                                       const PatchTables& tables, const int (&origin)[kAxes],
                                       int64_t item_bytes) const {
    const int chunk = threadIdx.x % Rows::kChunks, first_row = threadIdx.x / Rows::kChunks;
    const int slice_bytes = plan.slab_rows * kRowBytes;
    const char* corner = first + item_bytes;
    bool whole = chunks == slices * Rows::kChunks;
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      corner += int64_t(origin[a] - shared.slots[a].begin) * step[a] * 16;
      whole = whole && origin[a] + plan.slab[a] <= shared.end[a];
    }
    uint32_t target = stage + Rows::offset(first_row, chunk);
    if (whole) {
      for (int s = 0; s < slices; ++s) {
        uint32_t at = target + s * slice_bytes;
#pragma unroll 4
        for (int row = first_row; row < plan.slab_rows; row += kStep) {
          ptx::cp_async_16(at, corner + s * kRowBytes + int64_t(tables.source[row]) * 16);
          at += kStep * kRowBytes;
        }
      }
      return;
    }
#pragma unroll 1
    for (int row = first_row; row < plan.slab_rows; row += kStep) {
      uint32_t rest = row;
      const int z = plan.by_slab[2].peel(rest), y = plan.by_slab[1].peel(rest);
      const bool valid =
          origin[0] + int(rest) < shared.end[0] && origin[1] + y < shared.end[1] && origin[2] + z < shared.end[2];
#pragma unroll 1
      for (int s = 0; s < slices; ++s) {
        ptx::cp_async_16(target + s * slice_bytes, corner + s * kRowBytes + int64_t(tables.source[row]) * 16,
                         valid && s * Rows::kChunks + chunk < chunks);
      }
      target += kStep * kRowBytes;
    }
  }
};

// How many keys of a patch a slab holds, from which row on.
struct SlabKeys {
  int count, first_row;

  // Slab row of key i. Keys past the slab's end or the patch's are in no window: any row serves.
  __device__ __forceinline__ int row(const PatchPlan& plan, const PatchTables& tables, int i) const {
    return min_int(first_row + tables.key_row[min_int(i, count - 1)], plan.slab_rows - 1);
  }
};

// The keys of a patch that a slab holds.
struct PatchKeys : SlabKeys {
  int low[kAxes], extent[kAxes];
  bool needed;  // some are in a window, for all that their place says

  __device__ __forceinline__ PatchKeys(const PatchPlan& plan, const Patch& patch, const int (&origin)[kAxes]) {
    count = 1;
    first_row = 0;
    needed = true;
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      low[a] = patch.first[a];
      extent[a] = plan.keys[a];
      if (a <= plan.split_axis) {
        const int high = min_int(low[a] + extent[a], origin[a] + plan.slab[a]);
        low[a] = max_int(low[a], origin[a]);
        extent[a] = max_int(high - low[a], 0);
      }
      count *= extent[a];
      first_row = first_row * plan.slab[a] + low[a] - origin[a];
      needed = needed && low[a] < patch.end[a];
    }
  }
};

// Bits of a pair of queries, of columns as a thread holds their accumulators: bit j is column 8 j + 2 (lane % 4), bit
// 16 + j the next.
struct ColumnBits {
  uint32_t of[2];  // queries lane / 4 and lane / 4 + 8

  __device__ __forceinline__ bool keeps(int column_block, int r, int odd) const {
    return of[r] >> (column_block + 16 * odd) & 1;
  }
  // Columns below `bound`.
  __device__ static __forceinline__ uint32_t below(int bound) {
    const int from_quad = bound - 2 * int(threadIdx.x % 4);
    const int even = (from_quad + 7) >> 3, odd = (from_quad + 6) >> 3;
    return ((1u << even) - 1) | ((1u << odd) - 1) << 16;
  }
};

// Columns whose keys lie inside the windows as far as the axes after the split axis say; the same for all slabs.
__device__ __forceinline__ ColumnBits find_inner_columns(const PatchPlan& plan, const Patch& patch,
                                                         const int (&slots)[kAxes]) {
  const int lane = threadIdx.x % 32;
  ColumnBits bits{};
  int begin[2][kAxes];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      begin[r][a] = __shfl_sync(~0u, patch.begin[a] - patch.first[a], lane / 4 + 8 * r);
    }
  }
#pragma unroll 1
  for (int j = 0; j < plan.columns / 8; ++j) {
    uint32_t rest = 8 * j + 2 * (lane % 4);
    const int z = plan.by_keys[2].peel(rest), y = plan.by_keys[1].peel(rest);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool in_y = plan.split_axis > 0 || unsigned(y - begin[r][1]) < unsigned(slots[1]);
      const bool even = plan.split_axis > 1 || unsigned(z - begin[r][2]) < unsigned(slots[2]);
      const bool odd = plan.split_axis > 1 || unsigned(z + 1 - begin[r][2]) < unsigned(slots[2]);
      bits.of[r] |= uint32_t(in_y && even) << j | uint32_t(in_y && odd) << (16 + j);
    }
  }
  return bits;
}

// Bytes from where key_slot says that a weight of the query lies to where it does; the same for all slabs.
__device__ __forceinline__ int slot_shift(const PatchPlan& plan, const Patch& patch, const int (&slots)[kAxes]) {
  int shift = 0;
#pragma unroll
  for (int a = 0; a < kAxes; ++a) {
    shift = shift * slots[a] - (a > plan.split_axis ? patch.begin[a] - patch.first[a] : 0);
  }
  return shift;
}

// What a lane knows of its query's stretch.
struct OwnStretch {
  int alignment;   // bytes of the first word before the first slot
  int begin, end;  // columns between which the query's keys lie
};

// Finds the stretches of weights of the patch's queries that a slab holds: each is consecutive in memory, as the keys
// of a slab are in raster order. To be called by whole warps.
template <class T>
__device__ __forceinline__ OwnStretch find_stretch(PatchTile& shared, int buffer, const PatchPlan& plan,
                                                   const Patch& patch, const PatchKeys& keys, const int (&slots)[kAxes],
                                                   const T* weights) {
  const int warp = threadIdx.x / 32, row = threadIdx.x % kPatch;
  int64_t slot = 0;  // the first that a query may have in the slab
  int begin = 0, end = patch.exists ? 1 : 0, inner_slots = 1, inner_keys = 1;
  int limit[kAxes];
#pragma unroll
  for (int a = 0; a < kAxes; ++a) {
    // Without branches: the compiler would move the arrays to local memory.
    const int from = keys.low[a] - patch.begin[a], until = min_int(slots[a] - from, keys.extent[a]);
    const bool before = a<plan.split_axis, at = a == plan.split_axis, after = a> plan.split_axis;
    slot = slot * slots[a] + (after ? 0 : from);
    begin += at ? min_int(max_int(-from, 0), keys.extent[a]) : 0;
    end *= at ? until : before && (from < 0 || until <= 0) ? 0 : 1;
    inner_slots *= after ? slots[a] : 1;
    inner_keys *= after ? plan.keys[a] : 1;
    limit[a] = patch.size[a] - (after ? 0 : max_int(from, 0));
  }
  if (end < begin) end = begin;
  const uintptr_t address = reinterpret_cast<uintptr_t>(weights + slot);
  const int alignment = int(address % 4);
  const int begin_bytes = begin * inner_slots * int(sizeof(T)) + alignment;
  const int end_bytes = end * inner_slots * int(sizeof(T)) + alignment;
  __syncwarp();
  if (threadIdx.x % 32 < kPatch) {
    shared.stretch[buffer][warp][row] = {reinterpret_cast<char*>(address - alignment),
                                         uint32_t(begin_bytes | end_bytes << 16)};
    if (!patch.whole) {
#pragma unroll
      for (int a = 0; a < kAxes; ++a) shared.limit[buffer][warp][row][a] = limit[a];
    }
  }
  __syncwarp();
  return {alignment, begin * inner_keys, end * inner_keys};
}

// Overwrites the slots of the stretches that hold no key.
template <class T>
__device__ __forceinline__ void erase_empty_slots(char* slab, const PatchTile& shared, int buffer,
                                                  const PatchPlan& plan, T empty) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
  for (int row = lane / 16; row < kPatch; row += 2) {
    const int begin = int(shared.stretch[buffer][warp][row].bytes & 0xffff);
    const int count = (int(shared.stretch[buffer][warp][row].bytes >> 16) - begin) / int(sizeof(T));
    const int (&limit)[kAxes] = shared.limit[buffer][warp][row];
    for (int i = lane % 16; i < count; i += 16) {
      uint32_t rest = i;
      const int z = plan.by_slots[2].peel(rest), y = plan.by_slots[1].peel(rest);
      if (int(rest) >= limit[0] || y >= limit[1] || z >= limit[2]) {
        *reinterpret_cast<T*>(slab + row * plan.row_words * 4 + begin + i * int(sizeof(T))) = empty;
      }
    }
  }
  __syncwarp();
}

// Calls word(shared, global) for the words of the stretches, 16 lanes a query: for whole words inside, or, with
// kCovering, for all that hold a part of it; then half(shared, global) for 16-bit ends that are no whole word. A word
// that covers an end holds a neighbour's weight, too, so stretches at the ends of the tensor, which reaches to
// `tensor_begin` and `tensor_end`, are never covered. Empty stretches may lie outside it.
template <bool kCovering, bool kHalves, class Word, class Half>
__device__ __forceinline__ void for_words(char* slab, const PatchTile& shared, int buffer, const PatchPlan& plan,
                                          const void* tensor_begin, const void* tensor_end, const Word& word,
                                          const Half& half) {
  constexpr int kLanes = 16, kSteps = 4;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % kLanes;
  const int row_bytes = plan.row_words * 4;
#pragma unroll 2
  for (int row = threadIdx.x % 32 / kLanes; row < kPatch; row += 32 / kLanes) {
    const PatchTile::Stretch stretch = shared.stretch[buffer][warp][row];
    const int begin = int(stretch.bytes & 0xffff), end = int(stretch.bytes >> 16);
    const bool covering =
        kCovering && stretch.weights + (begin & ~3) >= tensor_begin && stretch.weights + ((end + 3) & ~3) <= tensor_end;
    const int first = (covering ? begin : begin + 3) & ~3, last = (covering ? end + 3 : end) & ~3;
    char* own = slab + row * row_bytes + lane * 4;
    char* weights = stretch.weights + lane * 4;
    __builtin_assume(__isGlobal(weights));
    const int after = lane * 4 - first, length = end > begin ? max_int(last - first, 0) : 0;
    for (int at = 0; at < row_bytes; at += kLanes * 4 * kSteps) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int offset = at + s * kLanes * 4;
        if (unsigned(after + offset) < unsigned(length)) word(own + offset, weights + offset);
      }
    }
    if constexpr (kHalves) {
      const int at = lane == 0 ? begin : end - 2;
      const bool present = !covering && end > begin && lane < 2 && ((lane == 0 ? begin : end) & 2) != 0;
      if (present) half(slab + row * row_bytes + at, stretch.weights + at);
    }
  }
}

}  // namespace natten::gemm
