#define ISA_AVX2
#define FAST_AVX2
#include "fast.h"

const fast_table fast_avx2 = FAST_TABLE("avx2");
