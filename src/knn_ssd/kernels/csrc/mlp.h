/* The gated MLP sublayer. */
#ifndef KNN_SSD_MLP_H
#define KNN_SSD_MLP_H

#include "kernels.h"

/* x (n, D) += down(activation(gate(h)) * up(h)) with h = norm(x). */
int mlp(const Mlp *m, float *x, int64_t n);

#endif
