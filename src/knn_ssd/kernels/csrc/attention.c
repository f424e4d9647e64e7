/* Attention over the KV cache: query heads that share keys and values read them once. */
#include "attention.h"

#include "gemm.h"
#include "quantise.h"
#include "rows.h"
#include "scratch.h"
#include "thread_pool.h"

#define PREFETCH_BYTES 2048 /* of 8-bit keys and values that are prefetched ahead */
#define MAX_QUERIES 4       /* query heads whose outputs are summed at once */

/* The keys and values that the rows of a forward pass bring with them: the next positions of the KV cache, or scratch. */
typedef struct {
    KVCache cache;  /* of the first head, from the first row on */
    int64_t stride; /* rows from one head to the next */
} NewRows;

/* The cache from its vector number `index` on. */
static KVCache cache_from(KVCache c, int64_t index, int64_t head_dim) {
    const int64_t offset = index * head_dim;
    return (KVCache){c.keys + offset,        c.values + offset,    c.int8_keys + offset,
                     c.int8_values + offset, c.key_scales + index, c.value_scales + index};
}

/* Applies the rotary position embedding to the first `size` components of a head. */
static void rotate(float *x, const float *cosines, const float *sines, int64_t size) {
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cosines[i] - b * sines[i];
        x[i + half] = b * cosines[i + half] + a * sines[i + half];
    }
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

/* Writes LANES scores of a query (head_dim,), of which those of the first `count` keys are valid. */
INLINE void score_keys(const float *query, const float *keys, const int64_t head_dim, int64_t count, float scale,
                       float *scores) {
    Floats sums[LANES];
#pragma GCC unroll 16
    for (int t = 0; t < LANES; t++) sums[t] = (Floats){0};
    if (count == LANES)
        for (int64_t i = 0; i < head_dim; i += LANES) {
            const Floats q = load(query + i);
#pragma GCC unroll 16
            for (int t = 0; t < LANES; t++) sums[t] = fmadd(q, load(keys + t * head_dim + i), sums[t]);
        }
    else
        for (int t = 0; t < count; t++)
            for (int64_t i = 0; i < head_dim; i += LANES)
                sums[t] = fmadd(load(query + i), load(keys + t * head_dim + i), sums[t]);
    store(scores, horizontal_sums(sums) * scale);
}

/* Scores of `count` queries for a span's keys; a query's scores are `stride` apart from the next one's. */
INLINE void score_span(const float *queries, int64_t count, const Span *span, const int64_t head_dim, const int use_int8,
                       float scale, float *scores, int64_t stride) {
    float dequantised[use_int8 ? LANES * head_dim : 1];
    for (int64_t t = 0; t < span->count; t += LANES) {
        const int64_t n_keys = min_int(span->count - t, LANES);
        const float *keys = use_int8 ? dequantised : span->cache.keys + t * head_dim;
        const int8_t *int8_keys = span->cache.int8_keys + t * head_dim;
        for (int64_t i = 0; use_int8 && i < LANES * head_dim; i += 64) __builtin_prefetch(int8_keys + PREFETCH_BYTES + i);
        for (int64_t i = 0; use_int8 && i < n_keys * head_dim; i += LANES) store(dequantised + i, load_int8(int8_keys + i));
        for (int64_t q = 0; q < count; q++) {
            float *out = scores + q * stride + t;
            score_keys(queries + q * head_dim, keys, head_dim, n_keys, scale, out);
            for (int64_t i = 0; use_int8 && i < n_keys; i++) out[i] *= span->cache.key_scales[t + i];
        }
    }
}

/* Bounds scores (total,), and what is beyond them in their last vector. */
static void cap_scores(float *scores, int64_t total, float softcap) {
    for (int64_t t = 0; t < total; t += LANES) {
        const Floats power = exponential(load(scores + t) * (2.0f / softcap));
        store(scores + t, (power - 1.0f) / (power + 1.0f) * softcap); /* tanh(score / softcap) * softcap */
    }
}

/* Turns scores (total,) into exp(score - max), zero up to the next multiple of LANES; returns the inverse of their sum,
 * which the sink, a score without a value, is a part of. */
