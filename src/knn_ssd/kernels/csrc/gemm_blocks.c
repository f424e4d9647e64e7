/* Matrices in blocks, multiplied with float32 inputs, or bfloat16 matrices with inputs rounded to bfloat16. A row's products
 * are summed in an order of the columns alone, and the sums of KC columns are then added up.
 *
 * Processors with AVX512_BF16 multiply two bfloat16 columns and add both products in one instruction: twice the products of
 * a float32 instruction, and nothing has to be widened. */
#include "blocks.h"
#include "gemm.h"

#define KC 512              /* columns that are summed at once */
#define MAX_PANELS 8        /* of inputs that are multiplied with weights while they are in the cache */
#define PREFETCH_BYTES 8192 /* of the matrix that are prefetched ahead */

/* 4-byte words of a row's inputs to a unit. */
INLINE int64_t unit_words(int64_t kind, int are_pairs) { return unit_cols(kind) / (are_pairs ? 2 : 1); }

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

/* Reads the pairs of both halves of a unit, if it has some. */
INLINE void read_pairs(const uint8_t *data, Uints table, const int kind, Uints pairs[2][4]) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        const uint8_t *half = data + h * unit_bytes(kind) / 2;
        if (kind == BFLOAT16_PACKED) unpack_pairs(half, table, pairs[h]);
#pragma GCC unroll 4
        for (int i = 0; kind == BFLOAT16_BLOCKS && i < 4; i++) pairs[h][i] = load_uints(half + 4 * LANES * i);
    }
}

/* sum plus the products of pairs of bfloat16 weights with a pair of inputs. */
INLINE Floats add_pair_products(Floats sum, Uints pairs, uint32_t x) {
#if HAS_PAIR_PRODUCTS
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32((int)x));
#else
    (void)pairs, (void)x;
    return sum; /* never called: see `pack_inputs` */
#endif
}

/* Adds the products of a unit of bfloat16 weights with pairs of bfloat16 inputs (UNIT_COLS / 2, NR). */
INLINE void multiply_pairs(const uint8_t *data, Uints table, const uint32_t *x, Floats sum[2][PANEL_ROWS], const int kind,
                           const int NR) {
    Uints pairs[2][4];
    read_pairs(data, table, kind, pairs);
#pragma GCC unroll 4
    for (int i = 0; i < UNIT_COLS / 2; i++)
#pragma GCC unroll 12
        for (int r = 0; r < NR; r++)
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) sum[h][r] = add_pair_products(sum[h][r], pairs[h][i], x[i * NR + r]);
}

/* Adds the products of a unit of floats. */
INLINE void multiply_floats(const uint8_t *data, Uints table, const float *x, Floats sum[2][PANEL_ROWS], const int kind,
                            const int NR) {
    const int64_t size = unit_bytes(kind);
    Uints pairs[2][4];
    read_pairs(data, table, kind, pairs);
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

/* Adds to sums (2, NR) the products of a block's two halves with NR input rows, over `units` units. The inputs are float32,
 * or pairs of bfloat16. */
INLINE void micro_kernel(const uint8_t *data, const uint8_t *upper_bytes, int64_t units, const uint32_t *x, Floats *sums,
                         const int kind, const int NR, const int are_pairs) {
    const Uints table = kind == BFLOAT16_PACKED ? load_table(upper_bytes) : (Uints){0};
    const int64_t size = unit_bytes(kind);
    Floats sum[2][PANEL_ROWS];
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++)
#pragma GCC unroll 12
        for (int r = 0; r < NR; r++) sum[h][r] = sums[h * NR + r];
    for (int64_t u = 0; u < units; u++, data += size, x += unit_words(kind, are_pairs) * NR) {
        const float *floats = (const float *)(const void *)x;
        for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(data + PREFETCH_BYTES + i, 0, 2);
        if (are_pairs) multiply_pairs(data, table, x, sum, kind, NR);
        else if (is_quantised(kind)) multiply_quantised(data, floats, sum, kind, NR);
        else multiply_floats(data, table, floats, sum, kind, NR);
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++)
#pragma GCC unroll 12
        for (int r = 0; r < NR; r++) sums[h * NR + r] = sum[h][r];
}

