/* The attention sublayer, and the attention of query heads over keys and values, which it is made of. */
#ifndef KNN_SSD_ATTENTION_H
#define KNN_SSD_ATTENTION_H

#include "kernels.h"
#include "vectors.h"

/* x (n, D) += attention(norm(x)), for the rows of the entries and their KV caches of one layer. */
int attention(const Attention *a, const BatchEntry *entries, int64_t n_entries, int64_t layer, float *x, int64_t n);

#define ITEM_QUERIES 128 /* that read keys and values together, at most */

/* What attention reads of a KV cache: its keys and values, float32 or bfloat16, or their 8-bit copies. */
enum Read { READ_FLOAT32 = FLOAT32, READ_BFLOAT16 = BFLOAT16, READ_INT8 };

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

/* Queries (head_dim,) that share keys and values, each of one row and head. Each has an output, and scores, which become
 * its weights. It sees positions `begin` .. `end` - 1, counted from the spans' first one, and has room for the scores of all
 * of their positions, and for LANES more. */
typedef struct {
    int64_t count;
    const float *queries[ITEM_QUERIES];
    float *out[ITEM_QUERIES], *scores[ITEM_QUERIES];
    int64_t begin[ITEM_QUERIES], end[ITEM_QUERIES];
} Queries;

/* The outputs of queries over the keys and values of two spans, one after the other. */
void attend(const Queries *q, const Span spans[2], int64_t head_dim, enum Read read, const Scoring *scoring);

/* The same over 8-bit copies. */
void attend_int8(const Queries *q, const Span spans[2], int64_t head_dim, const Scoring *scoring);

/* Bounds scores (total,), and what is beyond them in their last vector. */
void cap_scores(float *scores, int64_t total, float softcap);

/* Turns scores (total,) into exp(score - max), zero up to the next multiple of LANES; returns the inverse of their sum,
 * which the sink, a score without a value, is a part of. */
float softmax(float *scores, int64_t total, float sink);

#endif
