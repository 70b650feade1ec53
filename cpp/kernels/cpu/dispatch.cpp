// Which instruction set runs.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

#include "kernels/cpu/driver.h"
#include "kernels/families.h"

namespace natten::cpu {
namespace {

struct InstructionSet {
  const char* name;
  const TileKernels& (*tile_kernels)(ScalarType);
  bool supported;
};

// NATTEN_CPU_INSTRUCTION_SET names one to run instead of the best that the processor has: to test or compare the
// others.
InstructionSet choose_instruction_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  const InstructionSet best_first[] = {
#if defined(__x86_64__)
      {"avx512", avx512::tile_kernels, has_avx512},
      {"avx2", avx2::tile_kernels, has_avx2},
#endif
      {"baseline", baseline::tile_kernels, true},
  };
  const char* wanted = std::getenv("NATTEN_CPU_INSTRUCTION_SET");
  for (const InstructionSet& candidate : best_first)
    if (candidate.supported && (!wanted || candidate.name == std::string_view(wanted))) return candidate;
  throw std::runtime_error(std::string("NATTEN_CPU_INSTRUCTION_SET=") + wanted +
                           ": this processor or build has none such");
}

const InstructionSet& chosen_instruction_set() {
  static const InstructionSet chosen = choose_instruction_set();
  return chosen;
}

}  // namespace

const TileKernels& kernels_for(ScalarType type) { return chosen_instruction_set().tile_kernels(type); }

const char* instruction_set() { return chosen_instruction_set().name; }

}  // namespace natten::cpu
