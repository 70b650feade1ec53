// Entry points of the kernel families. Each throws std::runtime_error (std::invalid_argument for what it does not
// support); the CUDA ones launch on `stream` of the current device and return without waiting.
#pragma once

#include <vector>

#include "kernels/arguments.h"

namespace natten {

namespace cpu_naive {
void forward(const ForwardArguments&);
void backward(const BackwardArguments&);
void qk(const UnfusedArguments&);
void av(const UnfusedArguments&);
void inverse_av(const UnfusedArguments&);
void rpb_backward(const RpbBackwardArguments&);
}  // namespace cpu_naive

namespace cpu {
void forward(const ForwardArguments&);
void backward(const BackwardArguments&);
void qk(const UnfusedArguments&);
void av(const UnfusedArguments&);
void inverse_av(const UnfusedArguments&);
const char* instruction_set();
// What the kernel chooses for a problem without a plan, in the numbers that `plan` takes; for explanations.
std::vector<int> forward_plan(
    const Problem&);  // rows and columns of a tile of queries, key rows folded into one vector
}  // namespace cpu

namespace naive {
void forward(const ForwardArguments&, void* stream);
void backward(const BackwardArguments&, void* stream);
void qk(const UnfusedArguments&, void* stream);
void av(const UnfusedArguments&, void* stream);
void inverse_av(const UnfusedArguments&, void* stream);
void rpb_backward(const RpbBackwardArguments&, void* stream);
}  // namespace naive

namespace gemm {
void qk(const UnfusedArguments&, void* stream);
void av(const UnfusedArguments&, void* stream);
void inverse_av(const UnfusedArguments&, void* stream);
}  // namespace gemm

namespace fused_sm80 {
void forward(const ForwardArguments&, void* stream);
void backward(const BackwardArguments&, void* stream);
// Variant, query tile (3), key box (3); or 2, query patch (3), patches of a tile (3), slab step, heads of a block. For
// the current device.
std::vector<int> forward_plan(const Problem&);
}  // namespace fused_sm80

namespace fused_sm90 {
void forward(const ForwardArguments&, void* stream);
void backward(const BackwardArguments&, void* stream);
std::vector<int> forward_plan(const Problem&);  // fused_sm90::Schedule; for the current device
}  // namespace fused_sm90

}  // namespace natten
