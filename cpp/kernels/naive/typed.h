// The naive operators for one element type. Defined in forward.h, backward.h and unfused.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels/arguments.h"

namespace natten::naive {

template <class T>
void forward(const ForwardArguments&, cudaStream_t);
template <class T>
void backward(const BackwardArguments&, cudaStream_t);
template <class T>
void qk(const UnfusedArguments&, cudaStream_t);
template <class T>
void av(const UnfusedArguments&, cudaStream_t);
template <class T>
void inverse_av(const UnfusedArguments&, cudaStream_t);
template <class T>
void rpb_backward(const RpbBackwardArguments&, cudaStream_t);

}  // namespace natten::naive
