/* Runs the kernels without Python, over random layers and batches: driver MODE [SEED [CASES]].
 *
 *   exact     a row has the same bits in blocks, in batches and in teacher-forced runs as alone, for 1 to 4 threads
 *   outer     the same of attention by itself, wherever the keys that a row sees are split
 *   callers   the same, from several threads at once, while another one quantises and changes the number of threads
 *   quantise  matrices in blocks have the values of their source; 4-bit copies decode to their matrix, and have the same
 *             bits for 1 to 4 threads, whatever format it is in
 *   contract  sizes that would corrupt memory are refused
 *   dump      writes the outputs of the named cases to standard output, for `compare` with those of another build
 *   compare   driver compare FILE FILE TOLERANCE
 *
 * Every buffer is exactly as large as kernels.h says, and what a kernel must not read holds NaN, so that the address
 * sanitiser or a comparison finds what is read or written beyond. */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "random_numbers.h"
#include "thread_pool.h"

enum { LAYERS = 2, CAPACITY = 67, MAX_SESSIONS = 4, GROUP = 64, CALLERS = 3 };

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition), exit(1);                      \
    } while (0)

/* ---- memory ---- */

enum { MAX_BLOCKS = 1 << 12 };
static _Thread_local void *blocks[MAX_BLOCKS];
static _Thread_local int n_blocks;

/* Room for `bytes` bytes that ends where the allocation ends, aligned to `alignment` and often to no more. */
static void *take(int64_t bytes, int64_t alignment) {
    const int64_t offset = random_below(2) * alignment;
    char *block = malloc((size_t)(bytes + offset));
    CHECK(block && n_blocks < MAX_BLOCKS);
    blocks[n_blocks++] = block;
    return block + offset;
}

/* Frees what was taken since there were `count` blocks. */
static void release(int count) {
    while (n_blocks > count) free(blocks[--n_blocks]);
}

static float *take_floats(int64_t count, float low, float scale) {
    float *result = take(4 * count, 4);
    for (int64_t i = 0; i < count; i++) result[i] = low + scale * random_float();
    return result;
}

/* ---- layers ---- */

typedef struct {
    int64_t head_dim, heads, kv_heads, kind, mlp_kind, hidden, inner, window, vocab;
    int bias, qk_norm;
    int64_t kv_kind;
} Sizes;

static const Sizes NAMED[] = {
    {32, 1, 1, FLOAT32, FLOAT32, 96, 160, 0, 33, 1, 0, FLOAT32},
    {32, 6, 2, BFLOAT16, BFLOAT16, 96, 160, 9, 101, 0, 0, FLOAT32},
    {64, 9, 3, BFLOAT16, BFLOAT16, 608, 160, 0, 101, 1, 0, FLOAT32},
    {64, 4, 1, INT4, INT4, 96, 160, 40, 101, 0, 1, FLOAT32},
    {96, 4, 2, INT4, INT4, 96, 160, 0, 7, 1, 0, FLOAT32},
    {96, 5, 1, FLOAT32, INT4, 96, 608, 0, 101, 0, 1, FLOAT32},
    {128, 8, 2, BFLOAT16, INT4, 96, 160, 33, 101, 0, 1, FLOAT32},
    {128, 7, 1, INT4, BFLOAT16, 96, 608, 0, 129, 0, 0, FLOAT32},
    {256, 2, 2, FLOAT32, FLOAT32, 96, 160, 40, 101, 1, 0, FLOAT32},
    {256, 4, 1, BFLOAT16, BFLOAT16, 96, 160, 0, 101, 0, 1, FLOAT32},
    {64, 6, 2, BFLOAT16, BFLOAT16, 96, 160, 40, 101, 0, 1, BFLOAT16},
    {128, 5, 1, FLOAT32, INT4, 96, 160, 0, 101, 1, 0, BFLOAT16}};
enum { N_NAMED = sizeof NAMED / sizeof *NAMED };

static int64_t random_kind(void) { return (int64_t[]){FLOAT32, BFLOAT16, INT4}[random_below(3)]; }

static Sizes random_sizes(void) {
    const int64_t kv_heads = 1 + random_below(3);
    return (Sizes){.head_dim = 32 * (1 + random_below(8)),
                   .heads = kv_heads * (1 + random_below(5)),
                   .kv_heads = kv_heads,
                   .kind = random_kind(),
                   .mlp_kind = random_kind(),
                   .hidden = 32 * (1 + random_below(9)),
                   .inner = 32 * (1 + random_below(20)),
                   .window = random_below(2) * (1 + random_below(CAPACITY)),
                   .vocab = 1 + random_below(150),
                   .bias = (int)random_below(2),
                   .qk_norm = (int)random_below(2),
                   .kv_kind = random_below(2) ? BFLOAT16 : FLOAT32};
}

