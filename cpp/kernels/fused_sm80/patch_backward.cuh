// Patches in the backward pass: what the query gradient and the key gradient kernels share.
//
// A block owns a *tile*, a grid of patches of one side (queries, or keys in the key gradient kernel), one patch of 16
// rows per warp, and works on it for several *items*, pairs of batch and head, one after the other: everything that
// follows from the geometry is computed once. The other side's union of the tile's windows passes through shared memory
// in slabs, as a rule a single one; each warp walks exactly the columns of its own union. No product is shared between
// warps, so that after a slab has come there is nothing to wait for. docs/kernels/fused-sm80.md explains the schedule.
#pragma once

#include "kernels/fused_sm80/block.cuh"
#include "ptx/math.h"
#include "ptx/mma.h"
#include "tile/patch.cuh"
#include "tile/softmax.h"

namespace natten::fused_sm80::gradient {

constexpr int kMostPatches = 8;  // of a tile, and warps of its block

// Walked tensors come in pairs: keys and values, or queries and output gradients.
constexpr int kWalkedTensors = 2;

// A tensor in which the rows of a tile lie within 2^31 bytes of each other. Strides in bytes.
struct PatchTensor {
  char* data;
  int64_t batch, head, axis[kAxes];
  int step[kAxes];  // between neighbours in a dilation group

  NATTEN_HOST_DEVICE int offset(int x, int y, int z) const { return x * step[0] + y * step[1] + z * step[2]; }
};

enum Tensors {
  kQuery,
  kOut,
  kLogsumexp,
  kGradOut,
  kGradLogsumexp,
  kStatistics,
  kGradQuery,
  kKey,  // from here on, tensors of keys
  kValue,
  kGradKey,
  kGradValue,
  kTensors
};

struct PatchParameters {
  Axis axis[kAxes];
  Group dense[kAxes];  // group 0, ready for axes without dilation

  Divisor tiles[kAxes], groups[kAxes];  // block index, innermost digit first: tiles, dilation groups, sets of items
  int items, items_per_block;           // an item is batch * heads + head, with heads of the owned side
  Divisor heads;
  int heads_per_kv;

  tile::Patch patch;
  int grid[kAxes];  // patches of a tile
  Divisor grid_y, grid_z;
  int slab_axis;    // the axis along which slabs follow each other
  int slab_extent;  // positions of a slab along it
  int slab_rows;    // room for the rows of a slab
  int stages;       // slabs in flight or in use

  int head_dim, head_dim_v;
  float scale, scale_log2;
  PatchTensor tensor[kTensors];
};

// Lives in shared memory. Positions of the walked side are relative to the first that the tile needs.
struct PatchBlock {
  Group group[kAxes];
  int position[kAxes], count[kAxes];   // of the tile's first row, in its group; rows of the tile that exist
  int own_first[kAxes];                // local coordinate of the tile's first row
  int walk_position[kAxes];            // of the first needed position, in its group
  int walk_first[kAxes], size[kAxes];  // its local coordinate; needed positions
  int extent[kAxes];                   // the largest union of a patch of the tile: every patch walks as much
  uint32_t inverse[kAxes];             // 2^31 / size, rounded up
  int first_item, items;
  tile::ChunkShape chunk;
  tile::Slab slab;
  int slabs;
  char* origin_of[kTensors];               // of batch 0, head 0: the tile's first row, or the first needed position
  char* base[4][kTensors];                 // the same of the items in use: of item i of the block in base[i % 4]
  int origin[kAxes][kMostPatches];         // where the patches of each coordinate begin to walk
  Range window[kAxes][kMostPatches * 16];  // of each coordinate of the tile

  __device__ __forceinline__ bool empty() const { return count[0] <= 0 || count[1] <= 0 || count[2] <= 0; }
  __device__ __forceinline__ bool nothing_to_walk() const { return size[0] * size[1] * size[2] == 0; }
  // Whether every patch walks one chunk, whose mask serves for all items.
  __device__ __forceinline__ bool single_chunk() const {
    return slabs == 1 && extent[0] == 1 && chunk.lines >= extent[1] && chunk.width >= extent[2];
  }

