// Kernel configurations, with the reason for each number, and the shared memory that they imply.
#pragma once

#include <cstddef>
#include <cstdint>

#include "window/axis.h"

namespace natten::fused_sm90 {

constexpr int kQueries = 64;                 // per consumer warpgroup: the M of one wgmma
constexpr int kMaxWarpgroups = 3;            // consumer warpgroups
constexpr int kTileRecords = 2;              // tiles that the scheduler may be ahead
constexpr int kMaxSharedBytes = 227 * 1024;  // of a block; an SM has 228 KB, and each block costs 1 KB more

// What distinguishes two kernels besides the element type. Head dims are padded (by the copy engine, with zeros) to a
// class. Per query row a thread holds head_dim / 2 accumulators, keys / 2 scores and keys / 4 probabilities, so
// registers bound `keys`; shared memory bounds the stages.
struct Variant {
  int head_dim;    // class
  int keys;        // per step: the N of the score product
  int warpgroups;  // consumers
  int blocks;      // per SM

  constexpr bool operator==(const Variant&) const = default;
};

// The planner chooses among the variants of a class.
constexpr Variant kVariants[] = {
    // Large windows: three warpgroups hide the exponentials (at D <= 64 they cost as much as the products).
    // Small windows: two blocks an SM hide each other's first and last step.
    {32, 128, 3, 1},
    {32, 64, 2, 2},
    {64, 128, 3, 1},
    {64, 64, 3, 1},
    {64, 64, 2, 2},
    {96, 128, 2, 1},
    {96, 64, 3, 1},
    // 128 keys have the higher product rate; 64-key boxes fit windows better, and then a third warpgroup fits too.
    {128, 128, 2, 1},
    {128, 64, 3, 1},
    // Accumulators of 192 and 256 channels leave room for 64 keys and two warpgroups.
    {192, 64, 2, 1},
    {256, 64, 2, 1},
};

constexpr int kClasses[] = {32, 64, 96, 128, 192, 256};
constexpr int head_dim_class(int head_dim) {
  for (int c : kClasses) {
    if (head_dim <= c) return c;
  }
  return 0;
}

// Channels that one box of the copy engine brings: 64 (128-byte swizzle), or 32 where the class is no multiple of 64.
constexpr int chunk_channels(int head_dim) { return head_dim % 64 == 0 ? 64 : 32; }

// Registers per thread after setmaxnreg: they sum to what the launch allocates (65536 / threads / blocks, floored to
// 8). Consumers get what their accumulators need; below 56 the scheduler spills a little, once per tile.
constexpr int consumer_registers(const Variant& v) {
  return v.blocks == 2 ? 104 : v.warpgroups == 2 ? (v.head_dim == 256 ? 232 : 224) : v.keys == 128 ? 160 : 152;
}
constexpr int producer_registers(const Variant& v) {
  return v.blocks == 2 ? 32 : v.warpgroups == 2 ? (v.head_dim == 256 ? 40 : 56) : v.keys == 128 ? 32 : 56;
}

// What the scheduler warp tells the other roles about a tile. Coordinates are positions among the queries, or keys, of
// the tile's dilation group that were passed.
struct alignas(16) TileRecord {
  int query_origin[kAxes];  // of the block's query box
  int query_end[kAxes];     // of the group
  int query_fold, out_fold, key_fold, value_fold, additional_key_fold, additional_value_fold;
  int query_shape, key_shape;  // which maps: bit a is set if the group is shorter along axis a
  int box_count[kAxes];
  int box_steps;                    // product of box_count; negative: no tile is left
  int key_begin[kAxes];             // the union of the block's windows
  Range common[kAxes];              // their intersection; the pair axis has one for each warpgroup instead
  Range needed_by[kMaxWarpgroups];  // along the pair axis: union and intersection of the warpgroup's windows
  Range common_to[kMaxWarpgroups];
  int64_t logsumexp_origin;  // element of the first query
  Range window[kMaxWarpgroups * kQueries + kAxes -
               1];  // per axis and query coordinate of the tile, axes one after another
};

// What the key loader tells the consumers about a step.
struct alignas(16) StepRecord {
  int x, y, z;  // first key of the box; additional keys: z is how many keys are left
  int flags;    // bit 2 g: warpgroup g needs the box; bit 2 g + 1: without a mask; kAdditionalStep
};
constexpr int kAdditionalStep = 1 << 8;
static_assert(sizeof(TileRecord::window) / sizeof(Range) <= 256);

// Variants that can mask by tensor core (bias.h) besides score by score (mask.h). It needs a producer warp that keeps
// up, and registers for a second copy of the loop: not where steps are short, or two blocks share an SM.
constexpr bool masks_by_bias(const Variant& v) {
  return v.blocks == 1 && (v.head_dim > 64 || v.keys == 64) && v.head_dim > 32;
}
// Key coordinates for which a tile may have mask vectors then.
constexpr int kKeyVectors = 448;

template <typename Element_, int kVariant>
struct Config {
  using Element = Element_;
  static constexpr Variant kSelf = kVariants[kVariant];
  static constexpr int kHeadDim = kSelf.head_dim, kKeys = kSelf.keys, kWarpgroups = kSelf.warpgroups;
  static constexpr int kBlocks = kSelf.blocks;
  static constexpr int kChunk = chunk_channels(kHeadDim), kChunks = kHeadDim / kChunk, kRowBytes = 2 * kChunk;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kConsumerRegisters = consumer_registers(kSelf), kProducerRegisters = producer_registers(kSelf);

