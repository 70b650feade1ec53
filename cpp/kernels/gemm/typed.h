// The GEMM operators for one arithmetic (products.h). Defined in qk.h, av.h and inverse_av.h.
#pragma once

#include <cuda_runtime.h>

#include "kernels/arguments.h"

namespace natten::gemm {

struct Float16;
struct BFloat16;
struct Tf32;
struct Tf32x3;

template <class P>
void qk(const UnfusedArguments&, cudaStream_t);
template <class P>
void av(const UnfusedArguments&, cudaStream_t);
template <class P>
void inverse_av(const UnfusedArguments&, cudaStream_t);

}  // namespace natten::gemm
