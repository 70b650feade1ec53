// Which scores of a key box lie inside the windows of a thread's two rows.
//
// A thread of wgmma holds, of row r of two, columns 8 j + 2 (lane % 4) + c. Key boxes are a multiple of 8 long along z,
// so column block j is a mixed-radix number (x * rows + y) * row_columns + z8, a window is a range in each digit, and
// the bits over j of "inside" are the AND of three masks: a range (x), a range within a plane repeated over planes (y),
// and a range within a row repeated over rows (z). Repeating is one multiplication.
#pragma once

#include "kernels/fused_sm90/config.h"
#include "kernels/fused_sm90/parameters.h"

namespace natten::fused_sm90 {

// Bits [begin, end); both may lie outside [0, 32).
__device__ __forceinline__ uint32_t bit_range(int begin, int end) {
  begin = max(begin, 0);
  const int count = max(end - begin, 0);
  uint32_t bits;
  asm("bmsk.clamp.b32 %0, %1, %2;" : "=r"(bits) : "r"(begin), "r"(count));
  return bits;
}

// Of one key box: [row][c], bit j.
struct MaskBits {
  uint32_t inside[2][2];

  template <int kCount>
  __device__ __forceinline__ void apply(float (&scores)[kCount]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int j = 0; j < kCount / 4; ++j) {
          float& score = scores[4 * j + 2 * r + c];
          score = inside[r][c] >> j & 1u ? score : -INFINITY;
        }
      }
    }
  }
};

// The bits of y and z are kept from box to box, which come x fastest.
class Mask {
 public:
  // `warpgroup` and thread fix which queries the two rows are.
  __device__ __forceinline__ Mask(const Parameters& p, int warpgroup, int warp, int lane) {
    const int step = warpgroup * p.warpgroup_box[p.pair_axis];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp * 16 + lane / 4 + 8 * r;
      const int x = row >> (p.log2_z + p.log2_y), y = row >> p.log2_z & ((1 << p.log2_y) - 1),
                z = row & ((1 << p.log2_z) - 1);
      const int entry_x = x + (p.pair_axis == 0 ? step : 0);
      const int entry_y = y + (p.pair_axis == 1 ? step : 0) + p.tile_box[0];
      const int entry_z = z + (p.pair_axis == 2 ? step : 0) + p.tile_box[0] + p.tile_box[1];
      entries_[r] = entry_x | entry_y << 8 | entry_z << 16;
    }
  }

  __device__ __forceinline__ void begin_tile() { known_ = false; }

  __device__ __forceinline__ MaskBits of(const Parameters& p, const TileRecord& tile, const StepRecord& box) {
    MaskBits bits;
    const int column = 2 * (threadIdx.x % 4) - 7;
    if (box.flags & kAdditionalStep) {
#pragma unroll
      for (int c = 0; c < 2; ++c) bits.inside[0][c] = bits.inside[1][c] = bit_range(0, (box.z - column - c) >> 3);
      return bits;
    }
    if (!known_ || box.y != y_ || box.z != z_) {
      known_ = true;
      y_ = box.y;
      z_ = box.z;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const Range y = tile.window[entries_[r] >> 8 & 255], z = tile.window[entries_[r] >> 16];
        const uint32_t rows =
            bit_range((y.begin - y_) * p.row_columns, min((y.end - y_) * p.row_columns, p.plane_columns)) *
            p.repeat_planes;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int origin = z_ + column + c;
          inside_yz_[r][c] =
              rows & (bit_range((z.begin - origin) >> 3, min((z.end - origin) >> 3, p.row_columns)) * p.repeat_rows);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Range x = tile.window[entries_[r] & 255];
      const uint32_t planes = bit_range((x.begin - box.x) * p.plane_columns, (x.end - box.x) * p.plane_columns);
      bits.inside[r][0] = planes & inside_yz_[r][0];
      bits.inside[r][1] = planes & inside_yz_[r][1];
    }
    return bits;
  }

 private:
  uint32_t entries_[2];  // x | y << 8 | z << 16: positions in TileRecord::window, all below 256
  bool known_;
  int y_, z_;
  uint32_t inside_yz_[2][2];
};

}  // namespace natten::fused_sm90
