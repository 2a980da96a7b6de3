#define ISA_PORTABLE
#include "fast.h"

const fast_table fast_portable = {"portable", fast_linear, fast_workspace};