typedef void (*Kernel)(const uint8_t *, const uint8_t *, int64_t, const uint32_t *, Floats *);

/* A kernel's name is its kind's, or that of rounded inputs. */
#define KERNEL(name, kind, are_pairs, NR)                                                                           \
    static void kernel_##name##_##NR(const uint8_t *data, const uint8_t *upper_bytes, int64_t units,                \
                                     const uint32_t *x, Floats *sums) {                                             \
        micro_kernel(data, upper_bytes, units, x, sums, kind, NR, are_pairs);                                       \
    }
#define FEW_KERNELS(name, kind, are_pairs)                                                                   \
    KERNEL(name, kind, are_pairs, 1) KERNEL(name, kind, are_pairs, 2) KERNEL(name, kind, are_pairs, 3)      \
    KERNEL(name, kind, are_pairs, 4) KERNEL(name, kind, are_pairs, 5) KERNEL(name, kind, are_pairs, 6)
#define FEW_NAMES(name)                                                                                              \
    kernel_##name##_1, kernel_##name##_2, kernel_##name##_3, kernel_##name##_4, kernel_##name##_5, kernel_##name##_6
#if PANEL_ROWS == 12
#define KERNELS(name, kind, are_pairs)                                                                       \
    FEW_KERNELS(name, kind, are_pairs)                                                                       \
    KERNEL(name, kind, are_pairs, 7) KERNEL(name, kind, are_pairs, 8) KERNEL(name, kind, are_pairs, 9)       \
    KERNEL(name, kind, are_pairs, 10) KERNEL(name, kind, are_pairs, 11) KERNEL(name, kind, are_pairs, 12)
