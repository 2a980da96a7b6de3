/* Low-rank terms of 8 bits over the x8 of a fast product, for the rows of each segment:
 *     u[t, r] = d[r] * sum over blocks b of 64 of  a_scale[r, b] * (x_scale[t, b] * n[t, r, b])
 *     y[t, o] = gain[o] * (y[t, o] + sum over blocks c of 64 ranks of
 *                                    b_scale[o, c] * (u_scale[t, c] * m[t, o, c])) + bias[o]
 * n and m are sums of integers, so in any order: of a8 and x8, and of b8 and u8, u to 8 bits as x is.
 *
 * Order of additions: of u blocks ascending, of y blocks of ranks ascending, one float32 sum each.
 * Rows, segments, tiles and threads do not enter.
 *
 * A is kept as panels of 8 ranks: for each block of 64 columns 8 lines, line j holding columns 8 j to
 * 8 j + 7 of rank after rank as a8 + 128, then the 8 scales. B as panels of 32 outputs: for each block
 * of up to 64 ranks the lines of a weight in 8 bits (fast.h), as many as its ranks fill by four, then
 * 32 scales in bfloat16. rounded.py lays them out.
 *
 * The tasks of a call are all A x, then the panels of its products: the B u of a panel's outputs
 * follow it while they are in the cache, and what they read is asked for while it is multiplied.
 */
#define RANKS 8                              /* ranks in a panel of A */
#define RANK_BYTES (RANKS * BLOCK + RANKS * 4) /* of one block of it */
#define RANK_TILE 4                          /* rows of x that share a line */
#define TERM_ROWS (4 * X_TILE)               /* rows of x in one task */
#define TERM_PANELS (BLOCK / RANKS)          /* panels of A in one task: a block of u */
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

/* Bytes of one row's u, in blocks as x8 has them; and of all its rows. */
INLINE int64_t term_row(const lowrank_segment *s) { return ceil_div(s->rank, BLOCK) * X_BYTES; }

