/* One linear layer by itself, for models whose other modules run outside this library. */
#include "contract.h"
#include "gemm.h"
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
