#include "mlp.h"

#include "contract.h"
#include "gemm.h"
#include "rows.h"
#include "scratch.h"
#include "thread_pool.h"

#define ROWS_AT_ONCE 512 /* of a caller's, so that scratch memory stays small */

typedef struct {
    float *gate;
    const float *up;
    int64_t activation;
} Gating;

/* Sigmoid linear units are x / (1 + exp(-x)). Gaussian error linear units, as approximated by tanh, are x / (1 + exp(-z)) with
 * z = sqrt(8 / pi) * (x + 0.044715 x^3). */
INLINE Floats activated(Floats x, const int64_t activation) {
    const Floats z = activation == SILU ? x : x * (1.5957691216f + 0.0713548163f * x * x);
    return x / (1.0f + exponential(-z));
}

INLINE void apply_gate(const Gating *g, int64_t first, int64_t last, const int64_t activation) {
    for (int64_t i = first * LANES; i < last * LANES; i += LANES)
        store(g->gate + i, activated(load(g->gate + i), activation) * load(g->up + i));
}

/* gate = activation(gate) * up, for vectors `first` .. `last` - 1. */
static void apply_gates(void *context, int64_t first, int64_t last, int thread) {
    const Gating *g = context;
    (void)thread;
    if (g->activation == SILU) apply_gate(g, first, last, SILU);
    else apply_gate(g, first, last, GELU_TANH);
}

/* y (n, down.rows) = down(activation(gate(x)) * up(x)), with scratch memory that was taken before it. */
static int gated(const Mlp *m, const float *x, int64_t n, float *y) {
    const int64_t inner = m->gate.rows, vectors = n * inner / LANES;
    float *gate = scratch_take(n, inner * 4), *up = scratch_take(n, inner * 4);
    if (scratch_failed()) return OUT_OF_MEMORY;
    if (linear((const Matrix *[]){&m->gate, &m->up}, 2, x, n, (float *[]){gate, up})) return OUT_OF_MEMORY;
    Gating gating = {gate, up, m->activation};
    parallel_for(vectors, n * inner > 16384 ? 64 : vectors, apply_gates, &gating);
    return linear((const Matrix *[]){&m->down}, 1, gate, n, (float *[]){y});
}

int mlp(const Mlp *m, float *x, int64_t n) {
    const int64_t width = m->gate.cols;
    scratch_reset();
    float *normed = scratch_take(n, width * 4), *out = scratch_take(n, width * 4);
    if (scratch_failed()) return OUT_OF_MEMORY;
    normalise_rows(x, n, width, m->norm, m->epsilon, normed);
    if (gated(m, normed, n, out)) return OUT_OF_MEMORY;
    add_residual(x, out, n, width);
    return SUCCESS;
}

int knn_ssd_mlp(const Mlp *m, const float *x, int64_t n, float *y) {
    if (n < 0 || !is_valid_mlp(m, m->gate.cols)) return INVALID_SIZES;
    int status = SUCCESS;
    pool_lock();
    for (int64_t r = 0; r < n && !status; r += ROWS_AT_ONCE) {
        scratch_reset();
        status = gated(m, x + r * m->gate.cols, min_int(n - r, ROWS_AT_ONCE), y + r * m->down.rows);
    }
    pool_unlock();
    return status;
}
