// Chooses the tile shapes of a gradient kernel by simulated cost.
#pragma once

#include "kernels/arguments.h"
#include "kernels/fused_sm90/backward_config.h"

namespace natten::fused_sm90 {

// Boxes are x, y, z of the problem's axes.
struct GradientSchedule {
  int own_box[kAxes];     // 64 rows of a warpgroup, extents powers of two
  int walked_box[kAxes];  // rows of a step, innermost extent a multiple of 8
  int pair_axis;          // along which a block's warpgroups lie side by side
};

// The cheapest schedule. Remembers what it found for the last problems.
GradientSchedule choose_gradient_schedule(const Problem& problem, Pass pass, int head_dim_class, int multiprocessors);

}  // namespace natten::fused_sm90
