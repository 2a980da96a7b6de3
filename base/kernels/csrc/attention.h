/* out[t] = sum over visible keys j of softmax_j(scale q[t] . K[j]) V[j], keys and values in pages.
 *
 * The online softmax (Milakov & Gimelshein 2018; Dao 2022, "FlashAttention"): keys come in tiles of
 * KEYS, tile n holding positions n KEYS to (n + 1) KEYS - 1 of the sequence, whatever the pages and
 * the chunk of the prompt are. For each tile, with m the running maximum:
 *     m' = max(m, max s);  p = e^(s - m');  l = l e^(m - m') + sum p;  acc = acc e^(m - m') + p V
 * and at the end out = acc / l.
 *
 * Order of additions. q . K: dimension after dimension. sum p: by lanes within a tile, tiles in
 * order. p V: key after key. A query's position and its own keys fix all of it.
 */
#include "cache.h"
#include "kernels.h"
#include "pool.h"
#include "simd.h"

#define KEYS 32        /* keys of one tile; a multiple of every VL */
#define KEY_VECTORS (KEYS / VL)
#define QUERIES 48     /* query vectors that share a tile of keys, about */
#define SCORE_ROWS 4   /* query vectors in one register tile */

typedef struct {
    float *keys;    /* [dim, KEYS]: a tile of keys, transposed */
    float *values;  /* [KEYS, padded]: a tile of values, where the pages cannot be read in place */
    float *queries; /* [M, dim] */
    float *scores;  /* [M, KEYS] */
    float *sums;    /* [M, padded] */
    float *top;     /* [M]: m above */
    float *total;   /* [M]: l above */
} attention_scratch;

INLINE int64_t padded(int64_t dim) { return ceil_div(dim, VL) * VL; }

/* Tokens of one task: all query heads of a KV head, for so many tokens. */
INLINE int64_t task_tokens(const attention_call *c) {
    return max_i(1, QUERIES / (c->heads / c->kv_heads));
}

static int64_t attention_workspace(const attention_call *c) {
    const int64_t m = task_tokens(c) * (c->heads / c->kv_heads), wide = padded(c->dim);
    const int64_t floats = 2 * KEYS * wide + m * (2 * wide + KEYS + 2);
    return ceil_div(floats, 16) * 16;
}

static attention_scratch attention_split(const attention_call *c, float *p) {
    const int64_t m = task_tokens(c) * (c->heads / c->kv_heads), wide = padded(c->dim);
    attention_scratch s;
    s.keys = p;
    s.values = s.keys + KEYS * wide;
    s.queries = s.values + KEYS * wide;
    s.sums = s.queries + m * wide;
    s.scores = s.sums + m * wide;
    s.top = s.scores + m * KEYS;
    s.total = s.top + m;
    return s;
}

/* The vector of (position, kv head) in a cache. */
INLINE const char *vector_of(const attention_call *c, const void *cache, const int32_t *table,
                             int64_t position, int64_t head) {
    const int64_t page = table[position / c->block_size];
    const int64_t place = (page * c->block_size + position % c->block_size) * c->kv_heads + head;
    return (const char *)cache + place * vector_bytes(c->dim, c->stored);
}

/* keys[d * KEYS + i] = row i [d], for `rows` rows of `stride` floats. */
static void turn_rows(const float *from, int64_t stride, int64_t rows, int64_t dim, float *keys) {
    int64_t i = 0;
    for (; i + 8 <= rows; i += 8) {
        int64_t d = 0;
        for (; d + 8 <= dim; d += 8)
            transpose8(from + i * stride + d, stride, keys + d * KEYS + i, KEYS);
        for (; d < dim; d++)
            for (int64_t r = i; r < i + 8; r++) keys[d * KEYS + r] = from[r * stride + d];
    }
    for (; i < rows; i++)
        for (int64_t d = 0; d < dim; d++) keys[d * KEYS + i] = from[i * stride + d];
}

/* keys[d * KEYS + j] = K[first + j][d] for from <= j < to; other columns stay as they are. `room`
 * is for a tile of rows. */
static void turn_keys(const attention_call *c, const int32_t *table, int64_t first, int64_t from,
                      int64_t to, int64_t head, float *keys, float *room) {
    const int64_t row = c->kv_heads * c->dim;
    if (c->stored != STORED_F32) {
        for (int64_t j = from; j < to; j++)
            unpack_vector(vector_of(c, c->k, table, first + j, head), c->dim, c->stored,
                          room + (j - from) * c->dim);
        turn_rows(room, c->dim, to - from, c->dim, keys + from);
        return;
    }
    for (int64_t j = from; j < to;) {
        const int64_t run = min_(to - j, c->block_size - (first + j) % c->block_size);
        turn_rows((const float *)vector_of(c, c->k, table, first + j, head), row, run, c->dim,
                  keys + j);
        j += run;
    }
}

