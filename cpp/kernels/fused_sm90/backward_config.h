// Configurations of the gradient kernels, and the shared memory that they imply.
//
// The kernels have one shape: a block owns a tile of one side (keys, or queries) and walks boxes of the other side. So
// they share everything but the products that they accumulate:
//   Pass::keys     S^T = K Q^T, dP^T = V dO^T;  dK += dS^T Q, dV += P^T dO    (walks the queries that see its keys)
//   Pass::queries  S = Q K^T,   dP = dO V^T;    dQ += dS K                    (walks the keys that its queries see)
//   Pass::all      those of `keys`, and dS K, added to dQ in memory: in any order, so results vary in the last bits
#pragma once

#include <cuda.h>

#include "kernels/fused_sm90/config.h"
#include "kernels/fused_sm90/parameters.h"
#include "window/axis.h"

namespace natten::fused_sm90 {

enum class Side { queries, keys };
enum class Pass { queries, keys, all };
constexpr Side owned_side(Pass pass) { return pass == Pass::queries ? Side::queries : Side::keys; }

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
  kAccumulator,  // dQ of Pass::all, floats
  kOperands
};

// Per query and head {logsumexp * log2(e), delta} and 8 unused bytes: the copy engine wants strides of 16 bytes.
constexpr int kStatisticsBytes = 16;

struct GradientShape {
  int head_dim;  // class
  Pass pass;
  int walked;      // rows of a step
  int warpgroups;  // consumers, each of which owns 64 rows
  int consumer_registers, accumulator_registers, producer_registers;

  constexpr bool is(int head_dim_, Pass pass_) const { return head_dim == head_dim_ && pass == pass_; }
};

// Per row and thread: head_dim / 2 accumulators for each gradient, and walked / 2 values of S and of dP, which shrink
// to walked / 4 each when they become operands. At D 128 the two gradients of keys leave room for two warpgroups only.
// Pass::all pays a third warpgroup for dQ, so S and dP are never in flight together; its steps have 128 queries at D
// 64, where that keeps a product (64 x 128) below the bandwidth of shared memory.
constexpr GradientShape kGradientShapes[] = {
    {64, Pass::keys, 64, 3, 160, 0, 32},  {64, Pass::queries, 64, 3, 160, 0, 32},  {64, Pass::all, 128, 2, 208, 72, 24},
    {128, Pass::keys, 64, 2, 240, 0, 24}, {128, Pass::queries, 64, 3, 160, 0, 32}, {128, Pass::all, 64, 2, 208, 72, 24},
};

constexpr GradientShape gradient_shape(int head_dim, Pass pass) {
  for (const GradientShape& shape : kGradientShapes) {
    if (shape.is(head_dim, pass)) return shape;
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

template <typename Element_, int kHeadDim_, Pass kPass>
struct GradientConfig {
  using Element = Element_;
  static constexpr Side kOwned = owned_side(kPass);
  static constexpr bool kOwnsKeys = kOwned == Side::keys, kAccumulates = kPass == Pass::all;
  static constexpr GradientShape kSelf = gradient_shape(kHeadDim_, kPass);
  static constexpr int kHeadDim = kHeadDim_, kWarpgroups = kSelf.warpgroups, kWalked = kSelf.walked;
  static constexpr int kChunk = 64, kChunks = kHeadDim / kChunk, kRowBytes = 2 * kChunk;
  static constexpr int kConsumerThreads = 128 * kWarpgroups, kAccumulatorThreads = kAccumulates ? 128 : 0;
  static constexpr int kThreads = kConsumerThreads + kAccumulatorThreads + 128;
  // The launch allocates 65536 / threads registers, floored to 8, for each thread: what warpgroups share out.
  static_assert(kConsumerThreads * kSelf.consumer_registers + kAccumulatorThreads * kSelf.accumulator_registers +
                    128 * kSelf.producer_registers <=
                65536 / kThreads / 8 * 8 * kThreads);
  static constexpr int kOwnBytes = kQueries * kHeadDim * 2, kWalkedBytes = kWalked * kHeadDim * 2;
  static constexpr int kOwnStatisticsBytes = kOwnsKeys ? 0 : kQueries * kStatisticsBytes;
  static constexpr int kWalkedStatisticsBytes = kOwnsKeys ? kWalked * kStatisticsBytes : 0;
  static constexpr int kStageBytes = 2 * kWalkedBytes + kWalkedStatisticsBytes;
  static constexpr int kScoreBytes = kWalked * kQueries * 2, kSumBytes = kWalked * kHeadDim * 4;
  static constexpr int kAccumulatorBytes = kAccumulates ? kWarpgroups * kScoreBytes + kSumBytes : 0;
  static constexpr int kFreeBytes = kMaxSharedBytes - kWarpgroups * (2 * kOwnBytes + kOwnStatisticsBytes) -
                                    kAccumulatorBytes - static_cast<int>(sizeof(TileRecord)) - 2048;
  static constexpr int kStages = kFreeBytes / kStageBytes < 6 ? kFreeBytes / kStageBytes : 6;
  static_assert(kStages >= 2);
};

// Which walk a step belongs to stands above the flags of StepRecord.
constexpr int kRoundBit = 9;
static_assert(kAdditionalStep < 1 << kRoundBit);

// Pass::all: dS of each warpgroup on its way to the product for dQ, and dQ of a step on its way to memory.
template <class Config, bool = Config::kAccumulates>
struct AccumulatorStorage {
  static constexpr int kSteps = 8;                                         // that the loader may be ahead
  alignas(1024) uint8_t scores[Config::kWarpgroups][Config::kScoreBytes];  // queries by keys
  alignas(1024) uint8_t sum[Config::kSumBytes];
  StepRecord step[kSteps];
  uint64_t step_full[kSteps], step_empty[kSteps];
  uint64_t scores_full[Config::kWarpgroups], scores_empty[Config::kWarpgroups];
};
template <class Config>
struct AccumulatorStorage<Config, false> {
  static constexpr int kSteps = 1;
};

// Keys own what queries walk: the statistics are of the queries.
template <class Config>
struct GradientStorage {
  alignas(1024) uint8_t own[Config::kWarpgroups][2][Config::kOwnBytes];  // later the gradients, for the copy engine
  alignas(1024) uint8_t walked[Config::kStages][2][Config::kWalkedBytes];
  AccumulatorStorage<Config> accumulator;
  alignas(128) uint8_t statistics[Config::kOwnsKeys ? Config::kStages : Config::kWarpgroups]
                                 [Config::kOwnsKeys ? Config::kWalkedStatisticsBytes : Config::kOwnStatisticsBytes];
  TileRecord tile;
  int fold[kOperands];
  StepRecord step[Config::kStages];
  StepRecord prepared[32];  // loader's own
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
GradientKernelInfo bfloat16_gradient_kernel(int head_dim, Pass pass);
GradientKernelInfo float16_gradient_kernel(int head_dim, Pass pass);

}  // namespace natten::fused_sm90
