#include "kernels/fused_sm90/backward_kernel.h"

namespace natten::fused_sm90 {
GradientKernelInfo bfloat16_gradient_kernel(int head_dim, Pass pass) {
  return gradient_kernel_of<__nv_bfloat16>(head_dim, pass);
}
}  // namespace natten::fused_sm90
