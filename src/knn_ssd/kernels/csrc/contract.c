/* Checks of what callers pass: a few comparisons for each sublayer of a forward pass. */
#include "contract.h"

#include "blocks.h"
#include "gemm.h"

int is_valid_blocks(const Matrix *m) {
    const int is_complete = m->kind != BFLOAT16_PACKED || (m->upper_bytes && m->escape_starts && m->escapes);
    return m->data && is_blocks(m->kind) && is_complete && m->rows > 0 && m->cols > 0 && m->cols % unit_cols(m->kind) == 0;
}

static int is_valid_matrix(const Matrix *m, int64_t rows, int64_t cols) {
    const int is_known = is_valid_blocks(m) || (m->kind == BFLOAT16 && amx_enabled()) || (m->kind == INT4 && m->scales);
    return m->data && is_known && m->rows == rows && m->cols == cols && rows > 0 && cols > 0 && cols % K_STEP == 0;
}

static int is_valid_attention(const Attention *a, int64_t width) {
    const int are_valid_heads = a->heads > 0 && a->kv_heads > 0 && a->heads % a->kv_heads == 0;
    const int is_valid_rotary = a->rotary_dim >= 0 && a->rotary_dim <= a->head_dim && a->rotary_dim % 2 == 0;
    if (!are_valid_heads || a->head_dim <= 0 || a->head_dim % LANES || !is_valid_rotary || a->window < 0) return 0;
    const int64_t inner = a->heads * a->head_dim, kv_inner = a->kv_heads * a->head_dim;
    return is_valid_matrix(&a->q, inner, width) && is_valid_matrix(&a->k, kv_inner, width) &&
           is_valid_matrix(&a->v, kv_inner, width) && is_valid_matrix(&a->o, width, inner);
}

int is_valid_mlp(const Mlp *m, int64_t width) {
    const int64_t inner = m->gate.rows;
    if (m->activation != SILU && m->activation != GELU_TANH) return 0;
    return is_valid_matrix(&m->gate, inner, width) && is_valid_matrix(&m->up, inner, width) &&
           is_valid_matrix(&m->down, width, inner);
}

/* In teacher-forced scoring, the KV cache is read up to the start of the last run; else it is written for every row. */
static int is_valid_entry(const BatchEntry *e) {
    if (e->n_rows < 0 || e->run_length < 0 || e->position < 0 || e->position > e->capacity) return 0;
    if (e->kv_kind != FLOAT32 && e->kv_kind != BFLOAT16) return 0;
    const int64_t cached = e->run_length ? max_int(e->n_rows - 1, 0) / e->run_length * e->run_length : e->n_rows;
    return cached <= e->capacity - e->position;
}

int is_valid_forward(const Attention *const *attentions, const Mlp *const *mlps, int64_t layers, const BatchEntry *entries,
                     int64_t n_entries) {
    int64_t width = 0; /* of all sublayers, as the first one has it */
    for (int64_t i = 0; i < layers; i++) {
        if (!width) width = attentions[i] ? attentions[i]->q.cols : mlps[i] ? mlps[i]->gate.cols : 0;
        if (attentions[i] && !is_valid_attention(attentions[i], width)) return 0;
        if (mlps[i] && !is_valid_mlp(mlps[i], width)) return 0;
    }
    for (int64_t i = 0; i < n_entries; i++)
        if (!is_valid_entry(entries + i)) return 0;
    return 1;
}

int is_valid_head(const Matrix *head) { return is_valid_matrix(head, head->rows, head->cols); }

/* Each row sees at least one key. */
static int is_valid_row(const OuterCache *c, const VisibleKeys *r) {
    if (r->first < 0 || r->first > r->split || r->split > r->end || r->first == r->end || r->split > c->capacity) return 0;
    return r->split == r->end || (c->new_keys && c->new_values && c->position >= 0 && c->position <= r->split &&
                                  r->end - c->position <= c->n_new);
}

int is_valid_outer(const OuterAttention *a, const OuterCache *caches, int64_t n_caches, const VisibleKeys *rows, int64_t n) {
    if (a->heads <= 0 || a->kv_heads <= 0 || a->heads % a->kv_heads || a->head_dim <= 0 || a->head_dim % LANES) return 0;
    for (int64_t r = 0; r < n; r++)
        if (rows[r].cache < 0 || rows[r].cache >= n_caches || !is_valid_row(caches + rows[r].cache, rows + r)) return 0;
    return n >= 0;
}

int is_valid_source(const Matrix *m, int64_t n_ranges) {
    const int is_read = m->kind == FLOAT32 || m->kind == BFLOAT16 || is_valid_blocks(m);
    return m->data && is_read && m->rows > 0 && m->cols > 0 && m->cols % LANES == 0 && n_ranges > 0;
}

int is_valid_range(const Matrix *m, int64_t first, int64_t last) {
    return first >= 0 && first < last && last <= m->rows && first % BLOCK_ROWS == 0 &&
           (last % BLOCK_ROWS == 0 || last == m->rows);
}
