/* The two halves of a decoder layer around its attention, each as one call, for adapters that are
 * low-rank terms and norms alone; and whole layers, one after the other, where the attention is that
 * over pages. Python has the same parts out of the same functions (base/fused), and takes them for
 * every other adapter: the bits are the same.
 *
 * Each returns what those of dispatch.c do.
 */
#include "decoder.h"
#include "dispatch.h"

#include <stdlib.h>
#include <string.h>

/* Grown, never shrunk, one for each calling thread. */
static void *room(int64_t bytes) {
    static _Thread_local void *memory = NULL;
    static _Thread_local int64_t size = 0;
    if (bytes > size) {
        void *fresh = realloc(memory, (size_t)bytes);
        if (!fresh) return NULL;
        memory = fresh;
        size = bytes;
    }
    return memory;
}

/* Are all terms of an adapter at a place in 8 bits? Then a fast product takes them along. */
static int is_rounded(const adapter_place *own) {
    const lowrank_segment *terms = own->terms;
    int64_t ranks = 0;
    for (int64_t j = 0; j < own->count; j++) {
        if (terms[j].rank && terms[j].a_stored != STORED_I8) return 0;
        ranks += terms[j].rank;
    }
    return ranks > 0;
}

/* How many terms a place has in this step, of adapters whose terms there are rounded, or not. */
static int64_t count_terms(const decoder_step *s, int64_t place, int rounded) {
    int64_t count = 0;
    for (int64_t i = 0; i < s->spans; i++) {
        const adapter_place *own = s->span[i].table + place;
        if (own->count && is_rounded(own) == rounded) count += own->count;
    }
    return count;
}

/* Those terms with the rows of this step. Returns the floats of their A x. */
static int64_t list_terms(const decoder_step *s, int64_t place, int rounded,
                          lowrank_segment *next) {
    int64_t floats = 0;
    for (int64_t i = 0; i < s->spans; i++) {
        const adapter_place *own = s->span[i].table + place;
        const lowrank_segment *terms = own->terms;
        if (!own->count || is_rounded(own) != rounded) continue;
        for (int64_t j = 0; j < own->count; j++, next++) {
            *next = terms[j];
            next->start = s->span[i].start;
            next->stop = s->span[i].stop;
            floats += (next->stop - next->start) * next->rank;
        }
    }
    return floats;
}

static int add_terms(const decoder_step *s, int64_t place, int rounded, const float *x, int64_t in,
                     float *y, int64_t out, int threads) {
    const int64_t count = count_terms(s, place, rounded);
    if (!count) return 0;
    lowrank_segment *segments = room(count * (int64_t)sizeof *segments);
    if (!segments) return 1;
    const int64_t floats = list_terms(s, place, rounded, segments);
    return nibble_lowrank_add(segments, count, x, in, y, out, floats, threads);
}

/* Linears `first` to first + count - 1, all of x, each to its y. Those in panels are one call with
 * their rounded terms: x is rounded once for all of them. */
static int linears(const decoder_layer *l, const decoder_step *s, int first, int count,
                   const float *x, float *const *y, int threads) {
    const int64_t place = l->first_place + first;
    fast_product products[LINEARS];
    int64_t terms = 0;
    int fast = 0;
    for (int i = 0; i < count; i++)
        if (!l->linear[first + i].exact) terms += count_terms(s, place + i, 1);
    lowrank_segment *next = room(terms * (int64_t)sizeof *next + 1);
    if (!next) return 1;
    for (int i = 0; i < count; i++) {
        const decoder_linear *w = l->linear + first + i;
        if (w->exact) continue;
        const int64_t own = count_terms(s, place + i, 1);
        list_terms(s, place + i, 1, next);
        products[fast++] = (fast_product){w->panels, w->bias, y[i], w->out, w->bits, next, own};
        next += own;
    }
    if (fast && nibble_fast_linear(products, fast, x, l->linear[first].in, s->tokens, threads))
        return 1;
    for (int i = 0; i < count; i++) {
        const decoder_linear *w = l->linear + first + i;
        if (w->exact && (nibble_nf4_linear(w->exact, x, s->tokens, w->bias, y[i], threads) ||
                         add_terms(s, place + i, 1, x, w->in, y[i], w->out, threads)))
            return 1;
        if (add_terms(s, place + i, 0, x, w->in, y[i], w->out, threads)) return 1;
    }
    return 0;
}

/* y = norm(x), or sum = x + add and y = norm(sum); `heads` rows of `width` for each token. */
static int norm(const decoder_layer *l, const decoder_step *s, int which, const float *x,
                const float *add, float *sum, float *y, int64_t heads, int64_t width,
                int threads) {
    const int64_t place = l->first_place + LINEARS + which;
    norm_call call = {.x = x, .add = add, .weight = l->norm[which], .sum = sum, .y = y,
                      .rows = s->tokens * heads, .width = width, .each = heads, .eps = l->eps,
                      .shift = l->shift};
    norm_owner *own = room(s->spans * (int64_t)sizeof *own + 1);
    if (!own) return 1;
    for (int64_t i = 0; i < s->spans; i++)
        if (s->span[i].table[place].norm)
            own[call.owners++] = (norm_owner){s->span[i].start, s->span[i].stop,
                                              s->span[i].table[place].norm};
    call.own = own;
    nibble_norm(&call, threads);
    return 0;
}

