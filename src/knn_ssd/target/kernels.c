/* The sublayers of a Llama-like decoder for few rows at a time, on the processor.
 *
 * A row's result is the same bits whatever other rows stand beside it, how many threads work, and where a block
 * begins: every sum runs in an order that depends on nothing but the row itself. So a block that verifies eight drafted
 * tokens gives what eight single steps would have given. Activations, keys and values are float32; weights are read as
 * they lie in the checkpoint, float32 or bfloat16, or as 4-bit copies for drafting.
 *
 * Matrices are (rows, cols), row-major: y[i] = dot(weight row i, x) + bias[i].
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <omp.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
#define STEP (2 * LANES) /* columns that the inner loop takes at once; cols must be a multiple of 32 */
#define STRETCH 512      /* columns whose inputs stay in the nearest cache */
#define TILE 16          /* matrix rows that one thread takes at once */
#define MOST_ROWS 8      /* input rows that are multiplied with a matrix row while it is at hand */
#define GROUP 64         /* columns that share a scale in a 4-bit matrix */
#define INLINE static inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef Floats FloatsAt __attribute__((aligned(4), may_alias));
typedef Words WordsAt __attribute__((aligned(2), may_alias));

enum Kind { FLOAT32 = 0, BFLOAT16 = 1, INT4 = 2 };

typedef struct {
    const void *data;       /* (rows, cols); INT4: (rows, ceil(cols / GROUP), GROUP / 2) bytes */
    const uint16_t *scales; /* INT4: (rows, ceil(cols / GROUP), 2) bfloat16, w = q * scale + zero */
    const float *bias;      /* (rows,) or null */
    int64_t rows, cols, kind;
    float *seen;            /* (cols,) or null; squares of the inputs are added, if it is the first that shares them */
} Matrix;

typedef struct {
    Matrix q, k, v, o;
    const float *norm, *q_norm, *k_norm; /* (D,), (head_dim,) or null */
    double epsilon, scale;
    int64_t heads, kv_heads, head_dim, rotary, window; /* window 0: no limit */
} Attention;

typedef struct {
    Matrix gate, up, down;
    const float *norm;
    double epsilon;
} Mlp;

/* Where `count` rows of a pass stand; rows of several caches may run together. In a rehearsal (`run` > 0) nothing is
 * written to the cache: row i sees the cached keys up to the start of its run of `run` rows, and the pass's own from
 * there. */
typedef struct {
    const float *cosines, *sines; /* (context, rotary) */
    float *keys, *values;         /* (layers, kv_heads, capacity, head_dim); of one layer within an attention */
    int64_t capacity, position, run, count;
} Place;

/* ---- memory that a thread keeps between calls ---- */

static _Thread_local struct {
    char *data;
    size_t size, used;
} arena;

static void arena_begin(size_t size) {
    if (arena.size < size) {
        free(arena.data);
        arena.data = aligned_alloc(64, (size + 63) / 64 * 64);
        arena.size = arena.data ? size : 0;
        if (!arena.data) abort();
    }
    arena.used = 0;
}

static void *take(size_t bytes) {
    void *result = arena.data + arena.used;
    arena.used += (bytes + 63) / 64 * 64;
    return result;
}

static int64_t groups_of(const Matrix *m) { return (m->cols + GROUP - 1) / GROUP; }

static int64_t padded(int64_t groups) { return (groups + 7) / 8 * 8; }

static size_t linear_memory(const Matrix *m, int64_t n) {
    return (size_t)n * (m->cols * 4 + padded(groups_of(m)) * (GROUP + 8)) + 512;
}

/* ---- vectors ---- */

INLINE float sum_of(Floats a) {
    float part[LANES];
    memcpy(part, &a, sizeof a);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    return part[0];
}

INLINE Floats load(const float *p) { return *(const FloatsAt *)p; }
INLINE void store(float *p, Floats a) { *(FloatsAt *)p = a; }

