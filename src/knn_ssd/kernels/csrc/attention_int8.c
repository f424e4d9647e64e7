/* Attention of drafts, over the 8-bit copies of keys and values. Products are summed up as integers, which is exact in any
 * order. */
#include <math.h>

#include "attention.h"
#include "quantise.h"

#define STEP (2 * LANES)      /* components that are multiplied at once */
#define QUERY_LEVELS 8191     /* so that a product with 2048 components stays below 2^31 */
#define WEIGHT_LEVELS 32764   /* of the largest weight, and */
#define TOTAL_LEVELS 0x1p23f  /* of all weights of a query, whose products with 8-bit values so stay below 2^31 */
#define SMALLEST 1e-30f       /* that is not zero */
#define POSITIONS 64          /* whose values are read while their weights are in the L1 cache */
#define PREFETCH_BYTES 2048   /* of keys and values that are prefetched ahead */

/* Adds to LANES sums the products of STEP bytes with as many 16-bit integers. */
INLINE Ints add_products(Ints sums, const int8_t *bytes, const int16_t *others) {
#if defined(__AVX512BW__)
    const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)bytes)), by = _mm512_loadu_si512(others);
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpwssd_epi32((__m512i)sums, wide, by);
#else
    return sums + (Ints)_mm512_madd_epi16(wide, by);
#endif
#elif defined(__AVX2__) && LANES == 8
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)bytes));
    return sums + (Ints)_mm256_madd_epi16(wide, _mm256_loadu_si256((const __m256i *)others));
#else
    for (int half = 0; half < STEP; half += LANES) {
        const Shorts levels = *(const UnalignedShorts *)(others + half);
        const Ints wide = __builtin_convertvector(*(const UnalignedBytes *)(bytes + half), Ints);
        sums += wide * ((__builtin_convertvector(levels, Ints) ^ 0x8000) - 0x8000);
    }
    return sums;
#endif
}

/* Adds to sums[0] and sums[1] the products of two vectors of STEP bytes with the lower and upper half of `weights`. With
 * AVX-512, sums[0] has the components 0-7 and 16-23, sums[1] the others. */
INLINE void add_pair(Ints sums[2], const int8_t *first, const int8_t *second, uint32_t weights) {
#if defined(__AVX512BW__)
    const __m256i a = _mm256_loadu_si256((const __m256i *)first), b = _mm256_loadu_si256((const __m256i *)second);
    const __m512i by = _mm512_set1_epi32((int)weights);
    const __m512i pairs[2] = {_mm512_cvtepi8_epi16(_mm256_unpacklo_epi8(a, b)),
                              _mm512_cvtepi8_epi16(_mm256_unpackhi_epi8(a, b))};
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++)
#if defined(__AVX512VNNI__)
        sums[h] = (Ints)_mm512_dpwssd_epi32((__m512i)sums[h], pairs[h], by);
#else
        sums[h] += (Ints)_mm512_madd_epi16(pairs[h], by);
#endif
#elif defined(__AVX2__) && LANES == 8
    const __m128i a = _mm_loadu_si128((const __m128i *)first), b = _mm_loadu_si128((const __m128i *)second);
    const __m256i by = _mm256_set1_epi32((int)weights);
    sums[0] += (Ints)_mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b)), by);
    sums[1] += (Ints)_mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm_unpackhi_epi8(a, b)), by);
#else
    for (int h = 0; h < 2; h++)
        sums[h] += __builtin_convertvector(*(const UnalignedBytes *)(first + h * LANES), Ints) * (int32_t)(weights & 0xffff) +
                   __builtin_convertvector(*(const UnalignedBytes *)(second + h * LANES), Ints) * (int32_t)(weights >> 16);
#endif
}