  // By the first warp; synchronise after. Lane 8 a + t looks at patch coordinate t of axis a.
  template <bool kOwnKeys>
  __device__ __forceinline__ void locate(const PatchParameters& p) {
    const int lane = threadIdx.x, a = min(lane >> 3, kAxes - 1), t = lane & 7;
    uint32_t index = blockIdx.x;
    int tile_index = 0, group_index = 0;
#pragma unroll
    for (int b = kAxes - 1; b >= 0; --b) {
      const int digit = p.tiles[b].peel(index);
      if (b == a) tile_index = digit;
    }
#pragma unroll
    for (int b = kAxes - 1; b >= 0; --b) {
      const int digit = p.groups[b].peel(index);
      if (b == a) group_index = digit;
    }
    const int dilation = p.axis[a].dilation, patch_extent = p.patch.extent[a];
    const Group g = dilation == 1 ? p.dense[a] : make_group(p.axis[a], group_index);
    const int first = tile_index * patch_extent * p.grid[a];
    const int rows = min((kOwnKeys ? g.kv_count : g.q_count) - first, patch_extent * p.grid[a]);
    const int position_ = (kOwnKeys ? g.kv_position : g.q_position) + first, last = max(rows, 1) - 1;
    const Range low = related<kOwnKeys>(g, position_ + min(t * patch_extent, last));
    const Range high = related<kOwnKeys>(g, position_ + min(t * patch_extent + patch_extent - 1, last));
    const int begin = __shfl_sync(~0u, low.begin, a * 8), end = __shfl_sync(~0u, high.end, a * 8 + 7);
    int most = high.end - low.begin;
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2) most = max(most, __shfl_xor_sync(~0u, most, distance));
    if (lane < kAxes * 8) {
      const int size_ = end - begin;
      origin[a][t] = min(low.begin - begin, size_ - most);
      if (t == 0) {
        group[a] = g;
        position[a] = position_;
        count[a] = rows;
        walk_position[a] = begin;
        own_first[a] = (kOwnKeys ? g.kv_first : g.q_first) + first * dilation;
        walk_first[a] =
            kOwnKeys ? g.q_first + (begin - g.q_position) * dilation : g.kv_first + (begin - g.kv_position) * dilation;
        size[a] = size_;
        extent[a] = most;
        inverse[a] = (0x80000000u + uint32_t(max(size_, 1)) - 1) / uint32_t(max(size_, 1));
      }
    }
    __syncwarp();
    if (lane < kTensors) {
      const bool own_side = (lane >= kKey) == kOwnKeys;
      char* address = p.tensor[lane].data;
#pragma unroll
      for (int b = 0; b < kAxes; ++b) address += (own_side ? own_first[b] : walk_first[b]) * p.tensor[lane].axis[b];
      origin_of[lane] = address;
    } else if (lane == kTensors) {
      first_item = index * p.items_per_block;
      items = min(p.items_per_block, p.items - first_item);
      const int lines = p.slab_axis == 1 ? min(extent[1], p.slab_extent) : extent[1];
      const int width = p.slab_axis == 2 ? min(extent[2], p.slab_extent) : extent[2];
      chunk = tile::ChunkShape::make<tile::kMostChunk>(max(lines, 1), max(width, 1));
      // Lines are lengthened so that eight consecutive columns of a patch stay free of bank conflicts across their
      // ends.
      slab.line = p.slab_axis == 2 ? p.slab_extent : extent[2] + ((size[2] - extent[2] + 7) & ~7);
      slab.plane = (p.slab_axis == 1 ? p.slab_extent : size[1]) * slab.line;
      slabs = (size[p.slab_axis] + p.slab_extent - 1) / p.slab_extent;
    }
  }

