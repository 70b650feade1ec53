// Configurations of the gradient kernels, and the shared memory that they imply.
//
// Both kernels have one shape: a block owns a tile of one side (keys, or queries) and walks boxes of the other side. So
// they share everything but the products that they accumulate:
//   Side::keys     S^T = K Q^T, dP^T = V dO^T;  dK += dS^T Q, dV += P^T dO    (walks the queries that see its keys)
//   Side::queries  S = Q K^T,   dP = dO V^T;    dQ += dS K                    (walks the keys that its queries see)
#pragma once

#include <cuda.h>

#include "kernels/fused_sm90/config.h"
#include "kernels/fused_sm90/parameters.h"
#include "window/axis.h"

namespace natten::fused_sm90 {

enum class Side { queries, keys };

// Positions of the walked side that the row at position p of the owned side is paired with, as far as they were passed.
template <Side kOwned>
NATTEN_HOST_DEVICE Range related(const Group& g, int p) {
  if constexpr (kOwned == Side::queries) {
    const Range r = window(g, p);
    return {r.begin - g.kv_position, r.end - g.kv_position};
  } else {
    const Range r = inverse_window(g, p);
    const int begin = min_int(max_int(r.begin - g.q_position, 0), g.q_count);
    return {begin, max_int(min_int(r.end - g.q_position, g.q_count), begin)};
  }
}

// Tensors of a gradient kernel, in the order of their maps. "Scores" are the operands of S, "grads" those of dP.
enum Operand {
  kOwnScores,
  kOwnGrads,
  kWalkedScores,
  kWalkedGrads,
  kStatistics,
  kScoresGradient,
  kGradsGradient,
  kOperands
};

// Per query and head {logsumexp * log2(e), delta} and 8 unused bytes: the copy engine wants strides of 16 bytes. In
// shared memory a row takes the 64 bytes of the narrowest box, swizzled: they lie in 16-byte chunk row / 2 % 4.
constexpr int kStatisticsBytes = 16, kStatisticsRowBytes = 64, kStatisticsChannels = 4;

struct GradientShape {
  int head_dim;  // class
  Side owned;
  int walked;      // rows of a step
  int warpgroups;  // consumers, each of which owns 64 rows
  int consumer_registers, producer_registers;

  constexpr bool is(int head_dim_, Side owned_) const { return head_dim == head_dim_ && owned == owned_; }
};

// Per row and thread: head_dim / 2 accumulators for each gradient, and walked / 2 values of S and of dP, which shrink
// to walked / 4 each when they become operands. At D 128 the two gradients of keys leave room for two warpgroups only.
constexpr GradientShape kGradientShapes[] = {
    {64, Side::keys, 64, 3, 160, 32},
    {64, Side::queries, 64, 3, 160, 32},
    {128, Side::keys, 64, 2, 240, 24},
    {128, Side::queries, 64, 3, 160, 32},
};

constexpr GradientShape gradient_shape(int head_dim, Side owned) {
  for (const GradientShape& shape : kGradientShapes) {
    if (shape.is(head_dim, owned)) return shape;
  }
  return {};
}
// 0: none.
constexpr int gradient_class(int head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 0; }

struct GradientParameters : Parameters {
  FoldUnits operand[kOperands];
  int rounds;            // walks per tile: query heads of a key head, or 1
  float gradient_scale;  // of dK and dQ
};

template <typename Element_, int kHeadDim_, Side kOwned_>
struct GradientConfig {
  using Element = Element_;
  static constexpr Side kOwned = kOwned_;
  static constexpr bool kOwnsKeys = kOwned == Side::keys;
  static constexpr GradientShape kSelf = gradient_shape(kHeadDim_, kOwned);
  static constexpr int kHeadDim = kHeadDim_, kWarpgroups = kSelf.warpgroups, kWalked = kSelf.walked;
  static constexpr int kChunk = 64, kChunks = kHeadDim / kChunk, kRowBytes = 2 * kChunk;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kOwnBytes = kQueries * kHeadDim * 2, kWalkedBytes = kWalked * kHeadDim * 2;
  static constexpr int kOwnStatisticsBytes = kOwnsKeys ? 0 : kQueries * kStatisticsRowBytes;
  static constexpr int kWalkedStatisticsBytes = kOwnsKeys ? kWalked * kStatisticsRowBytes : 0;
  static constexpr int kStageBytes = 2 * kWalkedBytes + kWalkedStatisticsBytes;
  static constexpr int kFreeBytes = kMaxSharedBytes - kWarpgroups * (2 * kOwnBytes + kOwnStatisticsBytes) -
                                    static_cast<int>(sizeof(TileRecord)) - 2048;
  static constexpr int kStages = kFreeBytes / kStageBytes < 6 ? kFreeBytes / kStageBytes : 6;
  static_assert(kStages >= 2);
};

// Keys own what queries walk: the statistics are of the queries.
template <class Config>
struct GradientStorage {
  alignas(1024) uint8_t own[Config::kWarpgroups][2][Config::kOwnBytes];  // later the gradients, for the copy engine
  alignas(1024) uint8_t walked[Config::kStages][2][Config::kWalkedBytes];
  alignas(1024) uint8_t statistics[Config::kOwnsKeys ? Config::kStages : Config::kWarpgroups]
                                  [Config::kOwnsKeys ? Config::kWalkedStatisticsBytes : Config::kOwnStatisticsBytes];
  TileRecord tile;
  int fold[kOperands];
  StepRecord step[Config::kStages];
  Group group[kAxes];
  uint64_t own_full[Config::kWarpgroups], full[Config::kStages], empty[Config::kStages];
};

struct GradientMaps {
  CUtensorMap operand[kOperands][kGroupShapes];
};

struct GradientKernelInfo {
  const void* function;
  int threads, shared_bytes;
};
GradientKernelInfo bfloat16_gradient_kernel(int head_dim, Side owned);
GradientKernelInfo float16_gradient_kernel(int head_dim, Side owned);

}  // namespace natten::fused_sm90
