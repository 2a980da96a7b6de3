/* The sums of fast.h for more rows of x than one tile: a stretch of W is decoded once, to a room of
 * the worker's own in its first cache, then used for all rows of x, WIDE_TILE of them at a time.
 *
 * A stretch has WIDE rows of W: one block of 64 columns after the other, each step after step of as
 * many columns as a multiply-add takes, a vector of rows after the other, then the scales.
 *
 * AVX-512: two panels at a time, 10 loads for 24 multiply-adds. One panel and 12 rows of x make 14,
 * which is what takes the time where a core loads one vector of 64 bytes in a cycle.
 * AVX2: W and x in 16 bits, two instructions for 16 multiply-adds, one of which any of three ports
 * takes. In 8 bits it is four for 32, and three of them are for two ports.
 */
#define VECTOR_BYTES (64 / PARTS8) /* of 8 bits */

#if defined(FAST_AVX2)
#define WIDE_PANELS 1
#define WIDE_GROUP 2 /* vectors of W whose sums are in registers: 12 sums, 2 w, 1 x, 1 product */
#define WIDE_TILE 6
#define X_SIZE 2 /* bytes of a number of W and x */
typedef __m256i wide_w;
INLINE wide_w wide_line(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE i32v wide_dot(i32v sum, wide_w w, int32_t x) {
    __m256i product; /* written out: gcc 12 adds products to each other first and spills the sums */
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
            : "+x"(sum), "=&x"(product) : "x"(w), "x"(_mm256_set1_epi32(x)));
    return sum;
}
/* Four columns of 8 rows: two of them, and `step` bytes behind the other two. */
INLINE void wide_keep(uint8_t *p, int64_t step, w8 w) {
    const __m256i first = _mm256_set1_epi64x((int64_t)0x0580048001800080);
    const __m256i rows = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 8, 8, 8, 8, 8, 8, 8, 8));
    const __m256i low = _mm256_add_epi8(first, rows), two = _mm256_set1_epi16(0x0200);
    const __m256i high = _mm256_add_epi8(low, two);
    _mm256_storeu_si256((__m256i *)p, _mm256_srai_epi16(_mm256_shuffle_epi8(w, low), 8));
    _mm256_storeu_si256((__m256i *)(p + step), _mm256_srai_epi16(_mm256_shuffle_epi8(w, high), 8));
}
#else
#if defined(FAST_VNNI)
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
#define X_SIZE 1
typedef w8 wide_w;
INLINE wide_w wide_line(const uint8_t *p) {
    w8 w;
    memcpy(&w, p, sizeof w);
    return w;
}
INLINE i32v wide_dot(i32v sum, wide_w w, int32_t x) { return dot4(sum, w, x); }
INLINE void wide_keep(uint8_t *p, int64_t step, w8 w) {
    (void)step;
    memcpy(p, &w, sizeof w);
}
#endif

#define X_TILE (2 * WIDE_TILE)
#define WIDE (ROWS * WIDE_PANELS)
#define WIDE_VECTORS (VECTORS * WIDE_PANELS)
#define WIDE_STEP (WIDE_VECTORS * VECTOR_BYTES)
#define WIDE_STEPS (BLOCK * X_SIZE / 4)
#define WIDE_BYTES (WIDE_STEPS * WIDE_STEP + WIDE * 4) /* of one block */
#define STRETCH 6                                      /* blocks that are decoded at a time */
#define WIDE_ROOM ((int64_t)(STRETCH * WIDE_BYTES))

/* Rows in the tile of x8 that begins with row t0. */
INLINE int64_t x_tile(const fast_job *job, int64_t t0) {
    return even_part(job->rows - t0, is_wide(job->rows) ? X_TILE : FAST_TILE);
}

/* A panel's blocks to a stretch, to its vectors from `v0` on. */
static void wide_decode(const uint8_t *panel, int64_t bits, int64_t blocks, int v0, uint8_t *to) {
    for (; blocks > 0; blocks--, to += WIDE_BYTES) {
        uint8_t *step = to + v0 * VECTOR_BYTES;
        const uint8_t *w_scale = panel + (bits == 4 ? ROWS * BLOCK / 2 : ROWS * BLOCK);
        if (bits == 4)
            for (; panel < w_scale; panel += 128, step += 2 * X_SIZE * WIDE_STEP)
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; v++) {
                    w8 low, high;
                    line4(panel + v * VECTOR_BYTES, &low, &high);
                    wide_keep(step + v * VECTOR_BYTES, WIDE_STEP, low);
                    wide_keep(step + X_SIZE * WIDE_STEP + v * VECTOR_BYTES, WIDE_STEP, high);
                }
        else
            for (; panel < w_scale; panel += 128, step += X_SIZE * WIDE_STEP)
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; v++)
                    wide_keep(step + v * VECTOR_BYTES, WIDE_STEP, line8(panel + v * VECTOR_BYTES));
        memcpy(to + WIDE_STEPS * WIDE_STEP + v0 * LINE_ROWS * 4, w_scale, ROWS * 4);
        panel = w_scale + ROWS * 4;
    }
}