INLINE Floats exponential(Floats x) { /* as in the Cephes library; relative error about 1e-7 */
    const Floats low = (Floats){0} - 87.0f, high = (Floats){0} + 88.0f;
    x = (Floats)(((Words)x & (Words)(x > low)) | ((Words)low & ~(Words)(x > low)));
    x = (Floats)(((Words)x & (Words)(x < high)) | ((Words)high & ~(Words)(x < high)));
    Floats y = x * 1.44269504f;
    Ints n = __builtin_convertvector(y + (Floats)(((Words)y & 0x80000000u) | (Words)((Floats){0} + 0.5f)), Ints);
    Floats f = __builtin_convertvector(n, Floats);
    x = x - f * 0.693359375f + f * 2.12194440e-4f;
    Floats p = (Floats){0} + 1.9875691500e-4f;
    p = p * x + 1.3981999507e-3f;
    p = p * x + 8.3334519073e-3f;
    p = p * x + 4.1665795894e-2f;
    p = p * x + 1.6666665459e-1f;
    p = p * x + 5.0000001201e-1f;
    p = p * x * x + x + 1.0f;
    return p * (Floats)((n + 127) << 23);
}

INLINE float bfloat(uint16_t bits) {
    uint32_t word = (uint32_t)bits << 16;
    float result;
    memcpy(&result, &word, 4);
    return result;
}

/* ---- inputs of a linear, in the order in which its kernel reads them ---- */

typedef struct {
    float *blocks;      /* parts of up to MOST_ROWS rows: (cols / STEP, rows of the part, STEP) */
    int8_t *bytes;      /* (n, groups, GROUP) rounded to 8 bits */
    float *byte_scales; /* (n, groups, padded with zeros to a multiple of 8) */
    float *group_sums;  /* likewise; sums of the rounded values */
} Input;

/* One row into its part. A bfloat16 kernel takes of every STEP columns the even ones first, then the odd ones. */
static void arrange_row(const float *x, float *to, int64_t cols, int64_t rows, int split) {
    for (int64_t c = 0; c < cols; c += STEP, to += rows * STEP)
        for (int i = 0; i < LANES; i++) {
            to[i] = x[c + (split ? 2 * i : i)];
            to[LANES + i] = x[c + (split ? 2 * i + 1 : LANES + i)];
        }
}

/* The first row of a part when n rows are cut into parts of as many as are multiplied at once. */
INLINE int64_t part_start(int64_t n, int64_t part) { return part * MOST_ROWS < n ? part * MOST_ROWS : n; }

static void round_group(const float *x, int64_t count, int8_t *bytes, float *scale, float *sum) {
    float most = 0;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < count; i++) {
        float size = fabsf(x[i]);
        most = size > most ? size : most;
    }
    float inverse = most > 0 ? 127 / most : 0;
    int32_t total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < count; i++) {
        int32_t level = (int32_t)rintf(x[i] * inverse);
        bytes[i] = (int8_t)level;
        total += level;
    }
    memset(bytes + count, 0, GROUP - count);
    *scale = most / 127;
    *sum = *scale * (float)total;
}

/* The matrices that share an input are all of one kind, or 4-bit beside it. */
static Input prepare(const float *x, int64_t n, const Matrix *m, int kinds) {
    Input in = {0, 0, 0, 0};
    int64_t cols = m->cols, groups = groups_of(m), parts = (n + MOST_ROWS - 1) / MOST_ROWS;
    if (kinds & ~(1 << INT4)) in.blocks = take((size_t)n * cols * 4);
    if (kinds & 1 << INT4) {
        in.bytes = take((size_t)n * groups * GROUP);
        in.byte_scales = take((size_t)n * padded(groups) * 4);
        in.group_sums = take((size_t)n * padded(groups) * 4);
    }
#pragma omp parallel for if (n > 2)
    for (int64_t part = 0; part < parts; part++) {
        int64_t first = part_start(n, part), rows = part_start(n, part + 1) - first;
        for (int64_t r = first; r < first + rows; r++) {
            if (in.blocks)
                arrange_row(x + r * cols, in.blocks + first * cols + (r - first) * STEP, cols, rows,
                            kinds & 1 << BFLOAT16);
            for (int64_t g = 0; in.bytes && g < groups; g++) {
                int64_t start = g * GROUP, count = cols - start < GROUP ? cols - start : GROUP;
                round_group(x + r * cols + start, count, in.bytes + (r * groups + g) * GROUP,
                            in.byte_scales + r * padded(groups) + g, in.group_sums + r * padded(groups) + g);
            }
            for (int64_t g = groups; in.bytes && g < padded(groups); g++)
                in.byte_scales[r * padded(groups) + g] = in.group_sums[r * padded(groups) + g] = 0;
        }
    }
    return in;
}

