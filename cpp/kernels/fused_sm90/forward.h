// Host side of the Hopper forward kernel.
#pragma once

#include "kernels/arguments.h"

namespace natten::fused_sm90 {

// Null if the kernel can run this call, otherwise the reason why not. Costs about a microsecond and touches no device.
const char* why_unsupported(const ForwardArguments& arguments);

}  // namespace natten::fused_sm90