/* The sums of `add_pair` in the order of their components. */
INLINE void in_order(const Ints sums[2], Floats ordered[2]) {
    const Floats parts[2] = {__builtin_convertvector(sums[0], Floats), __builtin_convertvector(sums[1], Floats)};
#if defined(__AVX512BW__)
    ordered[0] = shuffle(parts[0], parts[1], (Ints){0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23});
    ordered[1] = shuffle(parts[0], parts[1], (Ints){8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
#else
    ordered[0] = parts[0], ordered[1] = parts[1];
#endif
}

/* Rounds a query (size,) to `levels`, zero up to the next multiple of STEP; returns the size of a level. */
static float round_query(const float *query, int64_t size, int16_t *levels) {
    const float largest = largest_magnitude(query, size), inverse = largest > SMALLEST ? QUERY_LEVELS / largest : 0;
    for (int64_t i = 0; i < ceil_div(size, STEP) * STEP; i++) levels[i] = i < size ? (int16_t)rintf(query[i] * inverse) : 0;
    return largest / QUERY_LEVELS;
}

/* The bytes of a vector from component i on: STEP of them, or those that there are, and zeros in `padded`. */
INLINE const int8_t *part_of(const int8_t *vector, int64_t i, int64_t size, int8_t *padded) {
    if (i + STEP <= size) return vector + i;
    memset(padded, 0, STEP);
    memcpy(padded, vector + i, (size_t)(size - i));
    return padded;
}

/* Multiplies values (count,) by scales. */
INLINE void multiply_by(float *values, const float *scales, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(values + i, load(values + i) * load(scales + i));
    for (; i < count; i++) values[i] *= scales[i];
}

/* Writes the scores of a span's keys. */
INLINE void score_span(const Span *span, const int16_t *query, const int64_t size, float scale, float *scores) {
    int8_t padded[STEP];
    for (int64_t t = 0; t < span->count; t += LANES) {
        const int64_t n_keys = min_int(span->count - t, LANES);
        const int8_t *keys = span->cache.int8_keys + t * size;
        Floats sums[LANES];
        for (int64_t i = 0; i < LANES * size; i += 64) __builtin_prefetch(keys + PREFETCH_BYTES + i);
#pragma GCC unroll 16
        for (int k = 0; k < LANES; k++) {
            Ints sum = {0};
            for (int64_t i = 0; k < n_keys && i < size; i += STEP)
                sum = add_products(sum, part_of(keys + k * size, i, size, padded), query + i);
            sums[k] = __builtin_convertvector(sum, Floats);
        }
        store(scores + t, horizontal_sums(sums) * scale);
        multiply_by(scores + t, span->cache.key_scales + t, n_keys);
    }
}

/* Adds to sums (size,), in the order of `add_pair`, the products of a span's values from position `first` on, at most POSITIONS
 * of them, with weights. Positions are taken in pairs; a last one alone is followed by a weight of zero. */
INLINE void add_values(const Span *span, int64_t first, int64_t count, const uint32_t *weights, const int64_t size,
                       Ints *sums) {
    int8_t padded[2][STEP];
    const int8_t *values = span->cache.int8_values + first * size;
    for (int64_t t = 0; t < count; t++) __builtin_prefetch(values + PREFETCH_BYTES + t * size);
    for (int64_t i = 0; i < size; i += STEP, sums += 2) {
        Ints both[2] = {sums[0], sums[1]};
        for (int64_t t = 0; t < count; t += 2) {
            const int8_t *next = values + (t + 1 < count ? t + 1 : t) * size;
            add_pair(both, part_of(values + t * size, i, size, padded[0]), part_of(next, i, size, padded[1]), weights[t / 2]);
        }
        sums[0] = both[0], sums[1] = both[1];
    }
}

/* How many levels a weight of 1 gets, so that all weights (count,), followed by zeros up to a multiple of LANES, stay within
 * bounds. */
static float levels_of(const float *weights, int64_t count) {
    Floats maxima = {0}, sums = {0};
    for (int64_t t = 0; t < count; t += LANES) {
        const Floats w = load(weights + t);
        maxima = select_lanes(w > maxima, w, maxima);
        sums += w;
    }
    const float largest = horizontal_max(maxima);
    return largest > SMALLEST ? fminf(WEIGHT_LEVELS / largest, TOTAL_LEVELS / horizontal_sum(sums)) : 0;
}

/* Rounds weights (count,), followed by zeros up to a multiple of LANES, to 16-bit integers in the same memory. What a weight
 * loses is added to the next one of its lane: so many small weights keep their sum, beside a large one. */
static void round_weights(float *weights, int64_t count, float levels) {
    Floats lost = {0};
    for (int64_t t = 0; t < count; t += LANES) {
        const Floats exact = load(weights + t) * levels + lost;
        const Ints whole = __builtin_convertvector(exact + 0.5f, Ints);
        lost = exact - __builtin_convertvector(whole, Floats);
        *(UnalignedShorts *)((char *)weights + 2 * t) = __builtin_convertvector(whole, Shorts);
    }
}

/* Writes the products of weights, of which those of positions begin .. end - 1 count, with the values of both spans. */
INLINE void sum_values(const Span spans[2], float *weights, int64_t begin, int64_t end, float inverse, const int64_t size,
                       float *out) {
    Ints sums[2 * ceil_div(size, STEP)];
    for (int64_t s = 0, first = 0; s < 2; first += spans[s++].count) {
        const int64_t from = max_int(begin, first), last = min_int(end, first + spans[s].count);
        multiply_by(weights + from, spans[s].cache.value_scales + from - first, last - from);
    }
    const float levels = levels_of(weights + begin, end - begin);
    round_weights(weights + begin, end - begin, levels);
    memset(sums, 0, sizeof sums);
    for (int64_t s = 0, first = 0; s < 2; first += spans[s++].count) {
        const int64_t last = min_int(end, first + spans[s].count);
        for (int64_t from = max_int(begin, first), count; from < last; from += count) {
            uint32_t pairs[POSITIONS / 2] = {0}; /* a last position alone is followed by a weight of zero */
            count = min_int(last - from, POSITIONS);
            memcpy(pairs, (const char *)(weights + begin) + 2 * (from - begin), (size_t)(2 * count));
            add_values(spans + s, from - first, count, pairs, size, sums);
        }
    }
    const float scale = levels > 0 ? inverse / levels : 0;
    for (int64_t i = 0; i < size; i += STEP) {
        Floats ordered[2];
        in_order(sums + i / LANES, ordered);
        for (int h = 0; h < 2 && i + h * LANES < size; h++) store(out + i + h * LANES, ordered[h] * scale);
    }
}

INLINE void attend_query(const Queries *q, int64_t j, const Span spans[2], const int64_t size, const Scoring *scoring) {
    int16_t query[ceil_div(size, STEP) * STEP];
    const float scale = scoring->scale * round_query(q->queries[j], size, query);
    float *scores = q->scores[j];
    for (int64_t s = 0, first = 0; s < 2; first += spans[s++].count) score_span(spans + s, query, size, scale, scores + first);
    const int64_t begin = q->begin[j], end = q->end[j];
    if (scoring->softcap > 0) cap_scores(scores + begin, end - begin, scoring->softcap);
    const float inverse = softmax(scores + begin, end - begin, scoring->sinks ? scoring->sinks[j] : -INFINITY);
    sum_values(spans, scores, begin, end, inverse, size, q->out[j]);
}

void attend_int8(const Queries *q, const Span spans[2], int64_t head_dim, const Scoring *scoring) {
    for (int64_t j = 0; j < q->count; j++) { /* the usual sizes are constants for the compiler */
        if (head_dim == 64) attend_query(q, j, spans, 64, scoring);
        else if (head_dim == 128) attend_query(q, j, spans, 128, scoring);
        else attend_query(q, j, spans, head_dim, scoring);
    }
}
