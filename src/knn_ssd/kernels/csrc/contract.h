/* The sizes that the entry points accept; what violates them would read or write memory out of bounds. */
#ifndef KNN_SSD_CONTRACT_H
#define KNN_SSD_CONTRACT_H

#include "kernels.h"

/* Whether the sublayers fit together, and the rows of each entry into its KV cache. */
int is_valid_forward(const Attention *const *attentions, const Mlp *const *mlps, int64_t layers, const BatchEntry *entries,
                     int64_t n_entries);

/* Whether a matrix with its own number of rows and columns can be multiplied. */
int is_valid_head(const Matrix *head);

/* Whether the matrices of a gated MLP fit together. */
int is_valid_mlp(const Mlp *m, int64_t width);

/* Whether rows of a matrix can be read: it is in blocks, but not one of 4 bits for drafts. */
int is_valid_blocks(const Matrix *m);

/* Whether n rows see only keys that there are. */
int is_valid_outer(const OuterAttention *a, const OuterCache *caches, int64_t n_caches, const VisibleKeys *rows, int64_t n);

/* Whether a 4-bit copy of the matrix can be made. */
int is_valid_source(const Matrix *m, int64_t n_ranges);

/* Whether the rows first .. last - 1 can be quantised by themselves. */
int is_valid_range(const Matrix *m, int64_t first, int64_t last);

#endif
