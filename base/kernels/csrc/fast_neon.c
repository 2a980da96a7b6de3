#define ISA_PORTABLE
#define FAST_NEON
#include "fast.h"

const fast_table fast_neon = FAST_TABLE("neon");
