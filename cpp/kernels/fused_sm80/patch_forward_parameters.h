// What the forward patch kernels receive.
#pragma once

#include "kernels/fused_sm80/patch_forward_plan.h"
#include "tile/divisor.h"
#include "tile/patch.cuh"

namespace natten::fused_sm80 {

// A tensor [B, X, Y, Z, H, C], strides in bytes. `step` is the distance of neighbours in a dilation group; a tile and a
// slab span less than 2^31 bytes.
struct PatchTensor {
  char* data;
  int64_t batch, head, axis[kAxes];
  int step[kAxes];
};

struct PatchParameters {
  Axis axis[kAxes];
  Group dense[kAxes];  // group 0, ready for axes without dilation

  // Block index, innermost digit first: [head set], tiles z, y, x, dilation groups z, y, x, [head set], batch.
  Divisor head_sets, tiles[kAxes], groups[kAxes];
  bool heads_innermost;
  int heads, set_heads;  // a block works on the heads of a set, one after the other
  Divisor heads_per_kv;  // query heads that share a key/value head

  tile::Patch patch;
  tile::Patch patches;     // of a tile, one per warp
  int tile_extent[kAxes];  // rows of a tile

  // The keys of a tile come in slabs, cut along slab_axis; two in flight when there are several.
  int slab_axis;
  int slab_extent[kAxes];  // largest, over all tiles
  Divisor slab_y, slab_z;  // slab_extent[1], slab_extent[2]
  int slab_line;           // rows of shared memory from line to line
  int slabs;               // in shared memory: one, or two in turns
  int slab_tokens;         // product of slab_extent
  int slab_bytes;          // in shared memory
  bool same_steps;         // of keys and values: one table of a slab's rows

  int head_dim, head_dim_v;
  float scale, scale_log2;  // scale * log2(e)

  enum { kQuery, kKey, kValue, kOut, kLogsumexp, kTensors };
  PatchTensor tensor[kTensors];
};

}  // namespace natten::fused_sm80
