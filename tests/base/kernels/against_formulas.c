/* The library's products, terms and attention against the formulas that their headers state, written
 * out in plain loops: for processors that Python's tests do not reach. Alone it is a program without
 * dependencies, so that a cross compiler and an emulator suffice: test_neon.py builds and runs it.
 *
 * Products in 8 bits and their terms have one order of additions, so they are compared bit for bit.
 * Sums by lanes are compared with sums in doubles, and with themselves: fewer rows, other threads. */
#include "dispatch.h"
#include "pool.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

EXPORT const char *nibble_select(const char *name);
EXPORT const char *nibble_fast_name(void);
EXPORT float nibble_fast_levels(int32_t *levels);
EXPORT void nibble_fast_bytes(float *values);
EXPORT int nibble_dense_linear(const void *w, int64_t stored, const float *x, int64_t rows,
                               int64_t in, int64_t out, const float *bias, float *y, int threads);

#define BLOCK 64
#define MARK -12345.0f
#define MOST_ROWS 160
#define MOST_TERMS 3

static int fused; /* are multiply-adds of the products in 8 bits rounded once? */
static int64_t compared, failures;

static uint64_t state = 18;
static uint32_t bits32(void) { /* xorshift64* */
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (uint32_t)((state * 2685821657736338717ull) >> 32);
}
static int64_t between(int64_t low, int64_t high) { return low + bits32() % (high - low + 1); }
static float number(void) { /* about normal, of any size */
    float sum = 0;
    for (int i = 0; i < 4; i++) sum += (float)bits32() / 4294967296.0f - 0.5f;
    return sum;
}

static void *room(int64_t bytes) {
    void *p = NULL;
    if (posix_memalign(&p, 64, (size_t)bytes + 64)) abort();
    return p;
}
static float *numbers(int64_t count) {
    float *x = room(count * 4);
    for (int64_t i = 0; i < count; i++) x[i] = number();
    return x;
}
static float *copy(const float *x, int64_t count) {
    return memcpy(room(count * 4), x, (size_t)count * 4);
}

static void expect(int right, const char *what, int64_t a, int64_t b, double got, double wanted) {
    compared++;
    if (!right && failures++ < 20)
        printf("%s at (%lld, %lld): %.9g, not %.9g\n", what, (long long)a, (long long)b, got, wanted);
}
static void same(const char *what, const float *got, const float *wanted, int64_t rows,
                 int64_t width) {
    for (int64_t t = 0; t < rows; t++)
        for (int64_t o = 0; o < width; o++)
            expect(!memcmp(got + t * width + o, wanted + t * width + o, 4), what, t, o,
                   got[t * width + o], wanted[t * width + o]);
}
static void near(const char *what, int64_t t, int64_t o, float got, double wanted, double bound) {
    expect(fabs(got - wanted) <= bound, what, t, o, got, wanted);
}

static float bf16(uint16_t half) {
    const uint32_t wide = (uint32_t)half << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}
static uint16_t half_of(float x) { /* towards zero: any bfloat16 will do */
    uint32_t wide;
    memcpy(&wide, &x, 4);
    return (uint16_t)(wide >> 16);
}

/* Products in 8 bits: fast.h. */

static int32_t levels[16]; /* of NF4, as the instruction set takes them */
static float bytes[256];   /* of a weight in 8 bits, likewise */
static float unit;

static float mul_add(float a, float b, float c) {
    const float product = a * b;
    return fused ? fmaf(a, b, c) : product + c;
}

static int64_t panel_bytes(int64_t bits) { return 32 * BLOCK * bits / 8 + 128; }

