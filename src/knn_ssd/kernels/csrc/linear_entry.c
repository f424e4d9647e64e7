/* One linear layer or norm by itself, for models whose other modules run outside this library. */
#include "contract.h"
#include "gemm.h"
#include "rows.h"
#include "scratch.h"
#include "thread_pool.h"

int knn_ssd_linear(const Matrix *m, const float *x, int64_t n, float *y) {
    if (n < 0 || !is_valid_head(m)) return INVALID_SIZES;
    if (!n) return SUCCESS;
    pool_lock();
    scratch_reset();
    const int status = linear((const Matrix *[]){m}, 1, x, n, (float *[]){y});
    pool_unlock();
    return status;
}

int knn_ssd_rms_norm(const float *x, int64_t n, int64_t width, const float *weight, double epsilon, float *y) {
    if (n < 0 || width <= 0 || width % LANES) return INVALID_SIZES;
    pool_lock();
    normalise_rows(x, n, width, weight, epsilon, y);
    pool_unlock();
    return SUCCESS;
}