#define KERNEL_TABLE(name)                                                                                           \
    {FEW_NAMES(name),     kernel_##name##_7,  kernel_##name##_8, kernel_##name##_9,                                  \
     kernel_##name##_10, kernel_##name##_11, kernel_##name##_12}
#else
#define KERNELS(name, kind, are_pairs) FEW_KERNELS(name, kind, are_pairs)
#define KERNEL_TABLE(name) {FEW_NAMES(name)}
#endif
KERNELS(FLOAT32_BLOCKS, FLOAT32_BLOCKS, 0) KERNELS(FLOAT16_BLOCKS, FLOAT16_BLOCKS, 0)
KERNELS(BFLOAT16_BLOCKS, BFLOAT16_BLOCKS, 0) KERNELS(BFLOAT16_PACKED, BFLOAT16_PACKED, 0)
KERNELS(Q8_0_BLOCKS, Q8_0_BLOCKS, 0) KERNELS(Q6_K_BLOCKS, Q6_K_BLOCKS, 0) KERNELS(Q5_0_BLOCKS, Q5_0_BLOCKS, 0)
KERNELS(Q4_K_BLOCKS, Q4_K_BLOCKS, 0) KERNELS(Q4_0_BLOCKS, Q4_0_BLOCKS, 0)

/* By kind and number of rows. */
static const Kernel KERNEL_OF[][PANEL_ROWS] = {
    KERNEL_TABLE(FLOAT32_BLOCKS), KERNEL_TABLE(FLOAT16_BLOCKS), KERNEL_TABLE(BFLOAT16_BLOCKS), KERNEL_TABLE(BFLOAT16_PACKED),
    KERNEL_TABLE(Q8_0_BLOCKS),    KERNEL_TABLE(Q6_K_BLOCKS),    KERNEL_TABLE(Q5_0_BLOCKS),     KERNEL_TABLE(Q4_K_BLOCKS),
    KERNEL_TABLE(Q4_0_BLOCKS)};

#if HAS_PAIR_PRODUCTS
KERNELS(ROUNDED_BLOCKS, BFLOAT16_BLOCKS, 1) KERNELS(ROUNDED_PACKED, BFLOAT16_PACKED, 1)
static const Kernel ROUNDED_KERNEL_OF[][PANEL_ROWS] = {KERNEL_TABLE(ROUNDED_BLOCKS), KERNEL_TABLE(ROUNDED_PACKED)};
#endif

INLINE Kernel kernel_of(int64_t kind, int are_pairs, int64_t n_rows) {
#if HAS_PAIR_PRODUCTS
    if (are_pairs) return ROUNDED_KERNEL_OF[kind - BFLOAT16_BLOCKS][n_rows - 1];
#else
    (void)are_pairs;
#endif
    return KERNEL_OF[kind - FLOAT32_BLOCKS][n_rows - 1];
}

/* Units `first` .. `first` + `units` - 1 of a block, and whether their inputs are pairs. */
typedef struct {
    const Matrix *m;
    int64_t block, first, units;
    int are_pairs;
} Part;

/* Adds a part's products with a panel to sums (2, n_rows). Between the escapes of a packed matrix, its units are unpacked
 * in registers. A unit with escapes is unpacked to memory, where they are put in. */
static void multiply(const Part *p, const uint32_t *x, int64_t n_rows, Floats *sums) {
    const Matrix *m = p->m;
    const uint8_t *data = unit_of(m, p->block, p->first);
    const Kernel kernel = kernel_of(m->kind, p->are_pairs, n_rows);
    const int64_t inputs = unit_words(m->kind, p->are_pairs) * n_rows;
    Escapes escapes = escapes_from(m, p->block, p->first);
    for (int64_t unit = 0; unit < p->units; unit++) {
        const int64_t next = escapes.next < escapes.end ? min_int(p->units, escapes.next->unit - p->first) : p->units;
        const uint8_t *from = data + unit * unit_bytes(m->kind);
        if (next > unit) kernel(from, m->upper_bytes, next - unit, x + unit * inputs, sums);
        unit = next;
        if (unit == p->units) break;
        uint16_t pairs[UNIT];
        unpack_unit(data + unit * unit_bytes(m->kind), load_table(m->upper_bytes), p->first + unit, &escapes, pairs);
        kernel_of(BFLOAT16_BLOCKS, p->are_pairs, n_rows)((const uint8_t *)pairs, NULL, 1, x + unit * inputs, sums);
    }
}

/* Inputs in panels of `height` rows, each (words, rows of the panel) of 4 bytes; the last one may be lower. */
typedef struct {
    const uint32_t *x;
    int64_t n, height, words;
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
    const int64_t width = unit_cols(p.m->kind), words = unit_words(p.m->kind, p.are_pairs);
    memset(totals, 0, ceil_div(panels->n, panels->height) * sizeof *totals);
    for (int64_t all = num_units(p.m); p.first < all; p.first += KC / width) {
        p.units = min_int(all - p.first, KC / width);
        for (int64_t i = 0; i * panels->height < panels->n; i++) {
            const int64_t n_rows = rows_of_panel(panels, i);
            Floats sums[2 * PANEL_ROWS] = {0};
            multiply(&p, panels->x + i * panels->height * panels->words + p.first * words * n_rows, n_rows, sums);
            for (int64_t j = 0; j < 2 * n_rows; j++) totals[i][j] += sums[j];
        }
    }
    store_totals(&p, panels, totals, y);
}

void block_gemm(const Matrix *m, int64_t first, int64_t count, const PackedInputs *in, int64_t n, float *y) {
    const int are_pairs = in->pairs && is_bfloat16(m->kind);
    const int64_t height = panel_height(n), words = m->cols / (are_pairs ? 2 : 1);
    const uint32_t *x = are_pairs ? in->pairs : (const uint32_t *)(const void *)in->panels;
    for (int64_t row = first; row < first + count; row += BLOCK_ROWS)
        for (int64_t r = 0; r < n; r += MAX_PANELS * height) {
            const Panels some = {x + r * words, min_int(n - r, MAX_PANELS * height), height, words};
            multiply_block((Part){m, row / BLOCK_ROWS, 0, 0, are_pairs}, &some, y + r * m->rows);
        }
}
