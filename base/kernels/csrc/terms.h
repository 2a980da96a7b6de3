/* Low-rank terms of 8 bits over the x8 of a fast product, for the rows of each segment:
 *     u[t, r] = d[r] * sum over blocks b of 64 of  a_scale[r, b] * (x_scale[t, b] * n[t, r, b])
 *     y[t, o] = gain[o] * (y[t, o] + sum over r of  u[t, r] * (b_scale[r, p] * b8[r, o])) + bias[o]
 * n is a sum of integers, so in any order; p is the panel of 32 columns that o is in.
 *
 * Order of additions: of u blocks ascending, of y ranks ascending, one float32 sum each. Rows,
 * segments, tiles and threads do not enter.
 *
 * A is kept as panels of 8 ranks: for each block of 64 columns 8 lines, line j holding columns 8 j to
 * 8 j + 7 of rank after rank as w8 + 128, then the 8 scales. B as panels of 32 outputs: for each rank
 * 32 signed bytes, then the scale of each rank. rounded.py lays them out.
 *
 * All products of a call are multiplied together with the A x of their terms, then all B u follow.
 */
#define RANKS 8                              /* ranks in a panel of A */
#define RANK_BYTES (RANKS * BLOCK + RANKS * 4) /* of one block of it */
#define RANK_TILE 4                          /* rows of x that share a line */
#define TERM_ROWS (4 * FAST_TILE)            /* rows of x in one task */
#define TERM_PANELS 4                        /* panels of A in one task */
#define TERM_TILE 4                          /* rows of y in one register tile */

/* rank_dot: += line (8 ranks by 8 columns) times 8 numbers of x; rank_add: the 8 sums of a block. */
#if defined(FAST_VNNI)
typedef __m512i ranks8;
INLINE ranks8 rank_start(int32_t sum) { return _mm512_set1_epi64((uint32_t)sum); }
INLINE ranks8 rank_dot(ranks8 n, const uint8_t *line, int64_t x) {
    __asm__("vpdpbusd %2, %1, %0"
            : "+v"(n) : "v"(_mm512_loadu_si512(line)), "v"(_mm512_set1_epi64(x)));
    return n;
}
#elif defined(FAST_AVX2)
typedef struct { __m256i at[2]; } ranks8;
INLINE ranks8 rank_start(int32_t sum) {
    (void)sum;
    return (ranks8){{_mm256_setzero_si256(), _mm256_setzero_si256()}};
}
INLINE ranks8 rank_dot(ranks8 n, const uint8_t *line, int64_t x) {
    for (int h = 0; h < 2; h++) {
        const __m256i w = line8(line + 32 * h);
        const __m256i pairs =
            _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(_mm256_set1_epi64x(x), w));
        n.at[h] = _mm256_add_epi32(n.at[h], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    return n;
}
#elif defined(FAST_NEON)
typedef struct { int32x4_t at[4]; } ranks8;
INLINE ranks8 rank_start(int32_t sum) {
    (void)sum;
    return (ranks8){{vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)}};
}
INLINE ranks8 rank_dot(ranks8 n, const uint8_t *line, int64_t x) {
    for (int h = 0; h < 4; h++)
        n.at[h] = vdotq_s32(n.at[h], line8(line + 16 * h), vreinterpretq_s8_s64(vdupq_n_s64(x)));
    return n;
}
#else
typedef struct { int32_t at[RANKS]; } ranks8;
INLINE ranks8 rank_start(int32_t sum) { (void)sum; return (ranks8){{0}}; }
INLINE ranks8 rank_dot(ranks8 n, const uint8_t *line, int64_t x) {
    int8_t eight[8];
    memcpy(eight, &x, 8);
    for (int r = 0; r < RANKS; r++)
        for (int i = 0; i < 8; i++) n.at[r] += (line[8 * r + i] - 128) * eight[i];
    return n;
}
#endif

