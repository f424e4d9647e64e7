/* What happens to single rows of activations between the linears. */
#ifndef KNN_SSD_ROWS_H
#define KNN_SSD_ROWS_H

#include <math.h>

#include "vectors.h"

#define ROWS_PER_CHUNK 8 /* fewer rows are done by one thread: waking others takes longer */

/* y (size,) = RMS norm of x (size,). */
INLINE void rms_norm(const float *x, int64_t size, const float *weight, double epsilon, float *y) {
    Floats squares = {0};
    for (int64_t i = 0; i < size; i += LANES) squares = fmadd(load(x + i), load(x + i), squares);
    const float factor = 1.0f / sqrtf(horizontal_sum(squares) / (float)size + (float)epsilon);
    for (int64_t i = 0; i < size; i += LANES) store(y + i, load(weight + i) * (load(x + i) * factor));
}

/* y (n, width) = RMS norm of each row of x (n, width). */
void normalise_rows(const float *x, int64_t n, int64_t width, const float *weight, double epsilon, float *y);

/* x (n, width) += y (n, width). */
void add_residual(float *x, const float *y, int64_t n, int64_t width);

#endif
