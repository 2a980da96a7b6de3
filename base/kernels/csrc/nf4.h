/* y[t, o] = sum over k of x[t, k] W[o, k], + bias[o]; W in NF4, all arithmetic in float32.
 *
 * The packed weights are read as bitsandbytes wrote them, block of 64 after block, and come out of
 * the look-up in an order of their own: `place(m)` is where weight m of a block lands. So x is laid
 * out once per call in the same order. With AVX-512 a block is 8 words of 32 bits; shifting them
 * right by 4 j leaves the codes of the weights 8 i + (j ^ 1), i = 0..7, ready for a permute of 16
 * floats. With AVX2 a byte shuffle looks up the four bytes of each float, even weights then odd.
 *
 * Order of additions. k is cut in stretches of CHUNK. Within one, lane l of VL adds up the places
 * l, l + VL, l + 2 VL, ...; `sum_each` joins the lanes; the stretches are added in order; the bias
 * comes last. The shape of W fixes all of it.
 *
 * Tiling. A panel of weight rows is dequantised for one stretch into a buffer (L2) and used for all
 * rows of x, TILE of them at a time (L1), in register tiles of 4 weight rows x TILE rows of x. For
 * no more than TILE rows of x the weights go from the packed bytes to the registers directly.
 */
#include "kernels.h"
#include "pool.h"
#include "simd.h"

#define CHUNK 1024         /* weights of one row that are dequantised at a time */
#define PANEL 32           /* weight rows in a panel */
#define X_BUDGET (1 << 20) /* floats of x laid out at a time: 4 MiB */

static const float LEVELS[16] __attribute__((aligned(64))) = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

INLINE float nf4_scale(const nf4_weight *w, int64_t block) {
    if (w->absmax) return w->absmax[block];
    return w->nested_code[w->absmax_codes[block]] * w->nested_absmax[block >> 8] + *w->nested_offset;
}

/* A block is looked up in PARTS: a part's vectors are added to one sum each before the next weight
 * row has its turn, and short chains of additions overlap better. */
#if defined(ISA_AVX2)
#define PARTS 2
#else
#define PARTS 1
#endif
#define PART_VECTORS (64 / VL / PARTS)

/* Part of a block of 64 weights of one scale, in its places: level * scale, rounded once. */
#if defined(ISA_AVX512)
INLINE void nf4_block(const uint8_t *packed, float scale, const int part, vf to[PART_VECTORS]) {
    const __m512i shifts = _mm512_set_epi32(4, 4, 4, 4, 4, 4, 4, 4, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512 table = _mm512_mul_ps(_mm512_load_ps(LEVELS), _mm512_set1_ps(scale));
    __m512i words = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)packed));
    words = _mm512_srlv_epi32(words, shifts);
    (void)part;
    /* vpermps reads the low four bits of each word: no mask is needed */
    to[0] = _mm512_permutexvar_ps(words, table);
    to[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 8), table);
    to[2] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 16), table);
    to[3] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 24), table);
}
#elif defined(ISA_AVX2)
/* LEVEL_BYTES[k][c] is byte k of LEVELS[c]: a table of 16 floats as four tables of 16 bytes, which
 * is what one shuffle can look up. Cheaper than two permutes of 8 floats and a blend. */
static const uint8_t LEVEL_BYTES[4][16] __attribute__((aligned(16))) = {
    {0, 177, 48, 160, 77, 63, 113, 0, 255, 227, 221, 58, 184, 171, 179, 0},
    {0, 57, 107, 50, 162, 53, 120, 0, 250, 202, 4, 3, 164, 7, 19, 0},
    {128, 50, 6, 202, 145, 61, 186, 0, 162, 36, 124, 173, 225, 16, 57, 128},
    {191, 191, 191, 190, 190, 190, 189, 0, 61, 62, 62, 62, 62, 63, 63, 63},
};

