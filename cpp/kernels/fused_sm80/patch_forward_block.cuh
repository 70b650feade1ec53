// The tile of patches that a block of the forward owns, a warp's patch, the loads of slabs and rows.
#pragma once

#include "kernels/fused_sm80/patch_forward_parameters.h"
#include "ptx/memory.h"

namespace natten::fused_sm80 {

// Rows of shared memory that are an odd number of 16-byte chunks: any eight consecutive ones fall into different banks.
template <int kHeadDim>
constexpr int kPatchRowBytes = kHeadDim * 2 + 16;

// Where a row of a patch lies, in bytes from the tile's first.
struct RowOffsets {
  uint32_t query, out, logsumexp;
};

// A row of a slab: bytes from the first key in the tensor, and in shared memory. Rows that the tile does not need are
// copies of the first.
struct alignas(8) SlabRow {
  uint32_t source, destination;
};

// Lives in shared memory. Positions of keys are relative to the first that the tile needs.
struct PatchBlock {
  int first_head, heads;
  int count[kAxes];                                  // rows of the tile that exist
  int size[kAxes];                                   // needed keys
  const char* origin[PatchParameters::kTensors];     // of head 0: the tile's first row, or the first needed key
  Range table[kMostPatches * tile::kPatchRows + 2];  // window of each coordinate of the tile, axis after axis
  int position[kAxes], first[kAxes], walk_first[kAxes], walk_position[kAxes];
  Group group[kAxes];

  // To be called by the first warp; synchronise after.
  __device__ __forceinline__ void locate(const PatchParameters& p) {
    const int lane = threadIdx.x, axis = min(lane, kAxes - 1);
    uint32_t index = blockIdx.x;
    int set = p.heads_innermost ? p.head_sets.peel(index) : 0;
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
    if (!p.heads_innermost) set = p.head_sets.peel(index);
    const int dilation = p.axis[axis].dilation;
    const Group g = dilation == 1 ? p.dense[axis] : make_group(p.axis[axis], group_index);
    const int first_row = tile * p.tile_extent[axis];
    const int rows = min(g.q_count - first_row, p.tile_extent[axis]);
    const int begin = window(g, g.q_position + first_row).begin;
    const int end = window(g, g.q_position + first_row + max(rows, 1) - 1).end;
    if (lane < kAxes) {
      group[axis] = g;
      count[axis] = rows;
      position[axis] = g.q_position + first_row;
      first[axis] = g.q_first + first_row * dilation;
      walk_position[axis] = begin;
      walk_first[axis] = g.kv_first + (begin - g.kv_position) * dilation;
      size[axis] = max(end - begin, 0);
      if (axis == 0) {
        first_head = set * p.set_heads;
        heads = min(p.set_heads, p.heads - first_head);
      }
    }
    __syncwarp();
    if (lane < PatchParameters::kTensors) {
      const PatchTensor& t = p.tensor[lane];
      const bool keys = lane == PatchParameters::kKey || lane == PatchParameters::kValue;
      const int* at = keys ? walk_first : first;
      origin[lane] = t.data + index * t.batch + at[0] * t.axis[0] + at[1] * t.axis[1] + at[2] * t.axis[2];
    }
    // Rows past the end of the group repeat the last one.
    const int begin_y = p.tile_extent[0], begin_z = begin_y + p.tile_extent[1];
    for (int i = lane; i < begin_z + p.tile_extent[2]; i += 32) {
      const int a = i < begin_y ? 0 : i < begin_z ? 1 : 2, c = i - (a == 0 ? 0 : a == 1 ? begin_y : begin_z);
      const Range r = window(group[a], position[a] + max(min(c, count[a] - 1), 0));
      table[i] = {r.begin - walk_position[a], r.end - walk_position[a]};
    }
  }
  __device__ __forceinline__ bool empty() const { return count[0] <= 0 || count[1] <= 0 || count[2] <= 0; }
};

// The patch of a warp. Lane l looks after row l % 16.
struct PatchRows {
  uint32_t exist;       // bit per row
  Range window[kAxes];  // rows that do not exist repeat one that does
  Range needed[kAxes];  // union over the rows

  // Leaves in `offsets` where each row lies in the tensors of queries' rows.
  __device__ __forceinline__ PatchRows(const PatchParameters& p, const PatchBlock& block, int warp, int lane,
                                       RowOffsets* offsets) {
    int patch[kAxes], c[kAxes];
    p.patches.coordinates(warp, patch);
    p.patch.coordinates(lane % tile::kPatchRows, c);
    bool exists = lane % tile::kPatchRows < p.patch.rows();
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      c[a] += patch[a] * p.patch.extent[a];
      exists &= c[a] < block.count[a];
      window[a] = block.table[c[a] + (a > 0 ? p.tile_extent[0] : 0) + (a > 1 ? p.tile_extent[1] : 0)];
      needed[a] = {__shfl_sync(~0u, window[a].begin, 0), __shfl_sync(~0u, window[a].end, tile::kPatchRows - 1)};
    }
    exist = __ballot_sync(~0u, exists) & 0xffffu;
    auto offset = [&](int which) {
      const PatchTensor& t = p.tensor[which];
      return uint32_t(c[0] * t.step[0] + c[1] * t.step[1] + c[2] * t.step[2]);
    };
    if (lane < tile::kPatchRows)
      offsets[lane] = {offset(PatchParameters::kQuery), offset(PatchParameters::kOut),
                       offset(PatchParameters::kLogsumexp)};
    __syncwarp();
  }
};

// Fills the table of a slab's rows for the steps of one tensor. To be called by all threads; synchronise after.
template <int kRowBytes>
__device__ __forceinline__ void fill_slab_rows(SlabRow* table, const PatchParameters& p, const PatchBlock& block,
                                               const PatchTensor& t) {
  for (int n = threadIdx.x; n < p.slab_tokens; n += blockDim.x) {
    const int line = p.slab_z.quotient(n), z = n - line * p.slab_extent[2];
    const int x = p.slab_y.quotient(line), y = line - x * p.slab_extent[1];
    const bool needed = (p.slab_axis == 0 || x < block.size[0]) && (p.slab_axis == 1 || y < block.size[1]) &&
                        (p.slab_axis == 2 || z < block.size[2]);
    table[n] = {needed ? uint32_t(x * t.step[0] + y * t.step[1] + z * t.step[2]) : 0,
                uint32_t(line * p.slab_line + z) * kRowBytes};
  }
}

// Loads the first `rows` rows of a slab of keys or values. Leaves the channels past the head dim alone.
template <int kHeadDim>
__device__ __forceinline__ void load_slab(uint32_t slab, const SlabRow* table, const char* origin, int rows,
                                          int channels) {
  constexpr int kLanes = kHeadDim / 8;
  const int chunk = threadIdx.x % kLanes, per_pass = blockDim.x / kLanes;
  if (chunk * 8 >= channels) return;
  origin += chunk * 16;
  slab += chunk * 16;
  // The last row again instead of a branch for threads that have none.
#pragma unroll 4
  for (int first = 0; first < rows; first += per_pass) {
    const SlabRow row = table[min(first + int(threadIdx.x) / kLanes, rows - 1)];
    ptx::cp_async_16(slab + row.destination, origin + row.source);
  }
}

}  // namespace natten::fused_sm80
