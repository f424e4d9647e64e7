/* The attention sublayer, and the attention of query heads over keys and values, which it is made of. */
#ifndef KNN_SSD_ATTENTION_H
#define KNN_SSD_ATTENTION_H

#include "kernels.h"

/* x (n, D) += attention(norm(x)), for the rows of the entries and their KV caches of one layer. */
int attention(const Attention *a, const BatchEntry *entries, int64_t n_entries, int64_t layer, float *x, int64_t n);

/* Keys and values of successive positions, of one head. */
typedef struct {
    KVCache cache;
    int64_t count;
} Span;

/* How products of queries and keys become weights: scaled, bounded by `softcap` unless it is 0, and with a score of `sinks`
 * (one for each query, or null) that takes weight away from them. */
typedef struct {
    float scale, softcap;
    const float *sinks;
} Scoring;

/* out (count, head_dim) of `count` queries over the keys and values of two spans, one after the other. A query's scores are
 * `stride` apart from the next one's; there is room for LANES - 1 more than the keys, rounded up to LANES. */
void attend(const float *queries, int64_t count, const Span spans[2], int64_t head_dim, int use_int8,
            const Scoring *scoring, float *scores, int64_t stride, float *out);

#endif
