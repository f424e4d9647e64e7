/* Attention over the KV cache: query heads that share exact keys and values read them once. */
#include "attention.h"

#include "gemm.h"
#include "quantise.h"
#include "rows.h"
#include "scratch.h"
#include "thread_pool.h"

#define MAX_QUERIES 4       /* whose outputs are summed at once */
#define MAX_ROWS 8          /* whose queries read keys and values together */
#define POSITIONS 64        /* whose values stay in the L1 cache for all queries */

/* The keys and values that the rows of a forward pass bring with them: the next positions of the KV cache, or scratch. */
typedef struct {
    KVCache cache;  /* of the first head, from the first row on */
    int64_t stride; /* rows from one head to the next */
} NewRows;

/* The cache from its vector number `index` on. */
INLINE KVCache cache_from(KVCache c, int64_t index, int64_t head_dim, int64_t kv_kind) {
    const int64_t offset = index * head_dim, bytes = offset * (kv_kind == BFLOAT16 ? 2 : 4);
    return (KVCache){(char *)c.keys + bytes, (char *)c.values + bytes, c.int8_keys + offset,
                     c.int8_values + offset, c.key_scales + index,     c.value_scales + index};
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

/* LANES components of keys or values, `offset` from the first one on. */
INLINE Floats load_part(const void *whole, int64_t offset, const enum Read read) {
    return read == READ_BFLOAT16 ? load_bfloat16((const uint16_t *)whole + offset) : load((const float *)whole + offset);
}

/* Writes the scores of a span's keys from scores[…][first] on. */
INLINE void score_span(const Queries *q, const Span *span, int64_t first, const int64_t head_dim, const enum Read read,
                       float scale) {
    const int is_float32 = read == READ_FLOAT32;
    float widened[is_float32 ? 1 : LANES * head_dim];
    for (int64_t t = 0; t < span->count; t += LANES) {
        const int64_t n_keys = min_int(span->count - t, LANES);
        const float *keys = is_float32 ? (const float *)span->cache.keys + t * head_dim : widened;
        for (int64_t i = 0; !is_float32 && i < n_keys * head_dim; i += LANES)
            store(widened + i, load_part(span->cache.keys, t * head_dim + i, read));
        for (int64_t j = 0; j < q->count; j++)
            score_keys(q->queries[j], keys, head_dim, n_keys, scale, q->scores[j] + first + t);
    }
}

void cap_scores(float *scores, int64_t total, float softcap) {
    for (int64_t t = 0; t < total; t += LANES) {
        const Floats power = exponential(load(scores + t) * (2.0f / softcap));
        store(scores + t, (power - 1.0f) / (power + 1.0f) * softcap); /* tanh(score / softcap) * softcap */
    }
}

float softmax(float *scores, int64_t total, float sink) {
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

/* Adds to out[q][i:], for n_vectors vectors of components from i on, the products of a span's values with each query's
 * weights. The positions are added in their order. */
INLINE void weighted_sum(const Span *span, int64_t head_dim, float *const *weights, int64_t first, int64_t i,
                         const int n_vectors, const int n_queries, const enum Read read, float *const *out) {
    Floats sum[MAX_QUERIES][4];
#pragma GCC unroll 4
    for (int q = 0; q < n_queries; q++)
#pragma GCC unroll 4
        for (int j = 0; j < n_vectors; j++) sum[q][j] = load(out[q] + i + j * LANES);
    for (int64_t t = 0; t < span->count; t++) {
        Floats value[4];
#pragma GCC unroll 4
        for (int j = 0; j < n_vectors; j++) value[j] = load_part(span->cache.values, t * head_dim + i + j * LANES, read);
#pragma GCC unroll 4
        for (int q = 0; q < n_queries; q++)
#pragma GCC unroll 4
            for (int j = 0; j < n_vectors; j++) sum[q][j] = fmadd(splat(weights[q][first + t]), value[j], sum[q][j]);
    }
#pragma GCC unroll 4
    for (int q = 0; q < n_queries; q++)
#pragma GCC unroll 4
        for (int j = 0; j < n_vectors; j++) store(out[q] + i + j * LANES, sum[q][j]);
}

INLINE void weighted_sums_of(const Span *span, int64_t head_dim, float *const *weights, int64_t first, const int n_queries,
                             const enum Read read, float *const *out) {
    int64_t i = 0;
    for (; i + 4 * LANES <= head_dim; i += 4 * LANES)
        weighted_sum(span, head_dim, weights, first, i, 4, n_queries, read, out);
    for (; i < head_dim; i += LANES) weighted_sum(span, head_dim, weights, first, i, 1, n_queries, read, out);
}

/* The same for any number of queries and all components. weights[q][first + t] belongs to the span's position t. */
INLINE void weighted_sums(const Span *span, int64_t head_dim, float *const *weights, int64_t first, int64_t count,
                          const enum Read read, float *const *out) {
    for (int64_t q = 0, n; q < count; q += n) {
        n = min_int(count - q, MAX_QUERIES);
        if (n == 4) weighted_sums_of(span, head_dim, weights + q, first, 4, read, out + q);
        else if (n == 3) weighted_sums_of(span, head_dim, weights + q, first, 3, read, out + q);
        else if (n == 2) weighted_sums_of(span, head_dim, weights + q, first, 2, read, out + q);
        else weighted_sums_of(span, head_dim, weights + q, first, 1, read, out + q);
    }
}

/* Adds the values of positions `from` .. `to` - 1 of a span, whose first position is `first`, to `count` outputs. */
INLINE void sum_positions(const Queries *q, int64_t index, int64_t count, const Span *span, int64_t first, int64_t from,
                          int64_t to, int64_t head_dim, const enum Read read) {
    const Span part = {cache_from(span->cache, from - first, head_dim, read), to - from};
    if (from < to) weighted_sums(&part, head_dim, q->scores + index, from, count, read, q->out + index);
}

/* Adds a span's values to all outputs. What all queries attend to is read once for all of them. */
INLINE void sum_span(const Queries *q, const Span *span, int64_t first, int64_t head_dim, const enum Read read) {
    const int64_t last = first + span->count;
    int64_t from = first, to = last; /* of what is common */
    for (int64_t j = 0; j < q->count; j++) from = max_int(from, q->begin[j]), to = min_int(to, q->end[j]);
    to = max_int(from, to);
    for (int64_t j = 0; j < q->count; j++)
        sum_positions(q, j, 1, span, first, max_int(q->begin[j], first), min_int(from, min_int(q->end[j], last)), head_dim, read);
    for (int64_t t = from; t < to; t += POSITIONS)
        sum_positions(q, 0, q->count, span, first, t, min_int(t + POSITIONS, to), head_dim, read);
    for (int64_t j = 0; j < q->count; j++)
        sum_positions(q, j, 1, span, first, max_int(q->begin[j], to), min_int(q->end[j], last), head_dim, read);
}

INLINE void attend_with(const Queries *q, const Span spans[2], int64_t head_dim, const enum Read read,
                        const Scoring *scoring) {
    const float scale = scoring->scale;
    float inverse[ITEM_QUERIES];
    for (int64_t s = 0, first = 0; s < 2; first += spans[s++].count) { /* the usual sizes are constants for the compiler */
        if (head_dim == 64) score_span(q, spans + s, first, 64, read, scale);
        else if (head_dim == 128) score_span(q, spans + s, first, 128, read, scale);
        else score_span(q, spans + s, first, head_dim, read, scale);
    }
    for (int64_t j = 0; j < q->count; j++) {
        float *scores = q->scores[j] + q->begin[j];
        const int64_t total = q->end[j] - q->begin[j];
        if (scoring->softcap > 0) cap_scores(scores, total, scoring->softcap);
        inverse[j] = softmax(scores, total, scoring->sinks ? scoring->sinks[j] : -INFINITY);
        memset(q->out[j], 0, (size_t)4 * head_dim);
    }
    for (int64_t s = 0, first = 0; s < 2; first += spans[s++].count) sum_span(q, spans + s, first, head_dim, read);
    for (int64_t j = 0; j < q->count; j++)
        for (int64_t i = 0; i < head_dim; i += LANES) store(q->out[j] + i, load(q->out[j] + i) * inverse[j]);
}

void attend(const Queries *q, const Span spans[2], int64_t head_dim, enum Read read, const Scoring *scoring) {
    if (read == READ_INT8) attend_int8(q, spans, head_dim, scoring);
    else if (read == READ_BFLOAT16) attend_with(q, spans, head_dim, READ_BFLOAT16, scoring);
    else attend_with(q, spans, head_dim, READ_FLOAT32, scoring);
}

static int uses_int8(const Attention *a) { return a->q.kind == INT4; }

typedef struct {
    const Attention *attention;
    const BatchEntry *entry;
    const NewRows *new;
    float *q, *k; /* of the entry's first row */
    const float *v;
} Storing;

static void store_vector(const float *x, int64_t size, int64_t kv_kind, void *to) {
    uint16_t *halves = to;
    if (kv_kind == FLOAT32) memcpy(to, x, (size_t)4 * size);
    else
        for (int64_t i = 0; i < size; i++) halves[i] = float_to_bfloat16(x[i]);
}

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
            const KVCache to = cache_from(c->new->cache, h * c->new->stride + r, size, e->kv_kind);
            quantise_vector(head, size, to.int8_keys, to.key_scales);
            quantise_vector(value, size, to.int8_values, to.value_scales);
            if (uses_int8(a)) continue;
            store_vector(head, size, e->kv_kind, to.keys);
            store_vector(value, size, e->kv_kind, to.values);
        }
    }
}