static uint8_t *panels_of(int64_t out, int64_t blocks, int64_t bits) {
    const int64_t count = ceil_div(out, 32) * blocks, size = panel_bytes(bits);
    uint8_t *panels = room(count * size);
    for (int64_t i = 0; i < count; i++) {
        uint8_t *own = panels + i * size;
        for (int64_t b = 0; b < size - 128; b++)
            own[b] = (uint8_t)(bits == 4 ? bits32() >> 24 : between(1, 255));
        for (int64_t r = 0; r < 32; r++) {
            const float scale = fabsf(number()) / 50;
            memcpy(own + size - 128 + 4 * r, &scale, 4);
        }
    }
    return panels;
}

static float weight8(const uint8_t *block, int64_t bits, int64_t r, int64_t k) {
    if (bits == 8) return bytes[block[128 * (k / 4) + 4 * r + k % 4]];
    const uint8_t pair = block[128 * (k / 8) + 4 * r + k % 4];
    return levels[k % 8 < 4 ? pair & 15 : pair >> 4];
}

static float rounded(const float *x, int8_t *x8) {
    float most = 0;
    for (int k = 0; k < BLOCK; k++) most = fmaxf(most, fabsf(x[k]));
    const float factor = most > 1e-36f ? 127.0f / most : 0.0f;
    for (int k = 0; k < BLOCK; k++) x8[k] = (int8_t)nearbyintf(x[k] * factor);
    return factor > 0 ? most / 127.0f : 0.0f;
}

/* y [out] of one row. */
static void product_row(const fast_product *p, const float *x, int64_t in, float *y) {
    const int64_t blocks = in / BLOCK, size = panel_bytes(p->bits);
    for (int64_t o = 0; o < p->out; o++) y[o] = 0;
    for (int64_t b = 0; b < blocks; b++) {
        int8_t x8[BLOCK];
        const float x_scale = rounded(x + b * BLOCK, x8);
        for (int64_t o = 0; o < p->out; o++) {
            const uint8_t *block = p->panels + (o / 32 * blocks + b) * size;
            float w_scale;
            float n = 0; /* of halves at least, so exact */
            memcpy(&w_scale, block + size - 128 + o % 32 * 4, 4);
            for (int k = 0; k < BLOCK; k++) n += weight8(block, p->bits, o % 32, k) * x8[k];
            y[o] = mul_add(n * x_scale, w_scale, y[o]);
        }
    }
    for (int64_t o = 0; o < p->out; o++) {
        y[o] = y[o] * (p->bits == 4 ? unit : 1.0f);
        if (p->bias) y[o] = y[o] + p->bias[o];
    }
}

/* Terms in 8 bits: terms.h. */

static int64_t b_bytes(int64_t rank) { return ceil_div(rank, 4) * 128 + ceil_div(rank, BLOCK) * 64; }

static lowrank_segment term8(int64_t rows, int64_t in, int64_t out) {
    lowrank_segment s = {.rank = between(1, 150), .a_stored = STORED_I8, .b_stored = STORED_I8};
    const int64_t a_blocks = ceil_div(s.rank, 8) * (in / BLOCK), panels = ceil_div(out, 32);
    uint8_t *a = room(a_blocks * 544), *b = room(panels * b_bytes(s.rank));
    s.start = between(0, rows - 1);
    s.stop = between(s.start, rows);
    for (int64_t i = 0; i < a_blocks; i++) {
        const float *scales = numbers(8);
        for (int k = 0; k < 512; k++) a[i * 544 + k] = (uint8_t)between(1, 255);
        memcpy(a + i * 544 + 512, scales, 32);
        free((void *)scales);
    }
    for (int64_t n = 0; n < panels; n++) {
        uint8_t *to = b + n * b_bytes(s.rank);
        for (int64_t r = 0; r < s.rank; r += BLOCK) {
            const int64_t bytes = ceil_div(min_(BLOCK, s.rank - r), 4) * 128;
            for (int64_t k = 0; k < bytes; k++) *to++ = (uint8_t)between(1, 255);
            for (int k = 0; k < 32; k++, to += 2) {
                const uint16_t scale = half_of(number());
                memcpy(to, &scale, 2);
            }
        }
    }
    s.a = a;
    s.b = b;
    s.d = between(0, 1) ? numbers(s.rank) : NULL;
    s.gain = between(0, 1) ? numbers(out) : NULL;
    s.bias = between(0, 1) ? numbers(out) : NULL;
    return s;
}

