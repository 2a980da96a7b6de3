/* y[t, o] = unit * sum over blocks b of 64 of  w_scale[o, b] * (x_scale[t, b] * n[t, o, b])  + bias[o]
 * n[t, o, b] = sum over k of block b of  w8[o, k] * x8[t, k],  in integers, so in any order.
 *
 * x8 = round(127 x / m), x_scale = m / 127 with m the largest |x| of the block: 8 bits, to the
 * nearest, made here once for all weights that read the same x. w8 is a signed byte: for NF4 the
 * level in steps of 1 / 112 (LEVELS8, unit = 1 / 112.03), else as stored (unit = 1).
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
 * x8 is kept by tiles of up to FAST_TILE rows: for each block [rows][64] bytes, [rows] scales, [rows]
 * sums. The sums, -128 sum x8, take off what the 128 too many in a byte of w8 has added.
 *
 * Tiling. For one tile of rows the codes go to the registers directly. For more, a stretch of a
 * panel is decoded to 8 bits first (L1) and then used for all tiles.
 */
#include "kernels.h"
#include "pool.h"
#include "simd.h"

#include <stdatomic.h>

#define BLOCK 64
#define ROWS 32                                /* rows of W in a panel */
#define NF4_BYTES (ROWS * BLOCK / 2 + ROWS * 4) /* of one block of a panel */
#define INT8_BYTES (ROWS * BLOCK + ROWS * 4)
#define STRETCH 8                              /* blocks that are decoded at a time */
#define X_BYTES (BLOCK + 8)                    /* of one block of one row of x */
#define X_LIMIT (4 << 20)                      /* bytes of x8 at a time */
#define AHEAD_PANELS 4                         /* of B, where there is no product to hide behind */

/* round(112.03 level) + 128: of all tables the one with the smallest error, 1.7e-3 by root mean
 * square where 127 steps make 2.2e-3: see docs/LOG.md. */
static const uint8_t LEVELS8[16] __attribute__((aligned(16))) = {
    16, 50, 69, 84, 96, 107, 118, 128, 137, 146, 156, 166, 177, 191, 209, 240,
};
#define NF4_UNIT (1.0f / 112.03022f)

/* PARTS8 vectors make the 64 bytes of a line; FAST_TILE rows of x at a time.
 * line8: w8 + 128 or w8, whatever `dot4` takes; line4: the low and the high codes of a line. */
#if defined(FAST_VNNI)
#define PARTS8 1
#define FAST_TILE 12 /* 24 sums, 4 w, 1 x, 2 constants */
typedef __m512i w8;
typedef __m512i i32v;
typedef __m512 f32v;
INLINE i32v start_(int32_t sum) { return _mm512_set1_epi32(sum); }
INLINE w8 line8(const uint8_t *p) { return _mm512_loadu_si512(p); }
INLINE void line4(const uint8_t *p, w8 *low, w8 *high) {
    const __m512i mask = _mm512_set1_epi8(15);
    const __m512i table =
        _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)LEVELS8));
    const __m512i pairs = _mm512_loadu_si512(p);
    *low = _mm512_shuffle_epi8(table, _mm512_and_si512(pairs, mask));
    *high = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(pairs, 4), mask));
}
INLINE i32v dot4(i32v sum, w8 w, int32_t x) {
    /* As the intrinsic does, but gcc 12 copies and spills the sums of that one. */
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(_mm512_set1_epi32(x)));
    return sum;
}
INLINE void keep8(uint8_t *p, w8 w) { _mm512_storeu_si512(p, w); }
INLINE f32v scales(const float *p) { return _mm512_loadu_ps(p); }
INLINE f32v scale_(float scale) { return _mm512_set1_ps(scale); }
INLINE void add_block(float *sums, i32v n, f32v x_scale, f32v w_scale) {
    const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(n), x_scale);
    _mm512_storeu_ps(sums, _mm512_fmadd_ps(value, w_scale, _mm512_loadu_ps(sums)));
}

#elif defined(FAST_AVX2)
/* There is no product of unsigned and signed bytes here that cannot overflow 16 bits but |w8| times
 * x8 with the sign of w8: 2 * 112 * 127 and 2 * 127 * 127 both fit. */
