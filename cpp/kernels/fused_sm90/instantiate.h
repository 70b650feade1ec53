// Table of the kernels of one element type, one per variant.
#pragma once

#include <iterator>
#include <utility>

#include "kernels/fused_sm90/kernel.h"
#include "kernels/fused_sm90/kernels.h"

namespace natten::fused_sm90 {

template <typename Element, int... kVariant>
KernelInfo kernel_of(int variant, std::integer_sequence<int, kVariant...>) {
  static const KernelInfo kTable[] = {{reinterpret_cast<const void*>(&forward_kernel<Config<Element, kVariant>>),
                                       Config<Element, kVariant>::kThreads,
                                       static_cast<int>(sizeof(SharedStorage<Config<Element, kVariant>>))}...};
  return kTable[variant];
}

template <typename Element>
KernelInfo kernel_of(int variant) {
  return kernel_of<Element>(variant, std::make_integer_sequence<int, static_cast<int>(std::size(kVariants))>());
}

}  // namespace natten::fused_sm90
