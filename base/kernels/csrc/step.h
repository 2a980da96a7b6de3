/* What stands between the products of a decoder layer.
 *
 * Every function works on rows, or on single values, and does the same operations wherever a value
 * stands: the last ones of a width that is no multiple of VL go through the vector code too.
 */
#include "dispatch.h"
#include "kernels.h"
#include "pool.h"
#include "simd.h"

#define FLOATS_PER_TASK 16384 /* values in one task of the functions that work value by value */

INLINE vf load_first(const float *p, int64_t count) {
    float lane[VL] = {0};
    if (count >= VL) return load(p);
    memcpy(lane, p, (size_t)count * sizeof *p);
    return load(lane);
}

INLINE void store_first(float *p, vf a, int64_t count) {
    float lane[VL];
    if (count >= VL) {
        store(p, a);
        return;
    }
    store(lane, a);
    memcpy(p, lane, (size_t)count * sizeof *p);
}

/* RMSNorm (Zhang & Sennrich 2019) after a residual addition:
 *     s = x + add;   y = (weight + shift) * s / sqrt(mean(s^2) + eps)
 * Order of additions. Lane l of VL adds up the squares l, l + VL, ...; `sum_lanes` joins them. */
static void norm_row(const norm_call *c, int64_t row) {
    const int64_t token = row / c->each;
    const float *weight = c->weight, *x = c->x + row * c->width;
    float *y = c->y + row * c->width;
    vf squares = splat(0.0f);
    for (int64_t i = 0; i < c->owners; i++)
        if (c->own[i].start <= token && token < c->own[i].stop) weight = c->own[i].weight;
    for (int64_t k = 0; k < c->width; k += VL) {
        const int64_t count = c->width - k;
        vf value = load_first(x + k, count);
        if (c->add) {
            value = value + load_first(c->add + row * c->width + k, count);
            store_first(c->sum + row * c->width + k, value, count);
        }
        squares = fma_(value, value, squares);
    }
    const float *s = c->add ? c->sum + row * c->width : x;
    const vf factor = splat(1.0f / sqrtf(sum_lanes(squares) / (float)c->width + c->eps));
    for (int64_t k = 0; k < c->width; k += VL) {
        const int64_t count = c->width - k;
        const vf scale = load_first(weight + k, count) + splat(c->shift);
        store_first(y + k, scale * (load_first(s + k, count) * factor), count);
    }
}

static void norm_task(const void *data, int64_t task, int worker) {
    const norm_call *c = data;
    const int64_t step = max_i(1, FLOATS_PER_TASK / c->width);
    const int64_t stop = min_(c->rows, (task + 1) * step);
    (void)worker;
    for (int64_t row = task * step; row < stop; row++) norm_row(c, row);
}

static void norm(const norm_call *c, int threads) {
    pool_run(norm_task, c, ceil_div(c->rows, max_i(1, FLOATS_PER_TASK / c->width)), threads);
}

/* Rotary embedding (Su et al. 2021) in place, halves apart as Llama has them: with x = (a, b),
 *     a' = a cos_a - b sin_a;   b' = b cos_b + a sin_b
 * Each product is rounded before the sum, as torch does it. */
INLINE void rotate(float *x, const float *cos, const float *sin, int64_t half) {
    for (int64_t d = 0; d < half; d += VL) {
        const int64_t count = half - d;
        const vf a = load_first(x + d, count), b = load_first(x + half + d, count);
        const vf left = a * load_first(cos + d, count) - b * load_first(sin + d, count);
        const vf right =
            b * load_first(cos + half + d, count) + a * load_first(sin + half + d, count);
        store_first(x + d, left, count);
        store_first(x + half + d, right, count);
    }
}

typedef struct {
    float *x;
    const float *cos, *sin; /* [rows, dim] */
    int64_t rows, heads, dim;
} rotary_job;

static void rotary_task(const void *data, int64_t task, int worker) {
    const rotary_job *job = data;
    const int64_t step = max_i(1, FLOATS_PER_TASK / (job->heads * job->dim));
    const int64_t stop = min_(job->rows, (task + 1) * step);
    (void)worker;
    for (int64_t t = task * step; t < stop; t++)
        for (int64_t h = 0; h < job->heads; h++)
            rotate(job->x + (t * job->heads + h) * job->dim, job->cos + t * job->dim,
                   job->sin + t * job->dim, job->dim / 2);
}

static void rotary(float *x, const float *cos, const float *sin, int64_t rows, int64_t heads,
                   int64_t dim, int threads) {
    const rotary_job job = {x, cos, sin, rows, heads, dim};
    const int64_t step = max_i(1, FLOATS_PER_TASK / (heads * dim));
    pool_run(rotary_task, &job, ceil_div(rows, step), threads);
}

/* 1 / (1 + e^-x), by the e^-|x| that cannot overflow. */
INLINE vf sigmoid_(vf x) {
    const vf size = (vf)((lanes)x & ~(lanes)splat(-0.0f));
    const vf e = exp_(splat(-0.0f) - size);
    return where((lanes)(x < splat(0.0f)), e, splat(1.0f)) / (splat(1.0f) + e);
}

/* x/2 (1 + tanh u), u = sqrt(2/pi) (x + 0.044715 x^3): GELU as Gemma computes it. (1 + tanh u)/2 is
 * 1 / (1 + e^-2u), which does not lose its digits where tanh u is near -1. */
INLINE vf gelu_(vf x) {
    return x * sigmoid_(splat(1.5957691216057308f) * (x + splat(0.044715f) * (x * x * x)));
}

typedef struct {
    const float *a, *b;
    float *to, cap;
    int64_t size;
    int kind;
} each_job;

INLINE void each_span(const each_job *job, const int kind, int64_t start, int64_t stop) {
    for (int64_t i = start; i < stop; i += VL) {
        const int64_t count = stop - i;
        const vf a = load_first(job->a + i, count);
        vf value;
        if (kind == EACH_SOFTCAP)
            value = splat(job->cap) * tanh_(a / splat(job->cap));
        else if (kind == EACH_ADD)
            value = a + load_first(job->b + i, count);
        else if (kind == GATE_SILU)
            value = a * sigmoid_(a) * load_first(job->b + i, count);
        else
            value = gelu_(a) * load_first(job->b + i, count);
        store_first(job->to + i, value, count);
    }
}

static void each_task(const void *data, int64_t task, int worker) {
    const each_job *job = data;
    const int64_t start = task * FLOATS_PER_TASK, stop = min_(job->size, start + FLOATS_PER_TASK);
    (void)worker;
    switch (job->kind) {
    case GATE_SILU: each_span(job, GATE_SILU, start, stop); break;
    case GATE_GELU: each_span(job, GATE_GELU, start, stop); break;
    case EACH_SOFTCAP: each_span(job, EACH_SOFTCAP, start, stop); break;
    case EACH_ADD: each_span(job, EACH_ADD, start, stop); break;
    }
}

/* to = act(a) * b, cap tanh(a / cap), or a + b, value by value; `to` may be a or b. */
static void each(int kind, const float *a, const float *b, float cap, float *to, int64_t size,
                 int threads) {
    const each_job job = {a, b, to, cap, size, kind};
    pool_run(each_task, &job, ceil_div(size, FLOATS_PER_TASK), threads);
}
