// What the passes share: which tile a block owns and which boxes it walks, and the loads of both.
//
// A block owns a tile of one side (queries, or keys in the key gradient kernel) and walks boxes of the other side, those
// that some row of the tile needs. Positions of the walked side are relative to the first needed one.
#pragma once

#include "kernels/fused_sm80/parameters.h"
#include "ptx/memory.h"
#include "tile/shared_tile.h"

namespace natten::fused_sm80 {

// The other side's positions that the row at position p attends (or is attended by), as far as they were passed.
template <bool kOwnKeys>
__device__ __forceinline__ Range related(const Group& g, int p) {
  if constexpr (!kOwnKeys) return window(g, p);
  const Range r = inverse_window(g, p);
  const int begin = max(r.begin, g.q_position);
  return {begin, max(min(r.end, g.q_position + g.q_count), begin)};
}

// Lives in shared memory.
template <int kRows>
struct Block {
  int batch, head, part;
  Group group[kAxes];
  int position[kAxes];     // of the tile's first row, in its group
  int count[kAxes];        // rows of the tile that exist
  int own_first[kAxes];    // local coordinate of the tile's first row
  int walk_first[kAxes];   // local coordinate of the first needed position of the other side
  int walk_position[kAxes];
  int size[kAxes];         // needed positions
  Range table[kRows + 2];  // what each coordinate of the tile needs, axis after axis

  // To be called by the first warp; synchronise after. Returns false (to all its lanes) when the tile is empty.
  template <bool kOwnKeys>
  __device__ __forceinline__ void locate(const Parameters& p) {
    const int axis = min(int(threadIdx.x), kAxes - 1);
    uint32_t index = blockIdx.x;
    const int part_ = p.parts.peel(index);
    int head_ = p.heads_innermost ? p.heads.peel(index) : 0;
    int tile = 0, group_index = 0;
#pragma unroll
    for (int a = kAxes - 1; a >= 0; --a) {
      const int digit = p.tiles[a].peel(index);
      if (a == axis) tile = digit;
    }
#pragma unroll
    for (int a = kAxes - 1; a >= 0; --a) {
      const int digit = p.groups[a].peel(index);
      if (a == axis) group_index = digit;
    }
    if (!p.heads_innermost) head_ = p.heads.peel(index);
    const int dilation = p.axis[axis].dilation;
    const Group g = dilation == 1 ? p.dense[axis] : make_group(p.axis[axis], group_index);
    const int first = tile << p.owned.log[axis];
    const int rows = min((kOwnKeys ? g.kv_count : g.q_count) - first, 1 << p.owned.log[axis]);
    const int position_ = (kOwnKeys ? g.kv_position : g.q_position) + first;
    const int begin = related<kOwnKeys>(g, position_).begin;
    const int end = related<kOwnKeys>(g, position_ + max(rows, 1) - 1).end;
    if (threadIdx.x < kAxes) {
      group[axis] = g;
      count[axis] = rows;
      position[axis] = position_;
      own_first[axis] = (kOwnKeys ? g.kv_first : g.q_first) + first * dilation;
      walk_position[axis] = begin;
      walk_first[axis] = kOwnKeys ? g.q_first + (begin - g.q_position) * dilation
                                  : g.kv_first + (begin - g.kv_position) * dilation;
      size[axis] = max(end - begin, 0);
      if (axis == 0) {
        batch = index;
        head = head_;
        part = part_;
      }
    }
  }

  __device__ __forceinline__ bool empty() const { return count[0] <= 0 || count[1] <= 0 || count[2] <= 0; }

  __device__ __forceinline__ static int table_begin(const Parameters& p, int axis) {
    return (axis > 0 ? 1 << p.owned.log[0] : 0) + (axis > 1 ? 1 << p.owned.log[1] : 0);
  }

  // Rows past the end of the group repeat the last one. To be called by all threads; synchronise after.
  template <bool kOwnKeys>
  __device__ __forceinline__ void fill_table(const Parameters& p) {
    const int i = threadIdx.x, begin_y = table_begin(p, 1), begin_z = table_begin(p, 2);
    if (i >= begin_z + (1 << p.owned.log[2])) return;
    const int axis = i < begin_y ? 0 : i < begin_z ? 1 : 2;
    const int coordinate = i - (axis == 0 ? 0 : axis == 1 ? begin_y : begin_z);
    const Range r = related<kOwnKeys>(group[axis], position[axis] + min(coordinate, count[axis] - 1));
    table[i] = {r.begin - walk_position[axis], r.end - walk_position[axis]};
  }

