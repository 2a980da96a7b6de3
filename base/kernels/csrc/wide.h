/* The sums of fast.h for more rows of x than one tile: a stretch of W is decoded once, to a room of
 * the worker's own in its first cache, then used for all rows of x, WIDE_TILE of them at a time.
 *
 * A stretch has WIDE rows of W: one block of 64 columns after the other, each step after step of as
 * many columns as a multiply-add takes, a vector of rows after the other, then the scales.
 *
 * AVX-512: two panels at a time, 10 loads for 24 multiply-adds. One panel and 12 rows of x make 14,
 * which is what takes the time where a core loads one vector of 64 bytes in a cycle.
 */
#define VECTOR_BYTES (64 / PARTS8) /* of 8 bits */

#if defined(FAST_AVX2)
#define WIDE_PANELS 1
#define WIDE_GROUP 2 /* vectors of W whose sums are in registers: 12 sums, 2 w, 1 x, 1 constant */
#define WIDE_TILE 6
#elif defined(FAST_VNNI)
#define WIDE_PANELS 2
#define WIDE_GROUP 4 /* 24 sums, 4 w, 1 x */
#define WIDE_TILE 6
#elif defined(FAST_NEON)
#define WIDE_PANELS 1
#define WIDE_GROUP 4
#define WIDE_TILE 6
#else
#define WIDE_PANELS 1
#define WIDE_GROUP 2
#define WIDE_TILE 2
#endif

#define X_TILE (2 * WIDE_TILE)
#define WIDE (ROWS * WIDE_PANELS)
#define WIDE_VECTORS (VECTORS * WIDE_PANELS)
#define WIDE_STEP (WIDE_VECTORS * VECTOR_BYTES)
#define WIDE_STEPS (BLOCK / 4)
#define WIDE_BYTES (WIDE_STEPS * WIDE_STEP + WIDE * 4) /* of one block */
#define STRETCH 6 /* blocks that are decoded at a time */
#define WIDE_ROOM ((int64_t)(STRETCH * WIDE_BYTES))

/* Rows in the tile of x8 that begins with row t0. */
INLINE int64_t x_tile(const fast_job *job, int64_t t0) {
    return even_part(job->rows - t0, is_wide(job->rows) ? X_TILE : FAST_TILE);
}

INLINE w8 wide_line(const uint8_t *p) {
    w8 w;
    memcpy(&w, p, sizeof w);
    return w;
}

INLINE void wide_keep(uint8_t *p, w8 w) { memcpy(p, &w, sizeof w); }

/* A panel's blocks to a stretch, to its vectors from `v0` on. */
INLINE void wide_decode(const uint8_t *panel, const int bits, int64_t blocks, int v0,
                        uint8_t *to) {
    for (; blocks > 0; blocks--, to += WIDE_BYTES) {
        uint8_t *step = to + v0 * VECTOR_BYTES;
        uint8_t *const scales = to + WIDE_STEPS * WIDE_STEP + v0 * LINE_ROWS * 4;
        const uint8_t *w_scale = panel + (bits == 4 ? ROWS * BLOCK / 2 : ROWS * BLOCK);
        if (bits == 4)
            for (; panel < w_scale; panel += 128, step += 2 * WIDE_STEP)
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; v++) {
                    w8 low, high;
                    line4(panel + v * VECTOR_BYTES, &low, &high);
                    wide_keep(step + v * VECTOR_BYTES, low);
                    wide_keep(step + WIDE_STEP + v * VECTOR_BYTES, high);
                }
        else
            for (; panel < w_scale; panel += 128, step += WIDE_STEP)
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; v++)
                    wide_keep(step + v * VECTOR_BYTES, byte_line(panel + v * VECTOR_BYTES));
        memcpy(scales, w_scale, ROWS * 4);
        panel = w_scale + ROWS * 4;
    }
}

