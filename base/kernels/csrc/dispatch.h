/* The exported functions that others of them call; dispatch.c says what they return. */
#ifndef NIBBLE_DISPATCH_H
#define NIBBLE_DISPATCH_H

#include "kernels.h"

#define EXPORT __attribute__((visibility("default")))

EXPORT int nibble_nf4_linear(const nf4_weight *w, const float *x, int64_t rows, const float *bias,
                             float *y, int threads);
EXPORT int nibble_fast_linear(const fast_product *products, int64_t count, const float *x,
                              int64_t in, int64_t rows, int threads);
EXPORT int nibble_lowrank_add(const lowrank_segment *segments, int64_t count, const float *x,
                              int64_t in, float *y, int64_t out, int64_t floats, int threads);
EXPORT int nibble_attention(const attention_call *call, int threads);
EXPORT int nibble_cache_write(const cache_call *call, int threads);
EXPORT void nibble_norm(const norm_call *call, int threads);
EXPORT void nibble_rotary(float *x, const float *cos, const float *sin, int64_t rows,
                          int64_t heads, int64_t dim, int threads);
EXPORT void nibble_each(int kind, const float *a, const float *b, float cap, float *to,
                        int64_t size, int threads);

/* The kinds of `nibble_each`: act(a) * b, cap tanh(a / cap), a + b. */
enum { GATE_SILU = 0, GATE_GELU = 1, EACH_SOFTCAP = 2, EACH_ADD = 3 };

#endif