/* row[j] = V[first + j] for from <= j < to, as `padded(dim)` readable floats. */
static void find_values(const attention_call *c, const int32_t *table, int64_t first, int64_t from,
                        int64_t to, int64_t head, float *values, const float **row) {
    const int64_t wide = padded(c->dim);
    for (int64_t j = from; j < to; j++) {
        const char *value = vector_of(c, c->v, table, first + j, head);
        if (c->stored == STORED_F32 && c->dim % VL == 0) {
            row[j] = (const float *)value;
            continue;
        }
        float *copy = values + j * wide;
        unpack_vector(value, c->dim, c->stored, copy);
        for (int64_t d = c->dim; d < wide; d++) copy[d] = 0.0f;
        row[j] = copy;
    }
}

INLINE void score_tile(const float *queries, int64_t dim, const float *keys, const int rows,
                       float *scores) {
    for (int v0 = 0; v0 < KEY_VECTORS; v0 += 2) {
        vf sum[SCORE_ROWS][2];
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) sum[m][0] = sum[m][1] = splat(0.0f);
        for (int64_t d = 0; d < dim; d++) {
            vf left = load(keys + d * KEYS + v0 * VL), right = load(keys + d * KEYS + v0 * VL + VL);
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++) {
                vf q = splat(queries[m * dim + d]);
                sum[m][0] = fma_(q, left, sum[m][0]);
                sum[m][1] = fma_(q, right, sum[m][1]);
            }
        }
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
            store(scores + m * KEYS + v0 * VL, sum[m][0]);
            store(scores + m * KEYS + v0 * VL + VL, sum[m][1]);
        }
    }
}

/* scores -> p in place; returns the factor e^(m - m') of what was summed before. */
static float soften(const attention_call *c, float *scores, int64_t from, int64_t to, float *top,
                    float *total) {
    const float old = *top;
    vf best = splat(-INFINITY), sum = splat(0.0f);
    lanes index;
    for (int l = 0; l < VL; l++) index[l] = l;
    for (int v = 0; v < KEY_VECTORS; v++) {
        vf s = load(scores + v * VL) * splat(c->scale);
        if (c->softcap != 0.0f) s = splat(c->softcap) * tanh_(s / splat(c->softcap));
        const lanes here = index + (int32_t)(v * VL);
        s = where((here >= (int32_t)from) & (here < (int32_t)to), s, splat(-INFINITY));
        store(scores + v * VL, s);
        best = max_(best, s);
    }
    const float found = max_lanes(best);
    if (found > *top) *top = found;
    for (int v = 0; v < KEY_VECTORS; v++) {
        vf p = exp_(load(scores + v * VL) - splat(*top));
        store(scores + v * VL, p);
        sum = sum + p;
    }
    float lane[VL];
    store(lane, exp_(splat(old - *top)));
    *total = *total * lane[0] + sum_lanes(sum);
    return lane[0];
}

/* sums[m] = sums[m] * factor[m] + sum over from <= j < to of p[m][j] V[j]; `vectors` vectors
 * from dimension d on. */
INLINE void value_tile(const float *p, const float **row, int64_t from, int64_t to, int64_t d, int64_t wide,
                       const float *factor, const int rows, const int vectors, float *sums) {
    vf sum[SCORE_ROWS][4];
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            sum[m][v] = load(sums + m * wide + d + v * VL) * splat(factor[m]);
    for (int64_t j = from; j < to; j++) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            vf value = load(row[j] + d + v * VL);
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++)
                sum[m][v] = fma_(splat(p[m * KEYS + j]), value, sum[m][v]);
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) store(sums + m * wide + d + v * VL, sum[m][v]);
}

INLINE void add_values(const float *p, const float **row, int64_t from, int64_t to, int64_t wide,
                       const float *factor, const int rows, float *sums) {
    int64_t d = 0;
#if VL == 16
    for (; d + 4 * VL <= wide; d += 4 * VL)
        value_tile(p, row, from, to, d, wide, factor, rows, 4, sums);
#endif
    for (; d + 2 * VL <= wide; d += 2 * VL)
        value_tile(p, row, from, to, d, wide, factor, rows, 2, sums);
    for (; d < wide; d += VL) value_tile(p, row, from, to, d, wide, factor, rows, 1, sums);
}