static KVCache scratch_cache(int64_t n_rows, int64_t kv_heads, int64_t head_dim) {
    const int64_t size = kv_heads * head_dim;
    return (KVCache){scratch_take(n_rows, 4 * size), scratch_take(n_rows, 4 * size),     scratch_take(n_rows, size),
                     scratch_take(n_rows, size),     scratch_take(n_rows, 4 * kv_heads), scratch_take(n_rows, 4 * kv_heads)};
}

static KVCache layer_cache(const Attention *a, const BatchEntry *e, int64_t layer) {
    return cache_from(e->cache, layer * a->kv_heads * e->capacity, a->head_dim, e->kv_kind);
}

/* How the queries of a forward pass are divided into items of work. An item has the queries of some query heads, which
 * share keys and values, of some successive rows of an entry. */
typedef struct {
    int64_t shared, rows; /* query heads, and rows, of an item */
} Division;

/* All query heads that share keys are in one item, unless too few items would be left for the threads. 8-bit keys are read for
 * each query by itself. */
static Division divide(const Attention *a, int64_t n, int64_t threads) {
    const int64_t items = n * a->kv_heads, group = a->heads / a->kv_heads;
    if (uses_int8(a)) return (Division){1, 1};
    if (group > ITEM_QUERIES / MAX_ROWS || (items < 4 * threads && items % threads)) return (Division){1, 1};
    return (Division){group, max_int(1, min_int(MAX_ROWS, items / (4 * threads)))};
}