typedef struct {
    Sizes sizes;
    Attention attentions[LAYERS];
    Mlp mlps[LAYERS];
    const Attention *attention_of[LAYERS]; /* null where a sublayer is skipped */
    const Mlp *mlp_of[LAYERS];
    Matrix head;
    float *norm, *cosines, *sines;
} Model;

static Matrix float_matrix(int64_t rows, int64_t cols, int64_t kind) {
    const float scale = 2 / sqrtf((float)cols);
    float *floats = take_floats(rows * cols, 0, scale);
    Matrix m = {.data = floats, .rows = rows, .cols = cols, .kind = FLOAT32};
    if (kind != BFLOAT16) return m;
    uint16_t *halves = take(2 * rows * cols, 2);
    for (int64_t i = 0; i < rows * cols; i++) {
        uint32_t word;
        memcpy(&word, floats + i, 4);
        halves[i] = (uint16_t)(word >> 16);
    }
    m.data = halves, m.kind = BFLOAT16;
    return m;
}

static int64_t padded_rows(int64_t rows) { return (rows + knn_ssd_lanes() - 1) / knn_ssd_lanes() * knn_ssd_lanes(); }

/* Rows of a block, and weights of a unit; see blocks.h. */
static int64_t block_rows(void) { return 2 * knn_ssd_lanes(); }
static int64_t unit_weights(void) { return 8 * block_rows(); }

/* The 4-bit copy of a matrix, made of so many rows at a time. */
static Matrix quantised_in_parts(const Matrix *m, int64_t part) {
    const int64_t rows = padded_rows(m->rows), groups = (m->cols + GROUP - 1) / GROUP;
    uint8_t *data = take(rows * groups * (GROUP / 2), 2);
    uint16_t *scales = take(rows * groups * 4, 2);
    memset(data, 0xab, (size_t)(rows * groups * (GROUP / 2)));
    memset(scales, 0xff, (size_t)(rows * groups * 4)); /* NaN */
    const float *importance = take_floats(m->cols, 1, 0.5f); /* not among the arguments: their order is the compiler's */
    const int64_t n_ranges = 1 + random_below(3);
    for (int64_t first = 0; first < m->rows; first += part) {
        const int64_t last = first + part < m->rows ? first + part : m->rows;
        CHECK(knn_ssd_quantise(m, importance, n_ranges, first, last, data, scales) == SUCCESS);
    }
    return (Matrix){.data = data, .scales = scales, .rows = m->rows, .cols = m->cols, .kind = INT4};
}

static Matrix quantised(const Matrix *m) { return quantised_in_parts(m, m->rows); }

/* Bytes of 32 columns of a row in blocks. */
static int64_t bytes_of_32(int64_t kind) {
    const int64_t bytes[] = {[FLOAT32_BLOCKS] = 128, [FLOAT16_BLOCKS] = 64, [BFLOAT16_BLOCKS] = 64,
                             [BFLOAT16_PACKED] = 48, [Q8_0_BLOCKS] = 34,    [Q6_K_BLOCKS] = 28,
                             [Q5_0_BLOCKS] = 22,     [Q4_K_BLOCKS] = 22,    [Q4_0_BLOCKS] = 18};
    return bytes[kind];
}

static Matrix in_blocks(const Matrix *m, int64_t kind) {
    const int64_t n = (m->rows + block_rows() - 1) / block_rows();
    uint8_t *data = take(n * block_rows() * m->cols / 32 * bytes_of_32(kind), 4);
    uint8_t *upper_bytes = take(16, 1);
    int64_t *starts = take(8 * (n + 1), 8);
    if (kind == BFLOAT16_PACKED) CHECK(knn_ssd_upper_bytes(m, upper_bytes) == SUCCESS);
    CHECK(knn_ssd_pack(m, kind, upper_bytes, data, starts + 1) == SUCCESS);
    Matrix result = {.data = data, .rows = m->rows, .cols = m->cols, .kind = kind};
    if (kind != BFLOAT16_PACKED) return result;
    starts[0] = 0;
    for (int64_t i = 0; i < n; i++) starts[i + 1] += starts[i];
    Escape *escapes = take(8 * starts[n] + 8, 8);
    CHECK(knn_ssd_list_escapes(m, upper_bytes, starts, escapes) == SUCCESS);
    for (int64_t i = 0; i < starts[n]; i++) CHECK(escapes[i].index < unit_weights() && escapes[i].unit < m->cols / 8);
    result.upper_bytes = upper_bytes, result.escape_starts = starts, result.escapes = escapes;
    return result;
}

static Matrix random_matrix(int64_t rows, int64_t cols, int64_t kind, int bias) {
    Matrix m = float_matrix(rows, cols, kind);
    if (kind == INT4) m = quantised(&m);
    else if (kind == FLOAT32) m = in_blocks(&m, FLOAT32_BLOCKS);
    else if (!knn_ssd_uses_tiles()) m = in_blocks(&m, rows / 2 % 2 ? BFLOAT16_BLOCKS : BFLOAT16_PACKED);
    if (bias) m.bias = take_floats(rows, 0, 0.1f);
    return m;
}

