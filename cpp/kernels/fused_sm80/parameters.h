// What the kernels of this family receive: one plain struct for every pass, filled on the host by launch.h.
#pragma once

#include "kernels/arguments.h"
#include "tile/box.h"
#include "tile/divisor.h"

namespace natten::fused_sm80 {

// A tensor [B, X, Y, Z, H, C], strides in bytes. `step` is the distance of neighbours in a dilation group.
struct Tensor {
  char* data;
  int64_t batch, head;
  int64_t axis[kAxes], step[kAxes];
};

struct Parameters {
  Axis axis[kAxes];
  Group dense[kAxes];  // group 0, ready for axes without dilation

  // Block index, innermost digit first: part, [head], tiles z, y, x, dilation groups z, y, x, [head], batch.
  Divisor parts, heads, tiles[kAxes], groups[kAxes];
  bool heads_innermost;
  int heads_per_kv;  // query heads that share a key/value head

  tile::OwnedTile owned;  // the tile that a block owns: queries, or keys in the key gradient kernel
  tile::BoxShape box;     // the boxes that it walks over the other side

  int head_dim, head_dim_v;
  int columns, columns_v;  // the same in columns of tiles, which have 16 bits: float32 takes two
  int additional;          // additional keys that every query attends
  float scale;
  float scale_log2;  // scale * log2(e)

  Tensor query, key, value, additional_key, additional_value;
  Tensor out, logsumexp;
  // Backward. statistics: float2 {logsumexp * log2(e), delta} per query and head.
  Tensor grad_out, grad_logsumexp, statistics;
  Tensor accumulator;  // float [B, X, Y, Z, H, D rounded up to 16]: query gradients that grow by atomic additions
  Tensor grad_query, grad_key, grad_value;
  // Key gradients of the additional keys: each part of the queries leaves a float32 [part, B, S, Hkv, D + Dv].
  float* partial;
  int64_t partial_batch;  // B
};

}  // namespace natten::fused_sm80