static float softmax(float *scores, int64_t total, float sink) {
    for (int64_t t = total; t % LANES; t++) scores[t] = -INFINITY;
    Floats maxima = splat(-INFINITY), sums = {0};
    for (int64_t t = 0; t < total; t += LANES) {
        const Floats s = load(scores + t);
        maxima = select_lanes(s > maxima, s, maxima);
    }
    const float largest = horizontal_max(maxima), max = sink > largest ? sink : largest;
    for (int64_t t = 0; t < total; t += LANES) {
        store(scores + t, exponential(load(scores + t) - max));
        for (int i = 0; i < LANES && t + i >= total - LANES; i++)
            if (t + i >= total) scores[t + i] = 0;
        sums += load(scores + t);
    }
    return 1.0f / (horizontal_sum(sums) + (sink > -INFINITY ? exponential(splat(sink - max))[0] : 0));
}

INLINE Floats load_values(const KVCache *c, int64_t offset, const int use_int8) {
    return use_int8 ? load_int8(c->int8_values + offset) : load(c->values + offset);
}

/* out[q][i:] = the sum over all positions of weight times value, for n_vectors vectors of components from i on. */
INLINE void weighted_sum(const Span spans[2], int64_t head_dim, const float *weights, int64_t stride, const float *inverse,
                         int64_t i, const int n_vectors, const int n_queries, const int use_int8, float *out) {
    Floats sum[MAX_QUERIES][4];
#pragma GCC unroll 4
    for (int q = 0; q < n_queries; q++)
#pragma GCC unroll 4
        for (int j = 0; j < n_vectors; j++) sum[q][j] = (Floats){0};
    for (int s = 0; s < 2; s++)
        for (int64_t t = 0; t < spans[s].count; t++, weights++) {
            Floats value[4];
            if (use_int8) __builtin_prefetch(spans[s].cache.int8_values + t * head_dim + i + PREFETCH_BYTES);
#pragma GCC unroll 4
            for (int j = 0; j < n_vectors; j++)
                value[j] = load_values(&spans[s].cache, t * head_dim + i + j * LANES, use_int8);
#pragma GCC unroll 4
            for (int q = 0; q < n_queries; q++)
#pragma GCC unroll 4
                for (int j = 0; j < n_vectors; j++) sum[q][j] = fmadd(splat(weights[q * stride]), value[j], sum[q][j]);
        }
#pragma GCC unroll 4
    for (int q = 0; q < n_queries; q++)
#pragma GCC unroll 4
        for (int j = 0; j < n_vectors; j++) store(out + q * head_dim + i + j * LANES, sum[q][j] * inverse[q]);
}

INLINE void weighted_sums(const Span spans[2], int64_t head_dim, const float *weights, int64_t stride, const float *inverse,
                          const int n_queries, const int use_int8, float *out) {
    int64_t i = 0;
    for (; i + 4 * LANES <= head_dim; i += 4 * LANES)
        weighted_sum(spans, head_dim, weights, stride, inverse, i, 4, n_queries, use_int8, out);
    for (; i < head_dim; i += LANES)
        weighted_sum(spans, head_dim, weights, stride, inverse, i, 1, n_queries, use_int8, out);
}

/* Multiplies weights with the scales of the 8-bit values that they belong to. */
static void scale_weights(const Span spans[2], float *weights) {
    for (int s = 0; s < 2; weights += spans[s++].count)
        for (int64_t t = 0; t < spans[s].count; t++) weights[t] *= spans[s].cache.value_scales[t];
}

INLINE void attend_with(const float *queries, int64_t count, const Span spans[2], int64_t head_dim, const int use_int8,
                        const Scoring *scoring, float *scores, int64_t stride, float *out) {
    const float scale = scoring->scale;
    int64_t total = 0;
    for (int s = 0; s < 2; total += spans[s++].count) { /* the usual sizes are constants for the compiler */
        if (head_dim == 64) score_span(queries, count, spans + s, 64, use_int8, scale, scores + total, stride);
        else if (head_dim == 128) score_span(queries, count, spans + s, 128, use_int8, scale, scores + total, stride);
        else score_span(queries, count, spans + s, head_dim, use_int8, scale, scores + total, stride);
    }
    for (int64_t q = 0, n_queries; q < count; q += n_queries) {
        float inverse[MAX_QUERIES], *weights = scores + q * stride, *o = out + q * head_dim;
        n_queries = min_int(count - q, MAX_QUERIES);
        for (int64_t j = 0; j < n_queries; j++) {
            if (scoring->softcap > 0) cap_scores(weights + j * stride, total, scoring->softcap);
            inverse[j] = softmax(weights + j * stride, total, scoring->sinks ? scoring->sinks[q + j] : -INFINITY);
            if (use_int8) scale_weights(spans, weights + j * stride);
        }
        if (n_queries == 4) weighted_sums(spans, head_dim, weights, stride, inverse, 4, use_int8, o);
        else if (n_queries == 3) weighted_sums(spans, head_dim, weights, stride, inverse, 3, use_int8, o);
        else if (n_queries == 2) weighted_sums(spans, head_dim, weights, stride, inverse, 2, use_int8, o);
        else weighted_sums(spans, head_dim, weights, stride, inverse, 1, use_int8, o);
    }
}