#define PARTS8 2
#define FAST_TILE 4 /* of one line: 8 sums, 2 w, 1 x, 1 constant */
typedef __m256i w8;
typedef __m256i i32v;
typedef __m256 f32v;
INLINE i32v start_(int32_t sum) { (void)sum; return _mm256_setzero_si256(); }
INLINE w8 line8(const uint8_t *p) {
    return _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)p), _mm256_set1_epi8(-128));
}
INLINE void line4(const uint8_t *p, w8 *low, w8 *high) {
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i table = _mm256_xor_si256(
        _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)LEVELS8)),
        _mm256_set1_epi8(-128));
    const __m256i pairs = _mm256_loadu_si256((const __m256i *)p);
    *low = _mm256_shuffle_epi8(table, _mm256_and_si256(pairs, mask));
    *high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(pairs, 4), mask));
}
INLINE i32v dot4(i32v sum, w8 w, int32_t x) {
    const __m256i pairs =
        _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(_mm256_set1_epi32(x), w));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
INLINE void keep8(uint8_t *p, w8 w) {
    _mm256_storeu_si256((__m256i *)p, _mm256_xor_si256(w, _mm256_set1_epi8(-128)));
}
INLINE f32v scales(const float *p) { return _mm256_loadu_ps(p); }
INLINE f32v scale_(float scale) { return _mm256_set1_ps(scale); }
INLINE void add_block(float *sums, i32v n, f32v x_scale, f32v w_scale) {
    const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(n), x_scale);
    _mm256_storeu_ps(sums, _mm256_fmadd_ps(value, w_scale, _mm256_loadu_ps(sums)));
}

#elif defined(FAST_NEON)
#include <arm_neon.h>
#define PARTS8 4
#define FAST_TILE 6 /* of one line: 12 sums, 4 w, 1 x, 2 constants */
typedef int8x16_t w8;
typedef int32x4_t i32v;
typedef float32x4_t f32v;
INLINE i32v start_(int32_t sum) { (void)sum; return vdupq_n_s32(0); }
INLINE w8 line8(const uint8_t *p) {
    return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p), vdupq_n_u8(128)));
}
INLINE void line4(const uint8_t *p, w8 *low, w8 *high) {
    const int8x16_t table = line8(LEVELS8);
    const uint8x16_t pairs = vld1q_u8(p);
    *low = vqtbl1q_s8(table, vandq_u8(pairs, vdupq_n_u8(15)));
    *high = vqtbl1q_s8(table, vshrq_n_u8(pairs, 4));
}
INLINE i32v dot4(i32v sum, w8 w, int32_t x) {
    return vdotq_s32(sum, w, vreinterpretq_s8_s32(vdupq_n_s32(x)));
}
INLINE void keep8(uint8_t *p, w8 w) {
    vst1q_u8(p, veorq_u8(vreinterpretq_u8_s8(w), vdupq_n_u8(128)));
}
INLINE f32v scales(const float *p) { return vld1q_f32(p); }
INLINE f32v scale_(float scale) { return vdupq_n_f32(scale); }
INLINE void add_block(float *sums, i32v n, f32v x_scale, f32v w_scale) {
    const float32x4_t value = vmulq_f32(vcvtq_f32_s32(n), x_scale);
    vst1q_f32(sums, vfmaq_f32(vld1q_f32(sums), value, w_scale));
}

#else /* four rows of W at a time, 16 bit products where the compiler finds them */
#define PARTS8 4
#define FAST_TILE 2
typedef struct { int8_t at[16]; } w8;
typedef struct { int32_t at[4]; } i32v;
typedef struct { float at[4]; } f32v;
INLINE i32v start_(int32_t sum) { (void)sum; return (i32v){{0}}; }
INLINE w8 line8(const uint8_t *p) {
    w8 w;
    for (int i = 0; i < 16; i++) w.at[i] = (int8_t)(p[i] - 128);
    return w;
}
INLINE void line4(const uint8_t *p, w8 *low, w8 *high) {
    for (int i = 0; i < 16; i++) {
        low->at[i] = (int8_t)(LEVELS8[p[i] & 15] - 128);
        high->at[i] = (int8_t)(LEVELS8[p[i] >> 4] - 128);
    }
}
INLINE i32v dot4(i32v sum, w8 w, int32_t x) {
    int8_t four[4];
    memcpy(four, &x, 4);
    for (int r = 0; r < 4; r++)
        sum.at[r] += w.at[4 * r] * four[0] + w.at[4 * r + 1] * four[1] +
                     w.at[4 * r + 2] * four[2] + w.at[4 * r + 3] * four[3];
    return sum;
}
INLINE void keep8(uint8_t *p, w8 w) {
    for (int i = 0; i < 16; i++) p[i] = (uint8_t)(w.at[i] + 128);
}
INLINE f32v scales(const float *p) { return (f32v){{p[0], p[1], p[2], p[3]}}; }
INLINE f32v scale_(float scale) { return (f32v){{scale, scale, scale, scale}}; }
INLINE void add_block(float *sums, i32v n, f32v x_scale, f32v w_scale) {
    for (int r = 0; r < 4; r++) sums[r] += ((float)n.at[r] * x_scale.at[r]) * w_scale.at[r];
}
#endif

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

