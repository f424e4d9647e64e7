/* The attention sublayer. */
#ifndef KNN_SSD_ATTENTION_H
#define KNN_SSD_ATTENTION_H

#include "kernels.h"

/* x (n, D) += attention(norm(x)), for the rows of the entries and their KV caches of one layer. */
int attention(const Attention *a, const BatchEntry *entries, int64_t n_entries, int64_t layer, float *x, int64_t n);

#endif
