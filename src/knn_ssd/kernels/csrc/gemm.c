/* Float32 and bfloat16 matrices, and the linear layer, which gives each matrix to the kernels of its kind. */
#include "gemm.h"

#include "scratch.h"
#include "thread_pool.h"

#define PREFETCH_ROWS 32 /* matrix rows that are prefetched ahead */

/* Copies a row into its panel of n_rows rows. A bfloat16 kernel reads, of every K_STEP columns, the even ones first. */
static void pack_row(const float *x, float *panel, int64_t cols, int64_t n_rows, int even_first) {
    for (int64_t c = 0; c < cols; c += K_STEP, panel += n_rows * K_STEP)
        for (int i = 0; i < LANES; i++) {
            panel[i] = x[c + (even_first ? 2 * i : i)];
            panel[LANES + i] = x[c + (even_first ? 2 * i + 1 : LANES + i)];
        }
}

typedef struct {
    const float *x;
    int64_t n, cols, groups;
    int even_first;
    PackedInputs in;
} Packing;

/* Packs the rows of panels `first` .. `last` - 1. */
static void pack_panels(void *context, int64_t first, int64_t last, int thread) {
    const Packing *p = context;
    const int64_t cols = p->cols, groups = p->groups;
    (void)thread;
    for (int64_t start = first * MAX_ROWS; start < min_int(last * MAX_ROWS, p->n); start += MAX_ROWS) {
        const int64_t n_rows = min_int(p->n - start, MAX_ROWS);
        for (int64_t r = start; r < start + n_rows; r++) {
            if (p->in.panels)
                pack_row(p->x + r * cols, p->in.panels + start * cols + (r - start) * K_STEP, cols, n_rows, p->even_first);
            if (p->in.int8)
                int4_pack_row(p->x + r * cols, cols, p->in.int8 + r * groups * GROUP_SIZE, p->in.int8_scales + r * groups,
                              p->in.int8_sums + r * groups);
        }
    }
}

/* Packs x (n, cols) for the kernels of `kinds`, a set of bits 1 << kind. */
static PackedInputs pack_inputs(const float *x, int64_t n, const Matrix *m, int kinds) {
    PackedInputs in = {0};
    const int64_t cols = m->cols, groups = num_groups(m);
    if (amx_enabled() && kinds & 1 << BFLOAT16) {
        in.hi_lo = scratch_take(amx_packed_rows(n), cols * 4);
        kinds &= ~(1 << BFLOAT16);
        if (in.hi_lo) amx_pack_inputs(x, n, cols, in.hi_lo);
    }
    if (kinds & ~(1 << INT4)) in.panels = scratch_take(n, cols * sizeof *in.panels);
    if (kinds & 1 << INT4) {
        in.int8 = scratch_take(n, groups * GROUP_SIZE);
        in.int8_scales = scratch_take(n, groups * sizeof *in.int8_scales);
        in.int8_sums = scratch_take(n, groups * sizeof *in.int8_sums);
    }
    if (!kinds || scratch_failed()) return in;
    Packing packing = {x, n, cols, groups, kinds & 1 << BFLOAT16, in};
    const int64_t panels = ceil_div(n, MAX_ROWS);
    parallel_for(panels, n * cols > 8192 ? 1 : panels, pack_panels, &packing);
    return in;
}