/* Asks memory for what a term has at panel n of the outputs. */
INLINE void term_prefetch(const lowrank_segment *s, int64_t n) {
    const int64_t bytes = term_bytes(s->rank);
    for (int64_t i = 0; i < bytes; i += 64)
        __builtin_prefetch((const char *)s->b + n * bytes + i, 0, 2);
    for (int64_t i = 0; i < ROWS; i += 16) {
        if (s->gain) __builtin_prefetch(s->gain + n * ROWS + i, 0, 2);
        if (s->bias) __builtin_prefetch(s->bias + n * ROWS + i, 0, 2);
    }
}

/* A panel that comes from memory, as the panels of its terms do: they are asked for on the way. */
typedef struct {
    const fast_product *product;
    int64_t n;
} far_panel;

/* sums[t][r] += the terms of `blocks` blocks, for the 32 rows r of a panel and `tile` rows of x.
 * far: NULL where the panel is in the cache. */
INLINE void fast_tile(const uint8_t *panel, const int bits, const far_panel *far, int64_t blocks,
                      const uint8_t *x, const int tile, float sums[][ROWS]) {
    const int bytes = bits == 4 ? NF4_BYTES : INT8_BYTES;
    const lowrank_segment *term = far ? far->product->terms : NULL;
    const int64_t terms = far ? far->product->term_count : 0;
    for (int64_t b = 0, due = 0; b < blocks; b++) {
        for (due += terms; due >= blocks; due -= blocks) term_prefetch(term++, far->n);
        IN_ORDER;
        const int8_t *x8 = (const int8_t *)x;
        const float *x_scale = (const float *)(x + tile * BLOCK);
        const int32_t *x_sum = (const int32_t *)(x_scale + tile);
#if defined(__x86_64__)
#pragma GCC unroll 16
        for (int t = 0; t < tile; t++) __builtin_prefetch(x + (tile * X_BYTES) + t * 64);
        if (far) /* a page ahead: the processor's own prefetch stops at its end */
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
                for (int g = 0; g < GROUP; g++) n[t][g] = start_(x_sum[t]);
            if (bits == 4)
#pragma GCC unroll 1
                for (int k = 0; k < BLOCK; k += 8, line += 128) {
                    w8 low[GROUP], high[GROUP];
                    IN_ORDER;
#pragma GCC unroll 2
                    for (int g = 0; g < GROUP; g++)
                        line4(line + g * (64 / PARTS8), &low[g], &high[g]);
#pragma GCC unroll 16
                    for (int t = 0; t < tile; t++)
#pragma GCC unroll 2
                        for (int g = 0; g < GROUP; g++)
                            n[t][g] = dot4(n[t][g], low[g], four_(x8 + t * BLOCK + k));
#pragma GCC unroll 16
                    for (int t = 0; t < tile; t++)
#pragma GCC unroll 2
                        for (int g = 0; g < GROUP; g++)
                            n[t][g] = dot4(n[t][g], high[g], four_(x8 + t * BLOCK + k + 4));
                }
            else
#pragma GCC unroll 1
                for (int k = 0; k < BLOCK; k += 16, line += 512)
#pragma GCC unroll 4
                    for (int i = 0; i < 4; i++) {
                        w8 w[GROUP];
                        IN_ORDER;
#pragma GCC unroll 2
                        for (int g = 0; g < GROUP; g++)
                            w[g] = line8(line + 128 * i + g * (64 / PARTS8));
#pragma GCC unroll 16
                        for (int t = 0; t < tile; t++)
#pragma GCC unroll 2
                            for (int g = 0; g < GROUP; g++)
                                n[t][g] = dot4(n[t][g], w[g], four_(x8 + t * BLOCK + k + 4 * i));
                    }
            f32v own[GROUP];
#pragma GCC unroll 2
            for (int g = 0; g < GROUP; g++) own[g] = scales(w_scale + (v + g) * LINE_ROWS);
#pragma GCC unroll 16
            for (int t = 0; t < tile; t++) {
                const f32v all = scale_(x_scale[t]);
#pragma GCC unroll 2
                for (int g = 0; g < GROUP; g++)
                    add_block(sums[t] + (v + g) * LINE_ROWS, n[t][g], all, own[g]);
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
#elif FAST_TILE == 4
#define FAST_CASES(bits)                                                                          \
    FAST_CASE(bits, 1) FAST_CASE(bits, 2) FAST_CASE(bits, 3) FAST_CASE(bits, 4)
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

/* NF4 blocks of a panel to blocks of 8 bits. */
static void fast_decode(const uint8_t *panel, int64_t blocks, uint8_t *to) {
    for (int64_t b = 0; b < blocks; b++, panel += NF4_BYTES, to += INT8_BYTES) {
        for (int j = 0; j < BLOCK / 8; j++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) {
                w8 low, high;
                line4(panel + 128 * j + v * (64 / PARTS8), &low, &high);
                keep8(to + 256 * j + v * (64 / PARTS8), low);
                keep8(to + 256 * j + 128 + v * (64 / PARTS8), high);
            }
        memcpy(to + ROWS * BLOCK, panel + ROWS * BLOCK / 2, ROWS * 4);
    }
}

/* Rows of x in the next tile of `rows` that are left: 16 make 8 + 8, not 12 + 4. */
INLINE int64_t fast_even(int64_t rows) { return ceil_div(rows, ceil_div(rows, FAST_TILE)); }

/* One block of a row: 64 bytes, the scale and -128 times their sum. A block of zeros, or of less
 * than 1e-36, is zero; one with Inf or NaN makes the whole row of y NaN through its scale. */
INLINE void fast_quantize_block(const float *x, int8_t *x8, float *scale, int32_t *sum) {
    uint32_t most = 0; /* bits of |x| order as |x| does, and NaN is above Inf */
    int32_t total = 0;
    for (int i = 0; i < BLOCK; i++) {
        uint32_t size;
        memcpy(&size, x + i, 4);
        size &= 0x7fffffffu;
        most = size > most ? size : most;
    }
    float largest;
    memcpy(&largest, &most, 4);
    const int finite = most < 0x7f800000u;
    const float factor = finite && largest > 1e-36f ? 127.0f / largest : 0.0f;
    const float magic = 12582912.0f; /* adding it rounds to the nearest integer, ties to even */
    for (int i = 0; i < BLOCK; i++) {
        const float value = finite ? x[i] * factor : 0.0f;
        const float shifted = value + magic;
        int32_t bits;
        memcpy(&bits, &shifted, 4);
        x8[i] = (int8_t)(bits - 0x4B400000);
        total += x8[i];
    }
    *scale = !finite ? NAN : factor > 0.0f ? largest / 127.0f : 0.0f;
    *sum = -128 * total;
}

typedef struct {
    const fast_product *products;
    const float *x;
    uint8_t *x8, *panels, *inner; /* inner: u of all terms, terms.h */
    int64_t count, first_row, rows, blocks, panels_each, in, rank_tasks;
    _Atomic int64_t *ranks_left; /* of rank_tasks, those that are not done */
} fast_job;

#include "terms.h"

/* Rows of x in one task: enough to pay for waking a thread. */
INLINE int64_t fast_rows_each(const fast_job *job) {
    return max_i(4, ceil_div(256, job->blocks));
}

static void fast_quantize_task(const void *data, int64_t task, int worker) {
    const fast_job *job = data;
    const int64_t each = fast_rows_each(job), stop = min_(job->rows, (task + 1) * each);
    int64_t t0 = 0, tile = fast_even(job->rows);
    (void)worker;
    for (int64_t t = task * each; t < stop; t++) {
        while (t >= t0 + tile) {
            t0 += tile;
            tile = fast_even(job->rows - t0);
        }
        uint8_t *to = job->x8 + t0 * job->blocks * X_BYTES;
        for (int64_t b = 0; b < job->blocks; b++) {
            uint8_t *block = to + b * tile * X_BYTES;
            float *scale = (float *)(block + tile * BLOCK) + (t - t0);
            fast_quantize_block(job->x + t * job->in + b * BLOCK,
                                (int8_t *)block + (t - t0) * BLOCK, scale,
                                (int32_t *)(scale + tile));
        }
    }
}

/* sums -> y[o0 ...] in the end, count values of one row of x. */
INLINE void fast_finish(const fast_product *p, const float *sums, int64_t o0, const int64_t count,
                        float *y) {
    const float unit = p->bits == 4 ? NF4_UNIT : 1.0f;
    if (p->bias)
        for (int64_t r = 0; r < count; r++) y[r] = sums[r] * unit + p->bias[o0 + r];
    else
        for (int64_t r = 0; r < count; r++) y[r] = sums[r] * unit;
}

/* A stretch of panel n, in `codes` or already in 8 bits, times all rows of x, for the `count` rows
 * of W that the panel really has. Between stretches the sums wait in y. */
INLINE void fast_stretch(const fast_job *job, const fast_product *p, const uint8_t *codes,
                         const int bits, int64_t b0, int64_t length, int64_t panel,
                         const int64_t count) {
    const int last = b0 + length == job->blocks;
    const far_panel memory = {p, panel}, *far = job->rows <= FAST_TILE ? &memory : NULL;
    const int64_t o0 = panel * ROWS;
    for (int64_t t0 = 0, tile; t0 < job->rows; t0 += tile) {
        float sums[FAST_TILE][ROWS] __attribute__((aligned(64)));
        tile = fast_even(job->rows - t0);
        const uint8_t *x = job->x8 + (t0 * job->blocks + b0 * tile) * X_BYTES;
        float *y = p->y + (job->first_row + t0) * p->out + o0;
        for (int64_t t = 0; t < tile; t++) {
            if (b0 == 0) memset(sums[t], 0, sizeof *sums);
            else memcpy(sums[t], y + t * p->out, (size_t)count * sizeof **sums);
        }
        if (bits == 4) fast_tile4(codes, far, length, x, (int)tile, sums);
        else fast_tile8(codes, far, length, x, (int)tile, sums);
        for (int64_t t = 0; t < tile; t++) {
            if (last) fast_finish(p, sums[t], o0, count, y + t * p->out);
            else memcpy(y + t * p->out, sums[t], (size_t)count * sizeof **sums);
        }
    }
}

/* A stretch's share of the terms at panel n. */
INLINE void term_prefetch_some(const fast_product *p, int64_t n, int64_t b0, int64_t length,
                               int64_t blocks) {
    const int64_t stop = p->term_count * (b0 + length) / blocks;
    for (int64_t j = p->term_count * b0 / blocks; j < stop; j++) term_prefetch(p->terms + j, n);
}

/* Panel number `panel` of a weight times all rows of x. `decoded` has room for a stretch. */
static void fast_panel(const fast_job *job, const fast_product *p, int64_t panel,
                       uint8_t *decoded) {
    const int64_t bytes = p->bits == 4 ? NF4_BYTES : INT8_BYTES;
    const uint8_t *codes = p->panels + panel * job->blocks * bytes;
    const int64_t count = min_(ROWS, p->out - panel * ROWS);
    const int once = job->rows <= FAST_TILE; /* one tile: nothing is used twice */
    const int decode = p->bits == 4 && !once;
    const int64_t stretches = once ? 1 : ceil_div(job->blocks, STRETCH);
    const int64_t stretch = ceil_div(job->blocks, stretches);
    for (int64_t b0 = 0; b0 < job->blocks; b0 += stretch) {
        const int64_t length = min_(stretch, job->blocks - b0);
        const uint8_t *part = codes + b0 * bytes;
        if (!once) term_prefetch_some(p, panel, b0, length, job->blocks);
        if (decode) fast_decode(part, length, decoded);
        if (decode) part = decoded;
        const int bits = decode ? 8 : (int)p->bits;
        if (count == ROWS) fast_stretch(job, p, part, bits, b0, length, panel, ROWS);
        else fast_stretch(job, p, part, bits, b0, length, panel, count);
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
        const int64_t panels = fast_panels(p);
        for (int64_t n = max_i(0, first); n < min_(panels, stop); n++) {
            if (p->panels)
                fast_panel(job, p, n, job->panels + worker * (int64_t)(STRETCH * INT8_BYTES));
            else if (n + AHEAD_PANELS < panels)
                term_prefetch_some(p, n + AHEAD_PANELS, 0, job->blocks, job->blocks);
            if (p->term_count) term_panels_of(job, p, u, n);
        }
        for (int64_t j = 0; j < p->term_count; j++) u += term_room(job, p->terms + j);
        first -= panels;
        stop -= panels;
    }
}

static int64_t fast_x_rows(int64_t in, int64_t rows) {
    const int64_t most = X_LIMIT / (ceil_div(in, BLOCK) * X_BYTES) / FAST_TILE * FAST_TILE;
    return min_(rows, max_i(4 * FAST_TILE, most));
}

/* Bytes. */
static int64_t fast_workspace(const fast_product *products, int64_t count, int64_t in,
                              int64_t rows, int threads) {
    return fast_x_rows(in, rows) * (in / BLOCK) * X_BYTES +
           threads * (int64_t)(STRETCH * INT8_BYTES) + terms_workspace(products, count);
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
    job.panels = workspace + terms_workspace(products, count);
    job.x8 = job.panels + threads * (int64_t)(STRETCH * INT8_BYTES);
    /* About eight turns for each thread: one that comes late leaves little to wait for. */
    job.panels_each = max_i(1, panels / (8 * threads));
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