static void make_tables(Model *m) {
    m->cosines = take(4 * CAPACITY * m->sizes.head_dim, 4), m->sines = take(4 * CAPACITY * m->sizes.head_dim, 4);
    const int64_t half = m->sizes.head_dim / 2;
    for (int64_t i = 0; i < CAPACITY; i++)
        for (int64_t j = 0; j < half; j++) {
            const float t = random_float(), cosine = (1 - t * t) / (1 + t * t), sine = 2 * t / (1 + t * t);
            for (int64_t k = 0; k < 2; k++) {
                m->cosines[(2 * i + k) * half + j] = cosine;
                m->sines[(2 * i + k) * half + j] = sine;
            }
        }
}

static Model random_model(Sizes s) {
    Model m = {.sizes = s, .norm = take_floats(s.hidden, 1, 0.5f), .head = random_matrix(s.vocab, s.hidden, s.kind, s.bias)};
    for (int i = 0; i < LAYERS; i++) {
        const int64_t inner = s.heads * s.head_dim, kv_inner = s.kv_heads * s.head_dim;
        m.attentions[i] = (Attention){.q = random_matrix(inner, s.hidden, s.kind, s.bias),
                                      .k = random_matrix(kv_inner, s.hidden, s.kind, s.bias),
                                      .v = random_matrix(kv_inner, s.hidden, s.kind, s.bias),
                                      .o = random_matrix(s.hidden, inner, s.kind, s.bias),
                                      .norm = take_floats(s.hidden, 1, 0.5f),
                                      .q_norm = s.qk_norm ? take_floats(s.head_dim, 1, 0.5f) : NULL,
                                      .k_norm = s.qk_norm ? take_floats(s.head_dim, 1, 0.5f) : NULL,
                                      .epsilon = 1e-5,
                                      .scale = 1 / sqrt((double)s.head_dim),
                                      .heads = s.heads,
                                      .kv_heads = s.kv_heads,
                                      .head_dim = s.head_dim,
                                      .rotary_dim = s.head_dim,
                                      .window = s.window};
        m.mlps[i] = (Mlp){.gate = random_matrix(s.inner, s.hidden, s.mlp_kind, s.bias),
                          .up = random_matrix(s.inner, s.hidden, s.mlp_kind, s.bias),
                          .down = random_matrix(s.hidden, s.inner, s.mlp_kind, s.bias),
                          .norm = take_floats(s.hidden, 1, 0.5f),
                          .epsilon = 1e-5};
    }
    make_tables(&m);
    return m;
}

/* Runs all sublayers, or leaves some out. */
static void choose_sublayers(Model *m, int all) {
    for (int i = 0; i < LAYERS; i++) {
        m->attention_of[i] = all || random_below(5) ? m->attentions + i : NULL;
        m->mlp_of[i] = all || random_below(5) ? m->mlps + i : NULL;
    }
}

/* ---- KV caches ---- */

enum { PARTS = 6 };

typedef struct {
    void *parts[PARTS]; /* in the order of KVCache */
} Cache;

/* Bytes of a position of one head in each part. */
static int64_t part_size(const Model *m, int part) {
    if (part < 2) return (m->sizes.kv_kind == BFLOAT16 ? 2 : 4) * m->sizes.head_dim;
    return part < 4 ? m->sizes.head_dim : 4;
}

static int64_t num_vectors(const Model *m) { return LAYERS * m->sizes.kv_heads; }

/* A cache with the first `length` positions of `from`; the others hold NaN, or -1 as bytes. */
static Cache rewound(const Model *m, const Cache *from, int64_t length) {
    Cache result;
    for (int p = 0; p < PARTS; p++) {
        const int64_t size = part_size(m, p), head = CAPACITY * size;
        char *part = result.parts[p] = take(num_vectors(m) * head, p == 2 || p == 3 ? 1 : 4);
        memset(part, 0xff, (size_t)(num_vectors(m) * head));
        for (int64_t v = 0; v < num_vectors(m) && length; v++)
            memcpy(part + v * head, (char *)from->parts[p] + v * head, (size_t)(length * size));
    }
    return result;
}

static int same_cache(const Model *m, const Cache *a, const Cache *b, int64_t length) {
    for (int p = 0; p < PARTS; p++)
        for (int64_t v = 0, head = CAPACITY * part_size(m, p); v < num_vectors(m); v++)
            if (memcmp((char *)a->parts[p] + v * head, (char *)b->parts[p] + v * head, (size_t)(length * part_size(m, p))))
                return 0;
    return 1;
}

