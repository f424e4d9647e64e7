/* The linear layer: packs its inputs, and gives each matrix to the kernels of its kind. */
#include "gemm.h"

#include "scratch.h"
#include "thread_pool.h"

static int rounding;
static _Thread_local int keeps_float32;

void knn_ssd_enable_rounding(int64_t wanted) { rounding = wanted && HAS_PAIR_PRODUCTS; }
void knn_ssd_keep_float32(int64_t wanted) { keeps_float32 = wanted != 0; }
int64_t knn_ssd_rounds_inputs(void) { return rounding && !keeps_float32; }

/* Copies a row of inputs into its panel of n_rows rows. */
static void pack_row(const float *x, float *panel, int64_t cols, int64_t n_rows) {
    for (int64_t c = 0; c < cols; c++) panel[c * n_rows] = x[c];
}

/* The same, rounded to pairs of bfloat16. */
static void pack_pairs(const float *x, uint32_t *panel, int64_t cols, int64_t n_rows) {
#if HAS_PAIR_PRODUCTS
    for (int64_t c = 0; c < cols; c += K_STEP, panel += LANES * n_rows) {
        const __m512bh rounded = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + c + LANES), _mm512_loadu_ps(x + c));
        uint32_t pairs[LANES];
        memcpy(pairs, &rounded, sizeof pairs);
        for (int i = 0; i < LANES; i++) panel[i * n_rows] = pairs[i];
    }
#else
    (void)x, (void)panel, (void)cols, (void)n_rows;
#endif
}

typedef struct {
    const float *x;
    int64_t n, height, cols, groups;
    float *panels;
    uint32_t *pairs;
    PackedInputs in;
} Packing;

/* Packs the rows of panels `first` .. `last` - 1. */
static void pack_panels(void *context, int64_t first, int64_t last, int thread) {
    const Packing *p = context;
    const int64_t cols = p->cols, groups = p->groups;
    (void)thread;
    for (int64_t start = first * p->height; start < min_int(last * p->height, p->n); start += p->height) {
        const int64_t n_rows = min_int(p->n - start, p->height);
        for (int64_t r = start; r < start + n_rows; r++) {
            if (p->panels) pack_row(p->x + r * cols, p->panels + start * cols + r - start, cols, n_rows);
            if (p->pairs) pack_pairs(p->x + r * cols, p->pairs + start * cols / 2 + r - start, cols, n_rows);
            if (p->in.int8)
                int4_pack_row(p->x + r * cols, cols, p->in.int8 + r * groups * GROUP_SIZE, p->in.int8_scales + r * groups,
                              p->in.int8_sums + r * groups);
        }
    }
}

/* Packs x (n, cols) for the kernels of `kinds`, a set of bits 1 << kind. */
static PackedInputs pack_inputs(const float *x, int64_t n, const Matrix *m, int kinds) {
    PackedInputs in = {0};
    float *panels = NULL;
    uint32_t *pairs = NULL;
    const int64_t cols = m->cols, groups = num_groups(m);
    if (kinds & 1 << BFLOAT16) {
        in.hi_lo = scratch_take(amx_packed_rows(n), cols * 4);
        if (in.hi_lo) amx_pack_inputs(x, n, cols, in.hi_lo);
    }
    const int in_pairs = knn_ssd_rounds_inputs() ? kinds & (1 << BFLOAT16_BLOCKS | 1 << BFLOAT16_PACKED) : 0;
    const int has_blocks = (kinds & ~(1 << INT4 | 1 << BFLOAT16 | in_pairs)) != 0;
    if (in_pairs) in.pairs = pairs = scratch_take(n, cols * 2);
    if (has_blocks && n > 1) panels = scratch_take(n, cols * sizeof *panels);
    if (has_blocks) in.panels = n > 1 ? panels : x;
    if (kinds & 1 << INT4) {
        in.int8 = scratch_take(n, groups * GROUP_SIZE);
        in.int8_scales = scratch_take(n, groups * sizeof *in.int8_scales);
        in.int8_sums = scratch_take(n, groups * sizeof *in.int8_sums);
    }
    if ((!panels && !pairs && !in.int8) || scratch_failed()) return in;
    const int64_t height = panel_height(n), count = ceil_div(n, height);
    Packing packing = {x, n, height, cols, groups, panels, pairs, in};
    parallel_for(count, n * cols > 8192 ? 1 : count, pack_panels, &packing);
    return in;
}

/* y = `count` matrix rows from `first` on, at most MC, applied to n input rows. */
static void gemm(const Matrix *m, int64_t first, int64_t count, const PackedInputs *in, int64_t n, TileShape *shape,
                 int is_cold, float *y) {
    if (m->kind == INT4) int4_gemm(m, first, count, in, n, y);
    else if (m->kind == BFLOAT16) amx_gemm(m, first, count, in->hi_lo, n, shape, is_cold, y);
    else block_gemm(m, first, count, in, n, y);
    for (int64_t r = 0; m->bias && r < n; r++)
        for (int64_t i = first; i < first + count; i++) y[r * m->rows + i] += m->bias[i];
}

typedef struct {
    const Matrix *const *matrices;
    int64_t starts[4]; /* each matrix's first item of work, of MC rows */
    const PackedInputs *in;
    int64_t n;
    float *const *y;
    int64_t next[POOL_MAX_THREADS]; /* the item after each thread's last one, whose first rows are prefetched */
} Products;

static void run_products(void *context, int64_t first, int64_t last, int thread) {
    Products *p = context;
    TileShape shape = {0};
    for (int64_t item = first; item < last; item++) {
        int j = 0;
        while (item >= p->starts[j + 1]) j++;
        const Matrix *m = p->matrices[j];
        const int64_t row = (item - p->starts[j]) * MC;
        gemm(m, row, min_int(m->rows - row, MC), p->in, p->n, &shape, item != p->next[thread] || !row, p->y[j]);
        p->next[thread] = item + 1;
    }
    amx_release(&shape);
}

int linear(const Matrix *const *matrices, int count, const float *x, int64_t n, float *const *y) {
    int kinds = 0;
    Products products = {.matrices = matrices, .n = n, .y = y};
    for (int j = 0; j < count; j++) {
        kinds |= 1 << matrices[j]->kind;
        products.starts[j + 1] = products.starts[j] + ceil_div(matrices[j]->rows, MC);
    }
    const int64_t cols = matrices[0]->cols;
    float *squares = matrices[0]->input_squares;
    for (int64_t r = 0; squares && r < n; r++)
        for (int64_t c = 0; c < cols; c++) squares[c] += x[r * cols + c] * x[r * cols + c];
    const PackedInputs in = pack_inputs(x, n, matrices[0], kinds);
    if (scratch_failed()) return OUT_OF_MEMORY;
    products.in = &in;
    for (int i = 0; i < pool_threads(); i++) products.next[i] = -1;
    parallel_for(products.starts[count], 1, run_products, &products);
    return SUCCESS;
}
