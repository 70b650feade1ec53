// What the passes share: which tile a block owns and which boxes it walks, and the loads of both.
//
// A block owns a tile of one side (queries, or keys in the key gradient kernel) and walks boxes of the other side,
// those that some row of the tile needs. Positions of the walked side are relative to the first needed one.
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
  const int first = g.q_position, last = g.q_position + g.q_count;
  const int begin = min(max(r.begin, first), last);
  return {begin, max(min(r.end, last), begin)};
}

// Lives in shared memory.
template <int kRows>
struct Block {
  int batch, head, part;
  Group group[kAxes];
  int position[kAxes];    // of the tile's first row, in its group
  int count[kAxes];       // rows of the tile that exist
  int own_first[kAxes];   // local coordinate of the tile's first row
  int walk_first[kAxes];  // local coordinate of the first needed position of the other side
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
      walk_first[axis] =
          kOwnKeys ? g.q_first + (begin - g.q_position) * dilation : g.kv_first + (begin - g.kv_position) * dilation;
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
    const int begin_y = table_begin(p, 1), begin_z = table_begin(p, 2);
    // From the second warp on: the first has other work at this time.
    for (int i = (threadIdx.x + blockDim.x - 32) % blockDim.x; i < begin_z + (1 << p.owned.log[2]); i += blockDim.x) {
      const int axis = i < begin_y ? 0 : i < begin_z ? 1 : 2;
      const int coordinate = i - (axis == 0 ? 0 : axis == 1 ? begin_y : begin_z);
      const Range r = related<kOwnKeys>(group[axis], position[axis] + min(coordinate, count[axis] - 1));
      table[i] = {r.begin - walk_position[axis], r.end - walk_position[axis]};
    }
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
  __device__ __forceinline__ static WarpBounds make(const Parameters& p, const Block<kRows>& block, int warp,
                                                    int lane) {
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
  __device__ __forceinline__ tile::RowMask mask(const Parameters& p, const Block<kRows>& block,
                                                const int3& origin) const {
    return tile::row_mask(p.box, origin, block.table[packed & 0xff], block.table[(packed >> 8) & 0xff],
                          block.table[packed >> 16]);
  }
};

// Threads that share a row of kChunks 16-byte chunks.
template <int kChunks>
constexpr int kLanesPerRow = kChunks <= 4    ? 4
                             : kChunks <= 8  ? 8
                             : kChunks <= 16 ? 16
                                             : 32;

// How the threads of a block share the 16-byte chunks of [kRows, kColumns] tiles. A warp takes whole runs of 8 tokens,
// in passes of kRowsPerPass rows; its threads keep their chunk and their row within the pass.
template <int kColumns, int kThreads>
struct Loader {
  using Tile = tile::SharedTile<kColumns>;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kLanes = kLanesPerRow<Tile::kChunks>;
  static constexpr int kRowsPerPass = 32 / kLanes;
  static constexpr int kPasses = tile::kRun / kRowsPerPass;

  int warp, chunk, row;

  __device__ __forceinline__ Loader()
      : warp(threadIdx.x / 32), chunk(threadIdx.x % kLanes), row(threadIdx.x % 32 / kLanes) {}

  // Boxes leave the channels past a head dim alone: they are zeroed once.
  template <int kRows>
  __device__ __forceinline__ void zero_padding(char* tile, int channels) const {
    if (chunk * 8 < channels || chunk >= Tile::kChunks) return;
    for (int r = warp * kRowsPerPass + row; r < kRows; r += kWarps * kRowsPerPass)
      *reinterpret_cast<uint4*>(tile + Tile::offset(r, chunk)) = uint4{};
  }

