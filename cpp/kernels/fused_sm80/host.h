// Host side shared by the passes: from a Problem to Parameters, tile shapes and a launch.
#pragma once

#include <type_traits>

#include "kernels/arguments.h"
#include "kernels/fused_sm80/registry.h"
#include "kernels/launch.h"
#include "tile/token_tile.h"
#include "window/planner.h"

namespace natten::fused_sm80 {

// Neighbouring blocks take the heads of one tile when all the keys that the heads need fit here; then rows of
// neighbouring heads, which share cache lines, are read together. Otherwise they take the tiles of one head.
constexpr double kHeadsInnermostBytes = 16e6;

// Throws std::invalid_argument for what the family does not support.
void check_problem(const Problem& problem);

// Throws std::invalid_argument unless the kernels can read `view` in place: rows of 16-byte chunks.
void check_rows(const TensorView& view, const Problem& problem, int channels, const char* name);

// `view` of a problem's tensor, strides in bytes. Dilated axes step over their group's neighbours.
Tensor make_tensor(const TensorView& view, const Problem& problem, int element_bytes);
// Additional keys [B, S, Hkv, C]: S takes the place of the innermost axis, the others have extent 1.
Tensor make_additional(const TensorView& view, int element_bytes);

// Everything but the tensors and the tiles.
Parameters make_parameters(const Problem& problem);

// The shapes of the owned tile, of its cut for one warp and of the walked boxes.
struct TilePlan {
  Variant variant;
  int owned[kAxes], warp[kAxes], walked[kAxes];
  double scores;  // of `plan`: computed per batch item, head and dilation group, and what masks and the variant add
};
// For a kernel whose blocks own tiles of `owned`. Reads seven numbers: variant, owned tile, walked box.
TilePlan read_plan(const int* values, const Problem& problem, Side owned, const KernelEntry (&entries)[kVariants]);
// `only`: a variant, or -1 for the cheaper one.
TilePlan plan(const Problem& problem, Side owned, const KernelEntry (&entries)[kVariants], int only = -1);

// Sets the tiles, the order of blocks and their number, and launches. Empty grids return at once.
void launch(const KernelEntry& entry, Parameters& parameters, const Problem& problem, Side owned, const TilePlan& tiles,
            int parts, cudaStream_t stream, const char* name);

// Largest dynamic shared memory of a block, of the current device.
int shared_memory_limit();

// The class that a head dim is padded to; throws when there is none.
int head_dim_class(const Problem& problem);

inline int element_bytes(const Problem& problem) { return problem.type == ScalarType::float32 ? 4 : 2; }

// Calls visit(Element(), std::integral_constant<int, head dim class>()).
template <class Visit>
void visit_types(const Problem& problem, Visit visit) {
  const int head_dim = head_dim_class(problem);
  auto with_float32_head_dim = [&](auto element) {
    switch (head_dim) {
      case 32:
        return visit(element, std::integral_constant<int, 32>());
      case 64:
        return visit(element, std::integral_constant<int, 64>());
      default:
        return visit(element, std::integral_constant<int, 128>());
    }
  };
  auto with_head_dim = [&](auto element) {
    switch (head_dim) {
      case 32:
        return visit(element, std::integral_constant<int, 32>());
      case 64:
        return visit(element, std::integral_constant<int, 64>());
      case 96:
        return visit(element, std::integral_constant<int, 96>());
      case 128:
        return visit(element, std::integral_constant<int, 128>());
      case 192:
        return visit(element, std::integral_constant<int, 192>());
      default:
        return visit(element, std::integral_constant<int, 256>());
    }
  };
  if (problem.type == ScalarType::float32)
    problem.flags& kAllowTf32 ? with_float32_head_dim(Tf32()) : with_float32_head_dim(Tf32x3());
  else if (problem.type == ScalarType::float16)
    with_head_dim(__half());
  else
    with_head_dim(__nv_bfloat16());
}

}  // namespace natten::fused_sm80
