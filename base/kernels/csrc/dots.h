/* What fast.h multiplies with, on each instruction set: products of bytes, sums of four in 32 bits.
 *
 * dot4 takes the bytes of terms, level_dot the levels of NF4, byte_dot the bytes of weights; start_,
 * level_start and byte_start begin their sums with what takes off the 128, or LEVEL_ZERO, that a
 * byte of W has too many.
 */
#if defined(FAST_AVX2)
/* round(64.06 level) + 64: two levels times two x8 are no more than 2 * 128 * 127, which 16 bits
 * hold. Of all such tables the one with the smallest error, 3.8e-3 by root mean square. */
#define LEVEL_ZERO 64
static const uint8_t LEVELS[16] __attribute__((aligned(16))) = {
    0, 19, 30, 39, 46, 52, 58, 64, 69, 74, 80, 86, 92, 100, 110, 128,
};
#define NF4_UNIT (1.0f / 64.05953f)
#else
/* round(112.03 level) + 128: of all tables the one with the smallest error, 1.7e-3 by root mean
 * square where 127 steps make 2.2e-3: see docs/LOG.md. */
#define LEVEL_ZERO 128
static const uint8_t LEVELS[16] __attribute__((aligned(16))) = {
    16, 50, 69, 84, 96, 107, 118, 128, 137, 146, 156, 166, 177, 191, 209, 240,
};
#define NF4_UNIT (1.0f / 112.03022f)
#endif

/* PARTS8 vectors make the 64 bytes of a line; FAST_TILE rows of x at a time.
 * line8: w8 + 128 or w8, whatever `dot4` takes; line4: the low and the high codes of a line, as
 * `level_dot` takes them. */
#if defined(FAST_VNNI)
#define PARTS8 1
#define FAST_TILE 12 /* 24 sums, 4 w, 1 x, 2 constants */
typedef __m512i w8;
typedef __m512i i32v;
typedef __m512 f32v;
INLINE i32v start_(int32_t sum) { return _mm512_set1_epi32(sum); }
INLINE w8 line8(const uint8_t *p) { return _mm512_loadu_si512(p); }
INLINE void line4(const uint8_t *p, w8 *low, w8 *high) {
    const __m512i mask = _mm512_set1_epi8(15);
    const __m512i table =
        _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)LEVELS));
    const __m512i pairs = _mm512_loadu_si512(p);
    *low = _mm512_shuffle_epi8(table, _mm512_and_si512(pairs, mask));
    *high = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(pairs, 4), mask));
}
INLINE i32v dot4(i32v sum, w8 w, int32_t x) {
    /* As the intrinsic does, but gcc 12 copies and spills the sums of that one. */
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(_mm512_set1_epi32(x)));
    return sum;
}
INLINE f32v scales(const float *p) { return _mm512_loadu_ps(p); }
INLINE f32v scale_(float scale) { return _mm512_set1_ps(scale); }
INLINE void add_block(float *sums, i32v n, f32v x_scale, f32v w_scale) {
    const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(n), x_scale);
    _mm512_storeu_ps(sums, _mm512_fmadd_ps(value, w_scale, _mm512_loadu_ps(sums)));
}

#elif defined(FAST_AVX2)
#define PARTS8 2
#define FAST_TILE 8
#define FEW 4 /* rows of x up to which two vectors have their sums in registers: 8 sums, 4 w, 1 x */
typedef __m256i w8;
typedef __m256i i32v;
typedef __m256 f32v;
INLINE i32v start_(int32_t sum) { (void)sum; return _mm256_setzero_si256(); }
INLINE i32v level_start(int32_t sum) { return _mm256_set1_epi32(sum); }
INLINE w8 line8(const uint8_t *p) {
    return _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)p), _mm256_set1_epi8(-128));
}
INLINE void line4(const uint8_t *p, w8 *low, w8 *high) {
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i table =
        _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)LEVELS));
    const __m256i pairs = _mm256_loadu_si256((const __m256i *)p);
    *low = _mm256_shuffle_epi8(table, _mm256_and_si256(pairs, mask));
    *high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(pairs, 4), mask));
}
/* Written out: gcc 12 adds products to each other first and spills the sums. */
INLINE i32v level_dot(i32v sum, w8 w, int32_t x) {
    __m256i product = _mm256_set1_epi32(x);
    __asm__("vpmaddubsw %1, %2, %1\n\tvpmaddwd %3, %1, %1\n\tvpaddd %1, %0, %0"
            : "+x"(sum), "+x"(product) : "x"(w), "x"(_mm256_set1_epi16(1)));
    return sum;
}
/* Whole bytes: no product of unsigned and signed ones is sure to fit 16 bits but |w8| times x8 with
 * the sign of w8, 2 * 127 * 127. */
INLINE i32v dot4(i32v sum, w8 w, int32_t x) {
    const __m256i pairs =
        _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(_mm256_set1_epi32(x), w));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
/* A byte of a weight gives up its last bit, halves rounded up, and is a level of 0 to 128 then: the
 * sign costs an instruction for each row of x. What that adds, a quarter of a level on average,
 * add_bytes takes off again. */
