#define ISA_AVX512
#include "nf4.h"
#include "attention.h"
#include "lowrank.h"
#include "dense.h"
#include "step.h"
#include "rows.h"
#include "reduce.h"

const kernel_table kernels_avx512 = {
    "avx512", nf4_linear, nf4_workspace, lowrank_add, attention, attention_workspace, cache_write,
    dense_linear, dense_workspace, norm, rotary, each, nf4_rows, panel_rows, reduce,
    reduce_workspace, largest,
};