/* Where x in 16 bits has a block of a row of the tile that begins with row t0. */
INLINE int64_t x16_place(const fast_job *job, int64_t t0, int64_t tile, int64_t block,
                         int64_t row) {
    return (t0 * job->blocks + block * tile + row) * (BLOCK * 2);
}

INLINE void wide_copy(const int8_t *x8, uint8_t *to) {
    int16_t x16[BLOCK];
    for (int i = 0; i < BLOCK; i++) x16[i] = x8[i];
    memcpy(to, x16, sizeof x16);
}

/* Some rows of a tile of x, from one of its blocks on. */
typedef struct {
    const uint8_t *x;
    const float *scale;
    const int32_t *sum;
    int64_t x_step, step; /* bytes to the next block, numbers to its scales */
    int64_t ahead;        /* bytes to the same rows of the next tile */
} wide_x;

INLINE wide_x wide_rows(const fast_job *job, int64_t t0, int64_t tile, int64_t row,
                        int64_t block) {
    const uint8_t *x8 = job->x8 + (t0 * job->blocks + block * tile) * X_BYTES;
    const float *scale = (const float *)(x8 + tile * BLOCK) + row;
    wide_x x = {x8 + row * BLOCK, scale, (const int32_t *)scale + tile, tile * X_BYTES,
                tile * X_BYTES / 4, 0};
    if (job->x16) {
        x.x = job->x16 + x16_place(job, t0, tile, block, row);
        x.x_step = tile * BLOCK * X_SIZE;
    }
    x.ahead = job->blocks * x.x_step;
    return x;
}

/* sums[t][r] += the terms of `blocks` blocks of a stretch, for its WIDE rows r and `rows` of x. */
INLINE void wide_tile(const uint8_t *w, int64_t blocks, wide_x x, const int rows,
                      float sums[][WIDE]) {
    for (; blocks > 0; blocks--, w += WIDE_BYTES) {
        const float *w_scale = (const float *)(w + WIDE_BYTES) - WIDE;
#if defined(__x86_64__)
#pragma GCC unroll 16
        for (int i = 0; i < rows * X_SIZE; i++) __builtin_prefetch(x.x + x.ahead + i * 64);
#endif
        for (int v = 0; v < WIDE_VECTORS; v += WIDE_GROUP) {
            i32v n[WIDE_TILE][WIDE_GROUP];
            f32v own[WIDE_GROUP];
            const uint8_t *line = w + v * VECTOR_BYTES;
            IN_ORDER;
#pragma GCC unroll 8
            for (int t = 0; t < rows; t++)
#pragma GCC unroll 4
                for (int g = 0; g < WIDE_GROUP; g++) n[t][g] = start_(x.sum[t]);
#pragma GCC unroll 1
            for (int s = 0; s < WIDE_STEPS; s += 2, line += 2 * WIDE_STEP)
#pragma GCC unroll 2
                for (int i = 0; i < 2; i++) {
                    wide_w part[WIDE_GROUP];
                    IN_ORDER;
#pragma GCC unroll 4
                    for (int g = 0; g < WIDE_GROUP; g++)
                        part[g] = wide_line(line + i * WIDE_STEP + g * VECTOR_BYTES);
#pragma GCC unroll 8
                    for (int t = 0; t < rows; t++)
#pragma GCC unroll 4
                        for (int g = 0; g < WIDE_GROUP; g++)
                            n[t][g] = wide_dot(n[t][g], part[g],
                                               four_((const int8_t *)x.x + t * BLOCK * X_SIZE +
                                                     4 * (s + i)));
                }
            IN_ORDER;
#pragma GCC unroll 4
            for (int g = 0; g < WIDE_GROUP; g++) own[g] = scales(w_scale + (v + g) * LINE_ROWS);
#pragma GCC unroll 8
            for (int t = 0; t < rows; t++) {
                const f32v all = scale_(x.scale[t]);
#pragma GCC unroll 4
                for (int g = 0; g < WIDE_GROUP; g++)
                    add_block(sums[t] + (v + g) * LINE_ROWS, n[t][g], all, own[g]);
            }
        }
        x.x += x.x_step;
        x.scale += x.step;
        x.sum += x.step;
    }
}

static void wide_any(const uint8_t *w, int64_t blocks, wide_x x, int64_t rows,
                     float sums[][WIDE]) {
    switch (rows) {
    case 1: wide_tile(w, blocks, x, 1, sums); break;
    case 2: wide_tile(w, blocks, x, 2, sums); break;
#if WIDE_TILE > 2
    case 3: wide_tile(w, blocks, x, 3, sums); break;
    case 4: wide_tile(w, blocks, x, 4, sums); break;
    case 5: wide_tile(w, blocks, x, 5, sums); break;
    case 6: wide_tile(w, blocks, x, 6, sums); break;
#endif
    }
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
            wide_any(room, blocks, wide_rows(job, t0, tile, row, b0), rows, sums);
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
            wide_decode(p->panels + (own * job->blocks + b0) * bytes, p->bits, blocks,
                        (int)i * VECTORS, room);
            term_prefetch(p, own, terms * b0 / job->blocks, terms * (b0 + blocks) / job->blocks);
        }
        if (count == WIDE) wide_stretch(job, p, room, b0, blocks, o0, WIDE);
        else wide_stretch(job, p, room, b0, blocks, o0, count);
    }
}
