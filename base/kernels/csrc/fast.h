/* y[t, o] = unit * sum over blocks b of 64 of  w_scale[o, b] * (x_scale[t, b] * n[t, o, b])  + bias[o]
 * n[t, o, b] = sum over k of block b of  w8[o, k] * x8[t, k],  in integers, so in any order.
 *
 * x8 = round(127 x / m), x_scale = m / 127 with m the largest |x| of the block: 8 bits, to the
 * nearest, made here once for all weights that read the same x. w8 is a signed byte: for NF4 the
 * level in steps of NF4_UNIT (LEVELS, unit = NF4_UNIT), else as stored (unit = 1), and with AVX2 the
 * byte in steps of two (unit = BYTE_UNIT).
 *
 * Order of additions: blocks ascending, one float32 sum for each (t, o); then unit, then the bias.
 * Rows of x, tiles, stretches and threads do not enter.
 *
 * Panels. The weights are kept as panels of 32 rows of W; a panel is one block of 64 columns after
 * the other; a block is its bytes, then its 32 scales. A line of 64 bytes holds 4 columns of 16
 * rows: byte 4 r + i is row r, column i, so one multiply-add of four bytes and a broadcast of four
 * x8 serve 16 rows. Stored in 8 bits (w8 + 128): 4 columns of rows 0 to 15, of rows 16 to 31, the
 * next 4 columns, ... In NF4 each byte has two codes: columns 8 j + i low, 8 j + 4 + i high.
 * `_lines4` and `_lines8` in panels.py lay them out.
 *
 * x8 is kept by tiles of rows, one of up to FAST_TILE or many of up to X_TILE: for each block [rows][64] bytes, [rows] scales, [rows]
 * sums. The sums, -LEVEL_ZERO sum x8, take off what the 128 too many in a byte of w8 has added, or
 * the 64 where levels have those.
 *
 * Tiling. For one tile of rows the codes go to the registers directly; for more, wide.h.
 */
#include "kernels.h"
#include "pool.h"
#include "simd.h"

#include <stdatomic.h>

#define BLOCK 64
#define ROWS 32                                /* rows of W in a panel */
#define NF4_BYTES (ROWS * BLOCK / 2 + ROWS * 4) /* of one block of a panel */
#define INT8_BYTES (ROWS * BLOCK + ROWS * 4)
#define X_BYTES (BLOCK + 8)                    /* of one block of one row of x */
#define X_LIMIT (2 << 20)                      /* bytes of x8 at a time */
#define AHEAD_PANELS 4                         /* of B, where there is no product to hide behind */

#include "dots.h"

#define LINE_ROWS (16 / PARTS8) /* rows of W in a vector */
#define VECTORS (2 * PARTS8)    /* vectors of sums in a panel, for one row of x */
/* Vectors whose sums are in registers at a time: a panel has 32 rows, a small machine 16 names. */
#define GROUP 2

/* The compiler may not load earlier or store later than here. It would keep the float sums of the
 * next block or the codes of the next columns in registers that the integers need. */
#define IN_ORDER __asm__ volatile("" ::: "memory")

INLINE int32_t four_(const int8_t *p) {
    int32_t x;
    memcpy(&x, p, 4);
    return x;
}

/* Bytes of a panel of a term's B (terms.h). */
INLINE int64_t term_bytes(int64_t rank) {
    return ceil_div(rank, 4) * 4 * ROWS + ceil_div(rank, BLOCK) * 2 * ROWS;
}

/* Asks memory for what terms [j, stop) of a product have at panel n of its outputs. */
INLINE void term_prefetch(const fast_product *p, int64_t n, int64_t j, int64_t stop) {
    for (; j < stop; j++) {
        const lowrank_segment *s = p->terms + j;
        const int64_t bytes = term_bytes(s->rank);
        for (int64_t i = 0; i < bytes; i += 64)
            __builtin_prefetch((const char *)s->b + n * bytes + i, 0, 2);
        for (int64_t i = 0; i < ROWS; i += 16) {
            if (s->gain) __builtin_prefetch(s->gain + n * ROWS + i, 0, 2);
            if (s->bias) __builtin_prefetch(s->bias + n * ROWS + i, 0, 2);
        }
    }
}