/* ---- forward passes ---- */

static BatchEntry entry_of(const Model *m, const Cache *c, int64_t position, int64_t run_length, int64_t n_rows) {
    void *const *p = c->parts;
    return (BatchEntry){m->cosines, m->sines,   {p[0], p[1], p[2], p[3], p[4], p[5]}, CAPACITY,
                        position,   run_length, n_rows,                               m->sizes.kv_kind};
}

/* Floats of a row's outputs: its last state, normalised too, and its logits. */
static int64_t output_size(const Model *m) { return 2 * m->sizes.hidden + m->sizes.vocab; }

/* Writes outputs (n, output_size) of inputs (n, hidden). */
static void run(const Model *m, const BatchEntry *entries, int64_t n_entries, const float *inputs, int64_t n, float *outputs) {
    const int64_t width = m->sizes.hidden, vocab = m->sizes.vocab, first = random_below(n);
    const int taken = n_blocks;
    float *x = take(4 * n * width, 4), *hidden = take(4 * n * width, 4), *logits = take(4 * n * vocab, 4);
    int64_t *selected = take(8 * n, 8);
    for (int64_t r = 0; r < n; r++) selected[r] = (first + r) % n;
    memcpy(x, inputs, (size_t)(4 * n * width));
    CHECK(knn_ssd_forward(m->attention_of, m->mlp_of, LAYERS, entries, n_entries, x) == SUCCESS);
    CHECK(knn_ssd_lm_head(&m->head, m->norm, 1e-5, x, n, selected, n, hidden, logits) == SUCCESS);
    for (int64_t r = 0; r < n; r++) {
        memcpy(outputs + r * output_size(m), x + r * width, (size_t)(4 * width));
        memcpy(outputs + r * output_size(m) + width, hidden + r * width, (size_t)(4 * width));
        memcpy(outputs + selected[r] * output_size(m) + 2 * width, logits + r * vocab, (size_t)(4 * vocab));
    }
    release(taken);
}

/* A session whose rows were run one by one. */
typedef struct {
    Cache cache;
    float *inputs, *outputs; /* (CAPACITY, …) */
} Session;

static Session run_alone(const Model *m) {
    const int64_t width = m->sizes.hidden;
    Session s = {rewound(m, NULL, 0), take_floats(CAPACITY * width, 0, 2), take(4 * CAPACITY * output_size(m), 4)};
    for (int64_t i = 0; i < CAPACITY; i++) {
        const BatchEntry entry = entry_of(m, &s.cache, i, 0, 1);
        run(m, &entry, 1, s.inputs + i * width, 1, s.outputs + i * output_size(m));
    }
    for (int64_t i = 0; i < CAPACITY * output_size(m); i++) CHECK(isfinite(s.outputs[i]));
    return s;
}

/* Runs a random batch of one session's rows and compares every bit with the rows alone. */
static void try_batch(const Model *m, const Session *s, int64_t n_entries, int64_t max_rows) {
    BatchEntry entries[MAX_SESSIONS];
    Cache caches[MAX_SESSIONS], before[MAX_SESSIONS];
    const int64_t width = m->sizes.hidden, size = output_size(m);
    const int taken = n_blocks;
    int64_t n = 0;
    for (int64_t i = 0; i < n_entries; n += entries[i++].n_rows) {
        const int64_t rows = 1 + random_below(max_rows), start = random_below(4) ? random_below(CAPACITY - rows + 1) : CAPACITY - rows;
        const int64_t run_length = random_below(3) ? 0 : 1 + random_below(rows);
        caches[i] = rewound(m, &s->cache, start + (run_length ? (rows - 1) / run_length * run_length : 0));
        if (run_length) before[i] = rewound(m, &caches[i], CAPACITY);
        entries[i] = entry_of(m, caches + i, start, run_length, rows);
    }
    float *inputs = take(4 * n * width, 4), *outputs = take(4 * n * size, 4);
    for (int64_t i = 0, row = 0; i < n_entries; row += entries[i++].n_rows)
        memcpy(inputs + row * width, s->inputs + entries[i].position * width, (size_t)(4 * entries[i].n_rows * width));
    run(m, entries, n_entries, inputs, n, outputs);
    for (int64_t i = 0, row = 0; i < n_entries; row += entries[i++].n_rows) {
        const BatchEntry *e = entries + i;
        CHECK(!memcmp(outputs + row * size, s->outputs + e->position * size, (size_t)(4 * e->n_rows * size)));
        if (e->run_length) CHECK(same_cache(m, caches + i, before + i, CAPACITY));
        else CHECK(same_cache(m, caches + i, &s->cache, e->position + e->n_rows));
    }
    release(taken);
}

/* ---- modes ---- */

static const int64_t MOST_ROWS[] = {1, 2, 5, 8, 9, 17, 33, CAPACITY};
enum { N_MOST_ROWS = sizeof MOST_ROWS / sizeof *MOST_ROWS };

