/* Compares the attention of drafts, in integers, with the formula over the same 8-bit keys and values: driver SEED CASES. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "attention.h"
#include "quantise.h"
#include "random_numbers.h"

enum { MAX_SIZE = 256, MAX_KEYS = 700 };

/* Vectors (count, size) with 8-bit copies, in memory that ends where they end. */
static KVCache random_cache(int64_t count, int64_t size) {
    KVCache c = {NULL, NULL, malloc((size_t)(count * size)), malloc((size_t)(count * size)), malloc(4 * (size_t)count),
                 malloc(4 * (size_t)count)};
    float vector[MAX_SIZE];
    for (int64_t t = 0; t < count; t++)
        for (int is_value = 0; is_value < 2; is_value++) {
            const float scale = random_below(20) ? 1 : 0;
            for (int64_t i = 0; i < size; i++) vector[i] = scale * (is_value ? 3 : 2) * random_float();
            quantise_vector(vector, size, (is_value ? c.int8_values : c.int8_keys) + t * size,
                            (is_value ? c.value_scales : c.key_scales) + t);
        }
    return c;
}

static void release(KVCache c) { free(c.int8_keys), free(c.int8_values), free(c.key_scales), free(c.value_scales); }

/* The difference from the formula, in which the largest value is 3. */
static double worst_difference(const Span spans[2], int64_t size, const float *query, int64_t begin, int64_t end,
                               const Scoring *scoring, const float *out) {
    static double weights[2 * MAX_KEYS];
    double total = scoring->sinks ? exp((double)scoring->sinks[0]) : 0, worst = 0;
    for (int64_t t = begin; t < end; t++) {
        const Span *s = spans + (t >= spans[0].count);
        const int64_t row = t - (t >= spans[0].count ? spans[0].count : 0);
        double score = 0;
        for (int64_t i = 0; i < size; i++) score += (double)query[i] * s->cache.int8_keys[row * size + i];
        score *= (double)s->cache.key_scales[row] * (double)scoring->scale;
        if (scoring->softcap > 0) score = tanh(score / (double)scoring->softcap) * (double)scoring->softcap;
        total += weights[t] = exp(score);
    }
    for (int64_t i = 0; i < size; i++) {
        double sum = 0;
        for (int64_t t = begin; t < end; t++) {
            const Span *s = spans + (t >= spans[0].count);
            const int64_t row = t - (t >= spans[0].count ? spans[0].count : 0);
            sum += weights[t] * s->cache.int8_values[row * size + i] * (double)s->cache.value_scales[row];
        }
        worst = fmax(worst, fabs(sum / total - (double)out[i]));
    }
    return worst;
}

/* The keys and values from position `first` on. */
static KVCache cache_from(KVCache c, int64_t first, int64_t size) {
    return (KVCache){NULL, NULL, c.int8_keys + first * size, c.int8_values + first * size, c.key_scales + first,
                     c.value_scales + first};
}

static void run_case(int64_t most) {
    const int64_t size = LANES * (1 + random_below(MAX_SIZE / LANES)), total = 2 + random_below(most - 2);
    const int64_t begin = random_below(total), end = begin + 1 + random_below(total - begin);
    const KVCache cache = random_cache(total, size);
    const float sink = 2 * random_float(), largest = random_below(3) ? 4 : 20; /* of a query: few large weights, or many */
    const Scoring scoring = {1 / sqrtf((float)size), random_below(2) ? 0 : 2, random_below(2) ? NULL : &sink};
    float query[MAX_SIZE], out[2][MAX_SIZE];
    for (int64_t i = 0; i < size; i++) query[i] = largest * random_float();
    for (int way = 0; way < 2; way++) { /* split anywhere */
        const int64_t first = random_below(total + 1);
        const Span spans[2] = {{cache, first}, {cache_from(cache, first, size), total - first}};
        float *scores = malloc(4 * (size_t)(total + LANES));
        const Queries q = {1, {query}, {out[way]}, {scores}, {begin}, {end}};
        attend(&q, spans, size, READ_INT8, &scoring);
        const double worst = worst_difference(spans, size, query, begin, end, &scoring, out[way]);
        if (!(worst < 8e-4 * (double)largest)) /* a score is rounded by as much as its query is large */
            fprintf(stderr, "size %d, keys %d to %d of %d: %g\n", (int)size, (int)begin, (int)end, (int)total, worst), exit(1);
        free(scores);
    }
    if (memcmp(out[0], out[1], (size_t)(4 * size))) fprintf(stderr, "the split changes an output\n"), exit(1);
    release(cache);
}

/* One key with nine tenths of the weight and 20,000 with little, each by itself below half a level. */
static void run_tail(void) {
    enum { COUNT = 20000 };
    KVCache c = random_cache(COUNT, LANES);
    float query[LANES] = {1}, out[LANES], *scores = malloc(4 * (COUNT + LANES));
    for (int64_t t = 0; t < COUNT; t++) {
        float key[LANES] = {t ? -6 : 6 + 0.7f}, value[LANES] = {t ? 1 : 0};
        quantise_vector(key, LANES, c.int8_keys + t * LANES, c.key_scales + t);
        quantise_vector(value, LANES, c.int8_values + t * LANES, c.value_scales + t);
    }
    const Span spans[2] = {{c, COUNT}, {c, 0}};
    const Scoring scoring = {1, 0, NULL};
    const Queries q = {1, {query}, {out}, {scores}, {0}, {COUNT}};
    attend(&q, spans, LANES, READ_INT8, &scoring);
    const double expected = (COUNT - 1) / (COUNT - 1 + exp(12.7));
    if (!(fabs((double)out[0] - expected) < 0.01 * expected)) fprintf(stderr, "%g, not %g\n", (double)out[0], expected), exit(1);
    release(c), free(scores);
}

int main(int count, char **words) {
    if (count != 3) return fprintf(stderr, "driver SEED CASES\n"), 2;
    seed_with((uint64_t)atoll(words[1]));
    for (int i = 0; i < atoi(words[2]); i++) run_case(MAX_KEYS);
    run_tail();
    return 0;
}
