/* What Python and the functions of decoder.c agree on: `records.py` packs these. */
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

#endif