  // Scores of the next step are computed while this step's softmax runs, where registers allow. Two blocks an SM
  // overlap each other instead.
  static constexpr bool kOverlap = kBlocks == 1;

  static constexpr bool kMasksByBias = masks_by_bias(kSelf);

  static constexpr int kQueryBytes = kQueries * kHeadDim * 2, kKeyBytes = kKeys * kHeadDim * 2;
  static constexpr int kBlockBytes = kBlocks == 1 ? kMaxSharedBytes : kMaxSharedBytes / kBlocks - 512;
  static constexpr int kKeySlotBytes = kMasksByBias ? (kWarpgroups + 1) * kKeys * 16 : 0;  // of a stage
  static constexpr int kRecordBytes = kTileRecords * static_cast<int>(sizeof(TileRecord)) + kWarpgroups * kQueries * 8 +
                                      (kMasksByBias ? kKeyVectors * 16 + kQueries * 32 : 0) + 1024;
  static constexpr int stages(int query_buffers) {
    const int free = kBlockBytes - kRecordBytes - query_buffers * kWarpgroups * kQueryBytes;
    const int fit = free / (2 * kKeyBytes + kKeySlotBytes + 64);
    return fit < 6 ? fit : 6;
  }
  // With two query buffers the next tile's queries arrive during this tile, unless that leaves too few keys in flight.
  static constexpr int kQueryBuffers = stages(2) * kKeys >= 256 ? 2 : 1;
  static constexpr int kStages = stages(kQueryBuffers);
  static_assert(kStages >= 2);
};

// For masks by tensor core (bias.h).
template <class Config, bool = Config::kMasksByBias>
struct BiasStorage {
  alignas(128) uint8_t key_slots[Config::kStages][Config::kKeySlotBytes];
  alignas(128) uint8_t query_slots[kQueries * 32];
  uint4 key_vectors[kKeyVectors];
};
template <class Config>
struct BiasStorage<Config, false> {};

template <class Config>
struct SharedStorage {
  alignas(1024) uint8_t query[Config::kQueryBuffers][Config::kWarpgroups][Config::kQueryBytes];
  alignas(1024) uint8_t key[Config::kStages][Config::kKeyBytes];
  alignas(1024) uint8_t value[Config::kStages][Config::kKeyBytes];
  BiasStorage<Config> bias;
  TileRecord tile[kTileRecords];
  StepRecord step[Config::kStages];
  Group group[kAxes];                                        // scheduler's own
  int64_t logsumexp_offset[Config::kWarpgroups * kQueries];  // of each query from the tile's first
  uint64_t key_full[Config::kStages], key_empty[Config::kStages];
  uint64_t value_full[Config::kStages], value_empty[Config::kStages];
  uint64_t query_full[Config::kQueryBuffers][Config::kWarpgroups];
  uint64_t query_empty[Config::kQueryBuffers][Config::kWarpgroups];
  uint64_t tile_full[kTileRecords], tile_empty[kTileRecords];
};

// A ring position: slot and the parity of its current phase.
template <int kSlots>
struct Ring {
  int slot = 0;
  uint32_t parity = 0;
  NATTEN_HOST_DEVICE void advance() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

}  // namespace natten::fused_sm90
