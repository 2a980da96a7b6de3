/* The exported functions: picks the instruction set once, owns the workspace, bounds the threads. */
#include "dispatch.h"
#include "kernels.h"
#include "pool.h"

#include <stdlib.h>
#include <string.h>
#if defined(__linux__) && defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

/* Multiply-adds that pay for waking one more thread. */
#define WORK_PER_THREAD 32768

static const kernel_table *selected = &kernels_portable;
static const fast_table *selected_fast = &fast_portable;

static int usable(const kernel_table *table) {
#if defined(__x86_64__)
    if (table == &kernels_avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (table == &kernels_avx2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return table == &kernels_portable;
}

static const kernel_table *const TABLES[] = {
#if defined(__x86_64__)
    &kernels_avx512,
    &kernels_avx2,
#endif
    &kernels_portable,
};

/* The fast products that go with an instruction set: VNNI is a part of AVX-512 that not all have. */
static const fast_table *fast_of(const kernel_table *table) {
#if defined(__x86_64__)
    if (table == &kernels_avx512 && __builtin_cpu_supports("avx512vnni")) return &fast_vnni;
    if (table != &kernels_portable) return &fast_avx2;
#elif defined(__APPLE__) && defined(__aarch64__) /* every one of them has the dot product */
    return &fast_neon;
#elif defined(__linux__) && defined(__aarch64__)
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) return &fast_neon;
#endif
    (void)table;
    return &fast_portable;
}

/* The named instruction set, or the best one for NULL. Returns its name, NULL if this CPU lacks it.
 * Not to be called while a kernel runs. */
EXPORT const char *nibble_select(const char *name) {
    for (size_t i = 0; i < sizeof TABLES / sizeof *TABLES; i++)
        if ((!name || !strcmp(name, TABLES[i]->name)) && usable(TABLES[i])) {
            selected = TABLES[i];
            selected_fast = fast_of(selected);
            return selected->name;
        }
    return NULL;
}

static int useful_threads(int64_t work, int threads) {
    return (int)max_i(1, min_(threads, work / WORK_PER_THREAD));
}

/* Grown, never shrunk, one for each calling thread: a call costs no page faults. */
static float *workspace(int64_t floats) {
    static _Thread_local float *memory = NULL;
    static _Thread_local int64_t size = 0;
    if (floats > size) {
        void *fresh = NULL;
        free(memory);
        memory = NULL;
        size = 0;
        if (posix_memalign(&fresh, 64, (size_t)floats * sizeof(float))) return NULL;
        memory = fresh;
        size = floats;
    }
    return memory;
}

/* Each returns 0, or 1 when there is no memory for the workspace, or 2 when an index points outside
 * its tensor; nothing was written then. */

EXPORT int nibble_nf4_linear(const nf4_weight *w, const float *x, int64_t rows, const float *bias,
                             float *y, int threads) {
    const int use = useful_threads(w->out * w->in * (rows + 4) / 4, threads);
    float *memory = workspace(selected->nf4_workspace(w, rows, use));
    if (!memory) return 1;
    selected->nf4_linear(w, x, rows, bias, y, use, memory);
    return 0;
}

EXPORT const char *nibble_fast_name(void) { return selected_fast->name; }

/* The 16 levels of NF4 as the fast products take them, in steps of what is returned. */
EXPORT float nibble_fast_levels(int32_t *levels) {
    for (int i = 0; i < 16; i++) levels[i] = selected_fast->levels[i] - selected_fast->level_zero;
    return selected_fast->unit;
}

/* The 256 bytes of a weight in 8 bits, likewise: as stored, or halves rounded up, and less what that
 * adds on average. */
EXPORT void nibble_fast_bytes(float *values) {
    for (int i = 0; i < 256; i++)
        values[i] = selected_fast->byte_unit == 1 ? i - 128 : (i + 1) / 2 * 2 - 128.5f;
}

EXPORT int nibble_fast_linear(const fast_product *products, int64_t count, const float *x,
                              int64_t in, int64_t rows, int threads) {
    int64_t work = 0;
    for (int64_t i = 0; i < count; i++) {
        const fast_product *p = products + i;
        if (p->panels) work += p->out * in * (rows + 4) / 16;
        for (int64_t j = 0; j < p->term_count; j++)
            work += (p->terms[j].stop - p->terms[j].start + 4) / 4 * p->terms[j].rank *
                    (in + p->out);
    }
    const int use = useful_threads(work, threads);
    float *memory = workspace(ceil_div(selected_fast->workspace(products, count, in, rows, use), 4));
    if (!memory) return 1;
    selected_fast->linear(products, count, x, in, rows, use, (uint8_t *)memory);
    return 0;
}

/* How many segments from the first on are kept alike: those of no rank go with any others. */
static int64_t alike(const lowrank_segment *segments, int64_t count, int *rounded) {
    int64_t n = 0;
    *rounded = -1;
    for (; n < count; n++) {
        if (!segments[n].rank) continue;
        const int own = segments[n].a_stored == STORED_I8;
        if (*rounded >= 0 && own != *rounded) break;
        *rounded = own;
    }
    return n;
}

EXPORT int nibble_lowrank_add(const lowrank_segment *segments, int64_t count, const float *x,
                              int64_t in, float *y, int64_t out, int64_t floats, int threads) {
    for (int64_t same; count > 0; segments += same, count -= same) {
        int rounded;
        same = alike(segments, count, &rounded);
        if (rounded == 1) {
            int64_t rows = 0;
            for (int64_t i = 0; i < same; i++) rows = max_i(rows, segments[i].stop);
            const fast_product terms = {NULL, NULL, y, out, 8, segments, same};
            if (nibble_fast_linear(&terms, 1, x, in, rows, threads)) return 1;
            continue;
        }
        const int use = useful_threads(floats * (in + out), threads);
        float *memory = workspace(floats + 1);
        if (!memory) return 1;
        selected->lowrank_add(segments, same, x, in, y, out, use, memory);
    }
    return 0;
}

/* Do all rows and all pages that will be read exist? */
static int attention_fits(const attention_call *c) {
    if (c->query_start[0] < 0 || c->query_start[c->sequences] > c->tokens) return 0;
    for (int64_t i = 0; i < c->sequences; i++) {
        const int64_t length = (int64_t)c->query_start[i + 1] - c->query_start[i];
        const int64_t context = c->context_len[i];
        if (length < 0 || context < length || context > c->table_width * c->block_size) return 0;
        if (length == 0) continue;
        const int64_t seen = c->window ? max_i(0, context - length + 1 - c->window) : 0;
        for (int64_t b = seen / c->block_size; b < ceil_div(context, c->block_size); b++) {
            const int32_t page = c->tables[i * c->table_width + b];
            if (page < 0 || page >= c->blocks) return 0;
        }
    }
    return 1;
}

EXPORT int nibble_attention(const attention_call *call, int threads) {
    int64_t work = 0;
    if (!attention_fits(call)) return 2;
    for (int64_t i = 0; i < call->sequences; i++)
        work += (int64_t)(call->query_start[i + 1] - call->query_start[i]) * call->context_len[i];
    const int use = useful_threads(work * call->heads * call->dim, threads);
    float *memory = workspace(use * selected->attention_workspace(call));
    if (!memory) return 1;
    selected->attention(call, use, memory);
    return 0;
}

EXPORT int nibble_cache_write(const cache_call *call, int threads) {
    for (int64_t i = 0; i < call->rows; i++)
        if (call->slots[i] < 0 || call->slots[i] >= call->places) return 2;
    const int64_t work = call->rows * call->heads * call->dim;
    selected->cache_write(call, useful_threads(work, threads));
    return 0;
}

EXPORT int nibble_dense_linear(const void *w, int64_t stored, const float *x, int64_t rows,
                               int64_t in, int64_t out, const float *bias, float *y, int threads) {
    const int use = useful_threads(out * in * (rows + 4) / 4, threads);
    float *memory = workspace(selected->dense_workspace(in, rows, stored, use) + 1);
    if (!memory) return 1;
    selected->dense_linear(w, stored, x, rows, in, out, bias, y, use, memory);
    return 0;
}

/* Values that pay for waking one more thread, in the functions below. */
#define VALUES_PER_THREAD 16384

static int threads_for(int64_t values, int threads) {
    return (int)max_i(1, min_(threads, values / VALUES_PER_THREAD));
}

EXPORT void nibble_norm(const norm_call *call, int threads) {
    selected->norm(call, threads_for(call->rows * call->width, threads));
}

EXPORT void nibble_rotary(float *x, const float *cos, const float *sin, int64_t rows,
                          int64_t heads, int64_t dim, int threads) {
    selected->rotary(x, cos, sin, rows, heads, dim, threads_for(rows * heads * dim, threads));
}

EXPORT void nibble_each(int kind, const float *a, const float *b, float cap, float *to,
                        int64_t size, int threads) {
    selected->each(kind, a, b, cap, to, size, threads_for(size, threads));
}

/* Rows [start, stop) of a weight in floats; of panels, those of 4 bits. */
EXPORT void nibble_nf4_rows(const nf4_weight *w, int64_t start, int64_t stop, float *to,
                            int threads) {
    selected->nf4_rows(w, start, stop, to, threads_for((stop - start) * w->in, threads));
}

EXPORT void nibble_panel_rows(const uint8_t *panels, int64_t in, int64_t start, int64_t stop,
                              float *to, int threads) {
    selected->panel_rows(panels, in, start, stop, to, threads_for((stop - start) * in, threads));
}

/* reduce.h; rows of one value or more. */
EXPORT int nibble_reduce(const float *x, int64_t rows, int64_t width, int64_t stride,
                         int64_t *best, float *log_sum, int threads) {
    float *memory = workspace(selected->reduce_workspace(rows, width) + 1);
    if (!memory) return 1;
    selected->reduce(x, rows, width, stride, best, log_sum, threads_for(rows * width, threads),
                     memory);
    return 0;
}

EXPORT void nibble_largest(const float *x, int64_t width, int64_t count, float *values,
                           int64_t *places) {
    selected->largest(x, width, count, values, places);
}