#if defined(FAST_VNNI) || defined(FAST_AVX2)
INLINE void rank_add(float *sums, ranks8 n, float x_scale, const float *w_scale) {
#if defined(FAST_VNNI)
    const __m256i eight = _mm512_cvtepi64_epi32(_mm512_add_epi32(n, _mm512_srli_epi64(n, 32)));
#else
    const __m256i eight =
        _mm256_permute4x64_epi64(_mm256_hadd_epi32(n.at[0], n.at[1]), 0xD8);
#endif
    const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(eight), _mm256_set1_ps(x_scale));
    _mm256_storeu_ps(sums, _mm256_fmadd_ps(value, _mm256_loadu_ps(w_scale), _mm256_loadu_ps(sums)));
}
#elif defined(FAST_NEON)
INLINE void rank_add(float *sums, ranks8 n, float x_scale, const float *w_scale) {
    for (int h = 0; h < 2; h++) {
        const int32x4_t four = vpaddq_s32(n.at[2 * h], n.at[2 * h + 1]);
        const float32x4_t value = vmulq_n_f32(vcvtq_f32_s32(four), x_scale);
        vst1q_f32(sums + 4 * h,
                  vfmaq_f32(vld1q_f32(sums + 4 * h), value, vld1q_f32(w_scale + 4 * h)));
    }
}
#else
INLINE void rank_add(float *sums, ranks8 n, float x_scale, const float *w_scale) {
    for (int r = 0; r < RANKS; r++) sums[r] += ((float)n.at[r] * x_scale) * w_scale[r];
}
#endif

INLINE int64_t eight_(const int8_t *p) {
    int64_t x;
    memcpy(&x, p, 8);
    return x;
}

/* sums[t] = the 8 ranks of a panel of A for rows t0 + t < t0 + rows of a tile of x. */
INLINE void rank_tile(const uint8_t *panel, int64_t blocks, const uint8_t *x, int64_t tile,
                      int64_t t0, const int rows, float sums[][RANKS]) {
#pragma GCC unroll 4
    for (int t = 0; t < rows; t++) memset(sums[t], 0, sizeof *sums);
    for (int64_t b = 0; b < blocks; b++, panel += RANK_BYTES, x += tile * X_BYTES) {
        const int8_t *x8 = (const int8_t *)x + t0 * BLOCK;
        const float *x_scale = (const float *)(x + tile * BLOCK) + t0;
        const int32_t *x_sum = (const int32_t *)(x_scale - t0 + tile) + t0;
        const float *w_scale = (const float *)(panel + RANKS * BLOCK);
        ranks8 n[RANK_TILE];
#if defined(__x86_64__)
#pragma GCC unroll 9
        for (int i = 0; i < RANK_BYTES; i += 64) __builtin_prefetch(panel + 2048 + i);
#endif
#pragma GCC unroll 4
        for (int t = 0; t < rows; t++) n[t] = rank_start(x_sum[t]);
#pragma GCC unroll 8
        for (int k = 0; k < BLOCK; k += 8)
#pragma GCC unroll 4
            for (int t = 0; t < rows; t++)
                n[t] = rank_dot(n[t], panel + RANKS * k, eight_(x8 + t * BLOCK + k));
#pragma GCC unroll 4
        for (int t = 0; t < rows; t++) rank_add(sums[t], n[t], x_scale[t], w_scale);
    }
}

static void rank_rows(const uint8_t *panel, int64_t blocks, const uint8_t *x, int64_t tile,
                      int64_t t0, int64_t rows, float sums[][RANKS]) {
    switch (rows) {
    case 1: rank_tile(panel, blocks, x, tile, t0, 1, sums); break;
    case 2: rank_tile(panel, blocks, x, tile, t0, 2, sums); break;
    case 3: rank_tile(panel, blocks, x, tile, t0, 3, sums); break;
    case 4: rank_tile(panel, blocks, x, tile, t0, 4, sums); break;
    }
}

INLINE int64_t term_panels(const lowrank_segment *s) { return ceil_div(s->rank, RANKS); }

/* A segment's rows among those of x that are in 8 bits now: [start, stop) of them. */
INLINE int64_t term_start(const fast_job *job, const lowrank_segment *s) {
    return max_i(0, min_(job->rows, s->start - job->first_row));
}

INLINE int64_t term_rows(const fast_job *job, const lowrank_segment *s) {
    return max_i(0, min_(job->rows, s->stop - job->first_row)) - term_start(job, s);
}

/* Floats of all u of a segment. */
INLINE int64_t term_floats(const fast_job *job, const lowrank_segment *s) {
    return term_rows(job, s) * term_panels(s) * RANKS;
}