/* ---- dot products of NB matrix rows with MB input rows ---- */

INLINE void dots(const char *data, int kind, int64_t cols, int64_t steps, const float *x, Floats *sums, const int NB,
                 const int MB) {
    Floats sum[4][8];
    const int64_t size = kind == BFLOAT16 ? 2 : 4;
#pragma GCC unroll 4
    for (int i = 0; i < NB; i++)
#pragma GCC unroll 8
        for (int r = 0; r < MB; r++) sum[i][r] = sums[i * MB + r];
    for (int64_t s = 0; s < steps; s++, data += STEP * size, x += MB * STEP) {
        Floats first[4], second[4];
#pragma GCC unroll 4
        for (int i = 0; i < NB; i++) {
            const char *at = data + i * cols * size;
            __builtin_prefetch(at + TILE * cols * size, 0, 2); /* of the next tile, into the second cache */
            if (kind == BFLOAT16) {
                Words pairs = *(const WordsAt *)at;
                first[i] = (Floats)(pairs << 16);
                second[i] = (Floats)(pairs & 0xffff0000u);
            } else {
                first[i] = load((const float *)at);
                second[i] = load((const float *)at + LANES);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < MB; r++)
#pragma GCC unroll 4
            for (int i = 0; i < NB; i++) {
                sum[i][r] += first[i] * load(x + r * STEP);
                sum[i][r] += second[i] * load(x + r * STEP + LANES);
            }
    }
#pragma GCC unroll 4
    for (int i = 0; i < NB; i++)
#pragma GCC unroll 8
        for (int r = 0; r < MB; r++) sums[i * MB + r] = sum[i][r];
}

/* For `count` matrix rows from `data` on: a stretch of `steps` steps is added to sums (count, MB). */
#define DOTS(kind, NB, MB)                                                                                           \
    static void dots_##kind##_##NB##_##MB(const char *data, int64_t cols, int64_t steps, int64_t count, const float *x, \
                                          Floats *sums) {                                                            \
        int64_t i = 0, size = cols * (kind == BFLOAT16 ? 2 : 4);                                                      \
        for (; i + NB <= count; i += NB) dots(data + i * size, kind, cols, steps, x, sums + i * MB, NB, MB);          \
        for (; i < count; i++) dots(data + i * size, kind, cols, steps, x, sums + i * MB, 1, MB);                     \
    }
#define DOTS_FOR(kind) \
    DOTS(kind, 4, 1) DOTS(kind, 4, 2) DOTS(kind, 2, 3) DOTS(kind, 2, 4) DOTS(kind, 2, 5) DOTS(kind, 2, 6) DOTS(kind, 1, 7) DOTS(kind, 1, 8)
DOTS_FOR(FLOAT32)
DOTS_FOR(BFLOAT16)