#define BYTE_UNIT 2.0f
INLINE w8 byte_line(const uint8_t *p) {
    return _mm256_avg_epu8(_mm256_loadu_si256((const __m256i *)p), _mm256_setzero_si256());
}
INLINE i32v byte_start(int32_t sum) { return level_start(sum); }
INLINE i32v byte_dot(i32v sum, w8 w, int32_t x) { return level_dot(sum, w, x); }
INLINE f32v scales(const float *p) { return _mm256_loadu_ps(p); }
INLINE f32v scale_(float scale) { return _mm256_set1_ps(scale); }
INLINE void add_block(float *sums, i32v n, f32v x_scale, f32v w_scale) {
    const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(n), x_scale);
    _mm256_storeu_ps(sums, _mm256_fmadd_ps(value, w_scale, _mm256_loadu_ps(sums)));
}
INLINE void add_bytes(float *sums, i32v n, int32_t x_sum, f32v x_scale, f32v w_scale) {
    const __m256 quarter = /* of sum x8, exactly */
        _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_set1_epi32(x_sum)), _mm256_set1_ps(0.25f / LEVEL_ZERO));
    const __m256 value = _mm256_mul_ps(_mm256_add_ps(_mm256_cvtepi32_ps(n), quarter), x_scale);
    _mm256_storeu_ps(sums, _mm256_fmadd_ps(value, w_scale, _mm256_loadu_ps(sums)));
}

#elif defined(FAST_NEON)
#include <arm_neon.h>
#define PARTS8 4
#define FAST_TILE 6 /* of one line: 12 sums, 4 w, 1 x, 2 constants */
typedef int8x16_t w8;
typedef int32x4_t i32v;
typedef float32x4_t f32v;
INLINE i32v start_(int32_t sum) { (void)sum; return vdupq_n_s32(0); }
INLINE w8 line8(const uint8_t *p) {
    return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p), vdupq_n_u8(128)));
}
INLINE void line4(const uint8_t *p, w8 *low, w8 *high) {
    const int8x16_t table = line8(LEVELS);
    const uint8x16_t pairs = vld1q_u8(p);
    *low = vqtbl1q_s8(table, vandq_u8(pairs, vdupq_n_u8(15)));
    *high = vqtbl1q_s8(table, vshrq_n_u8(pairs, 4));
}
INLINE i32v dot4(i32v sum, w8 w, int32_t x) {
    return vdotq_s32(sum, w, vreinterpretq_s8_s32(vdupq_n_s32(x)));
}
INLINE f32v scales(const float *p) { return vld1q_f32(p); }
INLINE f32v scale_(float scale) { return vdupq_n_f32(scale); }
INLINE void add_block(float *sums, i32v n, f32v x_scale, f32v w_scale) {
    const float32x4_t value = vmulq_f32(vcvtq_f32_s32(n), x_scale);
    vst1q_f32(sums, vfmaq_f32(vld1q_f32(sums), value, w_scale));
}

#else /* four rows of W at a time, 16 bit products where the compiler finds them */
#define PARTS8 4
#define FAST_TILE 2
typedef struct { int8_t at[16]; } w8;
typedef struct { int32_t at[4]; } i32v;
typedef struct { float at[4]; } f32v;
INLINE i32v start_(int32_t sum) { (void)sum; return (i32v){{0}}; }
INLINE w8 line8(const uint8_t *p) {
    w8 w;
    for (int i = 0; i < 16; i++) w.at[i] = (int8_t)(p[i] - 128);
    return w;
}
INLINE void line4(const uint8_t *p, w8 *low, w8 *high) {
    for (int i = 0; i < 16; i++) {
        low->at[i] = (int8_t)(LEVELS[p[i] & 15] - 128);
        high->at[i] = (int8_t)(LEVELS[p[i] >> 4] - 128);
    }
}
INLINE i32v dot4(i32v sum, w8 w, int32_t x) {
    int8_t four[4];
    memcpy(four, &x, 4);
    for (int r = 0; r < 4; r++)
        sum.at[r] += w.at[4 * r] * four[0] + w.at[4 * r + 1] * four[1] +
                     w.at[4 * r + 2] * four[2] + w.at[4 * r + 3] * four[3];
    return sum;
}
INLINE f32v scales(const float *p) { return (f32v){{p[0], p[1], p[2], p[3]}}; }
INLINE f32v scale_(float scale) { return (f32v){{scale, scale, scale, scale}}; }
INLINE void add_block(float *sums, i32v n, f32v x_scale, f32v w_scale) {
    for (int r = 0; r < 4; r++) sums[r] += ((float)n.at[r] * x_scale.at[r]) * w_scale.at[r];
}
#endif

#if !defined(FAST_AVX2)
INLINE i32v level_start(int32_t sum) { return start_(sum); }
INLINE i32v level_dot(i32v sum, w8 w, int32_t x) { return dot4(sum, w, x); }
#define BYTE_UNIT 1.0f
INLINE w8 byte_line(const uint8_t *p) { return line8(p); }
INLINE i32v byte_start(int32_t sum) { return start_(sum); }
INLINE i32v byte_dot(i32v sum, w8 w, int32_t x) { return dot4(sum, w, x); }
INLINE void add_bytes(float *sums, i32v n, int32_t x_sum, f32v x_scale, f32v w_scale) {
    (void)x_sum;
    add_block(sums, n, x_scale, w_scale);
}
#endif
#if !defined(FEW)
#define FEW FAST_TILE
#endif
