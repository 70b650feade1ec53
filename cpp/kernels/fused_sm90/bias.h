// Masks by tensor core.
//
// A key is masked for a query if it lies outside the query's window along some axis. So the mask of a box is a matrix
// product of low rank: S += E B^T, where row q of E is one-hot per axis (which of the box's few x, y and z coordinates
// q has) and row k of B holds, for each of those coordinates, 0 where key k lies in its window along that axis and a
// huge negative number where it does not. With at most 8 slots for x and y together, and 8 for z, this is a single k =
// 16 step of wgmma: a sixteenth of a step at D 128, no instruction per score, nothing in the consumers' registers.
//
// E depends on the box shape only. The 16-byte halves of B's rows are looked up: (x, y) and z vectors of every key
// coordinate that a tile needs are made once per tile, and put together for each partial box by a producer warp.
#pragma once

#include <cuda_bf16.h>

#include <type_traits>

#include "kernels/fused_sm90/config.h"
#include "kernels/fused_sm90/parameters.h"
#include "ptx/tma.h"

namespace natten::fused_sm90 {

// Bit patterns of a one-hot element and of a masked one. Their product, summed over three axes, is finite, and so far
// below Softmax::kLowest that its exponential vanishes; finite, because wgmma multiplies it by zeros too.
template <typename Element>
struct BiasPattern {
  static constexpr bool kBfloat16 = std::is_same_v<Element, __nv_bfloat16>;
  static constexpr uint32_t kHot = kBfloat16 ? 0x3F80 : 0x7800;     // 1; 2^15
  static constexpr uint32_t kMasked = kBfloat16 ? 0xFE80 : 0xFBFF;  // -2^126; -65504
};

// E in wgmma's layout without swizzle: [2 halves of 8 slots][64 rows][8 slots].
template <class Config>
__device__ __forceinline__ void write_query_slots(const Parameters& p, SharedStorage<Config>& shared, int row) {
  constexpr uint32_t kHot = BiasPattern<typename Config::Element>::kHot;
  const int x = row >> (p.log2_z + p.log2_y), y = row >> p.log2_z & ((1 << p.log2_y) - 1),
            z = row & ((1 << p.log2_z) - 1);
  uint16_t slots[16] = {};
#pragma unroll
  for (int s = 0; s < 8; ++s) {
    const bool hot_x = p.warpgroup_box[0] > 1 && s == x;
    const bool hot_y = p.warpgroup_box[1] > 1 && s == p.first_slot_y + y;
    slots[s] = hot_x || hot_y ? kHot : 0;
    slots[8 + s] = s == z ? kHot : 0;
  }
  uint4* const out = reinterpret_cast<uint4*>(shared.bias.query_slots);
  out[row] = *reinterpret_cast<const uint4*>(slots);
  out[kQueries + row] = *reinterpret_cast<const uint4*>(slots + 8);
}

// Where the vectors of an axis start in BiasStorage::key_vectors. The pair axis has one set for each warpgroup.
struct KeyVectors {
  int x, y, z, pair_pitch;
};

// B of a box lies in shared memory as halves of [keys][8 slots]. Only the half with the pair axis's slots differs
// between warpgroups. The (x, y) half has to come before the z half, whose distance is a field of the matrix
// descriptor.
template <class Config>
struct SlotHalves {
  static constexpr int kBytes = Config::kKeys * 16, kCount = Config::kWarpgroups + 1;
  static __device__ __forceinline__ int shared_half(int pair_axis) { return pair_axis == 2 ? 0 : Config::kWarpgroups; }
  static __device__ __forceinline__ int own_half(int pair_axis, int warpgroup) {
    return pair_axis == 2 ? 1 + warpgroup : warpgroup;
  }
  static __device__ __forceinline__ uint4* address(SharedStorage<Config>& shared, int slot, int half) {
    return reinterpret_cast<uint4*>(shared.bias.key_slots[slot] + half * kBytes);
  }
};

// Vectors of all key coordinates of a tile; every lane of one warp. An axis whose query extent is 1 has no slots of its
// own: its vectors mask all of x and y's.
template <class Config>
__device__ __forceinline__ KeyVectors write_key_vectors(const Parameters& p, const TileRecord& tile,
                                                        SharedStorage<Config>& shared) {
  constexpr uint32_t kMasked = BiasPattern<typename Config::Element>::kMasked;
  const int lane = threadIdx.x % 32;
  KeyVectors at;
  int next = 0, first_window = 0;
#pragma unroll
  for (int a = 0; a < kAxes; ++a) {
    const int keys = tile.box_count[a] * p.key_box[a], copies = a == p.pair_axis ? Config::kWarpgroups : 1;
    const int extent = p.warpgroup_box[a], first_slot = a == 1 ? p.first_slot_y : 0, begin = tile.key_begin[a];
    (a == 0 ? at.x : a == 1 ? at.y : at.z) = next;
    if (a == p.pair_axis) at.pair_pitch = keys;
#pragma unroll 1
    for (int i = lane; i < keys * copies; i += 32) {
      const int w = i / keys, key = begin + i - w * keys;
      const Range* const window = tile.window + first_window + w * extent;
      uint32_t vector[4] = {};
      if (extent == 1 && a != 2) {
        const uint32_t all = window[0].contains(key) ? 0 : kMasked * 0x10001u;
        vector[0] = vector[1] = vector[2] = vector[3] = all;
      } else {
#pragma unroll
        for (int s = 0; s < 8; ++s) {
          const int q = s - first_slot;
          if (q >= 0 && q < extent && !window[q].contains(key)) vector[s / 2] |= kMasked << 16 * (s % 2);
        }
      }
      shared.bias.key_vectors[next + i] = make_uint4(vector[0], vector[1], vector[2], vector[3]);
    }
    next += keys * copies;
    first_window += p.tile_box[a];
  }
  __syncwarp();
  return at;
}

// B of one box, for the warpgroups in bit mask `warpgroups`; every lane of one warp. x, y, z: the box's first vectors
// along each axis.
template <class Config>
struct SlotWriter {
  static constexpr int kRows = Config::kKeys / 32;  // keys of a lane
  uint32_t coordinates[kRows];                      // x | y << 8 | z << 16 in the box

