// AVX2 with FMA: see instruction_set.h.
#define NATTEN_CPU_INSTRUCTION_SET avx2
#define NATTEN_CPU_VECTOR_BYTES 32
#define NATTEN_CPU_ACCUMULATORS 12
#include "kernels/cpu/instruction_set.h"