/* Some rows of a tile of x, from one of its blocks on. */
typedef struct {
    const int8_t *x;
    const float *scale;
    const int32_t *sum;
    int64_t step, ahead; /* bytes to the next block; to the same rows of the next tile */
} wide_x;

INLINE wide_x wide_rows(const fast_job *job, int64_t t0, int64_t tile, int64_t row,
                        int64_t block) {
    const uint8_t *x8 = job->x8 + (t0 * job->blocks + block * tile) * X_BYTES;
    const float *scale = (const float *)(x8 + tile * BLOCK) + row;
    return (wide_x){(const int8_t *)x8 + row * BLOCK, scale, (const int32_t *)scale + tile,
                    tile * X_BYTES, job->blocks * tile * X_BYTES};
}

/* sums[t][r] += the terms of `blocks` blocks of a stretch, for its WIDE rows r and `rows` of x. */
INLINE void wide_tile(const uint8_t *w, const int bits, int64_t blocks, wide_x x, const int rows,
                      float sums[][WIDE]) {
    const int64_t size = WIDE_STEPS * WIDE_STEP;
    for (; blocks > 0; blocks--, w += WIDE_BYTES) {
        const float *w_scale = (const float *)(w + size);
#if defined(__x86_64__)
#pragma GCC unroll 8
        for (int t = 0; t < rows; t++) __builtin_prefetch(x.x + x.ahead + t * BLOCK);
#endif
        for (int v = 0; v < WIDE_VECTORS; v += WIDE_GROUP) {
            i32v n[WIDE_TILE][WIDE_GROUP];
            f32v own[WIDE_GROUP];
            const uint8_t *line = w + v * VECTOR_BYTES;
            IN_ORDER;
#pragma GCC unroll 8
            for (int t = 0; t < rows; t++)
#pragma GCC unroll 4
                for (int g = 0; g < WIDE_GROUP; g++)
                    n[t][g] = any_start(bits, x.sum[t]);
#pragma GCC unroll 1
            for (int s = 0; s < WIDE_STEPS; s += 2)
#pragma GCC unroll 2
                for (int i = 0; i < 2; i++, line += WIDE_STEP) {
                    w8 part[WIDE_GROUP];
                    IN_ORDER;
#pragma GCC unroll 4
                    for (int g = 0; g < WIDE_GROUP; g++) part[g] = wide_line(line + g * VECTOR_BYTES);
#pragma GCC unroll 8
                    for (int t = 0; t < rows; t++)
#pragma GCC unroll 4
                        for (int g = 0; g < WIDE_GROUP; g++)
                            n[t][g] = any_dot(bits, n[t][g], part[g],
                                              four_(x.x + t * BLOCK + 4 * (s + i)));
                }
            IN_ORDER;
#pragma GCC unroll 4
            for (int g = 0; g < WIDE_GROUP; g++) own[g] = scales(w_scale + (v + g) * LINE_ROWS);
#pragma GCC unroll 8
            for (int t = 0; t < rows; t++) {
                const f32v all = scale_(x.scale[t]);
#pragma GCC unroll 4
                for (int g = 0; g < WIDE_GROUP; g++)
                    add_any(bits, sums[t] + (v + g) * LINE_ROWS, n[t][g], x.sum[t], all, own[g]);
            }
        }
        x.x += x.step;
        x.scale += x.step / 4;
        x.sum += x.step / 4;
    }
}

INLINE void wide_any(const uint8_t *w, const int bits, int64_t blocks, wide_x x, int64_t rows,
                     float sums[][WIDE]) {
    switch (rows) {
    case 1: wide_tile(w, bits, blocks, x, 1, sums); break;
    case 2: wide_tile(w, bits, blocks, x, 2, sums); break;
#if WIDE_TILE > 2
    case 3: wide_tile(w, bits, blocks, x, 3, sums); break;
    case 4: wide_tile(w, bits, blocks, x, 4, sums); break;
    case 5: wide_tile(w, bits, blocks, x, 5, sums); break;
    case 6: wide_tile(w, bits, blocks, x, 6, sums); break;
#endif
    }
}

