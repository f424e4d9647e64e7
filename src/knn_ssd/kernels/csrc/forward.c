/* The entry points that run layers and the LM head. */
#include "attention.h"
#include "contract.h"
#include "gemm.h"
#include "mlp.h"
#include "rows.h"
#include "scratch.h"
#include "thread_pool.h"

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
