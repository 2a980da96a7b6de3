/* For each segment, in place on its rows: y = gain * (y + B (d * (A x))) + bias.
 *
 * First every A x goes to the workspace, then the columns of y are dealt out and each thread takes
 * its columns through all segments in their order: several terms may touch the same rows.
 *
 * Order of additions. A x: lane l of VL adds up the columns l, l + VL, ... and `sum_each` joins the
 * lanes. B u: rank after rank, from 0 to r - 1; then y plus that sum.
 */
#ifndef NIBBLE_LOWRANK_H
#define NIBBLE_LOWRANK_H

#include "kernels.h"
#include "pool.h"
#include "simd.h"

#define SHRINK_ROWS (4 * TILE) /* rows of x in one task */
#define SHRINK_RANKS 16        /* rows of A in one task */
#define EXPAND_TILE 4          /* rows of y in one register tile */

INLINE vf load_as(const void *p, int64_t i, const int stored) {
    return stored == STORED_BF16 ? load_bf16((const uint16_t *)p + i) : load((const float *)p + i);
}

INLINE float read_as(const void *p, int64_t i, const int stored) {
    return stored == STORED_BF16 ? from_bf16(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

/* A line of bf16 a little ahead: of few rows of x these factors are read as fast as memory gives
 * them, from as many places at a time as there are ranks. For float32 it bought nothing. */
#define AHEAD 128 /* numbers */
INLINE void prefetch_as(const void *p, int64_t i, const int stored, const int rows) {
    if (stored == STORED_BF16 && rows <= 2) __builtin_prefetch((const uint16_t *)p + i + AHEAD);
}

INLINE vf load_some(const void *p, int64_t i, int64_t count, const int stored) {
    float lane[VL] = {0};
    for (int64_t l = 0; l < count; l++) lane[l] = read_as(p, i + l, stored);
    return load(lane);
}

/* u[t * ldu + r] = a row r . x row t, for four rows of A (`row`: their first elements). */
INLINE void shrink_tile(const void *a, const int64_t row[4], const int stored, const float *x,
                        int64_t in, const int tile, float out[][4]) {
    vf sum[4][TILE];
    const int64_t whole = in / VL * VL;
#pragma GCC unroll 8
    for (int r = 0; r < 4; r++)
#pragma GCC unroll 8
        for (int t = 0; t < tile; t++) sum[r][t] = splat(0.0f);
    for (int64_t k = 0; k < whole; k += VL) {
        vf column[TILE];
#pragma GCC unroll 8
        for (int t = 0; t < tile; t++) column[t] = load(x + t * in + k);
#pragma GCC unroll 8
        for (int r = 0; r < 4; r++) {
            vf weights = load_as(a, row[r] + k, stored);
            prefetch_as(a, row[r] + k, stored, tile);
#pragma GCC unroll 8
            for (int t = 0; t < tile; t++) sum[r][t] = fma_(weights, column[t], sum[r][t]);
        }
    }
    if (whole < in) {
        vf column[TILE];
#pragma GCC unroll 8
        for (int t = 0; t < tile; t++)
            column[t] = load_some(x, t * in + whole, in - whole, STORED_F32);
#pragma GCC unroll 8
        for (int r = 0; r < 4; r++) {
            vf weights = load_some(a, row[r] + whole, in - whole, stored);
#pragma GCC unroll 8
            for (int t = 0; t < tile; t++) sum[r][t] = fma_(weights, column[t], sum[r][t]);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < tile; t++) sum_each(out[t], sum[0][t], sum[1][t], sum[2][t], sum[3][t]);
}

INLINE void shrink_rows(const void *a, const int64_t row[4], const int stored, const float *x,
                        int64_t in, int tile, float out[][4]) {
    switch (tile) {
    case 1: shrink_tile(a, row, stored, x, in, 1, out); break;
#if TILE >= 2
    case 2: shrink_tile(a, row, stored, x, in, 2, out); break;
#endif
#if TILE >= 3
    case 3: shrink_tile(a, row, stored, x, in, 3, out); break;
#endif
#if TILE >= 4
    case 4: shrink_tile(a, row, stored, x, in, 4, out); break;
#endif
#if TILE >= 5
    case 5: shrink_tile(a, row, stored, x, in, 5, out); break;
#endif
#if TILE >= 6
    case 6: shrink_tile(a, row, stored, x, in, 6, out); break;
#endif
    }
}

static void shrink_f32(const void *a, const int64_t row[4], const float *x, int64_t in, int tile,
                       float out[][4]) {
    shrink_rows(a, row, STORED_F32, x, in, tile, out);
}

static void shrink_bf16(const void *a, const int64_t row[4], const float *x, int64_t in, int tile,
                        float out[][4]) {
    shrink_rows(a, row, STORED_BF16, x, in, tile, out);
}

/* u [stop - start, rank]: ranks [r0, r1) of rows [t0, t1) of a segment. */
static void shrink(const lowrank_segment *s, const float *x, int64_t in, int64_t t0, int64_t t1,
                   int64_t r0, int64_t r1, float *u) {
    float sums[TILE][4];
    for (int64_t r = r0; r < r1; r += 4) {
        int64_t row[4];
        const int64_t used = min_(4, r1 - r);
        for (int64_t i = 0; i < 4; i++) row[i] = (r + min_(i, used - 1)) * in;
        for (int64_t t = t0; t < t1; t += TILE) {
            const int tile = (int)min_(TILE, t1 - t);
            const float *rows = x + (s->start + t) * in;
            if (s->a_stored == STORED_BF16)
                shrink_bf16(s->a, row, rows, in, tile, sums);
            else
                shrink_f32(s->a, row, rows, in, tile, sums);
            for (int i = 0; i < tile; i++)
                for (int64_t j = 0; j < used; j++)
                    u[(t + i) * s->rank + r + j] = s->d ? s->d[r + j] * sums[i][j] : sums[i][j];
        }
    }
}

/* `vectors` vectors of columns from o on, for `tile` rows. */
INLINE void expand_tile(const lowrank_segment *s, const int stored, const float *u, float *y,
                        int64_t out, int64_t o, const int tile, const int vectors) {
    vf sum[EXPAND_TILE][2];
#pragma GCC unroll 4
    for (int t = 0; t < tile; t++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) sum[t][v] = splat(0.0f);
    for (int64_t r = 0; r < s->rank; r++) {
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            vf weights = load_as(s->b, r * out + o + v * VL, stored);
            prefetch_as(s->b, r * out + o + v * VL, stored, tile);
#pragma GCC unroll 4
            for (int t = 0; t < tile; t++)
                sum[t][v] = fma_(splat(u[t * s->rank + r]), weights, sum[t][v]);
        }
    }
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++) {
        const int64_t column = o + v * VL;
#pragma GCC unroll 4
        for (int t = 0; t < tile; t++) {
            vf value = load(y + t * out + column) + sum[t][v];
            if (s->gain) value = load(s->gain + column) * value;
            if (s->bias) value = value + load(s->bias + column);
            store(y + t * out + column, value);
        }
    }
}

/* The last columns of a width that is no multiple of VL, with the vector code's operations. */
static void expand_rest(const lowrank_segment *s, const float *u, float *y, int64_t out,
                        int64_t o0, int64_t o1, int64_t rows) {
    const int stored = s->b_stored == STORED_BF16;
    for (int64_t t = 0; t < rows; t++)
        for (int64_t o = o0; o < o1; o++) {
            float sum = 0.0f;
            for (int64_t r = 0; r < s->rank; r++) {
                float weight = read_as(s->b, r * out + o, stored);
#if defined(__FMA__) || defined(__aarch64__)
                sum = __builtin_fmaf(u[t * s->rank + r], weight, sum);
#else
                sum = u[t * s->rank + r] * weight + sum;
#endif
            }
            float value = y[t * out + o] + sum;
            if (s->gain) value = s->gain[o] * value;
            if (s->bias) value = value + s->bias[o];
            y[t * out + o] = value;
        }
}

INLINE void expand_as(const lowrank_segment *s, const int stored, const float *u, float *y,
                      int64_t out, int64_t o0, int64_t o1) {
    const int64_t rows = s->stop - s->start;
    int64_t o = o0;
    for (; o + 2 * VL <= o1; o += 2 * VL) {
        int64_t t = 0;
        for (; t + EXPAND_TILE <= rows; t += EXPAND_TILE)
            expand_tile(s, stored, u + t * s->rank, y + t * out, out, o, EXPAND_TILE, 2);
        for (; t < rows; t++) expand_tile(s, stored, u + t * s->rank, y + t * out, out, o, 1, 2);
    }
    for (; o + VL <= o1; o += VL)
        for (int64_t t = 0; t < rows; t++)
            expand_tile(s, stored, u + t * s->rank, y + t * out, out, o, 1, 1);
    if (o < o1) expand_rest(s, u, y, out, o, o1, rows);
}

static void expand(const lowrank_segment *s, const float *u, float *y, int64_t out, int64_t o0,
                   int64_t o1) {
    float *rows = y + s->start * out;
    if (s->b_stored == STORED_BF16)
        expand_as(s, STORED_BF16, u, rows, out, o0, o1);
    else
        expand_as(s, STORED_F32, u, rows, out, o0, o1);
}

typedef struct {
    const lowrank_segment *segments;
    const float *x;
    float *y, *inner;
    int64_t count, in, out, columns;
} lowrank_job;

/* Tasks of one segment's A x: SHRINK_RANKS ranks for SHRINK_ROWS rows each. */
INLINE int64_t shrink_tasks(const lowrank_segment *s) {
    return ceil_div(s->rank, SHRINK_RANKS) * ceil_div(s->stop - s->start, SHRINK_ROWS);
}

static void shrink_task(const void *data, int64_t task, int worker) {
    const lowrank_job *job = data;
    const lowrank_segment *s = job->segments;
    float *u = job->inner;
    (void)worker;
    for (; task >= shrink_tasks(s); s++) {
        task -= shrink_tasks(s);
        u += (s->stop - s->start) * s->rank;
    }
    const int64_t across = ceil_div(s->rank, SHRINK_RANKS);
    const int64_t t0 = task / across * SHRINK_ROWS, r0 = task % across * SHRINK_RANKS;
    shrink(s, job->x, job->in, t0, min_(s->stop - s->start, t0 + SHRINK_ROWS), r0,
           min_(s->rank, r0 + SHRINK_RANKS), u);
}

static void expand_task(const void *data, int64_t task, int worker) {
    const lowrank_job *job = data;
    const float *u = job->inner;
    const int64_t start = task * job->columns, stop = min_(job->out, start + job->columns);
    (void)worker;
    for (int64_t i = 0; i < job->count; i++) {
        const lowrank_segment *s = job->segments + i;
        expand(s, u, job->y, job->out, start, stop);
        u += (s->stop - s->start) * s->rank;
    }
}

static void lowrank_add(const lowrank_segment *segments, int64_t count, const float *x, int64_t in,
                        float *y, int64_t out, int threads, float *workspace) {
    lowrank_job job = {segments, x, y, workspace, count, in, out, 0};
    int64_t tasks = 0;
    for (int64_t i = 0; i < count; i++) tasks += shrink_tasks(segments + i);
    /* Whole vectors for each task, so that the cut does not move the remainder. */
    job.columns = max_i(2 * VL, ceil_div(ceil_div(out, 2 * threads), 2 * VL) * 2 * VL);
    pool_run(shrink_task, &job, tasks, threads);
    pool_run(expand_task, &job, ceil_div(out, job.columns), threads);
}

#endif
