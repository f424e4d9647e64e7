/* Matrices in float blocks, multiplied with float32 inputs. A row's products are summed in the order of the columns, and
 * the sums of KC columns are then added up. */
#include "blocks.h"
#include "gemm.h"

#define KC 512              /* columns that are summed at once */
#define MAX_BLOCKS 2        /* that are multiplied at once */
#define MAX_PANELS 8        /* of inputs that are multiplied with weights while they are in the cache */
#define UNCONVERTED_PANELS 2 /* at most, for which weights are unpacked anew */
#define PREFETCH_BYTES 4096 /* of a block that are prefetched ahead */

/* The weights of column i of a unit, whose pairs are given unless it is of float32. */
INLINE Floats column(const uint8_t *unit, const Uints *pairs, const int kind, const int i) {
    if (kind == FLOAT32_BLOCKS) return load((const float *)(const void *)unit + i * LANES);
    return (Floats)(i % 2 ? pairs[i / 2] & 0xffff0000u : pairs[i / 2] << 16);
}

/* Adds to sums (MB, NR) the products of MB blocks, `stride` bytes apart, with NR input rows, over `units` units. */
INLINE void micro_kernel(const uint8_t *data, int64_t stride, const uint8_t *upper_bytes, int64_t units, const float *x,
                         Floats *sums, const int kind, const int MB, const int NR) {
    const Uints table = kind == BFLOAT16_PACKED ? load_table(upper_bytes) : (Uints){0};
    Floats sum[MAX_BLOCKS][PANEL_ROWS];
#pragma GCC unroll 2
    for (int b = 0; b < MB; b++)
#pragma GCC unroll 8
        for (int r = 0; r < NR; r++) sum[b][r] = sums[b * NR + r];
    for (int64_t u = 0; u < units; u++, data += unit_bytes(kind), x += UNIT_COLS * NR) {
        Uints pairs[MAX_BLOCKS][4];
#pragma GCC unroll 2
        for (int b = 0; b < MB; b++) {
            const uint8_t *unit = data + b * stride;
            for (int64_t i = 0; i < unit_bytes(kind); i += 64) __builtin_prefetch(unit + PREFETCH_BYTES + i, 0, 2);
            if (kind == BFLOAT16_PACKED) unpack_pairs(unit, table, pairs[b]);
#pragma GCC unroll 4
            for (int i = 0; kind == BFLOAT16_BLOCKS && i < 4; i++) pairs[b][i] = load_uints(unit + 4 * LANES * i);
        }
#pragma GCC unroll 8
        for (int i = 0; i < UNIT_COLS; i++) {
            Floats weights[MAX_BLOCKS];
#pragma GCC unroll 2
            for (int b = 0; b < MB; b++) weights[b] = column(data + b * stride, pairs[b], kind, i);
#pragma GCC unroll 8
            for (int r = 0; r < NR; r++)
#pragma GCC unroll 2
                for (int b = 0; b < MB; b++) sum[b][r] = fmadd(weights[b], splat(x[i * NR + r]), sum[b][r]);
        }
    }
#pragma GCC unroll 2
    for (int b = 0; b < MB; b++)
#pragma GCC unroll 8
        for (int r = 0; r < NR; r++) sums[b * NR + r] = sum[b][r];
}

typedef void (*Kernel)(const uint8_t *, int64_t, const uint8_t *, int64_t, const float *, Floats *);

#define KERNEL(kind, MB, NR)                                                                                         \
    static void kernel_##kind##_##MB##_##NR(const uint8_t *data, int64_t stride, const uint8_t *upper_bytes,         \
                                            int64_t units, const float *x, Floats *sums) {                           \
        micro_kernel(data, stride, upper_bytes, units, x, sums, kind, MB, NR);                                       \
    }
#if PANEL_ROWS == 8
#define KERNELS(kind, MB)                                                                                            \
    KERNEL(kind, MB, 1) KERNEL(kind, MB, 2) KERNEL(kind, MB, 3) KERNEL(kind, MB, 4)                                  \
    KERNEL(kind, MB, 5) KERNEL(kind, MB, 6) KERNEL(kind, MB, 7) KERNEL(kind, MB, 8)