INLINE __m256i nf4_bytes(int k, __m256i codes) {
    const __m128i table = _mm_load_si128((const __m128i *)LEVEL_BYTES[k]);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), codes);
}

INLINE void nf4_block(const uint8_t *packed, float scale, const int part, vf to[PART_VECTORS]) {
    const __m256i pairs = _mm256_loadu_si256((const __m256i *)packed);
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256 factor = _mm256_set1_ps(scale);
    const __m256i codes = _mm256_and_si256(part ? pairs : _mm256_srli_epi16(pairs, 4), mask);
    const __m256i b0 = nf4_bytes(0, codes), b1 = nf4_bytes(1, codes);
    const __m256i b2 = nf4_bytes(2, codes), b3 = nf4_bytes(3, codes);
    const __m256i low_left = _mm256_unpacklo_epi8(b0, b1);
    const __m256i low_right = _mm256_unpackhi_epi8(b0, b1);
    const __m256i high_left = _mm256_unpacklo_epi8(b2, b3);
    const __m256i high_right = _mm256_unpackhi_epi8(b2, b3);
#define LEVELS_OF(words) _mm256_mul_ps(_mm256_castsi256_ps(words), factor)
    to[0] = LEVELS_OF(_mm256_unpacklo_epi16(low_left, high_left));
    to[1] = LEVELS_OF(_mm256_unpackhi_epi16(low_left, high_left));
    to[2] = LEVELS_OF(_mm256_unpacklo_epi16(low_right, high_right));
    to[3] = LEVELS_OF(_mm256_unpackhi_epi16(low_right, high_right));
#undef LEVELS_OF
}
#else
INLINE void nf4_block(const uint8_t *packed, float scale, const int part, vf to[PART_VECTORS]) {
    float table[16], value[64];
    (void)part;
    for (int c = 0; c < 16; c++) table[c] = LEVELS[c] * scale;
    for (int i = 0; i < 8; i++)
        for (int h = 0; h < 4; h++) {
            uint8_t pair = packed[4 * i + h];
            value[8 * (2 * h) + i] = table[pair & 15];
            value[8 * (2 * h + 1) + i] = table[pair >> 4];
        }
    for (int v = 0; v < PART_VECTORS; v++) to[v] = load(value + v * VL);
}
#endif

/* Do rows start with a block of codes, and do 64 codes never need two scales? */
INLINE int nf4_is_regular(const nf4_weight *w) { return w->in % 64 == 0 && w->blocksize % 64 == 0; }

/* to[i] = the scale of codes 64 i to 64 i + 63 from weight number `first` on; regular weights. */
INLINE void nf4_scales(const nf4_weight *w, int64_t first, int64_t blocks, float *to) {
    if (w->blocksize == 64)
        for (int64_t i = 0; i < blocks; i++) to[i] = nf4_scale(w, first / 64 + i);
    else
        for (int64_t i = 0; i < blocks; i++) to[i] = nf4_scale(w, (first + 64 * i) / w->blocksize);
}

/* The place of weight m of a block, m < 64. */
INLINE int place(int m) {
#if defined(ISA_AVX2)
    return 32 * (m & 1) + 8 * (m % 32 / 8) + 4 * (m / 32) + m % 8 / 2;
#else
    return 8 * ((m & 7) ^ 1) + (m >> 3);
#endif
}

/* A block of 64 values of x to the places of their weights. */
INLINE void nf4_place_block(const float *x, float *to) {
#if defined(ISA_AVX2)
    for (int q = 0; q < 4; q++) {
        const float *from = x + 8 * q;
        __m256 left = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from)),
                                           _mm_loadu_ps(from + 32), 1);
        __m256 right = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from + 4)),
                                            _mm_loadu_ps(from + 36), 1);
        _mm256_storeu_ps(to + 8 * q, _mm256_shuffle_ps(left, right, 0x88));
        _mm256_storeu_ps(to + 8 * q + 32, _mm256_shuffle_ps(left, right, 0xDD));
    }