  __device__ __forceinline__ const char* own_origin(const Tensor& t, int head_) const {
    return t.data + batch * t.batch + head_ * t.head + own_first[0] * t.axis[0] + own_first[1] * t.axis[1] +
           own_first[2] * t.axis[2];
  }
  __device__ __forceinline__ const char* walk_origin(const Tensor& t, int head_) const {
    return t.data + batch * t.batch + head_ * t.head + walk_first[0] * t.axis[0] + walk_first[1] * t.axis[1] +
           walk_first[2] * t.axis[2];
  }
  __device__ __forceinline__ bool contains(const int3& c) const {
    return c.x < count[0] && c.y < count[1] && c.z < count[2];
  }
};

// The boxes that a warp's rows need, and those that all of them attend entirely. Lane a holds axis a.
struct WarpBounds {
  Range some, all;

  template <int kRows>
  __device__ __forceinline__ static WarpBounds make(const Parameters& p, const Block<kRows>& block, int warp, int lane) {
    const int axis = lane & 3;
    if (axis == kAxes) return {{-1, INT32_MAX}, {-1, INT32_MAX}};  // never the reason to skip or to mask
    const int3 c = p.owned.coordinates(warp, 0);
    const int first = axis == 0 ? c.x : axis == 1 ? c.y : c.z;
    if (first >= block.count[axis]) return {{1, 0}, {1, 0}};
    const Range* table = block.table + block.table_begin(p, axis) + first;
    const Range low = table[0], high = table[(1 << p.owned.warp_log[axis]) - 1];
    return {{low.begin, high.end}, {high.begin, low.end}};
  }

  // `origin` and `extent` of the box along this lane's axis.
  __device__ __forceinline__ bool needs(int origin, int extent) const {
    return __all_sync(~0u, origin < some.end && origin + extent > some.begin);
  }
  __device__ __forceinline__ bool full(int origin, int extent) const {
    return __all_sync(~0u, origin >= all.begin && origin + extent <= all.end);
  }
};

// Where the windows of one row stand in the block's table. A lane looks after the row of its warp that has its number.
struct RowIndex {
  uint32_t packed;

  __device__ __forceinline__ RowIndex(const Parameters& p, const int3& c) {
    const uint32_t begin_y = 1 << p.owned.log[0], begin_z = begin_y + (1 << p.owned.log[1]);
    packed = c.x | (begin_y + c.y) << 8 | (begin_z + c.z) << 16;
  }
  template <int kRows>
  __device__ __forceinline__ tile::RowMask mask(const Parameters& p, const Block<kRows>& block, const int3& origin) const {
    return tile::row_mask(p.box, origin, block.table[packed & 0xff], block.table[(packed >> 8) & 0xff],
                          block.table[packed >> 16]);
  }
};

// The boxes of a walk, z fastest.
struct Walk {
  __device__ __forceinline__ static int boxes_along(const Parameters& p, const int (&size)[kAxes], int axis) {
    return (size[axis] + (1 << p.box.log[axis]) - 1) >> p.box.log[axis];
  }
  __device__ __forceinline__ static int boxes(const Parameters& p, const int (&size)[kAxes]) {
    return boxes_along(p, size, 0) * boxes_along(p, size, 1) * boxes_along(p, size, 2);
  }
  // Origin of the box after the one at `origin`; past the last one, that of the first.
  __device__ __forceinline__ static int3 next(const Parameters& p, const int (&size)[kAxes], int3 origin) {
    origin.z += 1 << p.box.log[2];
    if (origin.z < size[2]) return origin;
    origin.z = 0;
    origin.y += 1 << p.box.log[1];
    if (origin.y < size[1]) return origin;
    origin.y = 0;
    origin.x += 1 << p.box.log[0];
    if (origin.x < size[0]) return origin;
    return {0, 0, 0};
  }
};

// Threads that share a row of kChunks 16-byte chunks.
template <int kChunks>
constexpr int kLanesPerRow = kChunks <= 4 ? 4 : kChunks <= 8 ? 8 : kChunks <= 16 ? 16 : 32;

// How the threads of a block share the 16-byte chunks of [kRows, kColumns] tiles: a power of two of them per row.
template <int kColumns, int kThreads>
struct Loader {
  using Tile = tile::SharedTile<kColumns>;
  static constexpr int kLanes = kLanesPerRow<Tile::kChunks>;
  static constexpr int kRowsPerPass = kThreads / kLanes;
  static constexpr int kWords = kRowsPerPass < tile::kRun ? tile::kRun / kRowsPerPass : 1;  // passes until a run repeats
  static_assert(kRowsPerPass >= 2);

  int chunk, row;

  __device__ __forceinline__ Loader() : chunk(threadIdx.x % kLanes), row(threadIdx.x / kLanes) {}