static Sizes sizes_of(int64_t index) { return index < N_NAMED ? NAMED[index] : random_sizes(); }

static void exact(uint64_t seed, int64_t cases) {
    for (int64_t i = 0; i < cases; i++) {
        seed_with(seed + (uint64_t)i);
        pool_set_threads(1);
        Model m = random_model(sizes_of(i));
        choose_sublayers(&m, i < N_NAMED);
        const Session s = run_alone(&m);
        for (int j = 0; j < 2 * N_MOST_ROWS; j++) {
            pool_set_threads(1 + (int)random_below(4));
            try_batch(&m, &s, 1 + random_below(MAX_SESSIONS), MOST_ROWS[j / 2]);
        }
        release(0);
    }
}

/* Rows over one session's keys, for attention by itself: all in the cache, or those from `position` on apart. */
static void outer(uint64_t seed, int64_t cases) {
    for (int64_t i = 0; i < cases; i++) {
        seed_with(seed + (uint64_t)i);
        const int64_t size = knn_ssd_lanes() * (1 + random_below(3)), kv_heads = 1 + random_below(3);
        const int64_t heads = kv_heads * (1 + random_below(5)), n = 1 + random_below(12), capacity = 1 + random_below(60);
        const int64_t position = random_below(capacity), n_new = capacity - position, kept = 4 * position * size;
        float *sinks = take_floats(heads, 0, 1), *queries = take_floats(n * heads * size, 0, 1);
        const OuterAttention a = {0.3, random_below(2) ? 2 : 0, random_below(2) ? sinks : NULL, heads, kv_heads, size};
        float *kv[2][3]; /* keys and values: all, those before `position`, those from there on */
        for (int j = 0; j < 2; j++) {
            kv[j][0] = take_floats(kv_heads * capacity * size, 0, 1);
            kv[j][1] = take_floats(kv_heads * capacity * size, NAN, 1);
            kv[j][2] = take(4 * kv_heads * n_new * size, 4);
            for (int64_t h = 0; h < kv_heads; h++) {
                const float *all = kv[j][0] + h * capacity * size;
                memcpy(kv[j][1] + h * capacity * size, all, (size_t)kept);
                memcpy(kv[j][2] + h * n_new * size, all + position * size, (size_t)(4 * n_new * size));
            }
        }
        const OuterCache caches[2] = {{kv[0][0], kv[1][0], NULL, NULL, capacity, position, 0},
                                      {kv[0][1], kv[1][1], kv[0][2], kv[1][2], capacity, position, n_new}};
        float *alone = take(4 * n * heads * size, 4), *together = take(4 * n * heads * size, 4);
        VisibleKeys *rows = take((int64_t)sizeof *rows * n, 8);
        pool_set_threads(1);
        for (int64_t r = 0; r < n; r++) {
            const int64_t end = 1 + random_below(capacity), first = random_below(end), offset = r * heads * size;
            rows[r] = (VisibleKeys){0, first, end, end};
            CHECK(knn_ssd_attend(&a, caches, 1, rows + r, 1, queries + offset, alone + offset) == SUCCESS);
            rows[r].cache = random_below(2);
            if (rows[r].cache) rows[r].split = position < first ? first : position < end ? position : end;
        }
        for (int64_t v = 0; v < n * heads * size; v++) CHECK(isfinite(alone[v]));
        pool_set_threads(1 + (int)random_below(4));
        CHECK(knn_ssd_attend(&a, caches, 2, rows, n, queries, together) == SUCCESS);
        CHECK(!memcmp(alone, together, (size_t)(4 * n * heads * size)));
        rows[n - 1].end = capacity + 1;
        CHECK(knn_ssd_attend(&a, caches, 2, rows, n, queries, together) == INVALID_SIZES);
        release(0);
    }
}

typedef struct {
    pthread_t thread;
    const Model *model;
    const Session *session;
    uint64_t seed;
} Caller;

static void *call(void *given) {
    const Caller *c = given;
    seed_with(c->seed);
    for (int i = 0; i < 12; i++) try_batch(c->model, c->session, 1 + random_below(2), 9);
    return NULL;
}

static void callers(uint64_t seed, int64_t cases) {
    for (int64_t i = 0; i < cases; i++) {
        seed_with(seed + (uint64_t)i);
        pool_set_threads(3);
        Model m = random_model(sizes_of(i));
        choose_sublayers(&m, 1);
        const Session s = run_alone(&m);
        Caller each[CALLERS];
        for (int j = 0; j < CALLERS; j++) {
            each[j] = (Caller){.model = &m, .session = &s, .seed = random_bits()};
            CHECK(!pthread_create(&each[j].thread, NULL, call, each + j));
        }
        for (int j = 0; j < 8; j++) {
            const int taken = n_blocks;
            const Matrix source = float_matrix(40, 96, BFLOAT16), packed = in_blocks(&source, BFLOAT16_PACKED);
            quantised(&packed);
            pool_set_threads(1 + j % 4);
            release(taken);
        }
        for (int j = 0; j < CALLERS; j++) CHECK(!pthread_join(each[j].thread, NULL));
        release(0);
    }
}

