#define ISA_AVX512
#define FAST_VNNI
#include "fast.h"

const fast_table fast_vnni = FAST_TABLE("vnni");