void attend(const float *queries, int64_t count, const Span spans[2], int64_t head_dim, int use_int8,
            const Scoring *scoring, float *scores, int64_t stride, float *out) {
    if (use_int8) attend_with(queries, count, spans, head_dim, 1, scoring, scores, stride, out);
    else attend_with(queries, count, spans, head_dim, 0, scoring, scores, stride, out);
}

static int uses_int8(const Attention *a) { return a->q.kind == INT4; }

/* `count` query heads of one row that share the keys and values of head `kv`; `cache` is the entry's, of this layer. */
static void attend_row(const Attention *a, const BatchEntry *e, KVCache cache, const NewRows *new, int64_t row, int64_t kv,
                       int64_t count, const float *queries, float *scores, int64_t stride, float *out) {
    const int64_t position = e->position + row;
    const int64_t lowest = a->window ? max_int(position + 1 - a->window, 0) : 0;
    const int64_t cached = e->position + (e->run_length ? row - row % e->run_length : 0);
    const int64_t first_new = max_int(lowest, cached);
    const int64_t new_index = kv * new->stride + first_new - e->position;
    const Span spans[2] = {{cache_from(cache, kv * e->capacity + lowest, a->head_dim), first_new - lowest},
                           {cache_from(new->cache, new_index, a->head_dim), position + 1 - first_new}};
    const Scoring scoring = {(float)a->scale, 0, NULL};
    attend(queries, count, spans, a->head_dim, uses_int8(a), &scoring, scores, stride, out);
}

typedef struct {
    const Attention *attention;
    const BatchEntry *entry;
    const NewRows *new;
    float *q, *k; /* of the entry's first row */
    const float *v;
} Storing;

/* Normalises and rotates the queries and keys of rows `first` .. `last` - 1 of an entry, and stores keys and values. */
static void store_rows(void *context, int64_t first, int64_t last, int thread) {
    const Storing *c = context;
    const Attention *a = c->attention;
    const BatchEntry *e = c->entry;
    const int64_t size = a->head_dim;
    (void)thread;
    for (int64_t r = first; r < last; r++) {
        const float *cosines = e->cosines + (e->position + r) * a->rotary_dim;
        const float *sines = e->sines + (e->position + r) * a->rotary_dim;
        for (int64_t h = 0; h < a->heads; h++) {
            float *head = c->q + (r * a->heads + h) * size;
            if (a->q_norm) rms_norm(head, size, a->q_norm, a->epsilon, head);
            rotate(head, cosines, sines, a->rotary_dim);
        }
        for (int64_t h = 0; h < a->kv_heads; h++) {
            float *head = c->k + (r * a->kv_heads + h) * size;
            const float *value = c->v + (r * a->kv_heads + h) * size;
            if (a->k_norm) rms_norm(head, size, a->k_norm, a->epsilon, head);
            rotate(head, cosines, sines, a->rotary_dim);
            const KVCache to = cache_from(c->new->cache, h * c->new->stride + r, size);
            quantise_vector(head, size, to.int8_keys, to.key_scales);
            quantise_vector(value, size, to.int8_values, to.value_scales);
            if (uses_int8(a)) continue;
            memcpy(to.keys, head, (size_t)4 * size);
            memcpy(to.values, value, (size_t)4 * size);
        }
    }
}

static KVCache scratch_cache(int64_t n_rows, int64_t kv_heads, int64_t head_dim) {
    const int64_t size = kv_heads * head_dim;
    return (KVCache){scratch_take(n_rows, 4 * size), scratch_take(n_rows, 4 * size),     scratch_take(n_rows, size),
                     scratch_take(n_rows, size),     scratch_take(n_rows, 4 * kv_heads), scratch_take(n_rows, 4 * kv_heads)};
}