/* From the residual stream h [tokens, hidden] to q [tokens, heads, dim], k, v [.., kv_heads, ..],
 * normalised and rotated. */
EXPORT int nibble_decoder_open(const decoder_layer *l, const decoder_step *s, const float *h,
                               float *q, float *k, float *v, int threads) {
    float *const qkv[] = {q, k, v};
    if (norm(l, s, NORM_INPUT, h, NULL, NULL, s->normed, 1, l->hidden, threads) ||
        linears(l, s, LINEAR_Q, 3, s->normed, qkv, threads))
        return 1;
    if (l->norm[NORM_Q] && norm(l, s, NORM_Q, q, NULL, NULL, q, l->heads, l->dim, threads))
        return 1;
    if (l->norm[NORM_K] && norm(l, s, NORM_K, k, NULL, NULL, k, l->kv_heads, l->dim, threads))
        return 1;
    nibble_rotary(q, s->cos, s->sin, s->tokens, l->heads, l->dim, threads);
    nibble_rotary(k, s->cos, s->sin, s->tokens, l->kv_heads, l->dim, threads);
    return 0;
}

/* From what attention gave, [tokens, heads, dim], to the next residual stream `to`; h stays. */
EXPORT int nibble_decoder_close(const decoder_layer *l, const decoder_step *s, const float *h,
                                const float *attended, float *to, int threads) {
    const int64_t width = l->hidden;
    float *const out[] = {s->out}, *const gate_up[] = {s->gate, s->up};
    if (linears(l, s, LINEAR_O, 1, attended, out, threads)) return 1;
    if (l->norm[NORM_AFTER_ATTENTION] &&
        norm(l, s, NORM_AFTER_ATTENTION, s->out, NULL, NULL, s->out, 1, width, threads))
        return 1;
    if (norm(l, s, NORM_BEFORE_MLP, h, s->out, to, s->normed, 1, width, threads) ||
        linears(l, s, LINEAR_GATE, 2, s->normed, gate_up, threads))
        return 1;
    nibble_each((int)l->gate, s->gate, s->up, 0.0f, s->gate, s->tokens * l->inner, threads);
    if (linears(l, s, LINEAR_DOWN, 1, s->gate, out, threads)) return 1;
    if (l->norm[NORM_AFTER_MLP] &&
        norm(l, s, NORM_AFTER_MLP, s->out, NULL, NULL, s->out, 1, width, threads))
        return 1;
    nibble_each(EACH_ADD, to, s->out, 0.0f, to, s->tokens * width, threads);
    return 0;
}

/* Keys and values to their pages, then what each token sees: q [tokens, heads, dim] to `out`. */
static int attend(const decoder_layer *l, const decoder_step *s, const decoder_pages *p,
                  const float *q, const float *k, const float *v, float *out, int threads) {
    const float *const fresh[] = {k, v};
    void *const kept[] = {p->keys[l->index], p->values[l->index]};
    for (int i = 0; i < 2; i++) {
        const cache_call write = {fresh[i], kept[i], p->slots, s->tokens, l->kv_heads, l->dim,
                                  p->stored, p->blocks * p->block_size};
        const int failed = nibble_cache_write(&write, threads);
        if (failed) return failed;
    }
    const attention_call call = {
        .q = q, .k = kept[0], .v = kept[1], .tables = p->tables, .query_start = p->query_start,
        .context_len = p->context_len, .out = out, .sequences = p->sequences,
        .table_width = p->table_width, .heads = l->heads, .kv_heads = l->kv_heads, .dim = l->dim,
        .block_size = p->block_size, .window = l->window, .stored = p->stored,
        .tokens = s->tokens, .blocks = p->blocks, .scale = l->scale, .softcap = l->softcap};
    memset(out, 0, (size_t)(s->tokens * l->heads * l->dim) * sizeof *out);
    return nibble_attention(&call, threads);
}

/* From the residual stream h to that after `count` layers, `to`; h stays. steps[i] is layer i's.
 * room: floats for q, k, v, the attention's output and one more stream. */
EXPORT int nibble_decoder_run(const decoder_layer *const *layers, const decoder_step *const *steps,
                              int64_t count, const decoder_pages *p, const float *h, float *to,
                              float *own, int threads) {
    for (int64_t i = 0; i < count; i++) {
        const decoder_layer *l = layers[i];
        const decoder_step *s = steps[i];
        const int64_t wide = s->tokens * l->heads * l->dim, narrow = s->tokens * l->kv_heads * l->dim;
        float *q = own, *k = q + wide, *v = k + narrow, *attended = v + narrow;
        float *next = (count - i) % 2 ? to : attended + wide; /* the last one is `to` */
        int failed = nibble_decoder_open(l, s, h, q, k, v, threads);
        if (!failed) failed = attend(l, s, p, q, k, v, attended, threads);
        if (!failed) failed = nibble_decoder_close(l, s, h, attended, next, threads);
        if (failed) return failed;
        h = next;
    }
    return 0;
}