INLINE int64_t rank_tasks_of(const fast_job *job, const lowrank_segment *s) {
    return ceil_div(term_panels(s), TERM_PANELS) * ceil_div(term_rows(job, s), TERM_ROWS);
}

static int64_t rank_tasks(const fast_job *job) {
    int64_t tasks = 0;
    for (int64_t i = 0; i < job->count; i++)
        for (int64_t j = 0; j < job->products[i].term_count; j++)
            tasks += rank_tasks_of(job, job->products[i].terms + j);
    return tasks;
}

/* Panels [p0, p1) of a segment's A times its rows [r0, r1), counted from its first. */
static void rank_part(const fast_job *job, const lowrank_segment *s, float *u, int64_t p0,
                      int64_t p1, int64_t r0, int64_t r1) {
    const int64_t width = term_panels(s) * RANKS, begin = term_start(job, s);
    for (int64_t t0 = 0, tile; t0 < begin + r1; t0 += tile) {
        tile = fast_even(job->rows - t0);
        const uint8_t *x = job->x8 + t0 * job->blocks * X_BYTES;
        const int64_t stop = min_(tile, begin + r1 - t0);
        for (int64_t p = p0; p < p1; p++) {
            const uint8_t *panel = (const uint8_t *)s->a + p * job->blocks * RANK_BYTES;
            for (int64_t t = max_i(0, begin + r0 - t0), rows; t < stop; t += rows) {
                float sums[RANK_TILE][RANKS] __attribute__((aligned(32)));
                rows = min_(RANK_TILE, stop - t);
                rank_rows(panel, job->blocks, x, tile, t, rows, sums);
                for (int64_t i = 0; i < rows; i++)
                    for (int64_t r = 0; r < RANKS; r++) {
                        const int64_t rank = p * RANKS + r;
                        const int scaled = s->d && rank < s->rank;
                        u[(t0 + t + i - begin) * width + rank] =
                            scaled ? s->d[rank] * sums[i][r] : sums[i][r];
                    }
            }
        }
    }
}

/* Task number `task` of all A x. */
static void rank_task(const fast_job *job, int64_t task) {
    float *u = job->inner;
    for (int64_t i = 0; i < job->count; i++)
        for (int64_t j = 0; j < job->products[i].term_count; j++) {
            const lowrank_segment *s = job->products[i].terms + j;
            const int64_t tasks = rank_tasks_of(job, s);
            if (task < tasks) {
                const int64_t across = ceil_div(term_panels(s), TERM_PANELS);
                const int64_t r0 = task / across * TERM_ROWS, p0 = task % across * TERM_PANELS;
                rank_part(job, s, u, p0, min_(term_panels(s), p0 + TERM_PANELS), r0,
                          min_(term_rows(job, s), r0 + TERM_ROWS));
                return;
            }
            task -= tasks;
            u += term_floats(job, s);
        }
}

/* Two vectors of a panel's outputs, from number `first` of 32 on, for `rows` rows of u and y. gain
 * and bias: at the panel's first output, or NULL. */
INLINE void term_tile(const int8_t *panel, int64_t rank, int first, const float *u, int64_t ldu,
                      float *y, int64_t ldy, const float *gain, const float *bias,
                      const int rows) {
    const float *scale = (const float *)(panel + ROWS * rank);
    vf sum[TERM_TILE][2];
#pragma GCC unroll 4
    for (int t = 0; t < rows; t++) sum[t][0] = sum[t][1] = splat(0.0f);
    for (int64_t r = 0; r < rank; r++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) {
            const vf weights = load_i8(panel + ROWS * r + first + v * VL) * splat(scale[r]);
#pragma GCC unroll 4
            for (int t = 0; t < rows; t++)
                sum[t][v] = fma_(splat(u[t * ldu + r]), weights, sum[t][v]);
        }
#pragma GCC unroll 4
    for (int t = 0; t < rows; t++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) {
            const int64_t at = first + v * VL;
            vf value = load(y + t * ldy + at) + sum[t][v];
            if (gain) value = load(gain + at) * value;
            if (bias) value = value + load(bias + at);
            store(y + t * ldy + at, value);
        }
}

