/* Matrices in blocks, multiplied with float32 inputs. A row's products are summed in the order of the columns, and
 * the sums of KC columns are then added up. */
#include "blocks.h"
#include "gemm.h"

#define KC 512              /* columns that are summed at once */
#define MAX_PANELS 8        /* of inputs that are multiplied with weights while they are in the cache */
#define PREFETCH_BYTES 8192 /* of the matrix that are prefetched ahead */

/* The weights of column i of half a unit, whose pairs are given if it has some. */
INLINE Floats column(const uint8_t *half, const Uints *pairs, const int kind, const int i) {
    if (kind == FLOAT32_BLOCKS) return load((const float *)(const void *)half + i * LANES);
    if (kind == FLOAT16_BLOCKS) return load_float16(half + 2 * LANES * i);
    return (Floats)(i % 2 ? pairs[i / 2] & 0xffff0000u : pairs[i / 2] << 16);
}

/* Adds to sum (2, PANEL_ROWS) the products of a column's two vectors of weights with NR inputs. */
INLINE void add_products(Floats sum[2][PANEL_ROWS], const Floats weights[2], const float *x, const int NR) {
#pragma GCC unroll 12
    for (int r = 0; r < NR; r++)
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) sum[h][r] = fmadd(weights[h], splat(x[r]), sum[h][r]);
}

/* Adds the products of a unit of floats. */
INLINE void multiply_floats(const uint8_t *data, Uints table, const float *x, Floats sum[2][PANEL_ROWS], const int kind,
                            const int NR) {
    const int64_t size = unit_bytes(kind);
    Uints pairs[2][4];
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        const uint8_t *half = data + h * size / 2;
        if (kind == BFLOAT16_PACKED) unpack_pairs(half, table, pairs[h]);
#pragma GCC unroll 4
        for (int i = 0; kind == BFLOAT16_BLOCKS && i < 4; i++) pairs[h][i] = load_uints(half + 4 * LANES * i);
    }
#pragma GCC unroll 8
    for (int i = 0; i < UNIT_COLS; i++) {
        Floats weights[2];
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) weights[h] = column(data + h * size / 2, pairs[h], kind, i);
        add_products(sum, weights, x + i * NR, NR);
    }
}

/* Adds the products of a quantised unit. */
INLINE void multiply_quantised(const uint8_t *data, const float *x, Floats sum[2][PANEL_ROWS], const int kind, const int NR) {
    int8_t buffers[2][QUANTISED_COLS * LANES];
    const Quantised halves[2] = {read_quantised(data, kind, buffers[0]),
                                 read_quantised(data + unit_bytes(kind) / 2, kind, buffers[1])};
    for (int first = 0; first < QUANTISED_COLS; first += UNIT_COLS)
#pragma GCC unroll 8
        for (int i = 0; i < UNIT_COLS; i++) {
            Floats weights[2];
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) weights[h] = quantised_column(halves + h, kind, first + i);
            add_products(sum, weights, x + (first + i) * NR, NR);
        }
}

/* Adds to sums (2, NR) the products of a block's two halves with NR input rows, over `units` units. */
INLINE void micro_kernel(const uint8_t *data, const uint8_t *upper_bytes, int64_t units, const float *x, Floats *sums,
                         const int kind, const int NR) {
    const Uints table = kind == BFLOAT16_PACKED ? load_table(upper_bytes) : (Uints){0};
    const int64_t size = unit_bytes(kind);
    Floats sum[2][PANEL_ROWS];
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++)
#pragma GCC unroll 12
        for (int r = 0; r < NR; r++) sum[h][r] = sums[h * NR + r];
    for (int64_t u = 0; u < units; u++, data += size, x += unit_cols(kind) * NR) {
        for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(data + PREFETCH_BYTES + i, 0, 2);
        if (is_quantised(kind)) multiply_quantised(data, x, sum, kind, NR);
        else multiply_floats(data, table, x, sum, kind, NR);
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++)
#pragma GCC unroll 12
        for (int r = 0; r < NR; r++) sums[h * NR + r] = sum[h][r];
}

typedef void (*Kernel)(const uint8_t *, const uint8_t *, int64_t, const float *, Floats *);

#define KERNEL(kind, NR)                                                                                             \
    static void kernel_##kind##_##NR(const uint8_t *data, const uint8_t *upper_bytes, int64_t units, const float *x, \
                                     Floats *sums) {                                                                 \
        micro_kernel(data, upper_bytes, units, x, sums, kind, NR);                                                   \
    }
#define FEW_KERNELS(kind)                                                                                            \
    KERNEL(kind, 1) KERNEL(kind, 2) KERNEL(kind, 3) KERNEL(kind, 4) KERNEL(kind, 5) KERNEL(kind, 6)
#define FEW_NAMES(kind)                                                                                              \
    kernel_##kind##_1, kernel_##kind##_2, kernel_##kind##_3, kernel_##kind##_4, kernel_##kind##_5, kernel_##kind##_6
#if PANEL_ROWS == 12
#define KERNELS(kind)                                                                                                \
    FEW_KERNELS(kind)                                                                                                \
    KERNEL(kind, 7) KERNEL(kind, 8) KERNEL(kind, 9) KERNEL(kind, 10) KERNEL(kind, 11) KERNEL(kind, 12)
