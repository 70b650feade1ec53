#include "kernels/fused_sm90/instantiate.h"

namespace natten::fused_sm90 {
KernelInfo bfloat16_kernel(int variant) { return kernel_of<__nv_bfloat16>(variant); }
}  // namespace natten::fused_sm90