  // The addresses of item `index` of the block. By the first warp, at the start of the item before; the block
  // synchronises at least once per item, so that the slowest warp is at item index - 2 at least.
  template <bool kOwnKeys>
  __device__ __forceinline__ void fill_base(const PatchParameters& p, int index) {
    const int lane = threadIdx.x;
    if (lane >= kTensors) return;
    uint32_t batch = first_item + index;
    int head = p.heads.peel(batch);
    if ((lane >= kKey) != kOwnKeys) head = kOwnKeys ? head * p.heads_per_kv : head / p.heads_per_kv;
    base[index % 4][lane] = origin_of[lane] + batch * p.tensor[lane].batch + head * p.tensor[lane].head;
  }

  // By all threads; synchronise after.
  template <bool kOwnKeys>
  __device__ __forceinline__ void fill_windows(const PatchParameters& p) {
    const int rows_x = p.patch.extent[0] * p.grid[0], rows_y = p.patch.extent[1] * p.grid[1];
    const int total = rows_x + rows_y + p.patch.extent[2] * p.grid[2];
    for (int i = threadIdx.x; i < total; i += blockDim.x) {
      const int a = i < rows_x ? 0 : i < rows_x + rows_y ? 1 : 2;
      const int c = i - (a == 0 ? 0 : a == 1 ? rows_x : rows_x + rows_y);
      const Range r = related<kOwnKeys>(group[a], position[a] + min(c, count[a] - 1));
      window[a][c] = {r.begin - walk_position[a], r.end - walk_position[a]};
    }
  }

  // Quotient of a number below 2^16 by the size along an axis.
  __device__ __forceinline__ uint32_t divide(uint32_t numerator, int axis) const {
    return __umulhi(2 * numerator, inverse[axis]);
  }
};

// Rows of walked tensors in shared memory: kHeadDim channels and 16 bytes, so that eight consecutive rows fall into
// different banks.
template <int kHeadDim>
struct SlabRows {
  static constexpr int kChannelBytes = 2 * kHeadDim;
  static constexpr int kRowBytes = kChannelBytes + 16;
  static constexpr int kLanes = kHeadDim / 8;
};

// Where a row of a slab comes from, in bytes from the slab's first row in each tensor, and where it goes.
struct alignas(16) RowOffsets {
  int first, second, statistics, destination;
};

// By all threads; synchronise after. Rows of all slabs but the last, which has fewer, are alike.
template <int kHeadDim, Tensors kFirst, Tensors kSecond>
__device__ __forceinline__ void fill_row_offsets(RowOffsets* offsets, const PatchParameters& p,
                                                 const PatchBlock& block) {
  const int positions = min(p.slab_extent, block.size[p.slab_axis]);
  const int planes = p.slab_axis == 0 ? positions : block.size[0];
  const int lines = p.slab_axis == 1 ? positions : block.size[1], width = p.slab_axis == 2 ? positions : block.size[2];
  for (int row = threadIdx.x; row < planes * lines * width; row += blockDim.x) {
    const int line = p.slab_axis == 2 ? 0 : block.divide(row, 2), z = row - line * width;
    int x = 0, y = line;
    if (planes > 1) {
      x = block.divide(line, 1);
      y = line - x * lines;
    }
    offsets[row] = {p.tensor[kFirst].offset(x, y, z), p.tensor[kSecond].offset(x, y, z),
                    p.tensor[kStatistics].offset(x, y, z),
                    (line * block.slab.line + z) * SlabRows<kHeadDim>::kRowBytes};
  }
}

// The same number, of which the compiler knows nothing: what is derived from it is computed where it stands, and does
// not occupy registers throughout a loop.
__device__ __forceinline__ int unknown(int number) {
  asm volatile("" : "+r"(number));
  return number;
}