static void free_term(const lowrank_segment *s) {
    free((void *)s->a);
    free((void *)s->b);
    free((void *)s->d);
    free((void *)s->gain);
    free((void *)s->bias);
}

/* u [rank] of one row, zeros before. */
static void inner_row(const lowrank_segment *s, const float *x, int64_t in, float *u) {
    for (int64_t b = 0; b < in / BLOCK; b++) {
        int8_t x8[BLOCK];
        const float x_scale = rounded(x + b * BLOCK, x8);
        for (int64_t r = 0; r < s->rank; r++) {
            const uint8_t *block = (const uint8_t *)s->a + (r / 8 * (in / BLOCK) + b) * 544;
            float w_scale;
            int32_t n = 0;
            memcpy(&w_scale, block + 512 + r % 8 * 4, 4);
            for (int k = 0; k < BLOCK; k++)
                n += (block[k / 8 * 64 + r % 8 * 8 + k % 8] - 128) * x8[k];
            u[r] = mul_add((float)n * x_scale, w_scale, u[r]);
        }
    }
    for (int64_t r = 0; s->d && r < s->rank; r++) u[r] = s->d[r] * u[r];
}

/* y [out] of one row, with the term added. */
static void add_term(const lowrank_segment *s, const float *x, int64_t in, float *y, int64_t out) {
    const int64_t blocks = ceil_div(s->rank, BLOCK);
    float u[3 * BLOCK] = {0}, u_scale[3];
    int8_t u8[3][BLOCK];
    inner_row(s, x, in, u);
    for (int64_t c = 0; c < blocks; c++) u_scale[c] = rounded(u + c * BLOCK, u8[c]);
    for (int64_t o = 0; o < out; o++) {
        const uint8_t *from = (const uint8_t *)s->b + o / 32 * b_bytes(s->rank);
        float sum = 0, value;
        for (int64_t c = 0; c < blocks; c++) {
            const int64_t fours = ceil_div(min_(BLOCK, s->rank - c * BLOCK), 4);
            uint16_t half;
            int32_t m = 0;
            for (int64_t k = 0; k < 4 * fours; k++)
                m += (from[128 * (k / 4) + o % 32 * 4 + k % 4] - 128) * u8[c][k];
            memcpy(&half, from + 128 * fours + o % 32 * 2, 2);
            sum = mul_add((float)m * u_scale[c], bf16(half), sum);
            from += 128 * fours + 64;
        }
        value = y[o] + sum;
        if (s->gain) value = s->gain[o] * value;
        y[o] = s->bias ? value + s->bias[o] : value;
    }
}

