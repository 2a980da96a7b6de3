#define ISA_PORTABLE
#include "fast.h"

const fast_table fast_portable = FAST_TABLE("portable");