/* Adds to sums (MR, NR) the products of MR matrix rows with NR input rows, over `steps` steps of K_STEP columns. */
INLINE void micro_kernel(const char *data, int kind, int64_t cols, int64_t steps, const float *x, Floats *sums, const int MR,
                         const int NR) {
    Floats sum[4][MAX_ROWS];
    const int64_t size = kind == BFLOAT16 ? 2 : 4;
#pragma GCC unroll 4
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
        for (int r = 0; r < NR; r++) sum[i][r] = sums[i * NR + r];
    for (int64_t s = 0; s < steps; s++, data += K_STEP * size, x += NR * K_STEP) {
        Floats first[4], second[4];
#pragma GCC unroll 4
        for (int i = 0; i < MR; i++) {
            const char *weights = data + i * cols * size;
            __builtin_prefetch(weights + PREFETCH_ROWS * cols * size, 0, 2); /* into the L2 cache */
            if (kind == BFLOAT16) {
                Uints pairs = load_uints(weights);
                first[i] = (Floats)(pairs << 16);
                second[i] = (Floats)(pairs & 0xffff0000u);
            } else {
                first[i] = load((const float *)weights);
                second[i] = load((const float *)weights + LANES);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < NR; r++)
#pragma GCC unroll 4
            for (int i = 0; i < MR; i++) {
                sum[i][r] = fmadd(first[i], load(x + r * K_STEP), sum[i][r]);
                sum[i][r] = fmadd(second[i], load(x + r * K_STEP + LANES), sum[i][r]);
            }
    }
#pragma GCC unroll 4
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
        for (int r = 0; r < NR; r++) sums[i * NR + r] = sum[i][r];
}

/* The same for `count` matrix rows, MR of them at once. */
#define KERNEL(kind, MR, NR)                                                                                         \
    static void kernel_##kind##_##NR(const char *data, int64_t cols, int64_t steps, int64_t count, const float *x,   \
                                     Floats *sums) {                                                                 \
        int64_t i = 0, size = cols * (kind == BFLOAT16 ? 2 : 4);                                                     \
        for (; i + MR <= count; i += MR)                                                                             \
            micro_kernel(data + i * size, kind, cols, steps, x, sums + i * NR, MR, NR);                              \
        for (; i < count; i++) micro_kernel(data + i * size, kind, cols, steps, x, sums + i * NR, 1, NR);            \
    }
#define KERNELS(kind)                                                                                                \
    KERNEL(kind, 4, 1) KERNEL(kind, 4, 2) KERNEL(kind, 2, 3) KERNEL(kind, 2, 4)                                      \
    KERNEL(kind, 2, 5) KERNEL(kind, 2, 6) KERNEL(kind, 1, 7) KERNEL(kind, 1, 8)
#define KERNEL_TABLE(kind)                                                                                           \
    {kernel_##kind##_1, kernel_##kind##_2, kernel_##kind##_3, kernel_##kind##_4,                                     \
     kernel_##kind##_5, kernel_##kind##_6, kernel_##kind##_7, kernel_##kind##_8}
KERNELS(FLOAT32)
KERNELS(BFLOAT16)

typedef void (*Kernel)(const char *, int64_t, int64_t, int64_t, const float *, Floats *);
static const Kernel KERNEL_OF[2][MAX_ROWS] = {KERNEL_TABLE(FLOAT32), KERNEL_TABLE(BFLOAT16)}; /* by kind and n_rows - 1 */

static void float_gemm(const Matrix *m, int64_t first, int64_t count, const float *panels, int64_t n, float *y) {
    const int64_t cols = m->cols, size = m->kind == BFLOAT16 ? 2 : 4;
    const char *data = (const char *)m->data + first * cols * size;
    for (int64_t r = 0; r < n; r += MAX_ROWS) {
        const int64_t n_rows = min_int(n - r, MAX_ROWS);
        Floats sums[MC * MAX_ROWS] = {0};
        for (int64_t c = 0; c < cols; c += KC)
            KERNEL_OF[m->kind][n_rows - 1](data + c * size, cols, min_int(cols - c, KC) / K_STEP, count,
                                           panels + r * cols + c * n_rows, sums);
        for (int64_t i = 0; i < count; i++)
            for (int64_t j = 0; j < n_rows; j++) y[(r + j) * m->rows + first + i] = horizontal_sum(sums[i * n_rows + j]);
    }
}

/* y = `count` matrix rows from `first` on, at most MC, applied to n input rows. */
static void gemm(const Matrix *m, int64_t first, int64_t count, const PackedInputs *in, int64_t n, TileShape *shape,
                 int is_cold, float *y) {
    if (m->kind == INT4) int4_gemm(m, first, count, in, n, y);
    else if (m->kind == BFLOAT16 && in->hi_lo) amx_gemm(m, first, count, in->hi_lo, n, shape, is_cold, y);
    else float_gemm(m, first, count, in->panels, n, y);
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