  // Offset of this thread in a box: its row within the first run, and its chunk.
  __device__ __forceinline__ int64_t thread_offset(int64_t step_z) const { return (row & 7) * step_z + chunk * 16; }
  __device__ __forceinline__ bool has_channels(int channels) const { return chunk * 8 < channels; }

  // Rows of a box; `source` includes the box's origin and this thread's offset, `inside` one word per position of this
  // thread within a run, `run_offset` the byte offset of every run.
  template <int kRows>
  __device__ __forceinline__ void load_box(uint32_t tile, const char* source, const int64_t* run_offset, int64_t step_z,
                                           const uint32_t (&inside)[kWords], bool has_channels) const {
    if (Tile::kChunks < kLanes && chunk >= Tile::kChunks) return;
#pragma unroll
    for (int pass = 0; pass * kRowsPerPass < kRows; ++pass) {
      const int r = row + pass * kRowsPerPass;
      if (kRows % kRowsPerPass != 0 && r >= kRows) break;
      const int run = r / tile::kRun, word = pass % kWords;
      const char* address = source + run_offset[run] + (kWords > 1 ? word * kRowsPerPass * step_z : 0);
      ptx::cp_async_16(tile + Tile::offset(r, chunk), address, has_channels && ((inside[word] >> run) & 1));
    }
  }

  __device__ __forceinline__ void inside_words(uint32_t (&inside)[kWords], const tile::BoxShape& shape,
                                               const int (&left)[kAxes]) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) inside[w] = tile::rows_inside(shape, left, (row & 7) + w * kRowsPerPass);
  }
  // The same for a box of `left` consecutive tokens (additional keys).
  template <int kRows>
  __device__ __forceinline__ void inside_words_flat(uint32_t (&inside)[kWords], int left) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w)
      inside[w] = (1u << tile::runs_below(min(left, kRows), (row & 7) + w * kRowsPerPass)) - 1;
  }

  // The rows of the block's own tile, in the order of its warps.
  template <int kRows, int kRowsPerWarp, int kBlockRows>
  __device__ __forceinline__ void load_owned(uint32_t tile, const Parameters& p, const Block<kBlockRows>& block,
                                             const Tensor& t, const char* origin, int channels) const {
    if (Tile::kChunks < kLanes && chunk >= Tile::kChunks) return;
#pragma unroll
    for (int pass = 0; pass * kRowsPerPass < kRows; ++pass) {
      const int r = row + pass * kRowsPerPass;
      if (kRows % kRowsPerPass != 0 && r >= kRows) break;
      const int3 c = p.owned.coordinates(r / kRowsPerWarp, r % kRowsPerWarp);
      ptx::cp_async_16(tile + Tile::offset(r, chunk),
                       origin + c.x * t.step[0] + c.y * t.step[1] + c.z * t.step[2] + chunk * 16,
                       has_channels(channels) && block.contains(c));
    }
  }
};

// Byte offsets of a box's runs.
__device__ __forceinline__ int64_t run_offset(const tile::BoxShape& box, const Tensor& t, int run) {
  const int x = run >> box.log_ym, y = (run >> box.log_m) & ((1 << box.log[1]) - 1), z = run & ((1 << box.log_m) - 1);
  return x * t.step[0] + y * t.step[1] + z * tile::kRun * t.step[2];
}
__device__ __forceinline__ int64_t box_offset(const Tensor& t, const int3& origin) {
  return origin.x * t.step[0] + origin.y * t.step[1] + origin.z * t.step[2];
}

// A warp's rows of a tile in shared memory, to the tensor: 16 bytes per lane.
template <int kColumns, int kRowsPerWarp, int kBlockRows>
__device__ __forceinline__ void store_rows(const char* tile, const Parameters& p, const Block<kBlockRows>& block, int warp,
                                           int lane, const Tensor& t, const char* origin, int channels) {
  using Tile = tile::SharedTile<kColumns>;
  constexpr int kLanes = kLanesPerRow<Tile::kChunks>;
  static_assert(kLanes <= 32);
#pragma unroll
  for (int row = lane / kLanes; row < kRowsPerWarp; row += 32 / kLanes) {
    const int chunk = lane % kLanes;
    const int3 c = p.owned.coordinates(warp, row);
    if (chunk * 8 >= channels || !block.contains(c)) continue;
    *reinterpret_cast<uint4*>(const_cast<char*>(origin) + box_offset(t, c) + chunk * 16) =
        *reinterpret_cast<const uint4*>(tile + Tile::offset(warp * kRowsPerWarp + row, chunk));
  }
}

}  // namespace natten::fused_sm80