/* `count` products of one x, each with terms or without; `bits` 0: terms alone, on what y has. */
static void check_fast(int64_t rows, int64_t in, const int64_t *outs, const int64_t *bits, int count,
                       int with_terms) {
    fast_product products[3];
    lowrank_segment terms[3][MOST_TERMS];
    float *x = numbers(rows * in), *wanted[3], *y[3];
    for (int64_t k = 0; k < BLOCK && rows > 2; k++) x[2 * in + k] = 0; /* a block of zeros */
    for (int i = 0; i < count; i++) {
        const int64_t out = outs[i];
        const int some = with_terms ? (int)between(bits[i] == 0, MOST_TERMS) : 0;
        float *before = numbers((rows + 2) * out);
        products[i] = (fast_product){bits[i] ? panels_of(out, in / BLOCK, bits[i]) : NULL,
                                     bits[i] && between(0, 1) ? numbers(out) : NULL,
                                     before + out, out, bits[i] ? bits[i] : 8, terms[i], some};
        for (int j = 0; j < some; j++) terms[i][j] = term8(rows, in, out);
        for (int64_t o = 0; o < out; o++) before[o] = before[(rows + 1) * out + o] = MARK;
        wanted[i] = copy(before, (rows + 2) * out);
        y[i] = before;
        for (int64_t t = 0; t < rows; t++) {
            float *row = wanted[i] + (t + 1) * out;
            if (bits[i]) product_row(products + i, x + t * in, in, row);
            for (int j = 0; j < some; j++)
                if (terms[i][j].start <= t && t < terms[i][j].stop)
                    add_term(terms[i] + j, x + t * in, in, row, out);
        }
    }
    if (nibble_fast_linear(products, count, x, in, rows, (int)between(1, 4))) abort();
    for (int i = 0; i < count; i++) {
        char what[80];
        snprintf(what, sizeof what, "%lld rows by %lldx%lld in %lld bits, %d terms", (long long)rows,
                 (long long)outs[i], (long long)in, (long long)bits[i], (int)products[i].term_count);
        same(what, y[i], wanted[i], rows + 2, outs[i]);
        for (int64_t j = 0; j < products[i].term_count; j++) free_term(terms[i] + j);
        free((void *)products[i].panels);
        free((void *)products[i].bias);
        free(wanted[i]);
        free(y[i]);
    }
    free(x);
}

static void check_fast_all(void) {
    for (int64_t rows = 1; rows <= 40; rows++) /* every tile */
        for (int64_t bits = 4; bits <= 8; bits += 4)
            check_fast(rows, 128, &(int64_t){40}, &bits, 1, 0);
    for (int i = 0; i < 100; i++) {
        const int64_t rows = i % 10 ? between(1, 50) : between(50, MOST_ROWS);
        const int64_t in = BLOCK * (i % 6 ? between(1, 4) : between(5, 20));
        int64_t outs[3], bits[3];
        for (int p = 0; p < 3; p++) {
            outs[p] = i % 3 ? between(1, 40) : between(30, 100);
            bits[p] = 4 * between(i % 4 ? 1 : 0, 2);
        }
        check_fast(rows, in, outs, bits, (int)between(1, 3), i % 4 == 0 || i % 4 == 3);
    }
}

/* Products in float32: nf4.h, dense.h, lowrank.h. */

static const float LEVELS[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,
    0.7229568362236023f, 1.0f,
};

typedef int (*product)(const void *w, const float *x, int64_t rows, const float *bias, float *y,
                       int threads);
typedef struct {
    int64_t in, out, stored;
    const void *data;
} dense_weight;

static int nf4_product(const void *w, const float *x, int64_t rows, const float *bias, float *y,
                       int threads) {
    return nibble_nf4_linear(w, x, rows, bias, y, threads);
}
static int dense_product(const void *w, const float *x, int64_t rows, const float *bias, float *y,
                         int threads) {
    const dense_weight *d = w;
    return nibble_dense_linear(d->data, d->stored, x, rows, d->in, d->out, bias, y, threads);
}

/* plain [out, in]: the weight as doubles. */
static void check_product(const char *what, product of, const void *w, const double *plain,
                          int64_t rows, int64_t in, int64_t out) {
    float *x = numbers(rows * in), *bias = between(0, 1) ? numbers(out) : NULL;
    float *y = numbers((rows + 2) * out), *part = numbers(rows * out);
    for (int64_t o = 0; o < out; o++) y[o] = y[(rows + 1) * out + o] = MARK;
    if (of(w, x, rows, bias, y + out, (int)between(1, 4))) abort();
    for (int64_t o = 0; o < out; o++) {
        expect(y[o] == MARK && y[(rows + 1) * out + o] == MARK, "outside y", o, 0, 0, 0);
        for (int64_t t = 0; t < rows; t++) {
            double sum = bias ? bias[o] : 0, size = fabs(sum);
            for (int64_t k = 0; k < in; k++) {
                sum += plain[o * in + k] * x[t * in + k];
                size += fabs(plain[o * in + k] * x[t * in + k]);
            }
            near(what, t, o, y[(t + 1) * out + o], sum, 1e-6 * size + 1e-30);
        }
    }
    const int64_t first = between(0, rows - 1), some = between(1, rows - first);
    if (of(w, x + first * in, some, bias, part, (int)between(1, 4))) abort();
    same("the same rows alone", part, y + (1 + first) * out, some, out);
    free(x);
    free(bias);
    free(y);
    free(part);
}

