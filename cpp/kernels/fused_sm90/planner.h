// Chooses the tile shapes of a problem by simulated cost.
#pragma once

#include "kernels/arguments.h"

namespace natten::fused_sm90 {

// What Plan::values holds, in this order. Boxes are x, y, z of the problem's axes.
struct Schedule {
  int keys, warpgroups, blocks;  // a variant of the head dim's class, see config.h
  int warpgroup_box[kAxes];      // 64 queries, powers of two
  int key_box[kAxes];            // `keys` keys, innermost extent a multiple of 8
  int pair_axis;                 // along which a block's warpgroups lie side by side
};
constexpr int kScheduleValues = 10;

// The problem's plan if it has one, otherwise the cheapest schedule. Remembers what it found for the last problems.
// Throws std::invalid_argument for a plan that no kernel can run.
Schedule choose_schedule(const Problem& problem, int multiprocessors);

// Whether the tensor cores can mask this schedule's boxes (bias.h).
bool masks_by_bias(const Problem& problem, const Schedule& schedule);

// Position in kVariants, or -1.
int variant_index(int head_dim, const Schedule& schedule);

}  // namespace natten::fused_sm90