INLINE int64_t term_room(const fast_job *job, const lowrank_segment *s) {
    return term_rows(job, s) * term_row(s);
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

/* Panels [p0, p1) of a segment's A, no more than TERM_PANELS, times its rows [r0, r1), no more than
 * TERM_ROWS, counted from its first; then to 8 bits. */
static void rank_part(const fast_job *job, const lowrank_segment *s, uint8_t *u8, int64_t p0,
                      int64_t p1, int64_t r0, int64_t r1) {
    const int64_t begin = term_start(job, s);
    float u[TERM_ROWS][BLOCK] __attribute__((aligned(64)));
    memset(u, 0, (size_t)(r1 - r0) * sizeof *u);
    for (int64_t t0 = 0, tile; t0 < begin + r1; t0 += tile) {
        tile = x_tile(job, t0);
        const uint8_t *x = job->x8 + t0 * job->blocks * X_BYTES;
        const int64_t stop = min_(tile, begin + r1 - t0);
        for (int64_t p = p0; p < p1; p++) {
            const uint8_t *panel = (const uint8_t *)s->a + p * job->blocks * RANK_BYTES;
            const int64_t used = min_(RANKS, s->rank - p * RANKS);
            for (int64_t t = max_i(0, begin + r0 - t0), rows; t < stop; t += rows) {
                float sums[RANK_TILE][RANKS] __attribute__((aligned(32)));
                rows = min_(RANK_TILE, stop - t);
                rank_rows(panel, job->blocks, x, tile, t, rows, sums);
                for (int64_t i = 0; i < rows; i++)
                    for (int64_t r = 0; r < used; r++)
                        u[t0 + t + i - begin - r0][(p - p0) * RANKS + r] =
                            s->d ? s->d[p * RANKS + r] * sums[i][r] : sums[i][r];
            }
        }
    }
    for (int64_t t = r0; t < r1; t++) {
        uint8_t *to = u8 + t * term_row(s) + p0 / TERM_PANELS * X_BYTES;
        float *scale = (float *)(to + BLOCK);
        fast_quantize_block(u[t - r0], (int8_t *)to, scale, (int32_t *)(scale + 1));
    }
}

/* Task number `task` of all A x. */
static void rank_task(const fast_job *job, int64_t task) {
    uint8_t *u = job->inner;
    for (int64_t i = 0; i < job->count; i++)
        for (int64_t j = 0; j < job->products[i].term_count; j++) {
            const lowrank_segment *s = job->products[i].terms + j;
            const int64_t tasks = rank_tasks_of(job, s);
            if (task < tasks) {
                const int64_t across = ceil_div(term_panels(s), TERM_PANELS);
                const int64_t r0 = task / across * TERM_ROWS, p0 = task % across * TERM_PANELS;
                rank_part(job, s, u, p0, min_(term_panels(s), p0 + TERM_PANELS), r0,
                          min_(term_rows(job, s), r0 + TERM_ROWS));
                atomic_fetch_sub_explicit(job->ranks_left, 1, memory_order_release);
                return;
            }
            task -= tasks;
            u += term_room(job, s);
        }
}

/* A panel's outputs for `rows` rows of u and y. gain and bias: at its first output, or NULL. */
INLINE void term_tile(const uint8_t *panel, int64_t rank, const uint8_t *u, int64_t ldu, float *y,
                      int64_t ldy, const float *gain, const float *bias, const int rows) {
    float sums[TERM_TILE][ROWS] __attribute__((aligned(64)));
#pragma GCC unroll 4
    for (int t = 0; t < rows; t++) memset(sums[t], 0, sizeof *sums);
    for (int64_t r = 0; r < rank; r += BLOCK, u += X_BYTES) {
        const int64_t fours = ceil_div(min_(BLOCK, rank - r), 4);
        const uint16_t *kept = (const uint16_t *)(panel + fours * 4 * ROWS);
        float scale[ROWS] __attribute__((aligned(64)));
        for (int o = 0; o < ROWS; o += VL) store(scale + o, load_bf16(kept + o));
        for (int v = 0; v < VECTORS; v += GROUP) {
            const uint8_t *line = panel + v * (64 / PARTS8);
            i32v n[TERM_TILE][GROUP];
#pragma GCC unroll 4
            for (int t = 0; t < rows; t++)
#pragma GCC unroll 2
                for (int g = 0; g < GROUP; g++)
                    n[t][g] = start_(four_((const int8_t *)u + t * ldu + BLOCK + 4));
            for (int64_t k = 0; k < fours; k++, line += 4 * ROWS) {
                w8 w[GROUP];
#pragma GCC unroll 2
                for (int g = 0; g < GROUP; g++) w[g] = line8(line + g * (64 / PARTS8));
#pragma GCC unroll 4
                for (int t = 0; t < rows; t++)
#pragma GCC unroll 2
                    for (int g = 0; g < GROUP; g++)
                        n[t][g] = dot4(n[t][g], w[g], four_((const int8_t *)u + t * ldu + 4 * k));
            }
            f32v own[GROUP];
#pragma GCC unroll 2
            for (int g = 0; g < GROUP; g++) own[g] = scales(scale + (v + g) * LINE_ROWS);
#pragma GCC unroll 4
            for (int t = 0; t < rows; t++) {
                const f32v all = scale_(*(const float *)(u + t * ldu + BLOCK));
#pragma GCC unroll 2
                for (int g = 0; g < GROUP; g++)
                    add_block(sums[t] + (v + g) * LINE_ROWS, n[t][g], all, own[g]);
            }
        }
        panel += fours * 4 * ROWS + 2 * ROWS;
    }
#pragma GCC unroll 4
    for (int t = 0; t < rows; t++)
        for (int o = 0; o < ROWS; o += VL) {
            vf value = load(y + t * ldy + o) + load(sums[t] + o);
            if (gain) value = load(gain + o) * value;
            if (bias) value = value + load(bias + o);
            store(y + t * ldy + o, value);
        }
}

static void term_panel(const uint8_t *panel, int64_t rank, const uint8_t *u, int64_t ldu, float *y,
                       int64_t ldy, const float *gain, const float *bias, int64_t rows) {
    int64_t t = 0;
    for (; t + TERM_TILE <= rows; t += TERM_TILE)
        term_tile(panel, rank, u + t * ldu, ldu, y + t * ldy, ldy, gain, bias, TERM_TILE);
    for (; t < rows; t++)
        term_tile(panel, rank, u + t * ldu, ldu, y + t * ldy, ldy, gain, bias, 1);
}

/* The last panel, of less than 32 outputs: through a copy, with the same operations. */
static void term_rest(const uint8_t *panel, int64_t rank, const uint8_t *u, int64_t ldu, float *y,
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

/* Until all A x are there. Tasks are drawn in order, so whoever has a panel to finish knows them all
 * drawn: each is done, or another thread is at it. */
static void rank_wait(const fast_job *job) {
    for (int64_t looks = 0; atomic_load_explicit(job->ranks_left, memory_order_acquire);)
        pool_look(looks++);
}

/* Panel n of a product's outputs through its terms in their order. */
static void term_panels_of(const fast_job *job, const fast_product *p, const uint8_t *u,
                           int64_t n) {
    const int64_t o = n * ROWS, count = p->out - o;
    rank_wait(job);
    for (int64_t j = 0; j < p->term_count; j++) {
        const lowrank_segment *s = p->terms + j;
        const int64_t rows = term_rows(job, s), ldu = term_row(s);
        const uint8_t *panel = (const uint8_t *)s->b + n * term_bytes(s->rank);
        const float *gain = s->gain ? s->gain + o : NULL, *bias = s->bias ? s->bias + o : NULL;
        float *y = p->y + (job->first_row + term_start(job, s)) * p->out + o;
        if (count < ROWS)
            term_rest(panel, s->rank, u, ldu, y, p->out, gain, bias, rows, count);
        else
            term_panel(panel, s->rank, u, ldu, y, p->out, gain, bias, rows);
        u += term_room(job, s);
    }
}

/* Bytes of all u, in whole lines. */
static int64_t terms_workspace(const fast_product *products, int64_t count) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < products[i].term_count; j++) {
            const lowrank_segment *s = products[i].terms + j;
            bytes += (s->stop - s->start) * term_row(s);
        }
    return ceil_div(bytes, 64) * 64;
}
