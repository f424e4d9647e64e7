/* The MLP sublayer, and the entry points that run layers and the LM head. */
#include "attention.h"
#include "contract.h"
#include "gemm.h"
#include "rows.h"
#include "scratch.h"
#include "thread_pool.h"

typedef struct {
    float *gate;
    const float *up;
} Gating;

/* gate = silu(gate) * up, for vectors `first` .. `last` - 1. */
static void apply_gate(void *context, int64_t first, int64_t last, int thread) {
    const Gating *g = context;
    (void)thread;
    for (int64_t i = first * LANES; i < last * LANES; i += LANES) {
        const Floats x = load(g->gate + i);
        store(g->gate + i, x / (1.0f + exponential(-x)) * load(g->up + i));
    }
}

/* x (n, D) += down(silu(gate(h)) * up(h)) with h = norm(x). */
static int mlp(const Mlp *m, float *x, int64_t n) {
    const int64_t width = m->gate.cols, inner = m->gate.rows;
    scratch_reset();
    float *normed = scratch_take(n, width * 4), *out = scratch_take(n, width * 4);
    float *gate = scratch_take(n, inner * 4), *up = scratch_take(n, inner * 4);
    if (scratch_failed()) return OUT_OF_MEMORY;
    normalise_rows(x, n, width, m->norm, m->epsilon, normed);
    if (linear((const Matrix *[]){&m->gate, &m->up}, 2, normed, n, (float *[]){gate, up})) return OUT_OF_MEMORY;
    Gating gating = {gate, up};
    const int64_t vectors = n * inner / LANES;
    parallel_for(vectors, n * inner > 16384 ? 64 : vectors, apply_gate, &gating);
    if (linear((const Matrix *[]){&m->down}, 1, gate, n, (float *[]){out})) return OUT_OF_MEMORY;
    add_residual(x, out, n, width);
    return SUCCESS;
}

static int run_layers(const Attention *const *attentions, const Mlp *const *mlps, int64_t layers,
                      const BatchEntry *entries, int64_t n_entries, float *x) {
    int64_t n = 0;
    for (int64_t i = 0; i < n_entries; i++) n += entries[i].n_rows;
    for (int64_t layer = 0; layer < layers; layer++) {
        if (attentions[layer] && attention(attentions[layer], entries, n_entries, layer, x, n)) return OUT_OF_MEMORY;
        if (mlps[layer] && mlp(mlps[layer], x, n)) return OUT_OF_MEMORY;
    }
    return SUCCESS;
}

int knn_ssd_forward(const Attention *const *attentions, const Mlp *const *mlps, int64_t layers, const BatchEntry *entries,
                    int64_t n_entries, float *x) {
    if (!is_valid_forward(attentions, mlps, layers, entries, n_entries)) return INVALID_SIZES;
    pool_lock();
    const int status = run_layers(attentions, mlps, layers, entries, n_entries, x);
    pool_unlock();
    return status;
}

static int run_head(const Matrix *head, const float *hidden, int64_t n, const int64_t *selected, int64_t n_selected,
                    float *logits) {
    const int64_t width = head->cols;
    scratch_reset();
    float *rows = scratch_take(n_selected, width * 4);
    if (!rows) return OUT_OF_MEMORY;
    for (int64_t r = 0; r < n_selected; r++) {
        if (selected[r] < 0 || selected[r] >= n) return INVALID_SIZES;
        memcpy(rows + r * width, hidden + selected[r] * width, (size_t)4 * width);
    }
    return linear((const Matrix *[]){head}, 1, rows, n_selected, (float *[]){logits});
}

int knn_ssd_lm_head(const Matrix *head, const float *norm, double epsilon, const float *x, int64_t n,
                    const int64_t *selected, int64_t n_selected, float *hidden, float *logits) {
    if (!is_valid_head(head)) return INVALID_SIZES;
    const int64_t width = head->cols;
    normalise_rows(x, n, width, norm, epsilon, hidden);
    if (!n_selected) return SUCCESS;
    pool_lock();
    const int status = run_head(head, hidden, n, selected, n_selected, logits);
    pool_unlock();
    return status;
}

const int64_t *knn_ssd_struct_sizes(void) {
    static const int64_t sizes[] = {sizeof(Matrix),         sizeof(Attention),  sizeof(Mlp),        sizeof(BatchEntry),
                                    sizeof(OuterAttention), sizeof(OuterCache), sizeof(VisibleKeys)};
    return sizes;
}

int64_t knn_ssd_lanes(void) { return LANES; }
