/* What happens to single rows of activations between the linears. */
#ifndef KNN_SSD_ROWS_H
#define KNN_SSD_ROWS_H

#include <math.h>

#include "vectors.h"

/* y (size,) = RMS norm of x (size,). */
INLINE void rms_norm(const float *x, int64_t size, const float *weight, double epsilon, float *y) {
    Floats squares = {0};
    for (int64_t i = 0; i < size; i += LANES) squares = fmadd(load(x + i), load(x + i), squares);
    const float factor = 1.0f / sqrtf(horizontal_sum(squares) / (float)size + (float)epsilon);
    for (int64_t i = 0; i < size; i += LANES) store(y + i, load(weight + i) * (load(x + i) * factor));
}

INLINE void add_residual(float *x, const float *y, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) store(x + i, load(x + i) + load(y + i));
}

#endif
