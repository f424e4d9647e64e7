/* 4-bit matrices, multiplied with inputs of 8 bits: integer products within a group of columns, float sums over groups. */
#include "gemm.h"
#include "quantise.h"

#define MAX_ROWS 8          /* input rows that are multiplied with weights while they are in registers */
#define PREFETCH_BYTES 4096 /* of the matrix that are prefetched ahead */

void int4_pack_row(const float *x, int64_t cols, int8_t *int8, float *scales, float *sums) {
    for (int64_t start = 0; start < cols; start += GROUP_SIZE, int8 += GROUP_SIZE, scales++, sums++) {
        const int64_t count = min_int(cols - start, GROUP_SIZE);
        const int32_t total = quantise_vector(x + start, count, int8, scales);
        memset(int8 + count, 0, GROUP_SIZE - count);
        *sums = *scales * (float)total;
    }
}

/* Adds to sum[i] the products of its 4 weights, unsigned bytes, with the 4 signed bytes of an input. */
INLINE Ints add_products(Ints sum, Ints weights, int32_t input) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(input));
#elif defined(__AVX512BW__)
    __m512i pairs = _mm512_maddubs_epi16((__m512i)weights, _mm512_set1_epi32(input));
    return sum + (Ints)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    __m256i pairs = _mm256_maddubs_epi16((__m256i)weights, _mm256_set1_epi32(input));
    return sum + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD) /* of signed bytes, which levels of 0 to 15 are too */
    int32x4_t sums[2];
    int8x16_t bytes[2];
    memcpy(sums, &sum, sizeof sum);
    memcpy(bytes, &weights, sizeof weights);
    for (int i = 0; i < 2; i++) sums[i] = vdotq_s32(sums[i], bytes[i], vreinterpretq_s8_s32(vdupq_n_s32(input)));
    memcpy(&sum, sums, sizeof sum);
    return sum;
#else
    int8_t four[4];
    memcpy(four, &input, 4);
    for (int i = 0; i < 4; i++) sum += (weights >> (8 * i) & 255) * four[i];
    return sum;
#endif
}

/* y (NR, LANES), its rows `stride` apart, = LANES matrix rows applied to NR input rows. */
INLINE void micro_kernel(const uint8_t *q, const uint16_t *scales, int64_t groups, const int8_t *x, const float *x_scales,
                         const float *x_sums, float *y, int64_t stride, const int NR) {
    Floats sum[MAX_ROWS];
    for (int r = 0; r < NR; r++) sum[r] = (Floats){0};
    for (int64_t g = 0; g < groups; g++, scales += 2 * LANES) {
        Ints part[MAX_ROWS];
        for (int r = 0; r < NR; r++) part[r] = (Ints){0};
#pragma GCC unroll 8
        for (int k = 0; k < GROUP_SIZE / 8; k++, q += 4 * LANES) {
            const Ints both = (Ints)load_uints(q);
            __builtin_prefetch(q + PREFETCH_BYTES, 0, 2); /* into the L2 cache */
            const Ints low = both & 0x0f0f0f0f, high = both >> 4 & 0x0f0f0f0f;
#pragma GCC unroll 8
            for (int r = 0; r < NR; r++) {
                int32_t inputs[2]; /* 4 bytes of the group's first half, and of its second */
                memcpy(inputs, x + (r * groups + g) * GROUP_SIZE + 4 * k, 4);
                memcpy(inputs + 1, x + (r * groups + g) * GROUP_SIZE + GROUP_SIZE / 2 + 4 * k, 4);
                part[r] = add_products(add_products(part[r], low, inputs[0]), high, inputs[1]);
            }
        }
        const Uints both = load_uints(scales);
        const Floats scale = (Floats)(both << 16), zero = (Floats)(both & 0xffff0000u);
#pragma GCC unroll 8
        for (int r = 0; r < NR; r++) {
            sum[r] = fmadd(zero, splat(x_sums[r * groups + g]), sum[r]);
            sum[r] = fmadd(__builtin_convertvector(part[r], Floats), scale * x_scales[r * groups + g], sum[r]);
        }
    }
    for (int r = 0; r < NR; r++) store(y + r * stride, sum[r]);
}

#define KERNEL(NR)                                                                                                   \
    static void kernel_##NR(const uint8_t *q, const uint16_t *scales, int64_t groups, const int8_t *x,               \
                            const float *x_scales, const float *x_sums, float *y, int64_t stride) {                  \
        micro_kernel(q, scales, groups, x, x_scales, x_sums, y, stride, NR);                                         \
    }
KERNEL(1) KERNEL(2) KERNEL(3) KERNEL(4) KERNEL(5) KERNEL(6) KERNEL(7) KERNEL(8)

typedef void (*Kernel)(const uint8_t *, const uint16_t *, int64_t, const int8_t *, const float *, const float *, float *,
                       int64_t);
static const Kernel KERNEL_OF[MAX_ROWS] = {kernel_1, kernel_2, kernel_3, kernel_4, kernel_5, kernel_6, kernel_7, kernel_8};

void int4_gemm(const Matrix *m, int64_t first, int64_t count, const PackedInputs *in, int64_t n, float *y) {
    const int64_t groups = num_groups(m);
    for (int64_t r = 0; r < n; r += MAX_ROWS) {
        const int64_t n_rows = min_int(n - r, MAX_ROWS);
        for (int64_t i = first; i < first + count; i += LANES) {
            const uint8_t *q = (const uint8_t *)m->data + i * groups * (GROUP_SIZE / 2);
            const uint16_t *scales = m->scales + i * groups * 2;
            const int is_full = i + LANES <= m->rows;
            float padded[MAX_ROWS * LANES], *out = y + r * m->rows + i;
            KERNEL_OF[n_rows - 1](q, scales, groups, in->int8 + r * groups * GROUP_SIZE, in->int8_scales + r * groups,
                                  in->int8_sums + r * groups, is_full ? out : padded, is_full ? m->rows : LANES);
            for (int64_t j = 0; !is_full && j < n_rows; j++)
                memcpy(out + j * m->rows, padded + j * LANES, (size_t)4 * (m->rows - i));
        }
    }
}
