// Entry points of the GEMM family: the arithmetic follows from the element type and the TF32 flag.
#include "kernels/families.h"
#include "kernels/gemm/typed.h"
#include "kernels/launch.h"

namespace natten::gemm {
namespace {

// `rows` are the tensors with a channel axis; attention weights may be aligned in any way.
void check_supported(const Problem& problem, std::initializer_list<const TensorView*> rows) {
  if (problem.type == ScalarType::float64) throw std::invalid_argument("gemm: float64 has no such kernel");
  if (problem.head_dim % 8 != 0 || problem.head_dim > 256) {
    throw std::invalid_argument("gemm: the head dim must be a multiple of 8, at most 256");
  }
  const int element_bytes = problem.type == ScalarType::float32 ? 4 : 2;
  for (const TensorView* view : rows) {
    if (!has_aligned_rows(*view, problem.head_dim, element_bytes)) {
      throw std::invalid_argument("gemm: addresses and strides must be multiples of 16 bytes");
    }
  }
}

template <class P>
struct Arithmetic {
  using Type = P;
};

template <class Call>
void for_arithmetic(const Problem& problem, const Call& call) {
  if (problem.type == ScalarType::float16) return call(Arithmetic<Float16>());
  if (problem.type == ScalarType::bfloat16) return call(Arithmetic<BFloat16>());
  (problem.flags & kAllowTf32) != 0 ? call(Arithmetic<Tf32>()) : call(Arithmetic<Tf32x3>());
}

}  // namespace

void qk(const UnfusedArguments& args, void* stream) {
  check_supported(args.problem, {&args.a, &args.b});
  if (no_queries(args.problem)) return;
  for_arithmetic(args.problem,
                 [&](auto p) { qk<typename decltype(p)::Type>(args, static_cast<cudaStream_t>(stream)); });
}

void av(const UnfusedArguments& args, void* stream) {
  check_supported(args.problem, {&args.b, &args.c});
  if (no_queries(args.problem)) return;
  for_arithmetic(args.problem,
                 [&](auto p) { av<typename decltype(p)::Type>(args, static_cast<cudaStream_t>(stream)); });
}

void inverse_av(const UnfusedArguments& args, void* stream) {
  check_supported(args.problem, {&args.b, &args.c});
  if (no_keys(args.problem)) return;
  for_arithmetic(args.problem,
                 [&](auto p) { inverse_av<typename decltype(p)::Type>(args, static_cast<cudaStream_t>(stream)); });
}

}  // namespace natten::gemm
