/* What Python and the functions of decoder.c agree on: steps.py and decoder.py pack these. */
#ifndef NIBBLE_DECODER_H
#define NIBBLE_DECODER_H

#include <stdint.h>

/* Tokens [start, stop) have a norm of their own. */
typedef struct {
    int64_t start, stop;
    const float *weight;
} norm_owner;

/* y = (weight + shift) * s / sqrt(mean(s^2) + eps), s = x + add; x, add, sum, y [rows, width].
 * `each` rows belong to one token. add NULL: s = x, and sum is not written. */
typedef struct {
    const float *x, *add, *weight;
    const norm_owner *own;
    float *sum, *y;
    int64_t rows, width, each, owners;
    float eps, shift;
} norm_call;

/* What one adapter has at one place of the decoder: terms of a linear, or a norm's weight. Places
 * are numbered layer by layer: LINEARS linears, then NORMS norms. */
typedef struct {
    const void *terms; /* lowrank_segment [count]; start and stop are not read */
    int64_t count;
    const float *norm;
} adapter_place;

/* Tokens [start, stop) use the adapter of `table` [places]. In order, without overlap. */
typedef struct {
    int64_t start, stop;
    const adapter_place *table;
} adapter_span;

enum { LINEAR_Q, LINEAR_K, LINEAR_V, LINEAR_O, LINEAR_GATE, LINEAR_UP, LINEAR_DOWN, LINEARS };
enum { NORM_INPUT, NORM_AFTER_ATTENTION, NORM_BEFORE_MLP, NORM_AFTER_MLP, NORM_Q, NORM_K, NORMS };

/* The weight of a linear: `exact` is an nf4_weight or NULL, and then it is in panels (fast.h). */
typedef struct {
    const void *exact;
    const uint8_t *panels;
    const float *bias; /* or NULL */
    int64_t out, in, bits;
} decoder_linear;

/* One decoder layer. Norms that its architecture lacks are NULL: only Gemma 2 and 3 have one after
 * attention and MLP, only Qwen 3 and Gemma 3 have those of q and k. */
typedef struct {
    decoder_linear linear[LINEARS];
    const float *norm[NORMS];
    int64_t first_place, hidden, heads, kv_heads, dim, inner, gate;
    int64_t index, window; /* of its pages in a cache; 0, or the keys that a token sees at most */
    float eps, shift;
    float scale, softcap; /* of the attention: a factor of q . k; 0, or c of c tanh(score / c) */
} decoder_layer;

/* One step: its tokens, who they belong to, their angles, and room that all layers share. */
typedef struct {
    int64_t tokens, spans;
    const adapter_span *span;
    const float *cos, *sin; /* [tokens, dim] */
    float *normed, *out;    /* [tokens, hidden] */
    float *gate, *up;       /* [tokens, inner] */
} decoder_step;

/* Where a step's keys and values are: pages of all layers, and of its sequences. As in the
 * `attention_call` and `cache_call` of kernels.h. */
typedef struct {
    void *const *keys, *const *values; /* of each layer */
    const int64_t *slots;              /* [tokens] */
    const int32_t *tables, *query_start, *context_len;
    int64_t sequences, table_width, block_size, blocks, stored;
} decoder_pages;

#endif