typedef void (*Dots)(const char *, int64_t, int64_t, int64_t, const float *, Floats *);
#define DOTS_TABLE(kind) \
    {dots_##kind##_4_1, dots_##kind##_4_2, dots_##kind##_2_3, dots_##kind##_2_4, dots_##kind##_2_5, dots_##kind##_2_6, dots_##kind##_1_7, dots_##kind##_1_8}
static const Dots DOTS_OF[2][MOST_ROWS] = {DOTS_TABLE(FLOAT32), DOTS_TABLE(BFLOAT16)};

/* `count` rows of a 4-bit matrix with one input row of bytes. Low halves of a group's bytes are its first 32 columns. */
INLINE void dots_int4(const uint8_t *q, const uint16_t *scales, int64_t groups, const int8_t *x, const float *x_scales,
                      const float *x_sums, float *y, const int count) {
#ifdef __AVX2__
    const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1), high_half = _mm256_set1_epi32(0xffff0000);
    __m256 sum[4], zero[4];
    float factors[4][8];
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) sum[i] = zero[i] = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; g++) {
        if (g % 8 == 0)
#pragma GCC unroll 4
            for (int i = 0; i < count; i++) { /* of eight groups at once; beyond the last one the input's are zero */
                __m256i both = _mm256_loadu_si256((const __m256i *)(scales + 2 * (i * groups + g)));
                __m256 scale = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
                __m256 offset = _mm256_castsi256_ps(_mm256_and_si256(both, high_half));
                _mm256_storeu_ps(factors[i], _mm256_mul_ps(scale, _mm256_loadu_ps(x_scales + g)));
                zero[i] = _mm256_fmadd_ps(offset, _mm256_loadu_ps(x_sums + g), zero[i]);
            }
        __m256i first = _mm256_loadu_si256((const __m256i *)(x + g * GROUP));
        __m256i second = _mm256_loadu_si256((const __m256i *)(x + g * GROUP + 32));
#pragma GCC unroll 4
        for (int i = 0; i < count; i++) {
            __m256i both = _mm256_loadu_si256((const __m256i *)(q + (i * groups + g) * 32));
            _mm_prefetch((const char *)(q + ((i + TILE / 2) * groups + g) * 32), _MM_HINT_T1); /* half a tile ahead */
            __m256i low = _mm256_and_si256(both, mask), high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
            __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, first), _mm256_maddubs_epi16(high, second));
            __m256 part = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, ones));
            sum[i] = _mm256_fmadd_ps(part, _mm256_broadcast_ss(&factors[i][g % 8]), sum[i]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) {
        float part[8], total = 0;
        _mm256_storeu_ps(part, _mm256_add_ps(sum[i], zero[i]));
        for (int j = 0; j < 8; j++) total += part[j];
        y[i] = total;
    }
#else
    for (int i = 0; i < count; i++, q += groups * 32, scales += groups * 2) {
        float total = 0;
        for (int64_t g = 0; g < groups; g++) {
            int32_t part = 0;
            for (int j = 0; j < 32; j++)
                part += (q[g * 32 + j] & 15) * x[g * GROUP + j] + (q[g * 32 + j] >> 4) * x[g * GROUP + 32 + j];
            total += (float)part * (bfloat(scales[2 * g]) * x_scales[g]) + bfloat(scales[2 * g + 1]) * x_sums[g];
        }
        y[i] = total;
    }
#endif
}

static void tile(const Matrix *m, int64_t first, int64_t count, const Input *in, int64_t n, float *y) {
    int64_t cols = m->cols, groups = groups_of(m);
    if (m->kind == INT4) {
        const uint8_t *q = (const uint8_t *)m->data + first * groups * 32;
        const uint16_t *scales = m->scales + first * groups * 2;
        for (int64_t r = 0; r < n; r++) {
            const int8_t *bytes = in->bytes + r * groups * GROUP;
            const float *byte_scales = in->byte_scales + r * padded(groups), *sums = in->group_sums + r * padded(groups);
            float *out = y + r * m->rows + first;
            int64_t i = 0;
            for (; i + 4 <= count; i += 4)
                dots_int4(q + i * groups * 32, scales + i * groups * 2, groups, bytes, byte_scales, sums, out + i, 4);
            for (; i < count; i++)
                dots_int4(q + i * groups * 32, scales + i * groups * 2, groups, bytes, byte_scales, sums, out + i, 1);
        }
    } else {
        int64_t size = m->kind == BFLOAT16 ? 2 : 4;
        const char *data = (const char *)m->data + first * cols * size;
        for (int64_t part = 0, r = 0, rows; r < n; part++, r += rows) {
            rows = part_start(n, part + 1) - r;
            Floats sums[TILE * MOST_ROWS] = {0};
            for (int64_t c = 0; c < cols; c += STRETCH) {
                int64_t width = cols - c < STRETCH ? cols - c : STRETCH;
                DOTS_OF[m->kind][rows - 1](data + c * size, cols, width / STEP, count, in->blocks + r * cols + c * rows,
                                           sums);
            }
            for (int64_t i = 0; i < count; i++)
                for (int64_t j = 0; j < rows; j++) y[(r + j) * m->rows + first + i] = sum_of(sums[i * rows + j]);
        }
    }
    for (int64_t r = 0; m->bias && r < n; r++)
        for (int64_t i = first; i < first + count; i++) y[r * m->rows + i] += m->bias[i];
}

