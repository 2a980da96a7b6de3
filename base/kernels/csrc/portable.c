#define ISA_PORTABLE
#include "nf4.h"
#include "attention.h"
#include "lowrank.h"

const kernel_table kernels_portable = {
    "portable", nf4_linear, nf4_workspace, lowrank_add, attention, attention_workspace,
};