#define KERNEL_TABLE(kind, MB)                                                                                       \
    {kernel_##kind##_##MB##_1, kernel_##kind##_##MB##_2, kernel_##kind##_##MB##_3, kernel_##kind##_##MB##_4,         \
     kernel_##kind##_##MB##_5, kernel_##kind##_##MB##_6, kernel_##kind##_##MB##_7, kernel_##kind##_##MB##_8}
#else
#define KERNELS(kind, MB)                                                                                            \
    KERNEL(kind, MB, 1) KERNEL(kind, MB, 2) KERNEL(kind, MB, 3)                                                      \
    KERNEL(kind, MB, 4) KERNEL(kind, MB, 5) KERNEL(kind, MB, 6)
#define KERNEL_TABLE(kind, MB)                                                                                       \
    {kernel_##kind##_##MB##_1, kernel_##kind##_##MB##_2, kernel_##kind##_##MB##_3,                                   \
     kernel_##kind##_##MB##_4, kernel_##kind##_##MB##_5, kernel_##kind##_##MB##_6}
#endif
KERNELS(FLOAT32_BLOCKS, 1) KERNELS(FLOAT32_BLOCKS, 2)
KERNELS(BFLOAT16_BLOCKS, 1) KERNELS(BFLOAT16_BLOCKS, 2)
KERNELS(BFLOAT16_PACKED, 1) KERNELS(BFLOAT16_PACKED, 2)

/* By kind, number of blocks and number of rows. */
static const Kernel KERNEL_OF[3][MAX_BLOCKS][PANEL_ROWS] = {
    {KERNEL_TABLE(FLOAT32_BLOCKS, 1), KERNEL_TABLE(FLOAT32_BLOCKS, 2)},
    {KERNEL_TABLE(BFLOAT16_BLOCKS, 1), KERNEL_TABLE(BFLOAT16_BLOCKS, 2)},
    {KERNEL_TABLE(BFLOAT16_PACKED, 1), KERNEL_TABLE(BFLOAT16_PACKED, 2)},
};

INLINE Kernel kernel_of(int64_t kind, int64_t n_blocks, int64_t n_rows) {
    return KERNEL_OF[kind - FLOAT32_BLOCKS][n_blocks - 1][n_rows - 1];
}

/* Units `first` .. `first` + `units` - 1 of some blocks of a matrix, from `block` on. */
typedef struct {
    const Matrix *m;
    int64_t block, n_blocks, first, units;
} Part;

/* Adds a part's products with a panel to sums (n_blocks, n_rows). Between the escapes of a packed matrix, its units are
 * unpacked in registers. A unit with escapes is unpacked to memory, where they are put in. */
static void multiply(const Part *p, const float *x, int64_t n_rows, Floats *sums) {
    const Matrix *m = p->m;
    const uint8_t *data = unit_of(m, p->block, p->first);
    const int64_t size = unit_bytes(m->kind), stride = num_units(m) * size;
    const Kernel kernel = kernel_of(m->kind, p->n_blocks, n_rows);
    if (m->kind != BFLOAT16_PACKED) {
        kernel(data, stride, NULL, p->units, x, sums);
        return;
    }
    Escapes escapes[MAX_BLOCKS];
    for (int64_t b = 0; b < p->n_blocks; b++) escapes[b] = escapes_from(m, p->block + b, p->first);
    for (int64_t unit = 0; unit < p->units; unit++) {
        int64_t next = p->units;
        for (int64_t b = 0; b < p->n_blocks; b++)
            if (escapes[b].next < escapes[b].end) next = min_int(next, escapes[b].next->unit - p->first);
        if (next > unit) kernel(data + unit * size, stride, m->upper_bytes, next - unit, x + unit * UNIT_COLS * n_rows, sums);
        unit = next;
        if (unit == p->units) break;
        uint16_t pairs[MAX_BLOCKS * UNIT];
        for (int64_t b = 0; b < p->n_blocks; b++)
            unpack_unit(data + b * stride + unit * size, load_table(m->upper_bytes), p->first + unit, escapes + b, pairs + b * UNIT);
        kernel_of(BFLOAT16_BLOCKS, p->n_blocks, n_rows)((const uint8_t *)pairs, sizeof(uint16_t) * UNIT, NULL, 1,
                                                        x + unit * UNIT_COLS * n_rows, sums);
    }
}

/* Inputs (n, cols) in panels of `height` rows; the last one may be lower. */
typedef struct {
    const float *x;
    int64_t n, height, cols;
} Panels;

INLINE int64_t rows_of_panel(const Panels *p, int64_t panel) { return min_int(p->n - panel * p->height, p->height); }

/* Adds a part's products with some panels to totals (panels, n_blocks, rows of the panel). For many panels, the part is
 * converted to float32 once. */
static void multiply_panels(const Part *p, const Panels *panels, Floats (*totals)[MAX_BLOCKS * PANEL_ROWS]) {
    float values[MAX_BLOCKS * KC * LANES] __attribute__((aligned(64)));
    const int64_t count = ceil_div(panels->n, panels->height), stride = p->units * UNIT;
    for (int64_t b = 0; count > UNCONVERTED_PANELS && b < p->n_blocks; b++)
        read_units(p->m, p->block + b, p->first, p->units, values + b * stride);
    for (int64_t i = 0; i < count; i++) {
        const int64_t n_rows = rows_of_panel(panels, i);
        const float *x = panels->x + i * panels->height * panels->cols + p->first * UNIT_COLS * n_rows;
        Floats sums[MAX_BLOCKS * PANEL_ROWS] = {0};
        if (count <= UNCONVERTED_PANELS) multiply(p, x, n_rows, sums);
        else kernel_of(FLOAT32_BLOCKS, p->n_blocks, n_rows)((const uint8_t *)values, stride * 4, NULL, p->units, x, sums);
        for (int64_t j = 0; j < p->n_blocks * n_rows; j++) totals[i][j] += sums[j];
    }
}

/* Writes y (n, rows) of the blocks of a part. */
static void store_totals(const Part *p, const Panels *panels, Floats (*totals)[MAX_BLOCKS * PANEL_ROWS], float *y) {
    for (int64_t i = 0; i * panels->height < panels->n; i++)
        for (int64_t b = 0; b < p->n_blocks; b++)
            for (int64_t j = 0, n_rows = rows_of_panel(panels, i); j < n_rows; j++) {
                const int64_t row = (p->block + b) * LANES, count = min_int(p->m->rows - row, LANES);
                float *out = y + (i * panels->height + j) * p->m->rows + row;
                if (count == LANES) store(out, totals[i][b * n_rows + j]);
                else memcpy(out, &totals[i][b * n_rows + j], (size_t)4 * count);
            }
}

/* The products of up to MAX_PANELS panels with up to MAX_BLOCKS blocks. */
static void multiply_blocks(Part p, const Panels *panels, float *y) {
    Floats totals[MAX_PANELS][MAX_BLOCKS * PANEL_ROWS];
    memset(totals, 0, ceil_div(panels->n, panels->height) * sizeof *totals);
    for (int64_t all = num_units(p.m); p.first < all; p.first += KC / UNIT_COLS) {
        p.units = min_int(all - p.first, KC / UNIT_COLS);
        multiply_panels(&p, panels, totals);
    }
    store_totals(&p, panels, totals, y);
}

void block_gemm(const Matrix *m, int64_t first, int64_t count, const float *panels, int64_t n, float *y) {
    const int64_t height = panel_height(n);
    for (int64_t row = first; row < first + count; row += MAX_BLOCKS * LANES)
        for (int64_t r = 0; r < n; r += MAX_PANELS * height) {
            const Part part = {m, row / LANES, min_int(ceil_div(first + count - row, LANES), MAX_BLOCKS), 0, 0};
            const Panels some = {panels + r * m->cols, min_int(n - r, MAX_PANELS * height), height, m->cols};
            multiply_blocks(part, &some, y + r * m->rows);
        }
}