/* y[j] (n, rows of matrix j) = matrix j applied to x (n, cols), for matrices of the same number of columns. */
static void linear(const Matrix *const *matrices, int count, const float *x, int64_t n, float *const *y) {
    int kinds = 0;
    int64_t starts[4] = {0};
    for (int j = 0; j < count; j++) {
        kinds |= 1 << matrices[j]->kind;
        starts[j + 1] = starts[j] + (matrices[j]->rows + TILE - 1) / TILE;
    }
    float *seen = matrices[0]->seen;
    for (int64_t r = 0; seen && r < n; r++)
        for (int64_t c = 0; c < matrices[0]->cols; c++) seen[c] += x[r * matrices[0]->cols + c] * x[r * matrices[0]->cols + c];
    Input in = prepare(x, n, matrices[0], kinds);
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < starts[count]; t++) {
        int j = 0;
        while (t >= starts[j + 1]) j++;
        int64_t first = (t - starts[j]) * TILE, left = matrices[j]->rows - first;
        tile(matrices[j], first, left < TILE ? left : TILE, &in, n, y[j]);
    }
}

static void normalise(const float *x, int64_t size, const float *weight, double epsilon, float *y) {
    Floats squares = {0};
    for (int64_t i = 0; i < size; i += LANES) squares += load(x + i) * load(x + i);
    float factor = 1.0f / sqrtf(sum_of(squares) / (float)size + (float)epsilon);
    for (int64_t i = 0; i < size; i += LANES) store(y + i, load(weight + i) * (load(x + i) * factor));
}

static void add_to(float *x, const float *y, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) store(x + i, load(x + i) + load(y + i));
}

/* ---- attention ---- */

static void rotate(float *x, const float *cosines, const float *sines, int64_t size) {
    int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cosines[i] - b * sines[i];
        x[i + half] = b * cosines[i + half] + a * sines[i + half];
    }
}

typedef struct {
    const float *keys, *values;
    int64_t count;
} Span;

/* out[i..] = the values' components from i on, `count` vectors of them, weighted by the scores. */
INLINE void mix(const Span spans[2], int64_t head_dim, const float *scores, float inverse, int64_t i, const int count,
                float *out) {
    Floats sum[4] = {0};
    for (int s = 0; s < 2; s++)
        for (int64_t t = 0; t < spans[s].count; t++, scores++)
#pragma GCC unroll 4
            for (int j = 0; j < count; j++) sum[j] += *scores * load(spans[s].values + t * head_dim + i + j * LANES);
#pragma GCC unroll 4
    for (int j = 0; j < count; j++) store(out + i + j * LANES, sum[j] * inverse);
}

/* One query (head_dim,) over the keys of two spans, in their order; `scores` has room for all of them. */
static void attend(const float *query, const Span spans[2], int64_t head_dim, float scale, float *scores, float *out) {
    int64_t total = 0;
    float most = -INFINITY;
    for (int s = 0; s < 2; s++)
        for (int64_t t = 0; t < spans[s].count; t++) {
            const float *key = spans[s].keys + t * head_dim;
            Floats sum = {0};
            for (int64_t i = 0; i < head_dim; i += LANES) sum += load(query + i) * load(key + i);
            float score = sum_of(sum) * scale;
            most = score > most ? score : most;
            scores[total++] = score;
        }
    Floats sums = {0};
    for (int64_t t = total; t % LANES; t++) scores[t] = -INFINITY;
    for (int64_t t = 0; t < total; t += LANES) {
        Floats weight = exponential(load(scores + t) - most);
        store(scores + t, weight);
        for (int i = 0; i < LANES && t + i >= total - LANES; i++)
            if (t + i >= total) scores[t + i] = 0;
        sums += load(scores + t);
    }
    float inverse = 1.0f / sum_of(sums);
    int64_t i = 0;
    for (; i + 4 * LANES <= head_dim; i += 4 * LANES) mix(spans, head_dim, scores, inverse, i, 4, out);
    for (; i < head_dim; i += LANES) mix(spans, head_dim, scores, inverse, i, 1, out);
}