// Starts the copies of slab n of two walked tensors of an item, the second `tensor_bytes` behind the first in shared
// memory. `round`: head of the group. With kWithStatistics a row's statistics follow the first tensor's channels.
template <int kHeadDim, Tensors kFirst, Tensors kSecond, bool kWithStatistics>
__device__ __forceinline__ void load_slab(const PatchParameters& p, const PatchBlock& block, const RowOffsets* offsets,
                                          int item, int round, int n, uint32_t slab, int tensor_bytes) {
  using Rows = SlabRows<kHeadDim>;
  const int thread = unknown(threadIdx.x), chunk = thread % Rows::kLanes, begin = n * p.slab_extent;
  const int positions = min(p.slab_extent, block.size[p.slab_axis] - begin);
  const int rows = positions * (p.slab_axis < 2 ? block.size[2] : 1) * (p.slab_axis < 1 ? block.size[1] : 1);
  const bool first_exists = chunk * 8 < p.head_dim, second_exists = chunk * 8 < p.head_dim_v;
  auto source = [&](Tensors t) {
    const char* address = block.base[item % 4][t] + int64_t(begin) * p.tensor[t].step[p.slab_axis];
    if (round > 0) address += round * p.tensor[t].head;
    if (t != kStatistics) address += chunk * 16;
    asm volatile("" : "+l"(address));
    return address;
  };
  const char *first_source = source(kFirst), *second_source = source(kSecond);
#pragma unroll 2
  for (int row = thread / Rows::kLanes; row < rows; row += blockDim.x / Rows::kLanes) {
    const RowOffsets at = offsets[row];
    const uint32_t destination = slab + at.destination + chunk * 16;
    ptx::cp_async_16(destination, first_source + at.first, first_exists);
    ptx::cp_async_16(destination + tensor_bytes, second_source + at.second, second_exists);
  }
  if constexpr (kWithStatistics) {
    const char* statistics_source = source(kStatistics);
    for (int row = thread; row < rows; row += blockDim.x)
      ptx::cp_async_8(slab + offsets[row].destination + Rows::kChannelBytes,
                      statistics_source + offsets[row].statistics, true);
  }
}

// The patch of a warp. Lane l looks after row l % 16: it knows where the row stands, and prepares its mask.
struct OwnPatch {
  int origin[kAxes];  // where the patch begins to walk
  uint32_t row;       // coordinates in the tile, 8 bits each; rows that do not exist repeat others
  uint32_t exist;     // bit r: row r exists

  __device__ __forceinline__ OwnPatch(const PatchParameters& p, const PatchBlock& block, int warp, int lane) {
    uint32_t rest = warp;
    int at[kAxes], c[kAxes];
    at[2] = p.grid_z.peel(rest);
    at[1] = p.grid_y.peel(rest);
    at[0] = rest;
    p.patch.coordinates(lane % 16, c);
    bool exists = lane % 16 < p.patch.rows();
    row = 0;
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      origin[a] = block.origin[a][at[a]];
      const int coordinate = c[a] + at[a] * p.patch.extent[a];
      exists = exists && coordinate < block.count[a];
      row |= uint32_t(min(coordinate, block.count[a] - 1)) << (8 * a);
    }
    exist = __ballot_sync(~0u, exists);
  }
  __device__ __forceinline__ bool any() const { return exist != 0; }
  __device__ __forceinline__ Range window(const PatchBlock& block, int a) const {
    return block.window[a][row >> (8 * a) & 0xff];
  }
  // Address of the lane's row of an item.
  __device__ __forceinline__ char* address(const PatchParameters& p, const PatchBlock& block, Tensors t,
                                           int item) const {
    const uint32_t at = unknown(row);
    return block.base[item % 4][t] + p.tensor[t].offset(at & 0xff, at >> 8 & 0xff, at >> 16);
  }
};

// The own rows of a warp travel between global memory and fragments through 16 rows of shared memory, in whole chunks
// of 16 bytes: a fragment read from global memory directly would touch eight cache lines per instruction.
template <int kHeadDim>
struct OwnRows {
  using Rows = SlabRows<kHeadDim>;
  static constexpr int kPasses = tile::kPatchRows * Rows::kLanes / 32, kRowsPerPass = 32 / Rows::kLanes;
  static constexpr int kBytes = tile::kPatchRows * Rows::kRowBytes;