static float bfloat16(uint16_t bits) {
    const uint32_t word = (uint32_t)bits << 16;
    float result;
    memcpy(&result, &word, 4);
    return result;
}

static float weight_of(const Matrix *m, int64_t i) {
    return m->kind == BFLOAT16 ? bfloat16(((const uint16_t *)m->data)[i]) : ((const float *)m->data)[i];
}

/* Weight (row, col) of a 4-bit matrix, by the layout that kernels.h and store_group describe. */
static float decoded(const Matrix *m, int64_t row, int64_t col) {
    const int64_t lanes = knn_ssd_lanes(), groups = (m->cols + GROUP - 1) / GROUP, lane = row % lanes, i = col % (GROUP / 2);
    const int64_t index = row / lanes * groups + col / GROUP;
    const uint8_t byte = ((const uint8_t *)m->data)[((index * (GROUP / 8) + i / 4) * lanes + lane) * 4 + i % 4];
    const uint16_t *scale = m->scales + (index * lanes + lane) * 2;
    return (float)(col % GROUP < GROUP / 2 ? byte & 15 : byte >> 4) * bfloat16(scale[0]) + bfloat16(scale[1]);
}

/* A matrix in blocks has the bits of its source. */
static void check_rows(const Matrix *source, const Matrix *stored) {
    const int taken = n_blocks;
    int64_t *rows = take(8 * source->rows, 8);
    for (int64_t r = 0; r < source->rows; r++) rows[r] = source->rows - 1 - r;
    float *values = take(4 * source->rows * source->cols, 4);
    CHECK(knn_ssd_read_rows(stored, rows, source->rows, values) == SUCCESS);
    for (int64_t r = 0; r < source->rows; r++)
        for (int64_t c = 0; c < source->cols; c++)
            CHECK(values[r * source->cols + c] == weight_of(source, rows[r] * source->cols + c));
    rows[0] = source->rows;
    CHECK(knn_ssd_read_rows(stored, rows, 1, values) == INVALID_SIZES);
    release(taken);
}

static const int64_t GGUF_KINDS[][2] = {
    {FLOAT16, FLOAT16_BLOCKS}, {Q8_0, Q8_0_BLOCKS}, {Q6_K, Q6_K_BLOCKS},
    {Q5_0, Q5_0_BLOCKS},       {Q4_K, Q4_K_BLOCKS}, {Q4_0, Q4_0_BLOCKS}};
enum { N_GGUF_KINDS = sizeof GGUF_KINDS / sizeof *GGUF_KINDS };

/* A float16 matrix, or rows of a GGUF file's blocks: random bits, with scales below 2. */
static Matrix gguf_matrix(int64_t rows, int64_t cols, int64_t kind) {
    const int64_t bytes = (int64_t[]){[FLOAT16] = 2, [Q8_0] = 34, [Q6_K] = 210, [Q5_0] = 22, [Q4_K] = 144, [Q4_0] = 18}[kind];
    const int64_t width = kind == FLOAT16 ? 1 : kind == Q6_K || kind == Q4_K ? 256 : 32, count = rows * cols / width;
    uint8_t *data = take(count * bytes, 2);
    for (int64_t i = 0; i < count * bytes; i++) data[i] = (uint8_t)random_below(256);
    for (int64_t i = 0; i < count; i++) {
        uint8_t *scale = data + i * bytes + (kind == Q6_K ? 208 : 0);
        scale[1] &= 0xbf; /* the upper bit of the exponent */
        if (kind == Q4_K) scale[3] &= 0xbf;
    }
    return (Matrix){.data = data, .rows = rows, .cols = cols, .kind = kind};
}

/* The values of a matrix in blocks, row-major. */
static Matrix read_all(const Matrix *m) {
    int64_t *rows = take(8 * m->rows, 8);
    for (int64_t r = 0; r < m->rows; r++) rows[r] = r;
    float *values = take(4 * m->rows * m->cols, 4);
    CHECK(knn_ssd_read_rows(m, rows, m->rows, values) == SUCCESS);
    return (Matrix){.data = values, .rows = m->rows, .cols = m->cols, .kind = FLOAT32};
}

