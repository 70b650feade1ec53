// Host side of the patch kernels of the backward pass.
#pragma once

#include "kernels/fused_sm80/host.h"

namespace natten::fused_sm80 {

// Query and key gradients by patches. `p` holds the problem's tensors. False, and nothing launched, where the box
// kernels are expected to be faster or patches do not apply. problem.plan: empty, {2}, or {2, patch (3), grid (3), slab
// extent of the query gradient, and the same of the key gradient}.
bool patch_backward(const Problem& problem, const Parameters& p, cudaStream_t stream);

}  // namespace natten::fused_sm80