  uint4 chunk[kPasses];

  // Calls visit(pass, row, address) for the lane's chunks.
  template <class Visit>
  __device__ static __forceinline__ void for_passes(const PatchParameters& p, const PatchBlock& block,
                                                    const OwnPatch& own, Tensors t, int item, int lane, Visit visit) {
    const uint32_t at = unknown(own.row);
    const int offset = p.tensor[t].offset(at & 0xff, at >> 8 & 0xff, at >> 16);
    char* base = block.base[item % 4][t] + lane % Rows::kLanes * 16;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = pass * kRowsPerPass + lane / Rows::kLanes;
      visit(pass, row, base + __shfl_sync(~0u, offset, row));
    }
  }
  __device__ __forceinline__ void load(const PatchParameters& p, const PatchBlock& block, const OwnPatch& own,
                                       Tensors t, int item, int channels, int lane) {
    const bool wanted = lane % Rows::kLanes * 8 < channels;
    for_passes(p, block, own, t, item, lane, [&](int pass, int, const char* address) {
      chunk[pass] = wanted ? __ldg(reinterpret_cast<const uint4*>(address)) : uint4{};
    });
  }
  // As the A operand. `buffer`: the warp's kBytes of shared memory.
  __device__ __forceinline__ void fragments(uint32_t (&a)[kHeadDim / 16][4], char* buffer, int lane) const {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass)
      *reinterpret_cast<uint4*>(buffer + (pass * kRowsPerPass + lane / Rows::kLanes) * Rows::kRowBytes +
                                lane % Rows::kLanes * 16) = chunk[pass];
    __syncwarp();
    const uint32_t address = ptx::shared_address(buffer) + lane % 16 * Rows::kRowBytes + lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) ptx::ldmatrix_x4(a[k], address + 32 * k);
    __syncwarp();
  }
};

// Rounds the patch's results and writes them, through the same rows of shared memory.
template <class Element, int kHeadDim>
__device__ __forceinline__ void store_own_rows(const float (&values)[kHeadDim / 8][4], float scale,
                                               const PatchParameters& p, const PatchBlock& block, const OwnPatch& own,
                                               Tensors t, int item, int channels, char* buffer, int lane) {
  using Rows = SlabRows<kHeadDim>;
  __syncwarp();
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j)
      *reinterpret_cast<uint32_t*>(buffer + (lane / 4 + 8 * r) * Rows::kRowBytes + 16 * j + lane % 4 * 4) =
          ptx::pack(values[j][2 * r] * scale, values[j][2 * r + 1] * scale, Element());
  __syncwarp();
  const bool wanted = lane % Rows::kLanes * 8 < channels;
  OwnRows<kHeadDim>::for_passes(p, block, own, t, item, lane, [&](int, int row, char* address) {
    const uint4 chunk = *reinterpret_cast<const uint4*>(buffer + row * Rows::kRowBytes + lane % Rows::kLanes * 16);
    if (wanted && (own.exist >> row & 1)) *reinterpret_cast<uint4*>(address) = chunk;
  });
  __syncwarp();
}

// Pairs of 16-bit elements that a thread's mask keeps, in a step of 16 columns.
struct PairMask {
  uint32_t even[2], odd[2];  // of row lane / 4 and of the one 8 further: the sign of byte j is a column of block j

  __device__ __forceinline__ PairMask(const tile::PatchMask& mask, int first_column) {
    const uint32_t word = first_column < 64 ? mask.word[0] : mask.word[1];
    const uint32_t bits = word >> ((first_column & 16) + (first_column >> 3 & 4));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      even[r] = bits << (7 - 2 * r);
      odd[r] = bits << (6 - 2 * r);
    }
  }
  // Ones where row r (0: lane / 4, 1: 8 further) attends columns 8 j + 2 (lane % 4) and the next.
  __device__ __forceinline__ uint32_t keep(int j, int r) const {
    return ptx::permute_bytes(even[r], odd[r], 0xcc88 + 0x1111 * j);
  }
};