#define KERNEL_TABLE(kind)                                                                                           \
    {FEW_NAMES(kind),     kernel_##kind##_7,  kernel_##kind##_8, kernel_##kind##_9,                                  \
     kernel_##kind##_10, kernel_##kind##_11, kernel_##kind##_12}
#else
#define KERNELS(kind) FEW_KERNELS(kind)
#define KERNEL_TABLE(kind) {FEW_NAMES(kind)}
#endif
KERNELS(FLOAT32_BLOCKS) KERNELS(FLOAT16_BLOCKS) KERNELS(BFLOAT16_BLOCKS) KERNELS(BFLOAT16_PACKED)
KERNELS(Q8_0_BLOCKS) KERNELS(Q6_K_BLOCKS) KERNELS(Q5_0_BLOCKS) KERNELS(Q4_K_BLOCKS) KERNELS(Q4_0_BLOCKS)

/* By kind and number of rows. */
static const Kernel KERNEL_OF[][PANEL_ROWS] = {
    KERNEL_TABLE(FLOAT32_BLOCKS), KERNEL_TABLE(FLOAT16_BLOCKS), KERNEL_TABLE(BFLOAT16_BLOCKS), KERNEL_TABLE(BFLOAT16_PACKED),
    KERNEL_TABLE(Q8_0_BLOCKS),    KERNEL_TABLE(Q6_K_BLOCKS),    KERNEL_TABLE(Q5_0_BLOCKS),     KERNEL_TABLE(Q4_K_BLOCKS),
    KERNEL_TABLE(Q4_0_BLOCKS)};

INLINE Kernel kernel_of(int64_t kind, int64_t n_rows) { return KERNEL_OF[kind - FLOAT32_BLOCKS][n_rows - 1]; }

/* Units `first` .. `first` + `units` - 1 of a block. */
typedef struct {
    const Matrix *m;
    int64_t block, first, units;
} Part;

/* Adds a part's products with a panel to sums (2, n_rows). Between the escapes of a packed matrix, its units are unpacked
 * in registers. A unit with escapes is unpacked to memory, where they are put in. */
static void multiply(const Part *p, const float *x, int64_t n_rows, Floats *sums) {
    const Matrix *m = p->m;
    const uint8_t *data = unit_of(m, p->block, p->first);
    const Kernel kernel = kernel_of(m->kind, n_rows);
    const int64_t inputs = unit_cols(m->kind) * n_rows;
    Escapes escapes = escapes_from(m, p->block, p->first);
    for (int64_t unit = 0; unit < p->units; unit++) {
        const int64_t next = escapes.next < escapes.end ? min_int(p->units, escapes.next->unit - p->first) : p->units;
        const uint8_t *from = data + unit * unit_bytes(m->kind);
        if (next > unit) kernel(from, m->upper_bytes, next - unit, x + unit * inputs, sums);
        unit = next;
        if (unit == p->units) break;
        uint16_t pairs[UNIT];
        unpack_unit(data + unit * unit_bytes(m->kind), load_table(m->upper_bytes), p->first + unit, &escapes, pairs);
        kernel_of(BFLOAT16_BLOCKS, n_rows)((const uint8_t *)pairs, NULL, 1, x + unit * inputs, sums);
    }
}

/* Inputs (n, cols) in panels of `height` rows; the last one may be lower. */
typedef struct {
    const float *x;
    int64_t n, height, cols;
} Panels;

INLINE int64_t rows_of_panel(const Panels *p, int64_t panel) { return min_int(p->n - panel * p->height, p->height); }

/* Writes y (n, rows) of a block. */
static void store_totals(const Part *p, const Panels *panels, Floats (*totals)[2 * PANEL_ROWS], float *y) {
    for (int64_t i = 0; i * panels->height < panels->n; i++)
        for (int64_t h = 0; h < 2; h++)
            for (int64_t j = 0, n_rows = rows_of_panel(panels, i); j < n_rows; j++) {
                const int64_t row = p->block * BLOCK_ROWS + h * LANES, count = min_int(p->m->rows - row, LANES);
                float *out = y + (i * panels->height + j) * p->m->rows + row;
                if (count == LANES) store(out, totals[i][h * n_rows + j]);
                else if (count > 0) memcpy(out, &totals[i][h * n_rows + j], (size_t)4 * count);
            }
}

/* The products of up to MAX_PANELS panels with a block. */
static void multiply_block(Part p, const Panels *panels, float *y) {
    Floats totals[MAX_PANELS][2 * PANEL_ROWS];
    const int64_t width = unit_cols(p.m->kind);
    memset(totals, 0, ceil_div(panels->n, panels->height) * sizeof *totals);
    for (int64_t all = num_units(p.m); p.first < all; p.first += KC / width) {
        p.units = min_int(all - p.first, KC / width);
        for (int64_t i = 0; i * panels->height < panels->n; i++) {
            const int64_t n_rows = rows_of_panel(panels, i);
            Floats sums[2 * PANEL_ROWS] = {0};
            multiply(&p, panels->x + i * panels->height * panels->cols + p.first * width * n_rows, n_rows, sums);
            for (int64_t j = 0; j < 2 * n_rows; j++) totals[i][j] += sums[j];
        }
    }
    store_totals(&p, panels, totals, y);
}

void block_gemm(const Matrix *m, int64_t first, int64_t count, const float *panels, int64_t n, float *y) {
    const int64_t height = panel_height(n);
    for (int64_t row = first; row < first + count; row += BLOCK_ROWS)
        for (int64_t r = 0; r < n; r += MAX_PANELS * height) {
            const Panels some = {panels + r * m->cols, min_int(n - r, MAX_PANELS * height), height, m->cols};
            multiply_block((Part){m, row / BLOCK_ROWS, 0, 0}, &some, y + r * m->rows);
        }
}