  // The same box of kTensors tensors, by threads whose chunk has channels. `source`: its first row; `run_offset`: byte
  // offset of every run; `existing_rows(run)`: how many rows of a run exist, asked only when the box is not whole. The
  // others become zeros.
  template <int kRows, int kTensors, class ExistingRows>
  __device__ __forceinline__ void load_box(const uint32_t (&tile)[kTensors], const char* const (&source)[kTensors],
                                           const int64_t* const (&run_offset)[kTensors],
                                           const int64_t (&step_z)[kTensors], bool whole,
                                           ExistingRows existing_rows) const {
    constexpr int kRuns = kRows / tile::kRun, kRunsPerWarp = (kRuns + kWarps - 1) / kWarps;
    if (kRuns < kWarps && warp >= kRuns) return;
    const char* address[kTensors][kRunsPerWarp];
    uint32_t first[kTensors];
#pragma unroll
    for (int t = 0; t < kTensors; ++t) {
      const char* thread_source = source[t] + row * step_z[t] + chunk * 16;
      first[t] = tile[t] + warp * (kRunsPerWarp * tile::kRun * Tile::kRowBytes) + Tile::offset(row, chunk);
#pragma unroll
      for (int r = 0; r < kRunsPerWarp; ++r) address[t][r] = thread_source + run_offset[t][warp * kRunsPerWarp + r];
    }
    if (whole) {
#pragma unroll
      for (int r = 0; r < kRunsPerWarp; ++r)
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass)
#pragma unroll
          for (int t = 0; t < kTensors; ++t) {
            ptx::cp_async_16(Tile::down(first[t], r * tile::kRun + pass * kRowsPerPass), address[t][r]);
            address[t][r] += kRowsPerPass * step_z[t];
          }
    } else {
#pragma unroll
      for (int r = 0; r < kRunsPerWarp; ++r) {
        const int left = existing_rows(warp * kRunsPerWarp + r) - row;
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass)
#pragma unroll
          for (int t = 0; t < kTensors; ++t) {
            ptx::cp_async_16(Tile::down(first[t], r * tile::kRun + pass * kRowsPerPass), address[t][r],
                             pass * kRowsPerPass < left);
            address[t][r] += kRowsPerPass * step_z[t];
          }
      }
    }
  }
};

// Byte offsets of a box's runs.
__device__ __forceinline__ int64_t offset_of_run(const tile::BoxShape& box, const Tensor& t, int run) {
  const int x = run >> box.log_ym, y = (run >> box.log_m) & ((1 << box.log[1]) - 1), z = run & ((1 << box.log_m) - 1);
  return x * t.step[0] + y * t.step[1] + z * tile::kRun * t.step[2];
}
__device__ __forceinline__ int64_t box_offset(const Tensor& t, const int3& origin) {
  return origin.x * t.step[0] + origin.y * t.step[1] + origin.z * t.step[2];
}

// The rows of the block's tile that a warp owns. Lane l looks after row l % kRows: it knows where the row lies, and
// tells the lanes that copy the row's chunks.
template <int kRows>
struct OwnRows {
  int3 coordinates;
  uint32_t exist;  // bit per row

  template <class Block>
  __device__ __forceinline__ OwnRows(const Parameters& p, const Block& block, int warp, int lane)
      : coordinates(p.owned.coordinates(warp, lane % kRows)) {
    exist = __ballot_sync(~0u, block.contains(coordinates));
  }

  // Calls copy(row, chunk, address in the tensor, exists) for every chunk of the rows, 32 at a time.
  template <int kColumns, class Copy>
  __device__ __forceinline__ void for_chunks(const Tensor& t, const char* origin, int lane, Copy copy) const {
    constexpr int kChunks = kColumns / 8, kLanes = kLanesPerRow<kChunks>;
    const int64_t own = reinterpret_cast<int64_t>(origin) + box_offset(t, coordinates);
    const int chunk = lane % kLanes;
#pragma unroll
    for (int pass = 0; pass < kRows * kLanes / 32; ++pass) {
      const int row = pass * (32 / kLanes) + lane / kLanes;
      const int64_t address = __shfl_sync(~0u, own, row);
      if (chunk < kChunks) copy(row, chunk, reinterpret_cast<char*>(address) + chunk * 16, ((exist >> row) & 1) != 0);
    }
  }

  // Into rows [first_row, first_row + kRows) of a tile in shared memory, asynchronously; zeros where nothing exists.
  template <int kColumns>
  __device__ __forceinline__ void load(char* tile, int first_row, const Tensor& t, const char* origin, int channels,
                                       int lane) const {
    const uint32_t base = ptx::shared_address(tile);
    for_chunks<kColumns>(t, origin, lane, [&](int row, int chunk, char* address, bool exists) {
      ptx::cp_async_16(base + tile::SharedTile<kColumns>::offset(first_row + row, chunk), address,
                       exists && chunk * 8 < channels);
    });
  }
  // Back. The warp, or the warps that share the rows, must have synchronised.
  template <int kColumns>
  __device__ __forceinline__ void store(const char* tile, int first_row, const Tensor& t, const char* origin,
                                        int channels, int lane) const {
    for_chunks<kColumns>(t, origin, lane, [&](int row, int chunk, char* address, bool exists) {
      if (exists && chunk * 8 < channels)
        *reinterpret_cast<uint4*>(address) =
            *reinterpret_cast<const uint4*>(tile + tile::SharedTile<kColumns>::offset(first_row + row, chunk));
    });
  }
};

}  // namespace natten::fused_sm80