/* A panel that comes from memory, as the panels of its terms do: they are asked for on the way. */
typedef struct {
    const fast_product *product;
    int64_t n;
} far_panel;

/* Columns 0 to 3 and 4 to 7 of a vector of rows. */
INLINE void two_lines(const uint8_t *p, const int bits, w8 *low, w8 *high) {
    if (bits == 4) {
        line4(p, low, high);
    } else {
        *low = byte_line(p);
        *high = byte_line(p + 128);
    }
}

INLINE i32v any_start(const int bits, int32_t sum) {
    return bits == 4 ? level_start(sum) : byte_start(sum);
}

INLINE i32v any_dot(const int bits, i32v sum, w8 w, int32_t x) {
    return bits == 4 ? level_dot(sum, w, x) : byte_dot(sum, w, x);
}

/* n[t][g] += a block of GROUP vectors of W from their first lines on, for `tile` rows of x. */
INLINE void fast_block(const uint8_t *line, const int bits, const int8_t *x8, const int tile,
                       i32v n[][GROUP]) {
    const int some = tile > FEW ? 1 : GROUP;
#pragma GCC unroll 2
    for (int first = 0; first < GROUP; first += some) {
        const uint8_t *p = line + first * (64 / PARTS8);
#pragma GCC unroll 1
        for (int k = 0; k < BLOCK; k += 8, p += 32 * bits) {
            w8 low[GROUP], high[GROUP];
            IN_ORDER;
#pragma GCC unroll 2
            for (int g = 0; g < some; g++) two_lines(p + g * (64 / PARTS8), bits, &low[g], &high[g]);
#pragma GCC unroll 16
            for (int t = 0; t < tile; t++)
#pragma GCC unroll 2
                for (int g = 0; g < some; g++)
                    n[t][first + g] =
                        any_dot(bits, n[t][first + g], low[g], four_(x8 + t * BLOCK + k));
#pragma GCC unroll 16
            for (int t = 0; t < tile; t++)
#pragma GCC unroll 2
                for (int g = 0; g < some; g++)
                    n[t][first + g] =
                        any_dot(bits, n[t][first + g], high[g], four_(x8 + t * BLOCK + k + 4));
        }
    }
}

INLINE void add_any(const int bits, float *sums, i32v n, int32_t x_sum, f32v x_scale, f32v w_scale) {
    if (bits == 4) add_block(sums, n, x_scale, w_scale);
    else add_bytes(sums, n, x_sum, x_scale, w_scale);
}

/* sums[t][r] += the terms of `blocks` blocks, for the 32 rows r of a panel and `tile` rows of x. */
INLINE void fast_tile(const uint8_t *panel, const int bits, const far_panel *far, int64_t blocks,
                      const uint8_t *x, const int tile, float sums[][ROWS]) {
    const int bytes = bits == 4 ? NF4_BYTES : INT8_BYTES;
    const int64_t terms = far->product->term_count;
    for (int64_t b = 0; b < blocks; b++) {
        term_prefetch(far->product, far->n, terms * b / blocks, terms * (b + 1) / blocks);
        IN_ORDER;
        const int8_t *x8 = (const int8_t *)x;
        const float *x_scale = (const float *)(x + tile * BLOCK);
        const int32_t *x_sum = (const int32_t *)(x_scale + tile);
#if defined(__x86_64__)
#pragma GCC unroll 16
        for (int t = 0; t < tile; t++) __builtin_prefetch(x + (tile * X_BYTES) + t * 64);
        /* a page ahead: the processor's own prefetch stops at its end */
#pragma GCC unroll 34
        for (int i = 0; i < bytes; i += 64) __builtin_prefetch(panel + 4608 + i);
#endif
        const float *w_scale = (const float *)(panel + bytes) - ROWS;
        for (int v = 0; v < VECTORS; v += GROUP) {
            i32v n[FAST_TILE][GROUP];
            const uint8_t *line = panel + v * (64 / PARTS8);
#pragma GCC unroll 16
            for (int t = 0; t < tile; t++)
#pragma GCC unroll 2
                for (int g = 0; g < GROUP; g++)
                    n[t][g] = any_start(bits, x_sum[t]);
            fast_block(line, bits, x8, tile, n);
            f32v own[GROUP];
#pragma GCC unroll 2
            for (int g = 0; g < GROUP; g++) own[g] = scales(w_scale + (v + g) * LINE_ROWS);
#pragma GCC unroll 16
            for (int t = 0; t < tile; t++) {
                const f32v all = scale_(x_scale[t]);
#pragma GCC unroll 2
                for (int g = 0; g < GROUP; g++)
                    add_any(bits, sums[t] + (v + g) * LINE_ROWS, n[t][g], x_sum[t], all, own[g]);
            }
        }
        panel += bytes;
        x += tile * X_BYTES;
    }
}