static void check_nf4(void) {
    for (int i = 0; i < 60; i++) {
        const int64_t blocksize = i % 3 ? 64 : between(0, 1) ? 32 : 128;
        const int64_t in = i % 5 ? 64 * between(1, 4) : 2 * between(1, 700), out = between(1, 50);
        const int64_t blocks = ceil_div(out * in, blocksize);
        uint8_t *packed = room(out * in / 2 + 1), *codes = room(blocks);
        float *absmax = numbers(blocks), *nested = numbers(ceil_div(blocks, 256)), *code = numbers(256);
        float offset = number();
        double *plain = room(out * in * 8);
        const int is_nested = (int)between(0, 1);
        for (int64_t k = 0; k < ceil_div(out * in, 2); k++) packed[k] = (uint8_t)(bits32() >> 24);
        for (int64_t b = 0; b < blocks; b++) codes[b] = (uint8_t)(bits32() >> 24);
        for (int64_t n = 0; n < out * in; n++) {
            const int64_t b = n / blocksize;
            const float scale = is_nested ? code[codes[b]] * nested[b / 256] + offset : absmax[b];
            plain[n] = LEVELS[n % 2 ? packed[n / 2] & 15 : packed[n / 2] >> 4] * scale;
        }
        const nf4_weight w = {packed, is_nested ? NULL : absmax, codes, nested, code, &offset,
                              out,    in,                        blocksize};
        check_product("nf4", nf4_product, &w, plain, between(1, 30), in, out);
        free(packed);
        free(codes);
        free(absmax);
        free(nested);
        free(code);
        free(plain);
    }
}

static void check_dense(void) {
    for (int i = 0; i < 40; i++) {
        const int64_t in = between(1, 300), out = between(1, 50);
        float *w = numbers(out * in);
        uint16_t *halves = room(out * in * 2);
        double *plain = room(out * in * 8);
        for (int64_t n = 0; n < out * in; n++) {
            halves[n] = half_of(w[n]);
            plain[n] = i % 2 ? bf16(halves[n]) : w[n];
        }
        const dense_weight d = {in, out, i % 2 ? STORED_BF16 : STORED_F32, i % 2 ? (void *)halves : w};
        check_product("dense", dense_product, &d, plain, between(1, 30), in, out);
        free(w);
        free(halves);
        free(plain);
    }
}

static void check_lowrank(void) {
    for (int i = 0; i < 40; i++) {
        const int64_t rows = between(1, 40), in = between(1, 200), out = between(1, 100);
        const int64_t rank = between(1, 70), start = between(0, rows - 1);
        float *a = numbers(rank * in), *b = numbers(rank * out), *d = numbers(rank);
        float *gain = between(0, 1) ? numbers(out) : NULL, *x = numbers(rows * in);
        float *before = numbers(rows * out), *y = copy(before, rows * out);
        const lowrank_segment s = {start, between(start, rows), a, b, d, gain, NULL, rank, 0, 0};
        if (nibble_lowrank_add(&s, 1, x, in, y, out, rows * rank, (int)between(1, 4))) abort();
        for (int64_t t = 0; t < rows; t++)
            for (int64_t o = 0; o < out; o++) {
                double sum = before[t * out + o], size = fabs(sum), factor = gain ? gain[o] : 1;
                if (t < s.start || t >= s.stop) {
                    expect(y[t * out + o] == before[t * out + o], "another's row", t, o, 0, 0);
                    continue;
                }
                for (int64_t r = 0; r < rank; r++)
                    for (int64_t k = 0; k < in; k++) {
                        const double term = (double)d[r] * a[r * in + k] * x[t * in + k] * b[r * out + o];
                        sum += term;
                        size += fabs(term);
                    }
                near("lowrank", t, o, y[t * out + o], sum * factor, 1e-6 * size * fabs(factor) + 1e-30);
            }
        free(a);
        free(b);
        free(d);
        free(gain);
        free(x);
        free(before);
        free(y);
    }
}

