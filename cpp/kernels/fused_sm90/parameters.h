// What the host tells the kernel.
#pragma once

#include <cstdint>

#include "tile/divisor.h"
#include "window/axis.h"

namespace natten::fused_sm90 {

// How far one step of an index moves the fold coordinate of a map (maps.h).
struct FoldUnits {
  int axis[kAxes], head, batch;
};

// Dilation groups of a tensor come in up to this many shapes: along each axis, longer or shorter by one position.
constexpr int kGroupShapes = 8;

// A tile's index is a mixed-radix number: z, y, x of the tile, z, y, x of the dilation group, query head, batch item.
constexpr int kDigits = 8;
enum Digit : int { kTileZ, kTileY, kTileX, kGroupZ, kGroupY, kGroupX, kHead, kBatch };

struct Parameters {
  Axis axis[kAxes];
  int warpgroup_box[kAxes];  // queries of a warpgroup: a box of 64, extents powers of two
  int tile_box[kAxes];       // queries of a block: the warpgroups' boxes one after another along the pair axis
  int key_box[kAxes];        // keys of a step; the innermost extent is a multiple of 8
  int log2_z, log2_y;        // of warpgroup_box
  int pair_axis;
  Divisor digit_radix[kDigits], digit_weight[kDigits];
  int tiles;
  int head_group;  // query heads per key/value head

  FoldUnits query, key, value, out, additional_key, additional_value;
  int additional;  // keys
  int additional_steps;

  // Masks (mask.h): 8-key columns per row and per plane of a key box, and the constants that replicate a row's bits
  // over the box, and a plane's.
  int row_columns, plane_columns;
  uint32_t repeat_rows, repeat_planes;

  // Masks by tensor core (bias.h), where the boxes allow it.
  int bias;
  int first_slot_y;

  float lowest;      // score below all scores: what running maxima start from
  float scale_log2;  // scale * log2(e)
  float slack;       // growth of the running maximum that is tolerated without rescaling

  float* logsumexp;  // null: not wanted
  int64_t logsumexp_axis[kAxes], logsumexp_head, logsumexp_batch;
};

}  // namespace natten::fused_sm90
