#define ISA_AVX2
#include "nf4.h"
#include "attention.h"
#include "lowrank.h"

const kernel_table kernels_avx2 = {
    "avx2", nf4_linear, nf4_workspace, lowrank_add, attention, attention_workspace,
};