/* The keys and values that a pass's rows bring with them: the cache's next places, or apart from it. */
typedef struct {
    float *keys, *values; /* the first row's, of the first head */
    int64_t stride;       /* rows from one head to the next */
} Fresh;

static void attend_row(const Attention *a, const Place *p, const Fresh *fresh, int64_t row, int64_t head,
                       const float *query, float *scores, float *out) {
    int64_t kv = head / (a->heads / a->kv_heads), position = p->position + row, cached = p->position;
    int64_t lowest = a->window && position + 1 > a->window ? position + 1 - a->window : 0;
    if (p->run) cached += row - row % p->run;
    int64_t own = lowest > cached ? lowest : cached;
    int64_t old_at = (kv * p->capacity + lowest) * a->head_dim;
    int64_t new_at = (kv * fresh->stride + own - p->position) * a->head_dim;
    Span spans[2] = {{p->keys + old_at, p->values + old_at, own - lowest},
                     {fresh->keys + new_at, fresh->values + new_at, position + 1 - own}};
    attend(query, spans, a->head_dim, (float)a->scale, scores, out);
}

/* Puts queries and keys at their positions, and keys and values where they belong. */
static void place_rows(const Attention *a, const Place *p, const Fresh *fresh, float *q, float *k, const float *v) {
    int64_t size = a->head_dim;
    for (int64_t r = 0; r < p->count; r++) {
        const float *cosines = p->cosines + (p->position + r) * a->rotary, *sines = p->sines + (p->position + r) * a->rotary;
        for (int64_t h = 0; h < a->heads; h++) {
            float *head = q + (r * a->heads + h) * size;
            if (a->q_norm) normalise(head, size, a->q_norm, a->epsilon, head);
            rotate(head, cosines, sines, a->rotary);
        }
        for (int64_t h = 0; h < a->kv_heads; h++) {
            float *head = k + (r * a->kv_heads + h) * size;
            if (a->k_norm) normalise(head, size, a->k_norm, a->epsilon, head);
            rotate(head, cosines, sines, a->rotary);
            memcpy(fresh->keys + (h * fresh->stride + r) * size, head, (size_t)4 * size);
            memcpy(fresh->values + (h * fresh->stride + r) * size, v + (r * a->kv_heads + h) * size, (size_t)4 * size);
        }
    }
}

/* x (n, D) += attention(norm(x)), for rows at `places`. */
static void attention(const Attention *a, const Place *places, int64_t num_places, float *x, int64_t n) {
    int64_t width = a->q.cols, inner = a->heads * a->head_dim, kv_inner = a->kv_heads * a->head_dim, longest = 0;
    for (int64_t i = 0; i < num_places; i++) {
        int64_t end = places[i].position + places[i].count;
        longest = end > longest ? end : longest;
    }
    int64_t room = (longest + 2 * LANES) / LANES * LANES; /* for one thread's scores */
    arena_begin(linear_memory(&a->q, n) + linear_memory(&a->o, n) + 8192 + (size_t)16 * n +
                (size_t)num_places * (sizeof(Fresh) + 128) +
                (size_t)4 * (n * (2 * width + 2 * inner + 4 * kv_inner) + omp_get_max_threads() * room));
    float *normed = take((size_t)4 * n * width), *q = take((size_t)4 * n * inner), *k = take((size_t)4 * n * kv_inner);
    float *v = take((size_t)4 * n * kv_inner), *mixed = take((size_t)4 * n * inner), *out = take((size_t)4 * n * width);
    float *all_scores = take((size_t)4 * omp_get_max_threads() * room);
    Fresh *fresh = take((size_t)num_places * sizeof(Fresh));
    int64_t *owner = take((size_t)8 * n), *row_of = take((size_t)8 * n);
    for (int64_t r = 0; r < n; r++) normalise(x + r * width, width, a->norm, a->epsilon, normed + r * width);
    linear((const Matrix *[]){&a->q, &a->k, &a->v}, 3, normed, n, (float *[]){q, k, v});
    for (int64_t i = 0, first = 0; i < num_places; first += places[i++].count) {
        const Place *p = places + i;
        int64_t at = p->position * a->head_dim, size = p->count * kv_inner;
        fresh[i] = (Fresh){p->keys + at, p->values + at, p->capacity};
        if (p->run) fresh[i] = (Fresh){take((size_t)4 * size), take((size_t)4 * size), p->count};
        place_rows(a, p, fresh + i, q + first * inner, k + first * kv_inner, v + first * kv_inner);
        for (int64_t r = 0; r < p->count; r++) {
            owner[first + r] = i;
            row_of[first + r] = r;
        }
    }
#pragma omp parallel for schedule(static)
    for (int64_t item = 0; item < n * a->heads; item++) {
        int64_t r = item / a->heads;
        attend_row(a, places + owner[r], fresh + owner[r], row_of[r], item % a->heads, q + item * a->head_dim,
                   all_scores + omp_get_thread_num() * room, mixed + item * a->head_dim);
    }
    linear((const Matrix *[]){&a->o}, 1, mixed, n, (float *[]){out});
    add_to(x, out, n * width);
}