/* Successive rows of an entry, whose queries are in the same items. */
typedef struct {
    int64_t entry, row, rows, batch_row; /* `row`: the first one in the entry; `batch_row`: in the batch */
} RowGroup;

/* Divides each entry's rows into groups; returns their number. In teacher-forced scoring, each row is a group. */
static int64_t group_rows(const BatchEntry *entries, int64_t n_entries, int64_t most, RowGroup *groups) {
    int64_t count = 0, first = 0;
    for (int64_t i = 0; i < n_entries; first += entries[i++].n_rows)
        for (int64_t r = 0; r < entries[i].n_rows; r += groups[count++].rows)
            groups[count] = (RowGroup){i, r, entries[i].run_length ? 1 : min_int(most, entries[i].n_rows - r), first + r};
    return count;
}

typedef struct {
    const Attention *attention;
    const BatchEntry *entries;
    const NewRows *new;
    const RowGroup *groups;
    Division division;
    int64_t layer, stride; /* room for one query's scores */
    const float *q;
    float *scores, *out;
} Attending;

static int64_t lowest_position(const Attention *a, int64_t position) {
    return a->window ? max_int(position + 1 - a->window, 0) : 0;
}

/* The queries of a group's rows from query head `head` on; the group's first row is at `position`. */
static Queries queries_of(const Attending *c, const RowGroup *g, int64_t position, int64_t head, int thread) {
    const Attention *a = c->attention;
    const int64_t lowest = lowest_position(a, position);
    float *scores = c->scores + thread * c->division.rows * c->division.shared * c->stride;
    Queries q = {.count = 0};
    for (int64_t r = 0; r < g->rows; r++)
        for (int64_t h = 0; h < c->division.shared; h++, q.count++) {
            const int64_t offset = ((g->batch_row + r) * a->heads + head + h) * a->head_dim;
            q.queries[q.count] = c->q + offset;
            q.out[q.count] = c->out + offset;
            q.scores[q.count] = scores + q.count * c->stride;
            q.begin[q.count] = lowest_position(a, position + r) - lowest;
            q.end[q.count] = position + r + 1 - lowest;
        }
    return q;
}

