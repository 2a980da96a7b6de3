/* to[o - start, k] = W[o, k] for rows [start, stop): a tile of W in floats, in its own order, for
 * products that are cheaper in a library's float32 than here: those of training, with hundreds of
 * rows of x. Each weight is level * scale, rounded once, as everywhere.
 */
#define ROWS_IN_TASK 16
#define PANEL_ROWS 32
#define PANEL_BYTES (PANEL_ROWS * 32) /* codes of 64 columns of a panel (fast.h); scales follow */

/* 16 weights of one scale, `table` being LEVELS * scale. `codes`: one in each byte. */
#if defined(ISA_AVX512)
typedef __m512 level_table;
INLINE level_table levels_by(float scale) {
    return _mm512_mul_ps(_mm512_load_ps(LEVELS), _mm512_set1_ps(scale));
}
INLINE void sixteen(level_table table, __m128i codes, float *to) {
    store(to, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), table));
}
#elif defined(ISA_AVX2)
typedef struct {
    __m256 low, high;
} level_table;
INLINE level_table levels_by(float scale) {
    const __m256 factor = _mm256_set1_ps(scale);
    return (level_table){_mm256_mul_ps(_mm256_load_ps(LEVELS), factor),
                         _mm256_mul_ps(_mm256_load_ps(LEVELS + 8), factor)};
}
INLINE void sixteen(level_table table, __m128i codes, float *to) {
    for (int half = 0; half < 2; half++) {
        const __m256i at = _mm256_cvtepu8_epi32(half ? _mm_srli_si128(codes, 8) : codes);
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)); /* code > 7: negative */
        store(to + 8 * half, _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, at),
                                              _mm256_permutevar8x32_ps(table.high, at), upper));
    }
}
#endif

#if defined(ISA_AVX512) || defined(ISA_AVX2)
/* 64 weights of one scale, packed as bitsandbytes packs them. */
INLINE void nf4_in_order(const uint8_t *packed, float scale, float *to) {
    const level_table table = levels_by(scale);
    const __m128i mask = _mm_set1_epi8(15);
    for (int i = 0; i < 4; i++) {
        const __m128i pairs = _mm_loadl_epi64((const __m128i *)(packed + 8 * i));
        const __m128i even = _mm_and_si128(_mm_srli_epi16(pairs, 4), mask);
        sixteen(table, _mm_unpacklo_epi8(even, _mm_and_si128(pairs, mask)), to + 16 * i);
    }
}

/* 64 weights of row r of a panel: four bytes, 128 apart, hold eight columns, the low codes first. */
INLINE void panel_in_order(const uint8_t *codes, int64_t r, float scale, float *to) {
    const level_table table = levels_by(scale);
    const __m128i mask = _mm_set1_epi8(15);
    for (int i = 0; i < 4; i++) {
        int32_t word[2];
        memcpy(&word[0], codes + 256 * i + 4 * r, 4);
        memcpy(&word[1], codes + 256 * i + 128 + 4 * r, 4);
        const __m128i pairs = _mm_set_epi32(0, 0, word[1], word[0]);
        const __m128i high = _mm_and_si128(_mm_srli_epi16(pairs, 4), mask);
        sixteen(table, _mm_unpacklo_epi32(_mm_and_si128(pairs, mask), high), to + 16 * i);
    }
}
#else
INLINE void nf4_in_order(const uint8_t *packed, float scale, float *to) {
    float table[16];
    for (int c = 0; c < 16; c++) table[c] = LEVELS[c] * scale;
    for (int i = 0; i < 32; i++) {
        to[2 * i] = table[packed[i] >> 4];
        to[2 * i + 1] = table[packed[i] & 15];
    }
}

INLINE void panel_in_order(const uint8_t *codes, int64_t r, float scale, float *to) {
    float table[16];
    for (int c = 0; c < 16; c++) table[c] = LEVELS[c] * scale;
    for (int i = 0; i < 8; i++)
        for (int c = 0; c < 4; c++) {
            const uint8_t pair = codes[128 * i + 4 * r + c];
            to[8 * i + c] = table[pair & 15];
            to[8 * i + 4 + c] = table[pair >> 4];
        }
}
#endif

typedef struct {
    const nf4_weight *w;
    const uint8_t *panels;
    int64_t in, start, stop;
    float *to;
} rows_job;

static void nf4_rows_task(const void *data, int64_t task, int worker) {
    const rows_job *job = data;
    const nf4_weight *w = job->w;
    const int64_t stop = min_(job->stop, job->start + (task + 1) * ROWS_IN_TASK);
    (void)worker;
    for (int64_t o = job->start + task * ROWS_IN_TASK; o < stop; o++) {
        float *to = job->to + (o - job->start) * w->in;
        const int64_t first = o * w->in;
        if (nf4_is_regular(w)) {
            for (int64_t i = 0; i < w->in / 64; i++)
                nf4_in_order(w->packed + first / 2 + 32 * i,
                             nf4_scale(w, (first + 64 * i) / w->blocksize), to + 64 * i);
            continue;
        }
        /* Blocks of scales straddle rows here: one weight at a time. */
        for (int64_t n = first; n < first + w->in; n++) {
            const uint8_t pair = w->packed[n / 2];
            to[n - first] = LEVELS[n & 1 ? pair & 15 : pair >> 4] * nf4_scale(w, n / w->blocksize);
        }
    }
}

static void nf4_rows(const nf4_weight *w, int64_t start, int64_t stop, float *to, int threads) {
    const rows_job job = {.w = w, .start = start, .stop = stop, .to = to};
    pool_run(nf4_rows_task, &job, ceil_div(stop - start, ROWS_IN_TASK), threads);
}

static void panel_rows_task(const void *data, int64_t task, int worker) {
    const rows_job *job = data;
    const int64_t panel = job->start / PANEL_ROWS + task, blocks = job->in / 64;
    const int64_t first = max_i(job->start, panel * PANEL_ROWS);
    const int64_t stop = min_(job->stop, (panel + 1) * PANEL_ROWS);
    (void)worker;
    for (int64_t i = 0; i < blocks; i++) {
        const uint8_t *codes = job->panels + (panel * blocks + i) * (PANEL_BYTES + 4 * PANEL_ROWS);
        for (int64_t o = first; o < stop; o++) {
            const int64_t r = o - panel * PANEL_ROWS;
            float scale;
            memcpy(&scale, codes + PANEL_BYTES + 4 * r, sizeof scale);
            panel_in_order(codes, r, scale, job->to + (o - job->start) * job->in + 64 * i);
        }
    }
}

static void panel_rows(const uint8_t *panels, int64_t in, int64_t start, int64_t stop, float *to,
                       int threads) {
    const rows_job job = {
        .panels = panels, .in = in, .start = start, .stop = stop, .to = to};
    if (start == stop) return;
    pool_run(panel_rows_task, &job, ceil_div(stop, PANEL_ROWS) - start / PANEL_ROWS, threads);
}