  __device__ __forceinline__ explicit SlotWriter(const Parameters& p) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int key = threadIdx.x % 32 + 32 * r, row = key / p.key_box[2];
      const int x = row / p.key_box[1];
      coordinates[r] = x | (row - x * p.key_box[1]) << 8 | (key - row * p.key_box[2]) << 16;
    }
  }

  __device__ __forceinline__ void write(SharedStorage<Config>& shared, int pair_axis, int pair_pitch, int slot,
                                        int warpgroups, int first_x, int first_y, int first_z) const {
    using Halves = SlotHalves<Config>;
    const uint4* const vectors = shared.bias.key_vectors;
    uint4* const common = Halves::address(shared, slot, Halves::shared_half(pair_axis));
    uint4* const own = Halves::address(shared, slot, Halves::own_half(pair_axis, 0));
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int key = threadIdx.x % 32 + 32 * r;
      const uint4* in_x = vectors + first_x + (coordinates[r] & 255);
      const uint4* in_y = vectors + first_y + (coordinates[r] >> 8 & 255);
      const uint4* in_z = vectors + first_z + (coordinates[r] >> 16);
      uint4 rest = pair_axis == 0 ? *in_y : *in_x;
      const uint4* paired = pair_axis == 0 ? in_x : pair_axis == 1 ? in_y : in_z;
      if (pair_axis == 2) {
        common[key] = merge(rest, *in_y);
        rest = make_uint4(0, 0, 0, 0);
      } else {
        common[key] = *in_z;
      }
#pragma unroll
      for (int w = 0; w < Config::kWarpgroups; ++w) {
        if (warpgroups >> w & 1) own[w * Config::kKeys + key] = merge(rest, paired[w * pair_pitch]);
      }
    }
  }

  // For the last additional keys, of which `left` exist.
  __device__ __forceinline__ void write_tail(SharedStorage<Config>& shared, int slot, int left) const {
    constexpr uint32_t kMasked = BiasPattern<typename Config::Element>::kMasked * 0x10001u;
    // Every half alike: a masked key is masked in all slots.
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < SlotHalves<Config>::kCount * Config::kKeys; i += 32) {
      const uint32_t slots = i % Config::kKeys < left ? 0 : kMasked;
      SlotHalves<Config>::address(shared, slot, 0)[i] = make_uint4(slots, slots, slots, slots);
    }
  }

 private:
  static __device__ __forceinline__ uint4 merge(uint4 a, uint4 b) {
    return make_uint4(a.x | b.x, a.y | b.y, a.z | b.z, a.w | b.w);
  }
};

}  // namespace natten::fused_sm90