static void term_panel(const int8_t *panel, int64_t rank, const float *u, int64_t ldu, float *y,
                       int64_t ldy, const float *gain, const float *bias, int64_t rows) {
    for (int first = 0; first < ROWS; first += 2 * VL) {
        int64_t t = 0;
        for (; t + TERM_TILE <= rows; t += TERM_TILE)
            term_tile(panel, rank, first, u + t * ldu, ldu, y + t * ldy, ldy, gain, bias,
                      TERM_TILE);
        for (; t < rows; t++)
            term_tile(panel, rank, first, u + t * ldu, ldu, y + t * ldy, ldy, gain, bias, 1);
    }
}

/* The last panel, of less than 32 outputs: through a copy, with the same operations. */
static void term_rest(const int8_t *panel, int64_t rank, const float *u, int64_t ldu, float *y,
                      int64_t ldy, const float *gain, const float *bias, int64_t rows,
                      int64_t count) {
    float own[ROWS] = {0}, gains[ROWS] = {0}, biases[ROWS] = {0};
    const size_t bytes = (size_t)count * sizeof *own;
    if (gain) memcpy(gains, gain, bytes);
    if (bias) memcpy(biases, bias, bytes);
    for (int64_t t = 0; t < rows; t++) {
        memcpy(own, y + t * ldy, bytes);
        term_panel(panel, rank, u + t * ldu, ldu, own, ROWS, gain ? gains : NULL,
                   bias ? biases : NULL, 1);
        memcpy(y + t * ldy, own, bytes);
    }
}

/* Few rows read B as fast as memory gives it, from a place of its own for each term: its lines are
 * asked for AHEAD_PANELS early, and at the end of a term the next one's first. */
#define AHEAD_PANELS 4
INLINE void term_prefetch(const fast_product *p, int64_t j, int64_t n, int64_t p0, int64_t p1) {
    const lowrank_segment *s = p->terms + j;
    if (n >= p1) {
        n += p0 - p1;
        if (j + 1 >= p->term_count || n >= p1) return;
        s++;
    }
    const int64_t bytes = s->rank * (ROWS + 4);
    const char *panel = (const char *)s->b + n * bytes;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(panel + i, 0, 2);
}

/* Panels [p0, p1) of a product's outputs, through its terms in their order. */
static void term_columns(const fast_job *job, const fast_product *p, const float *u, int64_t p0,
                         int64_t p1) {
    for (int64_t j = 0; j < p->term_count; j++) {
        const lowrank_segment *s = p->terms + j;
        const int64_t rows = term_rows(job, s), ldu = term_panels(s) * RANKS;
        float *y = p->y + (job->first_row + term_start(job, s)) * p->out;
        for (int64_t n = p0; n < p1; n++) {
            const int64_t o = n * ROWS, count = p->out - o;
            const int8_t *panel = (const int8_t *)s->b + n * s->rank * (ROWS + 4);
            const float *gain = s->gain ? s->gain + o : NULL, *bias = s->bias ? s->bias + o : NULL;
            if (rows <= 2) term_prefetch(p, j, n + AHEAD_PANELS, p0, p1);
            if (count < ROWS)
                term_rest(panel, s->rank, u, ldu, y + o, p->out, gain, bias, rows, count);
            else
                term_panel(panel, s->rank, u, ldu, y + o, p->out, gain, bias, rows);
        }
        u += term_floats(job, s);
    }
}

/* Some panels of the outputs that have terms, counted through all products. */
static void term_task(const void *data, int64_t task, int worker) {
    const fast_job *job = data;
    const float *u = job->inner;
    int64_t first = task * job->outputs_each, stop = first + job->outputs_each;
    (void)worker;
    for (int64_t i = 0; i < job->count; i++) {
        const fast_product *p = job->products + i;
        if (!p->term_count) continue;
        const int64_t panels = ceil_div(p->out, ROWS);
        term_columns(job, p, u, max_i(0, first), min_(panels, stop));
        for (int64_t j = 0; j < p->term_count; j++) u += term_floats(job, p->terms + j);
        first -= panels;
        stop -= panels;
    }
}

/* Bytes of all u, in whole lines. */
static int64_t terms_workspace(const fast_product *products, int64_t count) {
    int64_t floats = 0;
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < products[i].term_count; j++) {
            const lowrank_segment *s = products[i].terms + j;
            floats += (s->stop - s->start) * term_panels(s) * RANKS;
        }
    return ceil_div(floats, 16) * 64;
}