#define FAST_CASE(bits, n)                                                                        \
    case n: fast_tile(panel, bits, far, blocks, x, n, sums); break;
#if FAST_TILE == 12
#define FAST_CASES(bits)                                                                          \
    FAST_CASE(bits, 1) FAST_CASE(bits, 2) FAST_CASE(bits, 3) FAST_CASE(bits, 4)                    \
    FAST_CASE(bits, 5) FAST_CASE(bits, 6) FAST_CASE(bits, 7) FAST_CASE(bits, 8)                    \
    FAST_CASE(bits, 9) FAST_CASE(bits, 10) FAST_CASE(bits, 11) FAST_CASE(bits, 12)
#elif FAST_TILE == 6
#define FAST_CASES(bits)                                                                          \
    FAST_CASE(bits, 1) FAST_CASE(bits, 2) FAST_CASE(bits, 3) FAST_CASE(bits, 4)                    \
    FAST_CASE(bits, 5) FAST_CASE(bits, 6)
#elif FAST_TILE == 8
#define FAST_CASES(bits)                                                                          \
    FAST_CASE(bits, 1) FAST_CASE(bits, 2) FAST_CASE(bits, 3) FAST_CASE(bits, 4)                    \
    FAST_CASE(bits, 5) FAST_CASE(bits, 6) FAST_CASE(bits, 7) FAST_CASE(bits, 8)
#else
#define FAST_CASES(bits) FAST_CASE(bits, 1) FAST_CASE(bits, 2)
#endif

static void fast_tile4(const uint8_t *panel, const far_panel *far, int64_t blocks, const uint8_t *x, int tile,
                       float sums[][ROWS]) {
    switch (tile) { FAST_CASES(4) }
}

static void fast_tile8(const uint8_t *panel, const far_panel *far, int64_t blocks, const uint8_t *x, int tile,
                       float sums[][ROWS]) {
    switch (tile) { FAST_CASES(8) }
}

/* Bits of the largest |x|: they order as |x| does, and NaN is above Inf. */
INLINE uint32_t largest_bits(const float *x) {
    uint32_t most = 0;
    for (int i = 0; i < BLOCK; i++) {
        uint32_t size;
        memcpy(&size, x + i, 4);
        size &= 0x7fffffffu;
        most = size > most ? size : most;
    }
    return most;
}

/* x8 = round(factor x), ties to even, of values up to 127; returns their sum. */
INLINE int32_t round_block(const float *x, float factor, int8_t *x8) {
    int32_t total = 0, whole[BLOCK];
    for (int i = 0; i < BLOCK; i++) {
        const float shifted = x[i] * factor + 12582912.0f; /* rounds to an integer */
        memcpy(whole + i, &shifted, 4);
        whole[i] -= 0x4B400000;
    }
    for (int i = 0; i < BLOCK; i++) total += whole[i];
    for (int i = 0; i < BLOCK; i++) x8[i] = (int8_t)whole[i];
    return total;
}

/* One block of a row: 64 bytes, the scale and -LEVEL_ZERO times their sum. A block of zeros, or of less
 * than 1e-36, is zero; one with Inf or NaN makes the whole row of y NaN through its scale. */