/* Attention over pages: attention.h, cache.h. */

static int64_t vector_size(int64_t dim, int64_t stored) {
    return stored == STORED_I8 ? dim + 4 * ceil_div(dim, 32) : dim * (stored == STORED_BF16 ? 2 : 4);
}

/* Number d of a kept vector. */
static float kept_at(const char *vector, int64_t dim, int64_t stored, int64_t d) {
    float value;
    uint16_t half;
    if (stored == STORED_I8) {
        memcpy(&value, vector + dim + d / 32 * 4, 4);
        return value * (float)((const int8_t *)vector)[d];
    }
    memcpy(&half, vector + 2 * d, 2);
    memcpy(&value, vector + (stored == STORED_BF16 ? 0 : 4 * d), 4);
    return stored == STORED_BF16 ? bf16(half) : value;
}

/* What is kept of x is near it, and all that is near it. */
static void check_kept(const float *x, const char *vector, int64_t dim, int64_t stored) {
    for (int64_t d = 0; d < dim; d++) {
        double bound = stored == STORED_BF16 ? fabs(x[d]) / 256 : 0;
        if (stored == STORED_I8)
            for (int64_t i = d / 32 * 32; i < min_(dim, d / 32 * 32 + 32); i++)
                bound = fmax(bound, fabs(x[i]) / 253.9);
        near("kept", stored, d, kept_at(vector, dim, stored, d), x[d], bound);
    }
}

static void attend_plain(const attention_call *c, int64_t i, int64_t t, int64_t head, double *out) {
    const int64_t length = c->query_start[i + 1] - c->query_start[i];
    const int64_t at = c->context_len[i] - length + t, own = head / (c->heads / c->kv_heads);
    const int64_t from = c->window ? max_i(0, at + 1 - c->window) : 0;
    const float *q = c->q + ((c->query_start[i] + t) * c->heads + head) * c->dim;
    double total = 0;
    for (int64_t d = 0; d < c->dim; d++) out[d] = 0;
    for (int64_t j = from; j <= at; j++) {
        const int64_t page = c->tables[i * c->table_width + j / c->block_size];
        const int64_t place = (page * c->block_size + j % c->block_size) * c->kv_heads + own;
        const int64_t bytes = vector_size(c->dim, c->stored);
        const char *k = (const char *)c->k + place * bytes, *v = (const char *)c->v + place * bytes;
        double score = 0;
        for (int64_t d = 0; d < c->dim; d++) score += (double)q[d] * kept_at(k, c->dim, c->stored, d);
        score *= c->scale;
        if (c->softcap != 0) score = c->softcap * tanh(score / c->softcap);
        const double p = exp(score);
        total += p;
        for (int64_t d = 0; d < c->dim; d++) out[d] += p * kept_at(v, c->dim, c->stored, d);
    }
    for (int64_t d = 0; d < c->dim; d++) out[d] /= total;
}

static void *cache_of(const attention_call *c) {
    const int64_t rows = c->blocks * c->block_size, bytes = vector_size(c->dim, c->stored);
    char *cache = room(rows * c->kv_heads * bytes);
    float *x = numbers(rows * c->kv_heads * c->dim);
    int64_t *slots = room(rows * 8);
    for (int64_t i = 0; i < rows; i++) slots[i] = rows - 1 - i;
    const cache_call call = {x, cache, slots, rows, c->kv_heads, c->dim, c->stored, rows};
    if (nibble_cache_write(&call, (int)between(1, 4))) abort();
    for (int64_t i = 0; i < rows * c->kv_heads; i++)
        check_kept(x + i * c->dim,
                   cache + (slots[i / c->kv_heads] * c->kv_heads + i % c->kv_heads) * bytes, c->dim,
                   c->stored);
    free(x);
    free(slots);
    return cache;
}