/* What a GGUF file's blocks give has the bits of their values in float32. */
static void check_gguf(void) {
    for (int kind = 0; kind < N_GGUF_KINDS; kind++) {
        const Matrix source = gguf_matrix(1 + random_below(70), 256 * (1 + random_below(4)), GGUF_KINDS[kind][0]);
        const Matrix stored = in_blocks(&source, GGUF_KINDS[kind][1]), floats = read_all(&stored);
        const Matrix wide = in_blocks(&floats, FLOAT32_BLOCKS);
        const int64_t n = 1 + random_below(30), size = 4 * n * source.rows;
        const float *x = take_floats(n * source.cols, -0.5f, 1);
        float *y[2] = {take(size, 4), take(size, 4)};
        CHECK(knn_ssd_linear(&stored, x, n, y[0]) == SUCCESS && knn_ssd_linear(&wide, x, n, y[1]) == SUCCESS);
        CHECK(!memcmp(y[0], y[1], (size_t)size));
        Matrix wrong = source;
        wrong.cols -= 16;
        CHECK(source.kind == FLOAT16 || knn_ssd_pack(&wrong, GGUF_KINDS[kind][1], NULL, y[0], NULL) == INVALID_SIZES);
        wrong.kind = FLOAT32;
        CHECK(knn_ssd_pack(&wrong, GGUF_KINDS[kind][1], NULL, y[0], NULL) == INVALID_SIZES);
        CHECK(knn_ssd_quantise(&source, x, 1, 0, source.rows, NULL, NULL) == INVALID_SIZES);
        release(0);
    }
}

static void quantise(uint64_t seed, int64_t cases) {
    for (int64_t i = 0; i < cases; i++) {
        seed_with(seed + (uint64_t)i);
        check_gguf();
        Matrix source, copy[2] = {{0}};
        for (int j = 0; j < 2; j++) {
            seed_with(seed + (uint64_t)i);
            pool_set_threads(j ? 4 : 1);
            source = float_matrix(1 + random_below(90), 32 * (1 + random_below(9)), random_below(2) ? BFLOAT16 : FLOAT32);
            const int64_t kind = source.kind == FLOAT32 ? FLOAT32_BLOCKS : BFLOAT16_BLOCKS + random_below(2);
            const Matrix stored = in_blocks(&source, kind); /* quantised first row-major, then from its blocks */
            check_rows(&source, &stored);
            copy[j] = j ? quantised_in_parts(&stored, block_rows()) : quantised(&source);
        }
        const int64_t bytes = padded_rows(source.rows) * ((source.cols + GROUP - 1) / GROUP) * (GROUP / 2);
        CHECK(!memcmp(copy[0].data, copy[1].data, (size_t)bytes));
        CHECK(!memcmp(copy[0].scales, copy[1].scales, (size_t)(bytes / 8)));
        const float range = 4 / sqrtf((float)source.cols); /* of all weights */
        for (int64_t r = 0; r < source.rows; r++)
            for (int64_t c = 0; c < source.cols; c++)
                CHECK(fabsf(decoded(copy, r, c) - weight_of(&source, r * source.cols + c)) < 0.08f * range);
        release(0);
    }
}

/* Tries a forward pass of a model of which one number is changed for its time. */
#define REFUSES(number, wrong)                                                                                         \
    do {                                                                                                               \
        const int64_t right = (number);                                                                                \
        (number) = (wrong);                                                                                            \
        CHECK(knn_ssd_forward(m.attention_of, m.mlp_of, LAYERS, &entry, 1, x) == INVALID_SIZES);                       \
        (number) = right;                                                                                              \
        CHECK(knn_ssd_forward(m.attention_of, m.mlp_of, LAYERS, &entry, 1, x) == SUCCESS);                             \
    } while (0)