static void wide_any4(const uint8_t *w, int64_t blocks, wide_x x, int64_t rows,
                      float sums[][WIDE]) {
    wide_any(w, 4, blocks, x, rows, sums);
}

static void wide_any8(const uint8_t *w, int64_t blocks, wide_x x, int64_t rows,
                      float sums[][WIDE]) {
    wide_any(w, 8, blocks, x, rows, sums);
}

/* Bytes of a worker's room: a stretch, and the sums of all rows of x between two stretches. In y
 * each row of them would be in a page of its own. */
INLINE int64_t wide_room(int64_t rows, int64_t blocks) {
    return is_wide(rows) ? WIDE_ROOM + (blocks > STRETCH ? rows * WIDE * 4 : 0) : 0;
}

/* A stretch from block b0 on times all rows of x, for the `count` rows of W that it really has.
 * Between stretches the sums wait in the room. */
INLINE void wide_stretch(const fast_job *job, const fast_product *p, uint8_t *room, int64_t b0,
                         int64_t blocks, int64_t o0, const int64_t count) {
    const int last = b0 + blocks == job->blocks;
    float(*kept)[WIDE] = (float(*)[WIDE])(room + WIDE_ROOM);
    for (int64_t t0 = 0, tile; t0 < job->rows; t0 += tile) {
        tile = x_tile(job, t0);
        for (int64_t row = 0, rows; row < tile; row += rows, kept += rows) {
            float own[WIDE_TILE][WIDE] __attribute__((aligned(64)));
            float(*sums)[WIDE] = job->blocks > STRETCH ? kept : own;
            float *y = p->y + (job->first_row + t0 + row) * p->out + o0;
            rows = even_part(tile - row, WIDE_TILE);
            if (b0 == 0) memset(sums, 0, (size_t)rows * sizeof *sums);
            if (last)
                for (int64_t t = 0; t < rows; t++)
                    for (int64_t o = 0; o < count; o += 16) __builtin_prefetch(y + t * p->out + o, 1);
            (p->bits == 4 ? wide_any4 : wide_any8)(room, blocks, wide_rows(job, t0, tile, row, b0),
                                                   rows, sums);
            if (last)
                for (int64_t t = 0; t < rows; t++)
                    fast_finish(p, sums[t], o0, count, y + t * p->out);
        }
    }
}

/* Panels [n, n + panels) of a weight, no more than WIDE_PANELS, times all rows of x. */
static void wide_panels(const fast_job *job, const fast_product *p, int64_t n, int64_t panels,
                        uint8_t *room) {
    const int64_t bytes = p->bits == 4 ? NF4_BYTES : INT8_BYTES;
    const int64_t stretch = even_part(job->blocks, STRETCH), terms = p->term_count;
    const int64_t o0 = n * ROWS, count = min_(panels * ROWS, p->out - o0);
    for (int64_t b0 = 0; b0 < job->blocks; b0 += stretch) {
        const int64_t blocks = min_(stretch, job->blocks - b0);
        for (int64_t i = 0; i < WIDE_PANELS; i++) { /* a lone one twice */
            const int64_t own = n + min_(i, panels - 1);
            const uint8_t *panel = p->panels + (own * job->blocks + b0) * bytes;
            if (p->bits == 4) wide_decode(panel, 4, blocks, (int)i * VECTORS, room);
            else wide_decode(panel, 8, blocks, (int)i * VECTORS, room);
            term_prefetch(p, own, terms * b0 / job->blocks, terms * (b0 + blocks) / job->blocks);
        }
        if (count == WIDE) wide_stretch(job, p, room, b0, blocks, o0, WIDE);
        else wide_stretch(job, p, room, b0, blocks, o0, count);
    }
}
