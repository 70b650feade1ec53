// SSE2 on x86-64, NEON on aarch64: see instruction_set.h.
#define NATTEN_CPU_INSTRUCTION_SET baseline
#define NATTEN_CPU_VECTOR_BYTES 16
#define NATTEN_CPU_ACCUMULATORS 12
#include "kernels/cpu/instruction_set.h"