/* x (n, D) += down(silu(gate(h)) * up(h)) with h = norm(x). */
static void mlp(const Mlp *m, float *x, int64_t n) {
    int64_t width = m->gate.cols, inner = m->gate.rows;
    arena_begin(linear_memory(&m->gate, n) + linear_memory(&m->down, n) + 2048 + (size_t)4 * n * (2 * width + 2 * inner));
    float *normed = take((size_t)4 * n * width), *gate = take((size_t)4 * n * inner), *up = take((size_t)4 * n * inner);
    float *out = take((size_t)4 * n * width);
    for (int64_t r = 0; r < n; r++) normalise(x + r * width, width, m->norm, m->epsilon, normed + r * width);
    linear((const Matrix *[]){&m->gate, &m->up}, 2, normed, n, (float *[]){gate, up});
#pragma omp parallel for if (n * inner > 4096)
    for (int64_t i = 0; i < n * inner; i += LANES) {
        Floats g = load(gate + i);
        store(gate + i, g / (1.0f + exponential(-g)) * load(up + i));
    }
    linear((const Matrix *[]){&m->down}, 1, gate, n, (float *[]){out});
    add_to(x, out, n * width);
}

/* x (n, D) through all layers, for rows at `places`. A sublayer whose pointer is null is skipped. */
void knn_ssd_pass(const Attention *const *attentions, const Mlp *const *mlps, int64_t layers, const Place *places,
                  int64_t num_places, float *x) {
    Place here[num_places];
    int64_t n = 0;
    for (int64_t i = 0; i < num_places; i++) n += places[i].count;
    for (int64_t l = 0; l < layers; l++) {
        if (attentions[l]) {
            for (int64_t i = 0; i < num_places; i++) {
                int64_t size = attentions[l]->kv_heads * places[i].capacity * attentions[l]->head_dim;
                here[i] = places[i];
                here[i].keys += l * size;
                here[i].values += l * size;
            }
            attention(attentions[l], here, num_places, x, n);
        }
        if (mlps[l]) mlp(mlps[l], x, n);
    }
}

/* hidden (n, D) = norm(x); logits (wanted, V) = head(hidden) of the rows that are wanted. */
void knn_ssd_head(const Matrix *head, const float *norm, double epsilon, const float *x, int64_t n,
                  const int64_t *rows, int64_t wanted, float *hidden, float *logits) {
    int64_t width = head->cols;
    for (int64_t r = 0; r < n; r++) normalise(x + r * width, width, norm, epsilon, hidden + r * width);
    if (!wanted) return;
    arena_begin(linear_memory(head, wanted) + 4096 + (size_t)4 * wanted * width);
    float *chosen = take((size_t)4 * wanted * width);
    for (int64_t r = 0; r < wanted; r++) memcpy(chosen + r * width, hidden + rows[r] * width, (size_t)4 * width);
    linear((const Matrix *[]){head}, 1, chosen, wanted, (float *[]){logits});
}

int64_t knn_ssd_lanes(void) { return LANES; }

