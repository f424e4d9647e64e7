/* Attention by itself, for models whose other modules run outside this library. */
#include <math.h>

#include "attention.h"
#include "contract.h"
#include "scratch.h"
#include "thread_pool.h"
#include "vectors.h"

typedef struct {
    const OuterAttention *attention;
    const OuterCache *caches;
    const VisibleKeys *rows;
    int64_t shared, stride; /* query heads of an item; room for one query's scores */
    const float *queries;
    float *scores, *out;
} Attending;

/* Keys and values of one head, from a position on. */
static Span span_of(const float *keys, const float *values, int64_t first, int64_t count, int64_t head_dim) {
    const int64_t offset = count ? first * head_dim : 0; /* of no keys there may be no address */
    return (Span){{(float *)keys + offset, (float *)values + offset, NULL, NULL, NULL, NULL}, count};
}

/* An item is `shared` query heads of one row, which share keys and values. */
static void attend_items(void *context, int64_t first, int64_t last, int thread) {
    const Attending *c = context;
    const OuterAttention *a = c->attention;
    for (int64_t item = first; item < last; item++) {
        const int64_t index = item * c->shared, head = index % a->heads, kv = head / (a->heads / a->kv_heads);
        const VisibleKeys *row = c->rows + index / a->heads;
        const OuterCache *cache = c->caches + row->cache;
        const Span spans[2] = {span_of(cache->keys, cache->values, kv * cache->capacity + row->first,
                                       row->split - row->first, a->head_dim),
                               span_of(cache->new_keys, cache->new_values,
                                       kv * cache->n_new + row->split - cache->position, row->end - row->split,
                                       a->head_dim)};
        const Scoring scoring = {(float)a->scale, (float)a->softcap, a->sinks ? a->sinks + head : NULL};
        Queries q = {.count = c->shared};
        for (int64_t h = 0; h < c->shared; h++) {
            q.queries[h] = c->queries + (index + h) * a->head_dim;
            q.out[h] = c->out + (index + h) * a->head_dim;
            q.scores[h] = c->scores + (thread * c->shared + h) * c->stride;
            q.begin[h] = 0;
            q.end[h] = row->end - row->first;
        }
        attend(&q, spans, a->head_dim, READ_FLOAT32, &scoring);
    }
}

static int attend_rows(Attending *attending, int64_t n) {
    const OuterAttention *a = attending->attention;
    const int64_t threads = pool_threads(), items = n * a->kv_heads;
    int64_t longest = 0;
    for (int64_t r = 0; r < n; r++) longest = max_int(longest, attending->rows[r].end - attending->rows[r].first);
    attending->shared = a->heads / a->kv_heads;
    if (attending->shared > ITEM_QUERIES || (items < 4 * threads && items % threads)) attending->shared = 1;
    attending->stride = (longest + 2 * LANES) / LANES * LANES;
    scratch_reset();
    attending->scores = scratch_take(attending->stride, threads * attending->shared * 4);
    if (scratch_failed()) return OUT_OF_MEMORY;
    parallel_for(n * a->heads / attending->shared, 1, attend_items, attending);
    return SUCCESS;
}

int knn_ssd_attend(const OuterAttention *a, const OuterCache *caches, int64_t n_caches, const VisibleKeys *rows, int64_t n,
                   const float *queries, float *out) {
    if (!is_valid_outer(a, caches, n_caches, rows, n)) return INVALID_SIZES;
    Attending attending = {.attention = a, .caches = caches, .rows = rows, .queries = queries, .out = out};
    pool_lock();
    const int status = attend_rows(&attending, n);
    pool_unlock();
    return status;
}