static void contract(uint64_t seed) {
    seed_with(seed);
    Model m = random_model(NAMED[3]);
    choose_sublayers(&m, 1);
    const Cache cache = rewound(&m, NULL, 0);
    BatchEntry entry = entry_of(&m, &cache, CAPACITY - 2, 0, 2);
    float *x = take_floats(2 * m.sizes.hidden, 0, 1), *logits = take(4 * m.sizes.vocab, 4);
    REFUSES(entry.n_rows, 3);
    REFUSES(entry.n_rows, -1);
    REFUSES(entry.position, CAPACITY - 1);
    REFUSES(entry.position, -1);
    REFUSES(entry.position, INT64_MAX);
    REFUSES(entry.capacity, CAPACITY - 1);
    REFUSES(entry.run_length, -1);
    REFUSES(entry.kv_kind, INT4);
    REFUSES(m.attentions[1].head_dim, 63);
    REFUSES(m.attentions[1].kv_heads, 3);
    REFUSES(m.attentions[0].heads, 0);
    REFUSES(m.attentions[0].rotary_dim, 66);
    REFUSES(m.attentions[0].rotary_dim, 63);
    REFUSES(m.attentions[0].window, -1);
    REFUSES(m.attentions[0].q.cols, 98);
    REFUSES(m.attentions[0].q.cols, 128);
    REFUSES(m.attentions[0].k.rows, 63);
    REFUSES(m.attentions[0].v.kind, 6);
    REFUSES(m.attentions[0].v.kind, FLOAT32);
    REFUSES(m.attentions[0].v.kind, BFLOAT16_PACKED); /* without its tables */
    REFUSES(m.attentions[0].o.rows, 128);
    REFUSES(m.mlps[0].gate.cols, 128);
    REFUSES(m.mlps[0].up.rows, 161);
    REFUSES(m.mlps[1].down.cols, 0);
    const Matrix source = float_matrix(2, 60, FLOAT32);
    CHECK(knn_ssd_quantise(&source, logits, 1, 0, 2, NULL, NULL) == INVALID_SIZES);
    const Matrix whole = float_matrix(3 * block_rows() - 1, 64, FLOAT32);
    const int64_t ranges[][2] = {{0, 0}, {-block_rows(), 1}, {0, 3 * block_rows()}, {1, block_rows()}, {0, 1}};
    for (int i = 0; i < 5; i++)
        CHECK(knn_ssd_quantise(&whole, logits, 1, ranges[i][0], ranges[i][1], NULL, NULL) == INVALID_SIZES);
    CHECK(knn_ssd_lm_head(&source, m.norm, 1e-5, x, 1, (int64_t[]){0}, 1, x, logits) == INVALID_SIZES);
    CHECK(knn_ssd_linear(&source, x, 1, logits) == INVALID_SIZES);
    CHECK(knn_ssd_linear(&m.head, x, -1, logits) == INVALID_SIZES);
    CHECK(knn_ssd_linear(&m.head, x, 0, NULL) == SUCCESS);
    CHECK(knn_ssd_linear(&m.head, x, 1, logits) == SUCCESS);
    for (int64_t wrong = -1; wrong < 2; wrong += 2)
        CHECK(knn_ssd_lm_head(&m.head, m.norm, 1e-5, x, 1, &wrong, 1, x, logits) == INVALID_SIZES);
    CHECK(knn_ssd_lm_head(&m.head, m.norm, 1e-5, x, 1, (int64_t[]){0}, 1, x, logits) == SUCCESS);
    release(0);
}

static void dump(uint64_t seed) {
    pool_set_threads(2);
    for (int64_t i = 0; i < N_NAMED; i++) {
        seed_with(seed + (uint64_t)i);
        Model m = random_model(NAMED[i]);
        choose_sublayers(&m, 1);
        const Session s = run_alone(&m);
        const size_t count = (size_t)(CAPACITY * output_size(&m));
        CHECK(fwrite(s.outputs, 4, count, stdout) == count);
        release(0);
    }
    for (int kind = 0; kind < N_GGUF_KINDS; kind++) {
        const Matrix source = gguf_matrix(100, 512, GGUF_KINDS[kind][0]), stored = in_blocks(&source, GGUF_KINDS[kind][1]);
        CHECK(fwrite(read_all(&stored).data, 4, 100 * 512, stdout) == 100 * 512);
        release(0);
    }
}

static void compare(const char *first, const char *second, double tolerance) {
    FILE *files[2] = {fopen(first, "rb"), fopen(second, "rb")};
    CHECK(files[0] && files[1]);
    int64_t count = 0, different = 0;
    double largest = 0;
    for (float pair[2]; fread(pair, 4, 1, files[0]) == 1; count++) {
        CHECK(fread(pair + 1, 4, 1, files[1]) == 1);
        different += pair[0] != pair[1];
        largest = fmax(largest, fabs((double)pair[0] - pair[1]) / fmax(1, fabs(pair[0])));
    }
    CHECK(count && fgetc(files[1]) == EOF);
    for (int i = 0; i < 2; i++) fclose(files[i]);
    fprintf(stderr, "%lld of %lld outputs differ, by at most %.1e\n", (long long)different, (long long)count, largest);
    CHECK(largest <= tolerance);
}

int main(int argc, char **argv) {
    CHECK(argc > 1);
    const uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 0;
    const int64_t cases = argc > 3 ? atoll(argv[3]) : N_NAMED;
    knn_ssd_enable_tiles(1);
    knn_ssd_enable_rounding(1);
    if (!strcmp(argv[1], "exact")) exact(seed, cases);
    else if (!strcmp(argv[1], "outer")) outer(seed, cases);
    else if (!strcmp(argv[1], "callers")) callers(seed, cases);
    else if (!strcmp(argv[1], "quantise")) quantise(seed, cases);
    else if (!strcmp(argv[1], "contract")) contract(seed);
    else if (!strcmp(argv[1], "dump")) dump(seed);
    else if (!strcmp(argv[1], "compare") && argc == 5) compare(argv[2], argv[3], atof(argv[4]));
    else CHECK(!"a known mode");
    pool_shutdown();
    return 0;
}
