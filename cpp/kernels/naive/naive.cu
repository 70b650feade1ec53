// Entry points of the naive family: one instantiation per element type, compiled in files of their own.
#include <stdexcept>

#include "kernels/families.h"
#include "kernels/launch.h"
#include "kernels/naive/typed.h"

namespace natten::naive {
namespace {

template <class Call>
void for_type(ScalarType type, const Call& call) {
  switch (type) {
    case ScalarType::float64:
      return call(double());
    case ScalarType::float32:
      return call(float());
    case ScalarType::float16:
      return call(__half());
    case ScalarType::bfloat16:
      return call(__nv_bfloat16());
  }
  throw std::invalid_argument("naive kernels: unknown element type");
}

}  // namespace

void forward(const ForwardArguments& args, void* stream) {
  for_type(args.problem.type, [&](auto t) { forward<decltype(t)>(args, static_cast<cudaStream_t>(stream)); });
}
void backward(const BackwardArguments& args, void* stream) {
  for_type(args.problem.type, [&](auto t) { backward<decltype(t)>(args, static_cast<cudaStream_t>(stream)); });
}
void qk(const UnfusedArguments& args, void* stream) {
  for_type(args.problem.type, [&](auto t) { qk<decltype(t)>(args, static_cast<cudaStream_t>(stream)); });
}
void av(const UnfusedArguments& args, void* stream) {
  for_type(args.problem.type, [&](auto t) { av<decltype(t)>(args, static_cast<cudaStream_t>(stream)); });
}
void inverse_av(const UnfusedArguments& args, void* stream) {
  for_type(args.problem.type, [&](auto t) { inverse_av<decltype(t)>(args, static_cast<cudaStream_t>(stream)); });
}
void rpb_backward(const RpbBackwardArguments& args, void* stream) {
  for_type(args.problem.type, [&](auto t) { rpb_backward<decltype(t)>(args, static_cast<cudaStream_t>(stream)); });
}

}  // namespace natten::naive
