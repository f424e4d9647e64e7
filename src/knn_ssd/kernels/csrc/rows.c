#include "rows.h"

#include "thread_pool.h"

typedef struct {
    const float *x, *weight;
    int64_t width;
    double epsilon;
    float *y;
} Normalising;

static void normalise_some(void *context, int64_t first, int64_t last, int thread) {
    const Normalising *c = context;
    (void)thread;
    for (int64_t r = first; r < last; r++)
        rms_norm(c->x + r * c->width, c->width, c->weight, c->epsilon, c->y + r * c->width);
}

void normalise_rows(const float *x, int64_t n, int64_t width, const float *weight, double epsilon, float *y) {
    Normalising normalising = {x, weight, width, epsilon, y};
    parallel_for(n, ROWS_PER_CHUNK, normalise_some, &normalising);
}

typedef struct {
    float *x;
    const float *y;
    int64_t width;
} Adding;

static void add_some(void *context, int64_t first, int64_t last, int thread) {
    const Adding *c = context;
    (void)thread;
    for (int64_t i = first * c->width; i < last * c->width; i += LANES) store(c->x + i, load(c->x + i) + load(c->y + i));
}

void add_residual(float *x, const float *y, int64_t n, int64_t width) {
    Adding adding = {x, y, width};
    parallel_for(n, ROWS_PER_CHUNK, add_some, &adding);
}