static void attend_items(void *context, int64_t first, int64_t last, int thread) {
    const Attending *c = context;
    const Attention *a = c->attention;
    const int64_t per_group = a->heads / c->division.shared;
    for (int64_t item = first; item < last; item++) {
        const RowGroup *g = c->groups + item / per_group;
        const BatchEntry *e = c->entries + g->entry;
        const NewRows *new = c->new + g->entry;
        const int64_t head = item % per_group * c->division.shared, kv = head / (a->heads / a->kv_heads);
        const int64_t position = e->position + g->row, lowest = lowest_position(a, position);
        const int64_t first_new = max_int(lowest, e->position + (e->run_length ? g->row - g->row % e->run_length : 0));
        const int64_t kind = e->kv_kind, size = a->head_dim;
        const KVCache cached = cache_from(layer_cache(a, e, c->layer), kv * e->capacity + lowest, size, kind);
        const KVCache added = cache_from(new->cache, kv * new->stride + first_new - e->position, size, kind);
        const Span spans[2] = {{cached, first_new - lowest}, {added, position + g->rows - first_new}};
        const Queries q = queries_of(c, g, position, head, thread);
        const Scoring scoring = {(float)a->scale, 0, NULL};
        attend(&q, spans, size, uses_int8(a) ? READ_INT8 : (enum Read)kind, &scoring);
    }
}

int attention(const Attention *a, const BatchEntry *entries, int64_t n_entries, int64_t layer, float *x, int64_t n) {
    const int64_t width = a->q.cols, inner = a->heads * a->head_dim, kv_inner = a->kv_heads * a->head_dim;
    const int64_t threads = pool_threads();
    const Division division = divide(a, n, threads);
    int64_t longest = 0;
    for (int64_t i = 0; i < n_entries; i++) longest = max_int(longest, entries[i].position + entries[i].n_rows);
    const int64_t stride = (longest + 2 * LANES) / LANES * LANES; /* room for one query's scores */
    scratch_reset();
    float *normed = scratch_take(n, width * 4), *out = scratch_take(n, width * 4), *q = scratch_take(n, inner * 4);
    float *k = scratch_take(n, kv_inner * 4), *v = scratch_take(n, kv_inner * 4), *mixed = scratch_take(n, inner * 4);
    float *scores = scratch_take(stride, threads * division.shared * division.rows * 4);
    NewRows *new = scratch_take(n_entries, sizeof *new);
    RowGroup *groups = scratch_take(n, sizeof *groups);
    for (int64_t i = 0; new && i < n_entries; i++) {
        const BatchEntry *e = entries + i;
        if (e->run_length) new[i] = (NewRows){scratch_cache(e->n_rows, a->kv_heads, a->head_dim), e->n_rows};
        else new[i] = (NewRows){cache_from(layer_cache(a, e, layer), e->position, a->head_dim, e->kv_kind), e->capacity};
    }
    if (scratch_failed()) return OUT_OF_MEMORY;
    normalise_rows(x, n, width, a->norm, a->epsilon, normed);
    if (linear((const Matrix *[]){&a->q, &a->k, &a->v}, 3, normed, n, (float *[]){q, k, v})) return OUT_OF_MEMORY;
    for (int64_t i = 0, first = 0; i < n_entries; first += entries[i++].n_rows) {
        Storing storing = {a, entries + i, new + i, q + first * inner, k + first * kv_inner, v + first * kv_inner};
        parallel_for(entries[i].n_rows, ROWS_PER_CHUNK, store_rows, &storing);
    }
    const int64_t n_groups = group_rows(entries, n_entries, division.rows, groups);
    Attending attending = {a, entries, new, groups, division, layer, stride, q, scores, mixed};
    parallel_for(n_groups * a->heads / division.shared, 1, attend_items, &attending);
    if (linear((const Matrix *[]){&a->o}, 1, mixed, n, (float *[]){out})) return OUT_OF_MEMORY;
    add_residual(x, out, n, width);
    return SUCCESS;
}
