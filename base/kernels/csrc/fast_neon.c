#define ISA_PORTABLE
#define FAST_NEON
#include "fast.h"

const fast_table fast_neon = {"neon", fast_linear, fast_workspace};