INLINE void fast_quantize_block(const float *x, int8_t *x8, float *scale, int32_t *sum) {
    const uint32_t most = largest_bits(x);
    float largest;
    memcpy(&largest, &most, 4);
    if (most >= 0x7f800000u || !(largest > 1e-36f)) {
        memset(x8, 0, BLOCK);
        *scale = most >= 0x7f800000u ? NAN : 0.0f;
        *sum = 0;
        return;
    }
    *sum = -LEVEL_ZERO * round_block(x, 127.0f / largest, x8);
    *scale = largest / 127.0f;
}

typedef struct {
    const fast_product *products;
    const float *x;
    uint8_t *x8, *rooms, *inner; /* rooms: wide.h; inner: u of all terms, terms.h */
    int64_t count, first_row, rows, blocks, panels_each, in, rank_tasks;
    _Atomic int64_t *ranks_left; /* of rank_tasks, those that are not done */
} fast_job;

/* The next of `rows` rows by parts of up to `most`, even ones: 16 by 12 make 8 + 8, not 12 + 4. */
INLINE int64_t even_part(int64_t rows, int64_t most) {
    return ceil_div(rows, ceil_div(rows, most));
}

INLINE int is_wide(int64_t rows) { return rows > FAST_TILE; }

/* sums -> y[o0 ...] in the end, count values of one row of x. */
INLINE void fast_finish(const fast_product *p, const float *sums, int64_t o0, const int64_t count,
                        float *y) {
    const float unit = p->bits == 4 ? NF4_UNIT : BYTE_UNIT;
    if (p->bias)
        for (int64_t r = 0; r < count; r++) y[r] = sums[r] * unit + p->bias[o0 + r];
    else
        for (int64_t r = 0; r < count; r++) y[r] = sums[r] * unit;
}

#include "wide.h"
#include "terms.h"

/* Rows of x in one task: enough to pay for waking a thread; of many, about a tile. */
INLINE int64_t fast_rows_each(const fast_job *job) {
    return max_i(is_wide(job->rows) ? X_TILE : 4, ceil_div(256, job->blocks));
}

static void fast_quantize_task(const void *data, int64_t task, int worker) {
    const fast_job *job = data;
    const int64_t each = fast_rows_each(job), stop = min_(job->rows, (task + 1) * each);
    (void)worker;
    for (int64_t t0 = 0, tile; t0 < stop; t0 += tile) {
        tile = x_tile(job, t0);
        const int64_t first = max_i(0, task * each - t0), last = min_(tile, stop - t0);
        if (first >= last) continue;
        for (int64_t b = 0; b < job->blocks; b++) {
            uint8_t *block = job->x8 + (t0 * job->blocks + b * tile) * X_BYTES;
            float *scale = (float *)(block + tile * BLOCK);
            for (int64_t t = first; t < last; t++) {
                int8_t *x8 = (int8_t *)block + t * BLOCK;
                fast_quantize_block(job->x + (t0 + t) * job->in + b * BLOCK, x8, scale + t,
                                    (int32_t *)(scale + tile) + t);
            }
        }
    }
}

/* Panel number `panel` of a weight times all rows of x, one tile. */
static void fast_panel(const fast_job *job, const fast_product *p, int64_t panel) {
    const far_panel far = {p, panel};
    const int64_t o0 = panel * ROWS, count = min_(ROWS, p->out - o0);
    const int64_t bytes = p->bits == 4 ? NF4_BYTES : INT8_BYTES;
    const uint8_t *codes = p->panels + panel * job->blocks * bytes;
    float sums[FAST_TILE][ROWS] __attribute__((aligned(64)));
    memset(sums, 0, (size_t)job->rows * sizeof *sums);
    (p->bits == 4 ? fast_tile4 : fast_tile8)(codes, &far, job->blocks, job->x8, (int)job->rows,
                                             sums);
    for (int64_t t = 0; t < job->rows; t++) {
        float *y = p->y + (job->first_row + t) * p->out + o0;
        if (count == ROWS) fast_finish(p, sums[t], o0, ROWS, y);
        else fast_finish(p, sums[t], o0, count, y);
    }
}