#else
    static const int swapped[8] = {1, 0, 3, 2, 5, 4, 7, 6};
    float turned[64];
    transpose8(x, 8, turned, 8);
    for (int j = 0; j < 8; j++) memcpy(to + 8 * j, turned + 8 * swapped[j], 32);
#endif
}

/* `blocks` blocks of 64 weights of row `o` from column k0 on; columns beyond `in` become 0. */
INLINE void nf4_row(const nf4_weight *w, int64_t o, int64_t k0, int64_t blocks, float *to) {
    const int64_t first = o * w->in + k0;
    if (nf4_is_regular(w)) {
        float scales[CHUNK / 64];
        nf4_scales(w, first, blocks, scales);
        for (int64_t i = 0; i < blocks; i++) {
#pragma GCC unroll 2
            for (int part = 0; part < PARTS; part++) {
                vf weights[PART_VECTORS];
                nf4_block(w->packed + first / 2 + 32 * i, scales[i], part, weights);
#pragma GCC unroll 16
                for (int v = 0; v < PART_VECTORS; v++)
                    store(to + 64 * i + (part * PART_VECTORS + v) * VL, weights[v]);
            }
        }
        return;
    }
    /* Blocks of scales straddle rows here: one weight at a time. */
    for (int64_t i = 0; i < 64 * blocks; i++) {
        float value = 0.0f;
        if (k0 + i < w->in) {
            int64_t n = first + i;
            uint8_t pair = w->packed[n / 2];
            value = LEVELS[n & 1 ? pair & 15 : pair >> 4] * nf4_scale(w, n / w->blocksize);
        }
        to[i / 64 * 64 + place(i % 64)] = value;
    }
}

/* x [in] in the places of the weights, zeros beyond `in`. */
INLINE void nf4_place_x(const float *x, int64_t in, float *to) {
    const int64_t whole = in / 64 * 64;
    float rest[64] = {0};
    for (int64_t k = 0; k < whole; k += 64) nf4_place_block(x + k, to + k);
    if (whole == in) return;
    memcpy(rest, x + whole, (size_t)(in - whole) * sizeof *x);
    nf4_place_block(rest, to + whole);
}

