// The compiled kernels, as the launcher sees them.
#pragma once

namespace natten::fused_sm90 {

struct KernelInfo {
  const void* function;
  int threads, shared_bytes;
};

// `variant`: position in kVariants.
KernelInfo bfloat16_kernel(int variant);
KernelInfo float16_kernel(int variant);

}  // namespace natten::fused_sm90