INLINE int64_t fast_panels(const fast_product *p) {
    return p->panels || p->term_count ? ceil_div(p->out, ROWS) : 0;
}

/* A part of the terms' A x; or some panels of the products, counted through all of them, each with
 * its B u while its outputs are in the cache. */
static void fast_multiply_task(const void *data, int64_t task, int worker) {
    const fast_job *job = data;
    const uint8_t *u = job->inner;
    if (task < job->rank_tasks) {
        rank_task(job, task);
        return;
    }
    task -= job->rank_tasks;
    int64_t first = task * job->panels_each, stop = first + job->panels_each;
    for (int64_t i = 0; i < job->count && stop > 0; i++) {
        const fast_product *p = job->products + i;
        const int64_t panels = fast_panels(p), end = min_(panels, stop);
        for (int64_t n = max_i(0, first), some; n < end; n += some) {
            some = p->panels && is_wide(job->rows) ? min_(WIDE_PANELS, end - n) : 1;
            if (p->panels && is_wide(job->rows))
                wide_panels(job, p, n, some, job->rooms + worker * wide_room(job->rows, job->blocks));
            else if (p->panels)
                fast_panel(job, p, n);
            else if (n + AHEAD_PANELS < panels)
                term_prefetch(p, n + AHEAD_PANELS, 0, p->term_count);
            if (p->term_count)
                for (int64_t i = 0; i < some; i++) term_panels_of(job, p, u, n + i);
        }
        for (int64_t j = 0; j < p->term_count; j++) u += term_room(job, p->terms + j);
        first -= panels;
        stop -= panels;
    }
}

static int64_t fast_x_rows(int64_t in, int64_t rows) {
    const int64_t each = ceil_div(in, BLOCK) * X_BYTES;
    const int64_t most = max_i(4, X_LIMIT / each / X_TILE) * X_TILE;
    return rows <= most ? rows : ceil_div(even_part(rows, most), X_TILE) * X_TILE;
}

/* Bytes. */
static int64_t fast_workspace(const fast_product *products, int64_t count, int64_t in,
                              int64_t rows, int threads) {
    const int64_t some = fast_x_rows(in, rows);
    return terms_workspace(products, count) + threads * wide_room(some, in / BLOCK) +
           some * (in / BLOCK) * X_BYTES;
}

static void fast_linear(const fast_product *products, int64_t count, const float *x, int64_t in,
                        int64_t rows, int threads, uint8_t *workspace) {
    fast_job job = {.products = products, .count = count, .in = in, .blocks = in / BLOCK};
    const int64_t step = fast_x_rows(in, rows);
    _Atomic int64_t ranks_left;
    int64_t panels = 0;
    for (int64_t i = 0; i < count; i++) panels += fast_panels(products + i);
    job.ranks_left = &ranks_left;
    job.inner = workspace;
    job.rooms = job.inner + terms_workspace(products, count);
    job.x8 = job.rooms + threads * wide_room(step, job.blocks);
    /* About eight turns for each thread: one that comes late leaves little to wait for. */
    job.panels_each = max_i(1, panels / (8 * threads));
    if (is_wide(rows)) job.panels_each = ceil_div(job.panels_each, WIDE_PANELS) * WIDE_PANELS;
    for (job.first_row = 0; job.first_row < rows; job.first_row += step) {
        job.x = x + job.first_row * in;
        job.rows = min_(step, rows - job.first_row);
        job.rank_tasks = rank_tasks(&job);
        atomic_init(&ranks_left, job.rank_tasks);
        pool_run(fast_quantize_task, &job, ceil_div(job.rows, fast_rows_each(&job)), threads);
        pool_run(fast_multiply_task, &job, job.rank_tasks + ceil_div(panels, job.panels_each),
                 threads);
    }
}

#define FAST_TABLE(name) {name, LEVELS, LEVEL_ZERO, NF4_UNIT, (int)BYTE_UNIT, \
                          fast_linear, fast_workspace}
