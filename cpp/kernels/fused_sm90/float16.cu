#include "kernels/fused_sm90/instantiate.h"

namespace natten::fused_sm90 {
KernelInfo float16_kernel(int variant) { return kernel_of<__half>(variant); }
}  // namespace natten::fused_sm90
