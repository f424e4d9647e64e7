/* Vectors of LANES float32 values, and the arithmetic that all kernels share.
 *
 * The compiler contracts nothing (-ffp-contract=off): it would fuse a multiplication and an addition in one loop and not in
 * another, and the same row would get other bits in another block. What is fused is written as `fmadd`. */
#ifndef KNN_SSD_VECTORS_H
#define KNN_SSD_VECTORS_H

#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef __aarch64__
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Uints __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));
typedef int8_t Codes __attribute__((vector_size(4 * LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * LANES)));
typedef Floats UnalignedFloats __attribute__((aligned(4), may_alias));
typedef Uints UnalignedUints __attribute__((aligned(2), may_alias));
typedef Bytes UnalignedBytes __attribute__((aligned(1), may_alias));
typedef Shorts UnalignedShorts __attribute__((aligned(2), may_alias));

INLINE Floats load(const float *p) { return *(const UnalignedFloats *)p; }
INLINE void store(float *p, Floats a) { *(UnalignedFloats *)p = a; }
INLINE Uints load_uints(const void *p) { return *(const UnalignedUints *)p; }
INLINE Floats splat(float a) { return a - (Floats){0}; } /* a sum would change -0, and so take an instruction */

/* a * b + c, rounded once where the processor can do so at the speed of a multiplication, else twice. */
INLINE Floats fmadd(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    float32x4_t halves[3][2];
    memcpy(halves[0], &a, sizeof a);
    memcpy(halves[1], &b, sizeof b);
    memcpy(halves[2], &c, sizeof c);
    for (int i = 0; i < 2; i++) halves[2][i] = vfmaq_f32(halves[2][i], halves[0][i], halves[1][i]);
    memcpy(&c, halves[2], sizeof c);
    return c;
#else
    return a * b + c;
#endif
}

/* The lanes of `a` where `mask` is all ones, those of `b` where it is zero. */
INLINE Floats select_lanes(Ints mask, Floats a, Floats b) {
    return (Floats)(((Uints)a & (Uints)mask) | ((Uints)b & ~(Uints)mask));
}

/* The sum of all lanes; the upper half is added to the lower one until one lane is left. */
INLINE float horizontal_sum(Floats a) {
    float lanes[LANES];
    memcpy(lanes, &a, sizeof a);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}

INLINE Floats shuffle(Floats a, Floats b, Ints indices) {
#ifdef __clang__
    Floats result;
    for (int i = 0; i < LANES; i++) result[i] = indices[i] < LANES ? a[indices[i]] : b[indices[i] - LANES];
    return result;
#else
    return __builtin_shuffle(a, b, indices);
#endif
}

/* For each level, the indices in two concatenated vectors of the first half of every pair of runs of 2^level lanes. */
#if LANES == 16
static const Ints FIRST_HALVES[4] = {{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30},
                                     {0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29},
                                     {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27},
                                     {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}};
#else
static const Ints FIRST_HALVES[3] = {
    {0, 2, 4, 6, 8, 10, 12, 14}, {0, 1, 4, 5, 8, 9, 12, 13}, {0, 1, 2, 3, 8, 9, 10, 11}};
#endif

/* The sums of LANES vectors, each in the order of `horizontal_sum`. */
INLINE Floats horizontal_sums(Floats *v) {
#pragma GCC unroll 4
    for (int level = LANES == 16 ? 3 : 2; level >= 0; level--) {
        const Ints low = FIRST_HALVES[level], high = low + (1 << level);
#pragma GCC unroll 8
        for (int i = 0; i < 1 << level; i++)
            v[i] = shuffle(v[2 * i], v[2 * i + 1], low) + shuffle(v[2 * i], v[2 * i + 1], high);
    }
    return v[0];
}

/* The largest of all lanes. */
INLINE float horizontal_max(Floats a) {
    float max = a[0];
    for (int i = 1; i < LANES; i++) max = a[i] > max ? a[i] : max;
    return max;
}

/* LANES signed bytes as float32. Compilers need many instructions for the generic form, so there are intrinsics. */
INLINE Floats load_int8(const int8_t *p) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__)
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#elif defined(__aarch64__)
    const int16x8_t wide = vmovl_s8(vld1_s8(p));
    const float32x4_t halves[2] = {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_high_s16(wide))};
    Floats result;
    memcpy(&result, halves, sizeof result);
    return result;
#else
    return __builtin_convertvector(__builtin_convertvector(*(const UnalignedBytes *)p, Ints), Floats);
#endif
}

/* LANES bfloat16 values as float32. */
INLINE Floats load_bfloat16(const uint16_t *p) {
#if defined(__AVX512F__)
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#elif defined(__AVX2__)
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#elif defined(__aarch64__)
    const uint16x8_t halves = vld1q_u16(p);
    const uint32x4_t words[2] = {vshll_n_u16(vget_low_u16(halves), 16), vshll_n_u16(vget_high_u16(halves), 16)};
    Floats result;
    memcpy(&result, words, sizeof result);
    return result;
#else
    Uints words;
    for (int i = 0; i < LANES; i++) words[i] = (uint32_t)p[i] << 16;
    return (Floats)words;
#endif
}

/* LANES float16 values as float32, which is exact. */
INLINE Floats load_float16(const void *p) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__AVX2__) && defined(__F16C__)
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#elif defined(__aarch64__)
    float16x4_t narrow[2];
    memcpy(narrow, p, sizeof narrow);
    const float32x4_t halves[2] = {vcvt_f32_f16(narrow[0]), vcvt_f32_f16(narrow[1])};
    Floats result;
    memcpy(&result, halves, sizeof result);
    return result;
#else
    const Uints bits = __builtin_convertvector(*(const UnalignedShorts *)p, Uints);
    const Uints magnitude = (bits & 0x7fffu) << 13, special = (Uints)(magnitude >= 0x0f800000u) & 0x7f800000u;
    return (Floats)((Uints)((Floats)magnitude * 0x1p112f) | special | (bits & 0x8000u) << 16);
#endif
}

/* exp(x) as in the Cephes library; the relative error is about 1e-7. */
INLINE Floats exponential(Floats x) {
    const Floats lowest = splat(-87.0f), highest = splat(88.0f);
    x = select_lanes(x > lowest, x, lowest);
    x = select_lanes(x < highest, x, highest);
    Floats y = x * 1.44269504f;
    Ints n = __builtin_convertvector(y + (Floats)(((Uints)y & 0x80000000u) | (Uints)splat(0.5f)), Ints);
    Floats f = __builtin_convertvector(n, Floats);
    x = fmadd(f, splat(2.12194440e-4f), fmadd(f, splat(-0.693359375f), x));
    Floats p = splat(1.9875691500e-4f);
    p = fmadd(p, x, splat(1.3981999507e-3f));
    p = fmadd(p, x, splat(8.3334519073e-3f));
    p = fmadd(p, x, splat(4.1665795894e-2f));
    p = fmadd(p, x, splat(1.6666665459e-1f));
    p = fmadd(p, x, splat(5.0000001201e-1f));
    p = fmadd(p * x, x, x) + 1.0f;
    return p * (Floats)((n + 127) << 23);
}

INLINE float bfloat16_to_float(uint16_t bits) {
    uint32_t word = (uint32_t)bits << 16;
    float result;
    memcpy(&result, &word, 4);
    return result;
}

/* Rounds to the nearest bfloat16, ties to even. */
INLINE uint16_t float_to_bfloat16(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    return (uint16_t)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

INLINE int64_t min_int(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max_int(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#endif