// Byte offsets in shared memory of the rows that a lane hands to ldmatrix.
struct ColumnOffsets {
  tile::SmallDivisor by_width;
  int first, row_bytes, skip_bytes, last;

  __device__ __forceinline__ ColumnOffsets(const tile::Slab& slab, const tile::Chunk& chunk, int row_bytes_)
      : by_width(tile::SmallDivisor::make(chunk.width)),
        first(slab.row(chunk.x, chunk.y, chunk.z) * row_bytes_),
        row_bytes(row_bytes_),
        skip_bytes((slab.line - chunk.width) * row_bytes_),
        last(chunk.columns() - 1) {}
  // Columns past the end repeat the last one.
  __device__ __forceinline__ int of(int column) const {
    const int j = min(column, last);
    return first + j * row_bytes + by_width.quotient(j) * skip_bytes;
  }
};

// Calls visit(column offsets, columns) for the patch's chunks in slab n. `mask` of the only chunk, if so, is kept from
// one item to the next.
template <int kRowBytes, class Visit>
__device__ __forceinline__ void for_chunks(const PatchParameters& p, const PatchBlock& block, const OwnPatch& own,
                                           int n, tile::PatchMask& mask, bool mask_is_known, int lane, Visit visit) {
  const int slab_begin = n * p.slab_extent, half = lane / 16;
  const int slab_x = p.slab_axis == 0 ? slab_begin : 0, slab_y = p.slab_axis == 1 ? slab_begin : 0;
  const int slab_z = p.slab_axis == 2 ? slab_begin : 0, slab_end = slab_begin + p.slab_extent;
  int begin[kAxes] = {max(own.origin[0], slab_x), max(own.origin[1], slab_y), max(own.origin[2], slab_z)}, end[kAxes];
#pragma unroll
  for (int a = 0; a < kAxes; ++a)
    end[a] = min(own.origin[a] + block.extent[a], p.slab_axis == a ? slab_end : INT32_MAX);
  if (begin[0] >= end[0] || begin[1] >= end[1] || begin[2] >= end[2]) return;
  const tile::ChunkShape shape = block.chunk;
#pragma unroll 1
  for (int z = begin[2]; z < end[2]; z += shape.width) {
    tile::Chunk chunk{0, 0, z - slab_z, shape.lines, min(shape.width, end[2] - z)};
    uint64_t pattern = 0;
    if (!mask_is_known) {
      const tile::SmallDivisor by_width = tile::SmallDivisor::make(chunk.width);
      const Range window_z = own.window(block, 2);
      const Range range_z{tile::clamp(window_z.begin - z, 0, chunk.width),
                          tile::clamp(window_z.end - z, 0, chunk.width)};
      pattern = tile::column_pattern(range_z, chunk.width, by_width, half);
    }
#pragma unroll 1
    for (int x = begin[0]; x < end[0]; ++x) {
#pragma unroll 1
      for (int y = begin[1]; y < end[1]; y += shape.lines) {
        chunk.x = x - slab_x;
        chunk.y = y - slab_y;
        chunk.lines = min(shape.lines, end[1] - y);
        if (!mask_is_known) {
          const uint64_t plane = own.window(block, 0).contains(x) ? pattern : 0;
          const Range window_y = own.window(block, 1);
          const Range range_y{window_y.begin - y, min(window_y.end - y, chunk.lines)};
          mask = tile::PatchMask::distribute(plane & tile::line_bits(range_y, chunk.width, half), lane);
        }
        visit(ColumnOffsets(block.slab, chunk, kRowBytes), chunk.columns());
      }
    }
  }
}

}  // namespace natten::fused_sm80::gradient
