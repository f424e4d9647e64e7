/* Linear layers: products of weight matrices with a few rows of inputs. */
#ifndef KNN_SSD_GEMM_H
#define KNN_SSD_GEMM_H

#include "kernels.h"
#include "vectors.h"

#define K_STEP (2 * LANES) /* cols is a multiple of it */
#define MC 32              /* matrix rows that a thread takes at once */
#if LANES == 16
#define PANEL_ROWS 12      /* input rows whose sums, with two vectors of weights, fit in the registers */
#else
#define PANEL_ROWS 6
#endif
#if LANES == 16 && defined(__AVX512BF16__)
#define HAS_PAIR_PRODUCTS 1 /* of two bfloat16 columns */
#else
#define HAS_PAIR_PRODUCTS 0
#endif
#define GROUP_SIZE 64      /* columns that share a scale in a 4-bit matrix */

/* How many of n rows a panel has; panels are about equally high. */
INLINE int64_t panel_height(int64_t n) { return ceil_div(n, ceil_div(n, PANEL_ROWS)); }

/* The inputs of a linear, in the order in which each kind of kernel reads them. */
typedef struct {
    const float *panels;   /* kernels of blocks: for every `panel_height` rows, (cols, rows of the panel) */
    const uint32_t *pairs; /* the same for bfloat16 weights, if inputs are rounded: (cols / 2, rows of the panel) pairs */
    int8_t *int8;       /* 4-bit kernels: (n, groups, GROUP_SIZE) */
    float *int8_scales; /* (n, groups) */
    float *int8_sums;   /* (n, groups) sums of the dequantised inputs */
    uint16_t *hi_lo;    /* the tile unit: see gemm_amx.c */
} PackedInputs;

/* How the tile unit of a thread is configured; zero if it is not. */
typedef struct {
    int64_t rows, cols;
} TileShape;

INLINE int64_t num_groups(const Matrix *m) { return ceil_div(m->cols, GROUP_SIZE); }

/* y[j] (n, rows of matrix j) = matrix j applied to x (n, cols), for up to 3 matrices with the same number of columns. They
 * may be of different kinds. */
int linear(const Matrix *const *matrices, int count, const float *x, int64_t n, float *const *y);

/* Quantises x (n, cols) to 8 bits, each group of columns with a scale of its own. */
void int4_pack_row(const float *x, int64_t cols, int8_t *int8, float *scales, float *sums);

/* y = the rows of a 4-bit matrix from `first` on, `count` of them, applied to n input rows. */
void int4_gemm(const Matrix *m, int64_t first, int64_t count, const PackedInputs *in, int64_t n, float *y);

/* The same for a matrix in blocks; see blocks.h. `first` is a multiple of 2 * LANES. */
void block_gemm(const Matrix *m, int64_t first, int64_t count, const PackedInputs *in, int64_t n, float *y);

/* The same for a row-major bfloat16 matrix and the tile unit. `is_cold` says that the first rows have not been prefetched. */
int amx_enabled(void);
int64_t amx_packed_rows(int64_t n); /* of `hi_lo`, of 4 * cols bytes each */
void amx_pack_inputs(const float *x, int64_t n, int64_t cols, uint16_t *hi_lo);
void amx_gemm(const Matrix *m, int64_t first, int64_t count, const uint16_t *hi_lo, int64_t n, TileShape *shape, int is_cold,
              float *y);
void amx_release(const TileShape *shape);

#endif