/* out[t][r] = the dot product of weight row r < 4 and x row t < tile, over `length` floats. */
INLINE void dot_tile(const float *w, int64_t w_stride, const float *x, int64_t x_stride,
                     int64_t length, const int tile, float out[][4]) {
    vf sum[4][TILE];
#pragma GCC unroll 8
    for (int r = 0; r < 4; r++)
#pragma GCC unroll 8
        for (int t = 0; t < tile; t++) sum[r][t] = splat(0.0f);
    for (int64_t k = 0; k < length; k += VL) {
        vf row[TILE];
#pragma GCC unroll 8
        for (int t = 0; t < tile; t++) row[t] = load(x + t * x_stride + k);
#pragma GCC unroll 8
        for (int r = 0; r < 4; r++) {
            vf weights = load(w + r * w_stride + k);
#pragma GCC unroll 8
            for (int t = 0; t < tile; t++) sum[r][t] = fma_(weights, row[t], sum[r][t]);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < tile; t++) sum_each(out[t], sum[0][t], sum[1][t], sum[2][t], sum[3][t]);
}

static void dot_rows(const float *w, int64_t w_stride, const float *x, int64_t x_stride,
                     int64_t length, int tile, float out[][4]) {
    switch (tile) {
    case 1: dot_tile(w, w_stride, x, x_stride, length, 1, out); break;
#if TILE >= 2
    case 2: dot_tile(w, w_stride, x, x_stride, length, 2, out); break;
#endif
#if TILE >= 3
    case 3: dot_tile(w, w_stride, x, x_stride, length, 3, out); break;
#endif
#if TILE >= 4
    case 4: dot_tile(w, w_stride, x, x_stride, length, 4, out); break;
#endif
#if TILE >= 5
    case 5: dot_tile(w, w_stride, x, x_stride, length, 5, out); break;
#endif
#if TILE >= 6
    case 6: dot_tile(w, w_stride, x, x_stride, length, 6, out); break;
#endif
    }
}

/* Rows of x in the next tile of `rows` that are left: 8 make 4 + 4, not 6 + 2. */
INLINE int64_t even_tile(int64_t rows) { return ceil_div(rows, ceil_div(rows, TILE)); }

/* y[t][o0 + r] (+)= sums[t][r]: one stretch more of the dot products. */
INLINE void nf4_gather(const nf4_weight *w, float sums[][4], int tile, int64_t o0, int64_t count,
                       const float *bias, int first, int last, float *y) {
    for (int t = 0; t < tile; t++) {
        float *to = y + t * w->out + o0;
        for (int64_t r = 0; r < count; r++) {
            const float value = first ? sums[t][r] : to[r] + sums[t][r];
            to[r] = last && bias ? value + bias[o0 + r] : value;
        }
    }
}

/* Rows [o0, o0 + count) of W, count <= PANEL, times all `rows` rows of placed x. */
static void nf4_panel(const nf4_weight *w, int64_t o0, int64_t count, const float *placed,
                      int64_t rows, const float *bias, float *y, float *panel) {
    const int64_t width = ceil_div(w->in, 64) * 64;
    float sums[TILE][4];
    for (int64_t k0 = 0; k0 < width; k0 += CHUNK) {
        const int64_t length = min_(CHUNK, width - k0);
        for (int64_t r = 0; r < count; r++)
            nf4_row(w, o0 + r, k0, length / 64, panel + r * length);
        for (int64_t r = count; r % 4; r++)
            memset(panel + r * length, 0, (size_t)length * sizeof *panel);
        for (int64_t t0 = 0, tile; t0 < rows; t0 += tile) {
            tile = even_tile(rows - t0);
            for (int64_t r0 = 0; r0 < count; r0 += 4) {
                dot_rows(panel + r0 * length, length, placed + t0 * width + k0, width, length,
                         (int)tile,
                         sums);
                nf4_gather(w, sums, (int)tile, o0 + r0, min_(4, count - r0), bias, k0 == 0,
                           k0 + length == width, y + t0 * w->out);
            }
        }
    }
}

/* The same for a regular weight, four of its rows and `tile` rows of x: the weights stay in
 * registers. The additions and their order are those of `dot_tile`. */
INLINE void nf4_direct_tile(const nf4_weight *w, int64_t o0, int64_t count, const float *placed,
                            const int tile, const float *bias, float *y) {
    float sums[TILE][4], scales[4][CHUNK / 64];
    const uint8_t *packed[4];
    for (int64_t k0 = 0; k0 < w->in; k0 += CHUNK) {
        const int64_t length = min_(CHUNK, w->in - k0);
        vf sum[4][TILE];
        for (int64_t r = 0; r < 4; r++) {
            const int64_t first = (o0 + min_(r, count - 1)) * w->in + k0;
            packed[r] = w->packed + first / 2;
            nf4_scales(w, first, length / 64, scales[r]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < 4; r++)
#pragma GCC unroll 8
            for (int t = 0; t < tile; t++) sum[r][t] = splat(0.0f);
        for (int64_t i = 0; i < length / 64; i++) {
#pragma GCC unroll 2
            for (int part = 0; part < PARTS; part++) {
                const float *x = placed + k0 + 64 * i + part * PART_VECTORS * VL;
#pragma GCC unroll 8
                for (int r = 0; r < 4; r++) {
                    vf weights[PART_VECTORS];
                    nf4_block(packed[r] + 32 * i, scales[r][i], part, weights);
#pragma GCC unroll 16
                    for (int v = 0; v < PART_VECTORS; v++)
#pragma GCC unroll 8
                        for (int t = 0; t < tile; t++)
                            sum[r][t] = fma_(weights[v], load(x + t * w->in + v * VL), sum[r][t]);
                }
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < tile; t++) sum_each(sums[t], sum[0][t], sum[1][t], sum[2][t], sum[3][t]);
        nf4_gather(w, sums, tile, o0, count, bias, k0 == 0, k0 + length == w->in, y);
    }
}

static void nf4_direct(const nf4_weight *w, int64_t o0, int64_t count, const float *placed,
                       int64_t rows, const float *bias, float *y) {
    switch (rows) {
    case 1: nf4_direct_tile(w, o0, count, placed, 1, bias, y); break;
#if TILE >= 2
    case 2: nf4_direct_tile(w, o0, count, placed, 2, bias, y); break;
#endif
#if TILE >= 3
    case 3: nf4_direct_tile(w, o0, count, placed, 3, bias, y); break;
#endif
#if TILE >= 4
    case 4: nf4_direct_tile(w, o0, count, placed, 4, bias, y); break;
#endif
#if TILE >= 5
    case 5: nf4_direct_tile(w, o0, count, placed, 5, bias, y); break;
#endif
#if TILE >= 6
    case 6: nf4_direct_tile(w, o0, count, placed, 6, bias, y); break;
#endif
    }
}

/* Rows of x that are laid out at a time. */
static int64_t nf4_x_rows(const nf4_weight *w, int64_t rows) {
    const int64_t width = ceil_div(w->in, 64) * 64;
    return min_(rows, max_i(4 * TILE, X_BUDGET / width / TILE * TILE));
}

static int64_t nf4_workspace(const nf4_weight *w, int64_t rows, int threads) {
    const int64_t width = ceil_div(w->in, 64) * 64;
    return nf4_x_rows(w, rows) * width + threads * (int64_t)(PANEL * CHUNK);
}

typedef struct {
    const nf4_weight *w;
    const float *x, *bias; /* x: the rows laid out now */
    float *y, *placed, *panels;
    int64_t rows, task_rows;
} nf4_job;

#define PLACE_ROWS 8 /* rows of x laid out in one task */

static void nf4_place_task(const void *data, int64_t task, int worker) {
    const nf4_job *job = data;
    const int64_t in = job->w->in, width = ceil_div(in, 64) * 64;
    const int64_t stop = min_(job->rows, (task + 1) * PLACE_ROWS);
    (void)worker;
    for (int64_t t = task * PLACE_ROWS; t < stop; t++)
        nf4_place_x(job->x + t * in, in, job->placed + t * width);
}

static void nf4_multiply_task(const void *data, int64_t task, int worker) {
    const nf4_job *job = data;
    const int64_t start = task * job->task_rows, stop = min_(job->w->out, start + job->task_rows);
    if (job->rows <= TILE && nf4_is_regular(job->w))
        for (int64_t o = start; o < stop; o += 4)
            nf4_direct(job->w, o, min_(4, stop - o), job->placed, job->rows, job->bias, job->y);
    else
        nf4_panel(job->w, start, stop - start, job->placed, job->rows, job->bias, job->y,
                  job->panels + worker * (int64_t)(PANEL * CHUNK));
}

static void nf4_linear(const nf4_weight *w, const float *x, int64_t rows, const float *bias,
                       float *y, int threads, float *workspace) {
    nf4_job job = {.w = w, .bias = bias, .panels = workspace};
    const int64_t step = nf4_x_rows(w, rows);
    job.placed = workspace + threads * (int64_t)(PANEL * CHUNK);
    job.task_rows = min_(PANEL, ceil_div(ceil_div(w->out, threads), 4) * 4);
    for (int64_t t0 = 0; t0 < rows; t0 += step) {
        job.x = x + t0 * w->in;
        job.y = y + t0 * w->out;
        job.rows = min_(step, rows - t0);
        pool_run(nf4_place_task, &job, ceil_div(job.rows, PLACE_ROWS), threads);
        pool_run(nf4_multiply_task, &job, ceil_div(w->out, job.task_rows), threads);
    }
}
