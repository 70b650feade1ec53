// AVX-512 F, BW, VL and DQ: see instruction_set.h.
#define NATTEN_CPU_INSTRUCTION_SET avx512
#define NATTEN_CPU_VECTOR_BYTES 64
#define NATTEN_CPU_ACCUMULATORS 24
#include "kernels/cpu/instruction_set.h"