static KVCache layer_cache(const Attention *a, const BatchEntry *e, int64_t layer) {
    return cache_from(e->cache, layer * a->kv_heads * e->capacity, a->head_dim);
}

/* How many query heads one item of work takes: all that share keys, unless too few items would be left for the threads. */
static int64_t heads_per_item(const Attention *a, int64_t n, int64_t threads) {
    const int64_t items = n * a->kv_heads;
    return items < 4 * threads && items % threads ? 1 : a->heads / a->kv_heads;
}

typedef struct {
    const Attention *attention;
    const BatchEntry *entries;
    const NewRows *new;
    const int64_t *entry_of, *row_of; /* of each row of the batch */
    int64_t layer, shared, stride;    /* query heads of an item; room for one query's scores */
    const float *q;
    float *scores, *out;
} Attending;

/* An item is `shared` query heads of one row, which share keys and values. */
static void attend_items(void *context, int64_t first, int64_t last, int thread) {
    const Attending *c = context;
    const Attention *a = c->attention;
    for (int64_t item = first; item < last; item++) {
        const int64_t index = item * c->shared, head = index % a->heads, r = index / a->heads, i = c->entry_of[r];
        const BatchEntry *e = c->entries + i;
        attend_row(a, e, layer_cache(a, e, c->layer), c->new + i, c->row_of[r], head / (a->heads / a->kv_heads), c->shared,
                   c->q + index * a->head_dim, c->scores + thread * c->shared * c->stride, c->stride,
                   c->out + index * a->head_dim);
    }
}

int attention(const Attention *a, const BatchEntry *entries, int64_t n_entries, int64_t layer, float *x, int64_t n) {
    const int64_t width = a->q.cols, inner = a->heads * a->head_dim, kv_inner = a->kv_heads * a->head_dim;
    const int64_t threads = pool_threads(), shared = heads_per_item(a, n, threads);
    int64_t longest = 0;
    for (int64_t i = 0; i < n_entries; i++) longest = max_int(longest, entries[i].position + entries[i].n_rows);
    const int64_t stride = (longest + 2 * LANES) / LANES * LANES; /* room for one query's scores */
    scratch_reset();
    float *normed = scratch_take(n, width * 4), *out = scratch_take(n, width * 4), *q = scratch_take(n, inner * 4);
    float *k = scratch_take(n, kv_inner * 4), *v = scratch_take(n, kv_inner * 4), *mixed = scratch_take(n, inner * 4);
    float *scores = scratch_take(stride, threads * shared * 4);
    NewRows *new = scratch_take(n_entries, sizeof *new);
    int64_t *entry_of = scratch_take(n, 8), *row_of = scratch_take(n, 8); /* of each row of x */
    for (int64_t i = 0; new && i < n_entries; i++) {
        const BatchEntry *e = entries + i;
        if (e->run_length) new[i] = (NewRows){scratch_cache(e->n_rows, a->kv_heads, a->head_dim), e->n_rows};
        else new[i] = (NewRows){cache_from(layer_cache(a, e, layer), e->position, a->head_dim), e->capacity};
    }
    if (scratch_failed()) return OUT_OF_MEMORY;
    normalise_rows(x, n, width, a->norm, a->epsilon, normed);
    if (linear((const Matrix *[]){&a->q, &a->k, &a->v}, 3, normed, n, (float *[]){q, k, v})) return OUT_OF_MEMORY;
    for (int64_t i = 0, first = 0; i < n_entries; first += entries[i++].n_rows) {
        Storing storing = {a, entries + i, new + i, q + first * inner, k + first * kv_inner, v + first * kv_inner};
        parallel_for(entries[i].n_rows, ROWS_PER_CHUNK, store_rows, &storing);
        for (int64_t r = 0; r < entries[i].n_rows; r++) entry_of[first + r] = i, row_of[first + r] = r;
    }
    Attending attending = {a, entries, new, entry_of, row_of, layer, shared, stride, q, scores, mixed};
    parallel_for(n * a->heads / shared, 1, attend_items, &attending);
    if (linear((const Matrix *[]){&a->o}, 1, mixed, n, (float *[]){out})) return OUT_OF_MEMORY;
    add_residual(x, out, n, width);
    return SUCCESS;
}
