/* What Python and the instruction-set files agree on. */
#ifndef NIBBLE_KERNELS_H
#define NIBBLE_KERNELS_H

#include "decoder.h"

#include <stddef.h>
#include <stdint.h>

/* An NF4 weight W [out, in]: weight number n has code packed[n / 2] >> 4 for even n, & 15 for odd,
 * and scale number n / blocksize. `_RECORD` in weight.py packs this. */
typedef struct {
    const uint8_t *packed;
    const float *absmax;          /* scales, or NULL when they are quantised: */
    const uint8_t *absmax_codes;  /* scale[i] = code[absmax_codes[i]] * nested_absmax[i / 256] */
    const float *nested_absmax;   /*            + nested_offset                               */
    const float *nested_code;
    const float *nested_offset;
    int64_t out, in, blocksize;
} nf4_weight;

enum { STORED_F32 = 0, STORED_BF16 = 1, STORED_I8 = 2 }; /* 8 bits: cache.h, terms.h */

/* Rows [start, stop) get y = gain * (y + B (d * (A x))) + bias. NULL: d = gain = 1, bias = 0.
 * In 8 bits both factors are in panels (terms.h). `_SPAN` and `_REST` in lowrank.py pack this. */
typedef struct {
    int64_t start, stop;
    const void *a; /* [rank, in] */
    const void *b; /* [rank, out]: the transpose of the equation's B */
    const float *d, *gain, *bias;
    int64_t rank, a_stored, b_stored;
} lowrank_segment;

typedef struct {
    const float *q;            /* [T, heads, dim] */
    const void *k, *v;         /* [blocks, block_size, kv_heads], each a vector as `stored` says */
    const int32_t *tables;     /* [sequences, table_width] */
    const int32_t *query_start; /* [sequences + 1] */
    const int32_t *context_len; /* [sequences] */
    float *out;                /* [T, heads, dim] */
    int64_t sequences, table_width, heads, kv_heads, dim, block_size, window, stored;
    int64_t tokens, blocks; /* rows of q; pages of the caches */
    float scale, softcap;
} attention_call;

/* cache[slots[t]] = x[t], x [rows, heads, dim]; the cache has `places` of `heads` vectors each.
 * `_CacheCall` in native.py is this. */
typedef struct {
    const float *x;
    void *cache;
    const int64_t *slots; /* [rows] */
    int64_t rows, heads, dim, stored, places;
} cache_call;

/* y [rows, out] = x Wᵀ + bias in the fast precision, with W in panels (fast.h) of 4 or 8 bits, then
 * the terms in 8 bits in their order. A call has several that read the same x. Panels NULL: y has
 * the product already. `_PRODUCT` in native.py packs this. */
typedef struct {
    const uint8_t *panels;
    const float *bias; /* [out] or NULL */
    float *y;
    int64_t out, bits;
    const lowrank_segment *terms;
    int64_t term_count;
} fast_product;

/* One instruction set's fast products. `in` is a multiple of 64; the workspace is in bytes. An NF4
 * level is taken as (levels[code] - level_zero) * unit, a weight's byte in steps of byte_unit. */
typedef struct {
    const char *name;
    const uint8_t *levels;
    int level_zero;
    float unit;
    int byte_unit;
    void (*linear)(const fast_product *products, int64_t count, const float *x, int64_t in,
                   int64_t rows, int threads, uint8_t *workspace);
    int64_t (*workspace)(const fast_product *products, int64_t count, int64_t in, int64_t rows,
                         int threads);
} fast_table;

extern const fast_table fast_portable;
#if defined(__x86_64__)
extern const fast_table fast_avx2;
extern const fast_table fast_vnni;
#elif defined(__aarch64__)
extern const fast_table fast_neon;
#endif

/* One instruction set's kernels. Each is told how many threads it may use. */
typedef struct {
    const char *name;
    void (*nf4_linear)(const nf4_weight *w, const float *x, int64_t rows, const float *bias,
                       float *y, int threads, float *workspace);
    int64_t (*nf4_workspace)(const nf4_weight *w, int64_t rows, int threads);
    void (*lowrank_add)(const lowrank_segment *segments, int64_t count, const float *x, int64_t in,
                        float *y, int64_t out, int threads, float *workspace);
    void (*attention)(const attention_call *call, int threads, float *workspace);
    int64_t (*attention_workspace)(const attention_call *call);
    void (*cache_write)(const cache_call *call, int threads);
    void (*dense_linear)(const void *w, int64_t stored, const float *x, int64_t rows, int64_t in,
                         int64_t out, const float *bias, float *y, int threads, float *workspace);
    int64_t (*dense_workspace)(int64_t in, int64_t rows, int64_t stored, int threads);
    void (*norm)(const norm_call *call, int threads);
    void (*rotary)(float *x, const float *cos, const float *sin, int64_t rows, int64_t heads,
                   int64_t dim, int threads);
    void (*each)(int kind, const float *a, const float *b, float cap, float *to, int64_t size,
                 int threads);
    void (*nf4_rows)(const nf4_weight *w, int64_t start, int64_t stop, float *to, int threads);
    void (*panel_rows)(const uint8_t *panels, int64_t in, int64_t start, int64_t stop, float *to,
                       int threads);
    void (*reduce)(const float *x, int64_t rows, int64_t width, int64_t stride, int64_t *best,
                   float *log_sum, int threads, float *workspace);
    int64_t (*reduce_workspace)(int64_t rows, int64_t width);
    void (*largest)(const float *x, int64_t width, int64_t count, float *values, int64_t *places);
} kernel_table;

extern const kernel_table kernels_portable;
#if defined(__x86_64__)
extern const kernel_table kernels_avx2;
extern const kernel_table kernels_avx512;
#endif

#endif