/* Ends the calling thread's idle helpers. While they live, another thread's helpers count as one too many for the
 * processor, and go to sleep at each of a pass's hundreds of barriers instead of waiting awake. */
void knn_ssd_dismiss_helpers(void) {
#if __GNUC__ >= 9 || _OPENMP >= 201811
    omp_pause_resource_all(omp_pause_hard);
#endif
}

/* ---- 4-bit copies ---- */

static uint16_t to_bfloat(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    return (uint16_t)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

/* Rounds w (count,) with one scale and zero; gives the squared error, weighted by importance. */
static float round_to(const float *w, const float *importance, int64_t count, float scale, float zero, float *q) {
    float inverse = scale != 0 ? 1 / scale : 0, error = 0;
#pragma omp simd reduction(+ : error)
    for (int64_t i = 0; i < count; i++) {
        float level = rintf((w[i] - zero) * inverse);
        level = level < 0 ? 0 : level > 15 ? 15 : level;
        q[i] = level;
        float off = level * scale + zero - w[i];
        error += importance[i] * off * off;
    }
    return error;
}

/* The scale and zero that suit the levels q best: weighted least squares. */
static void refit(const float *w, const float *importance, int64_t count, const float *q, float *scale, float *zero) {
    float a = 0, b = 0, c = 0, d = 0, e = 0;
#pragma omp simd reduction(+ : a, b, c, d, e)
    for (int64_t i = 0; i < count; i++) {
        a += importance[i];
        b += importance[i] * q[i];
        c += importance[i] * q[i] * q[i];
        d += importance[i] * w[i];
        e += importance[i] * q[i] * w[i];
    }
    float determinant = a * c - b * b;
    if (determinant <= 1e-12f * a * c) return;
    *scale = (a * e - b * d) / determinant;
    *zero = (c * d - b * e) / determinant;
}

static void round_weights(const float *w, const float *importance, int64_t count, int64_t tries, uint8_t *bytes,
                          uint16_t *scales) {
    float low = w[0], high = w[0], best = INFINITY, q[GROUP], best_q[GROUP] = {0};
    for (int64_t i = 1; i < count; i++) {
        low = fminf(low, w[i]);
        high = fmaxf(high, w[i]);
    }
    float middle = (low + high) / 2, half = (high - low) / 2;
    for (int64_t attempt = 0; attempt < tries; attempt++) {
        float width = half * (1 - 0.05f * (float)attempt), scale = width / 7.5f, zero = middle - width;
        for (int pass = 0; pass < (tries > 1 ? 3 : 1); pass++) {
            if (pass) refit(w, importance, count, q, &scale, &zero);
            uint16_t coded[2] = {to_bfloat(scale), to_bfloat(zero)};
            float error = round_to(w, importance, count, bfloat(coded[0]), bfloat(coded[1]), q);
            if (error < best) {
                best = error;
                memcpy(best_q, q, sizeof q);
                memcpy(scales, coded, sizeof coded);
            }
        }
    }
    for (int i = 0; i < GROUP / 2; i++)
        bytes[i] = (uint8_t)((i < count ? (int)best_q[i] : 0) | (i + 32 < count ? (int)best_q[i + 32] : 0) << 4);
}

/* A 4-bit copy of m in `bytes` and `scales`. `importance` (cols,) weighs the columns' errors; `tries` ranges are tried. */
void knn_ssd_round(const Matrix *m, const float *importance, int64_t tries, uint8_t *bytes, uint16_t *scales) {
    int64_t cols = m->cols, groups = groups_of(m);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < m->rows; i++)
        for (int64_t g = 0; g < groups; g++) {
            float w[GROUP] = {0};
            int64_t first = g * GROUP, count = cols - first < GROUP ? cols - first : GROUP;
            for (int64_t c = 0; c < count; c++)
                w[c] = m->kind == BFLOAT16 ? bfloat(((const uint16_t *)m->data)[i * cols + first + c])
                                           : ((const float *)m->data)[i * cols + first + c];
            round_weights(w, importance + first, count, tries, bytes + (i * groups + g) * 32,
                          scales + (i * groups + g) * 2);
        }
}
