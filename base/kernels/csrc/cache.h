/* A vector of `dim` floats as the paged cache keeps it, and back: kv_rows.py says the same in torch.
 *
 *   float32   as it is
 *   bfloat16  rounded to the nearest, ties to even
 *   8 bits    for each GROUP numbers: round(127 x / m) with m = max |x|, ties to even; after all of
 *             them the scales m / 127, one float32 for each group. x = scale * byte.
 *
 * The bytes of a vector depend on that vector alone.
 */
#ifndef NIBBLE_CACHE_H
#define NIBBLE_CACHE_H

#include "kernels.h"
#include "pool.h"
#include "simd.h"

#define GROUP 32

INLINE int64_t vector_bytes(int64_t dim, int64_t stored) {
    if (stored == STORED_I8) return dim + 4 * ceil_div(dim, GROUP);
    return dim * (stored == STORED_BF16 ? 2 : 4);
}

INLINE uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

/* `count` numbers to bytes; returns the scale. A group of zeros, or of less than 1e-36, is zero; of
 * one with Inf or NaN the scale is NaN, and so is all that is read back. */
INLINE float pack_group(const float *x, const int64_t count, int8_t *to) {
    uint32_t most = 0; /* bits of |x| order as |x| does, and NaN is above Inf */
    for (int64_t i = 0; i < count; i++) {
        uint32_t size;
        memcpy(&size, x + i, 4);
        size &= 0x7fffffffu;
        most = size > most ? size : most;
    }
    float largest;
    memcpy(&largest, &most, 4);
    const int finite = most < 0x7f800000u;
    const float factor = finite && largest > 1e-36f ? 127.0f / largest : 0.0f;
    for (int64_t i = 0; i < count; i++) {
        const float shifted = (finite ? x[i] * factor : 0.0f) + 12582912.0f;
        int32_t bits;
        memcpy(&bits, &shifted, 4);
        to[i] = (int8_t)(bits - 0x4B400000);
    }
    return !finite ? NAN : factor > 0.0f ? largest / 127.0f : 0.0f;
}

INLINE void pack_vector(const float *x, int64_t dim, int64_t stored, char *to) {
    if (stored == STORED_F32) {
        memcpy(to, x, (size_t)dim * sizeof *x);
    } else if (stored == STORED_BF16) {
        for (int64_t d = 0; d < dim; d++) {
            const uint16_t half = to_bf16(x[d]);
            memcpy(to + 2 * d, &half, 2);
        }
    } else {
        char *scales = to + dim;
        for (int64_t d = 0; d < dim; d += GROUP, scales += 4) {
            const float scale = dim - d >= GROUP
                                    ? pack_group(x + d, GROUP, (int8_t *)to + d)
                                    : pack_group(x + d, dim - d, (int8_t *)to + d);
            memcpy(scales, &scale, 4);
        }
    }
}

/* A vector as floats. */
INLINE void unpack_vector(const char *from, int64_t dim, int64_t stored, float *to) {
    if (stored == STORED_F32) {
        memcpy(to, from, (size_t)dim * sizeof *to);
    } else if (stored == STORED_BF16) {
        int64_t d = 0;
        for (; d + VL <= dim; d += VL) store(to + d, load_bf16((const uint16_t *)from + d));
        for (; d < dim; d++) to[d] = from_bf16(((const uint16_t *)from)[d]);
    } else {
        const char *scales = from + dim;
        for (int64_t d = 0; d < dim; d += GROUP, scales += 4) {
            const int8_t *bytes = (const int8_t *)from + d;
            float scale;
            memcpy(&scale, scales, 4);
            if (dim - d >= GROUP)
                for (int i = 0; i < GROUP; i++) to[d + i] = (float)bytes[i] * scale;
            else
                for (int64_t i = 0; i < dim - d; i++) to[d + i] = (float)bytes[i] * scale;
        }
    }
}

#define VECTORS_PER_TASK 64

static void cache_write_task(const void *data, int64_t task, int worker) {
    const cache_call *c = data;
    const int64_t bytes = vector_bytes(c->dim, c->stored);
    const int64_t stop = min_(c->rows * c->heads, (task + 1) * VECTORS_PER_TASK);
    (void)worker;
    for (int64_t i = task * VECTORS_PER_TASK; i < stop; i++) {
        const int64_t place = c->slots[i / c->heads] * c->heads + i % c->heads;
        pack_vector(c->x + i * c->dim, c->dim, c->stored, (char *)c->cache + place * bytes);
    }
}

/* cache[slots[t]] = x[t], head by head. No two slots are the same. */
static void cache_write(const cache_call *c, int threads) {
    pool_run(cache_write_task, c, ceil_div(c->rows * c->heads, VECTORS_PER_TASK), threads);
}

#endif