/* Tokens [t0, t1) of sequence i, all query heads of one KV head. */
static void attend(const attention_call *c, int64_t i, int64_t head, int64_t t0, int64_t t1,
                   attention_scratch s) {
    const int64_t group = c->heads / c->kv_heads, m = (t1 - t0) * group, wide = padded(c->dim);
    const int64_t start = c->query_start[i], length = c->query_start[i + 1] - start;
    const int64_t position = c->context_len[i] - length; /* of the sequence's first token here */
    const int32_t *table = c->tables + i * c->table_width;
    const int64_t last = position + t1; /* one past the last key that any of these tokens sees */
    const int64_t lowest = c->window ? max_i(0, position + t0 + 1 - c->window) : 0;
    for (int64_t t = t0; t < t1; t++)
        memcpy(s.queries + (t - t0) * group * c->dim,
               c->q + ((start + t) * c->heads + head * group) * c->dim,
               (size_t)(group * c->dim) * sizeof(float));
    for (int64_t r = 0; r < m; r++) {
        s.top[r] = -FLT_MAX;
        s.total[r] = 0.0f;
    }
    memset(s.sums, 0, (size_t)(m * wide) * sizeof(float));
    memset(s.keys, 0, (size_t)(KEYS * c->dim) * sizeof(float));
    for (int64_t tile = lowest / KEYS * KEYS; tile < last; tile += KEYS) {
        const float *row[KEYS];
        /* Pages of keys that nobody here sees may be gone: they are not touched. */
        const int64_t begin = max_i(0, lowest - tile), end = min_(KEYS, last - tile);
        turn_keys(c, table, tile, begin, end, head, s.keys, s.values);
        find_values(c, table, tile, begin, end, head, s.values, row);
        for (int64_t r0 = 0; r0 < m;) {
            const int rows = m - r0 >= SCORE_ROWS ? SCORE_ROWS : 1;
            float factor[SCORE_ROWS];
            float *scores = s.scores + r0 * KEYS;
            int visible = 0;
            if (rows == SCORE_ROWS)
                score_tile(s.queries + r0 * c->dim, c->dim, s.keys, SCORE_ROWS, scores);
            else
                score_tile(s.queries + r0 * c->dim, c->dim, s.keys, 1, scores);
            for (int r = 0; r < rows; r++) {
                const int64_t at = position + t0 + (r0 + r) / group; /* this query's position */
                const int64_t low = c->window ? max_i(0, at + 1 - c->window) : 0;
                const int64_t from = max_i(0, low - tile), to = min_(KEYS, at + 1 - tile);
                if (from < to) {
                    factor[r] = soften(c, scores + r * KEYS, from, to, s.top + r0 + r,
                                       s.total + r0 + r);
                    visible = 1;
                } else {
                    factor[r] = 1.0f;
                    memset(scores + r * KEYS, 0, KEYS * sizeof(float));
                }
            }
            if (visible && rows == SCORE_ROWS)
                add_values(scores, row, begin, end, wide, factor, SCORE_ROWS, s.sums + r0 * wide);
            else if (visible)
                add_values(scores, row, begin, end, wide, factor, 1, s.sums + r0 * wide);
            r0 += rows;
        }
    }
    for (int64_t r = 0; r < m; r++) {
        float *to = c->out + ((start + t0 + r / group) * c->heads + head * group + r % group) * c->dim;
        for (int64_t d = 0; d < c->dim; d++) to[d] = s.sums[r * wide + d] / s.total[r];
    }
}

typedef struct {
    const attention_call *call;
    float *workspace;
    int64_t tokens, share;
} attention_job;

static void attention_task(const void *data, int64_t task, int worker) {
    const attention_job *job = data;
    const attention_call *c = job->call;
    for (int64_t i = 0; i < c->sequences; i++) {
        const int64_t length = c->query_start[i + 1] - c->query_start[i];
        const int64_t tasks = ceil_div(length, job->tokens) * c->kv_heads;
        if (task < tasks) {
            const int64_t t0 = task / c->kv_heads * job->tokens;
            attend(c, i, task % c->kv_heads, t0, min_(length, t0 + job->tokens),
                   attention_split(c, job->workspace + worker * job->share));
            return;
        }
        task -= tasks;
    }
}

static void attention(const attention_call *c, int threads, float *workspace) {
    const attention_job job = {c, workspace, task_tokens(c), attention_workspace(c)};
    int64_t tasks = 0;
    for (int64_t i = 0; i < c->sequences; i++)
        tasks += ceil_div(c->query_start[i + 1] - c->query_start[i], job.tokens) * c->kv_heads;
    pool_run(attention_task, &job, tasks, threads);
}
