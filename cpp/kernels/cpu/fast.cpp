#include "kernels/families.h"
namespace natten::cpu {
void forward(const ForwardArguments& a) { cpu_naive::forward(a); }
void backward(const BackwardArguments& a) { cpu_naive::backward(a); }
void qk(const UnfusedArguments& a) { cpu_naive::qk(a); }
void av(const UnfusedArguments& a) { cpu_naive::av(a); }
void inverse_av(const UnfusedArguments& a) { cpu_naive::inverse_av(a); }
const char* instruction_set() { return "baseline"; }
}  // namespace natten::cpu