static void check_attention(void) {
    for (int i = 0; i < 36; i++) {
        const int64_t kv_heads = between(1, 3), sequences = between(1, 3), block_size = 8 << between(0, 2);
        attention_call c = {.sequences = sequences, .kv_heads = kv_heads, .block_size = block_size};
        int32_t start[4] = {0}, context[3];
        int64_t longest = 0;
        for (int64_t s = 0; s < sequences; s++) {
            const int64_t length = i % 2 ? 1 : between(0, 20);
            context[s] = (int32_t)(length + between(0, 70));
            start[s + 1] = start[s] + (int32_t)length;
            longest = max_i(longest, context[s]);
        }
        c.heads = kv_heads * between(1, 5);
        c.dim = i % 3 ? 4 * between(1, 24) : between(1, 70);
        c.stored = i % 3;
        c.window = between(0, 1) * between(1, 60);
        c.softcap = between(0, 1) ? 3.0f : 0.0f;
        c.scale = 1 / sqrtf((float)c.dim);
        c.tokens = start[sequences];
        c.table_width = ceil_div(longest, block_size);
        c.blocks = sequences * c.table_width + 1;
        int32_t *tables = room(c.blocks * 4);
        for (int64_t b = 0; b < c.blocks; b++) tables[b] = (int32_t)((b * 2 + 1) % c.blocks);
        if (c.blocks % 2 == 0)
            for (int64_t b = 0; b < c.blocks; b++) tables[b] = (int32_t)(c.blocks - 1 - b);
        c.tables = tables;
        c.query_start = start;
        c.context_len = context;
        c.q = numbers(c.tokens * c.heads * c.dim);
        c.out = numbers(c.tokens * c.heads * c.dim);
        c.k = cache_of(&c);
        c.v = cache_of(&c);
        if (nibble_attention(&c, (int)between(1, 4))) abort();
        double plain[128];
        for (int64_t s = 0; s < sequences; s++)
            for (int64_t t = 0; t < start[s + 1] - start[s]; t++)
                for (int64_t h = 0; h < c.heads; h++) {
                    attend_plain(&c, s, t, h, plain);
                    for (int64_t d = 0; d < c.dim; d++)
                        near("attention", start[s] + t, h * c.dim + d,
                             c.out[((start[s] + t) * c.heads + h) * c.dim + d], plain[d], 2e-6);
                }
        free(tables);
        free((void *)c.q);
        free(c.out);
        free((void *)c.k);
        free((void *)c.v);
    }
}

/* The name of an instruction set, or nothing for the best one. Prints what ran. */
int main(int count, char **names) {
    static const struct {
        const char *name;
        void (*check)(void);
    } parts[] = {{"fast", check_fast_all}, {"nf4", check_nf4},         {"dense", check_dense},
                 {"lowrank", check_lowrank}, {"attention", check_attention}};
    const char *isa = nibble_select(count > 1 ? names[1] : NULL);
    if (!isa) {
        printf("this processor has no %s\n", names[1]);
        return 2;
    }
    fused = strcmp(nibble_fast_name(), "portable") != 0;
    unit = nibble_fast_levels(levels);
    nibble_fast_bytes(bytes);
    printf("%s, fast products %s\n", isa, nibble_fast_name());
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        const int64_t before = compared;
        parts[i].check();
        printf("%s: %lld numbers compared, %lld wrong so far\n", parts[i].name,
               (long long)(compared - before), (long long)failures);
    }
    return failures != 0;
}
