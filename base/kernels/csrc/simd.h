/* Vectors of VL floats, the same few operations for each instruction set.
 *
 * Every sum the kernels make is VL partial sums, one to a lane, joined by `sum_each` or `sum_lanes`
 * in a fixed tree. Multiply-adds are fused where the machine does it and the call says so; the
 * compiler fuses nothing on its own (-ffp-contract=off), so that all copies of a loop round alike.
 */
#ifndef NIBBLE_SIMD_H
#define NIBBLE_SIMD_H

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline, unused))

#if defined(ISA_AVX512)
#include <immintrin.h>
#define VL 16
#define TILE 6 /* rows of x in one register tile of 4 weight rows: 24 sums, 6 x, 1 w */
typedef __m512 vf;
typedef __m512i vi;
INLINE vf load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store(float *p, vf a) { _mm512_storeu_ps(p, a); }
INLINE vf splat(float a) { return _mm512_set1_ps(a); }
INLINE vf fma_(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf max_(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf load_bf16(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE vf load_i8(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
/* out[i] = sum of the lanes of the i-th vector; each by the same tree. */
INLINE void sum_each(float *out, vf a, vf b, vf c, vf d) {
    vf ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    vf cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    vf all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all),
                                _mm512_castps512_ps256(_mm512_shuffle_f32x4(all, all, 0xEE)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

#elif defined(ISA_AVX2)
#include <immintrin.h>
#define VL 8
#define TILE 3 /* 12 sums, 3 x, 1 w */
typedef __m256 vf;
typedef __m256i vi;
INLINE vf load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void store(float *p, vf a) { _mm256_storeu_ps(p, a); }
INLINE vf splat(float a) { return _mm256_set1_ps(a); }
INLINE vf fma_(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf max_(vf a, vf b) { return _mm256_max_ps(a, b); }
INLINE vf load_bf16(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
INLINE vf load_i8(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
INLINE void sum_each(float *out, vf a, vf b, vf c, vf d) {
    vf ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    vf cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    vf all = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

#else /* GNU vectors of 16 bytes: SSE2 or NEON, or scalars where there is neither */
#define VL 4
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
INLINE vf load(const float *p) {
    vf a;
    memcpy(&a, p, sizeof a);
    return a;
}
INLINE void store(float *p, vf a) { memcpy(p, &a, sizeof a); }
INLINE vf splat(float a) { return (vf){a, a, a, a}; }
#if defined(__aarch64__)
#include <arm_neon.h>
#define TILE 5 /* 20 sums, 5 x, 1 w of NEON's 32 registers */
INLINE vf fma_(vf a, vf b, vf c) {
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#else
#define TILE 2
INLINE vf fma_(vf a, vf b, vf c) { return a * b + c; }
#endif
INLINE vf max_(vf a, vf b) {
    vi greater = (vi)(a > b);
    return (vf)(((vi)a & greater) | ((vi)b & ~greater));
}
INLINE vf load_bf16(const uint16_t *p) {
    vi wide = {(int32_t)((uint32_t)p[0] << 16), (int32_t)((uint32_t)p[1] << 16),
               (int32_t)((uint32_t)p[2] << 16), (int32_t)((uint32_t)p[3] << 16)};
    return (vf)wide;
}
INLINE vf load_i8(const int8_t *p) { return (vf){p[0], p[1], p[2], p[3]}; }
INLINE void sum_each(float *out, vf a, vf b, vf c, vf d) {
    out[0] = (a[0] + a[1]) + (a[2] + a[3]);
    out[1] = (b[0] + b[1]) + (b[2] + b[3]);
    out[2] = (c[0] + c[1]) + (c[2] + c[3]);
    out[3] = (d[0] + d[1]) + (d[2] + d[3]);
}
#endif

typedef int32_t lanes __attribute__((vector_size(VL * 4)));
typedef uint32_t ulanes __attribute__((vector_size(VL * 4)));

INLINE float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

INLINE float sum_lanes(vf a) {
    float out[4];
    sum_each(out, a, a, a, a);
    return out[0];
}

INLINE float max_lanes(vf a) {
    float lane[VL];
    store(lane, a);
    float best = lane[0];
    for (int i = 1; i < VL; i++) best = lane[i] > best ? lane[i] : best;
    return best;
}

INLINE vf where(lanes condition, vf yes, vf no) {
    return (vf)((condition & (lanes)yes) | (~condition & (lanes)no));
}

/* e^x for x <= 0 with an error below 2 units in the last place; 0 below -87.
 * 2^n e^r with r = x - n ln 2; the polynomial is the one of Cephes' expf. */
INLINE vf exp_(vf x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    vf shifted = fma_(x, splat(1.44269504f), splat(magic));
    vf n = shifted - splat(magic);
    vf r = fma_(n, splat(-0.693359375f), x);
    r = fma_(n, splat(2.12194440e-4f), r);
    vf p = splat(1.9875691500e-4f);
    p = fma_(p, r, splat(1.3981999507e-3f));
    p = fma_(p, r, splat(8.3334519073e-3f));
    p = fma_(p, r, splat(4.1665795894e-2f));
    p = fma_(p, r, splat(1.6666665459e-1f));
    p = fma_(p, r, splat(5.0000001201e-1f));
    p = fma_(p * r, r, r) + splat(1.0f);
    ulanes power = ((ulanes)shifted << 23) + (127u << 23);
    return where((lanes)(x < splat(-87.0f)), splat(0.0f), p * (vf)power); /* NaN stays NaN */
}

/* tanh x: 1 - 2 / (e^2|x| + 1) with its sign, and Cephes' polynomial near 0. */
INLINE vf tanh_(vf x) {
    lanes sign = (lanes)x & (lanes)splat(-0.0f);
    vf size = (vf)((lanes)x ^ sign);
    vf e = exp_(splat(-2.0f) * size);
    vf far = (splat(1.0f) - e) / (splat(1.0f) + e);
    vf z = size * size;
    vf p = splat(-5.70498872745e-3f);
    p = fma_(p, z, splat(2.06390887954e-2f));
    p = fma_(p, z, splat(-5.37397155531e-2f));
    p = fma_(p, z, splat(1.33314422036e-1f));
    p = fma_(p, z, splat(-3.33332819422e-1f));
    vf near = fma_(p * z, size, size);
    return (vf)((lanes)where((lanes)(size < splat(0.625f)), near, far) | sign);
}

/* to[c * to_stride + r] = from[r * from_stride + c] for r, c < 8. */
#if defined(ISA_AVX512) || defined(ISA_AVX2)
INLINE void transpose8(const float *from, ptrdiff_t from_stride, float *to, ptrdiff_t to_stride) {
    __m256 row[8], pair[8], quad[8];
    for (int i = 0; i < 8; i++) row[i] = _mm256_loadu_ps(from + i * from_stride);
    for (int i = 0; i < 4; i++) {
        pair[2 * i] = _mm256_unpacklo_ps(row[2 * i], row[2 * i + 1]);
        pair[2 * i + 1] = _mm256_unpackhi_ps(row[2 * i], row[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        quad[4 * i] = _mm256_shuffle_ps(pair[4 * i], pair[4 * i + 2], 0x44);
        quad[4 * i + 1] = _mm256_shuffle_ps(pair[4 * i], pair[4 * i + 2], 0xEE);
        quad[4 * i + 2] = _mm256_shuffle_ps(pair[4 * i + 1], pair[4 * i + 3], 0x44);
        quad[4 * i + 3] = _mm256_shuffle_ps(pair[4 * i + 1], pair[4 * i + 3], 0xEE);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * to_stride,
                         _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31));
    }
}
#else
INLINE void transpose8(const float *from, ptrdiff_t from_stride, float *to, ptrdiff_t to_stride) {
    for (int c = 0; c < 8; c++)
        for (int r = 0; r < 8; r++) to[c * to_stride + r] = from[r * from_stride + c];
}
#endif

#endif
