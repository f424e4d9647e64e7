/* 4-bit copies of matrices. */
#include "quantise.h"

#include "blocks.h"
#include "contract.h"
#include "gemm.h"
#include "thread_pool.h"

/* Quantises w (count,) with one scale and zero; returns the squared error, weighted by importance. `count` is a multiple of
 * LANES here and below. */
static float quantise_levels(const float *w, const float *importance, int64_t count, float scale, float zero, float *levels) {
    const float inverse = scale != 0 ? 1 / scale : 0;
    for (int64_t i = 0; i < count; i++) {
        const float level = rintf((w[i] - zero) * inverse);
        levels[i] = level < 0 ? 0 : level > 15 ? 15 : level;
    }
    Floats error = {0};
    for (int64_t i = 0; i < count; i += LANES) {
        const Floats difference = fmadd(load(levels + i), splat(scale), splat(zero)) - load(w + i);
        error = fmadd(load(importance + i) * difference, difference, error);
    }
    return horizontal_sum(error);
}

/* Fits the scale and zero to the levels by weighted least squares. */
static void refit(const float *w, const float *importance, int64_t count, const float *levels, float *scale, float *zero) {
    Floats sums[5] = {0}; /* of importance times 1, level, level squared, w, level times w */
    for (int64_t i = 0; i < count; i += LANES) {
        const Floats once = load(importance + i), level = load(levels + i), weighted = once * level;
        sums[0] += once;
        sums[1] += weighted;
        sums[2] = fmadd(weighted, level, sums[2]);
        sums[3] = fmadd(once, load(w + i), sums[3]);
        sums[4] = fmadd(weighted, load(w + i), sums[4]);
    }
    const float a = horizontal_sum(sums[0]), b = horizontal_sum(sums[1]), c = horizontal_sum(sums[2]);
    const float d = horizontal_sum(sums[3]), e = horizontal_sum(sums[4]);
    const float determinant = a * c - b * b;
    if (determinant <= 1e-12f * a * c) return;
    *scale = (a * e - b * d) / determinant;
    *zero = (c * d - b * e) / determinant;
}

/* Quantises a group: levels (GROUP_SIZE,) with w = level * scales[0] + scales[1]. The best of n_ranges ranges, each refitted
 * twice if there are several, is taken. */
static void quantise_group(const float *w, const float *importance, int64_t count, int64_t n_ranges, uint8_t *levels,
                           uint16_t *scales) {
    float low = w[0], high = w[0], best = INFINITY, candidate[GROUP_SIZE], chosen[GROUP_SIZE] = {0};
    for (int64_t i = 1; i < count; i++) {
        low = fminf(low, w[i]);
        high = fmaxf(high, w[i]);
    }
    const float middle = (low + high) / 2, half = (high - low) / 2;
    for (int64_t range = 0; range < n_ranges; range++) {
        float width = half * (1 - 0.05f * (float)range), scale = width / 7.5f, zero = middle - width;
        for (int fit = 0; fit < (n_ranges > 1 ? 3 : 1); fit++) {
            if (fit) refit(w, importance, count, candidate, &scale, &zero);
            const uint16_t coded[2] = {float_to_bfloat16(scale), float_to_bfloat16(zero)};
            const float error = quantise_levels(w, importance, count, bfloat16_to_float(coded[0]),
                                                bfloat16_to_float(coded[1]), candidate);
            if (error < best) {
                best = error;
                memcpy(chosen, candidate, sizeof chosen);
                memcpy(scales, coded, sizeof coded);
            }
        }
    }
    for (int i = 0; i < GROUP_SIZE; i++) levels[i] = i < count ? (uint8_t)chosen[i] : 0;
}

/* Stores a group where the kernels read it: data (ceil(rows / LANES), groups, GROUP_SIZE / 8, LANES, 4), each byte with
 * columns i and i + GROUP_SIZE / 2 of the group. */
static void store_group(const uint8_t *levels, const uint16_t *scale, int64_t row, int64_t group, int64_t groups,
                        uint8_t *data, uint16_t *scales) {
    const int64_t index = row / LANES * groups + group, lane = row % LANES;
    for (int i = 0; i < GROUP_SIZE / 2; i++)
        data[((index * (GROUP_SIZE / 8) + i / 4) * LANES + lane) * 4 + i % 4] =
            (uint8_t)(levels[i] | levels[i + GROUP_SIZE / 2] << 4);
    memcpy(scales + (index * LANES + lane) * 2, scale, 4);
}

typedef struct {
    const Matrix *m;
    const float *importance;
    int64_t n_ranges, first_block;
    uint8_t *data;
    uint16_t *scales;
} Quantisation;

/* values (BLOCK_ROWS, GROUP_SIZE) = a group of columns of a block's rows; what is beyond the last row or column stays as it is. */
static void read_group(const Matrix *m, int64_t block, int64_t group, float *values) {
    const int64_t start = group * GROUP_SIZE, count = min_int(m->cols - start, GROUP_SIZE);
    float columns[GROUP_SIZE * BLOCK_ROWS];
    if (is_blocks(m->kind)) read_units(m, block, start / unit_cols(m->kind), count / unit_cols(m->kind), columns);
    for (int64_t row = 0; row < min_int(BLOCK_ROWS, m->rows - block * BLOCK_ROWS); row++)
        for (int64_t k = 0; k < count; k++) {
            const int64_t index = (block * BLOCK_ROWS + row) * m->cols + start + k;
            const int64_t place = k / UNIT_COLS * UNIT + row / LANES * HALF + k % UNIT_COLS * LANES + row % LANES;
            values[row * GROUP_SIZE + k] = is_blocks(m->kind)    ? columns[place]
                                            : m->kind == BFLOAT16 ? bfloat16_to_float(((const uint16_t *)m->data)[index])
                                                                  : ((const float *)m->data)[index];
        }
}

static void quantise_blocks(void *context, int64_t first, int64_t last, int thread) {
    const Quantisation *c = context;
    const Matrix *m = c->m;
    const int64_t groups = num_groups(m);
    (void)thread;
    for (int64_t block = c->first_block + first; block < c->first_block + last; block++)
        for (int64_t g = 0; g < groups; g++) {
            float values[BLOCK_ROWS * GROUP_SIZE] = {0};
            read_group(m, block, g, values);
            for (int64_t row = block * BLOCK_ROWS; row < min_int((block + 1) * BLOCK_ROWS, m->rows); row++) {
                uint8_t levels[GROUP_SIZE];
                uint16_t scale[2] = {0, 0};
                const int64_t start = g * GROUP_SIZE, count = min_int(m->cols - start, GROUP_SIZE);
                quantise_group(values + row % BLOCK_ROWS * GROUP_SIZE, c->importance + start, count, c->n_ranges, levels, scale);
                store_group(levels, scale, row, g, groups, c->data, c->scales);
            }
        }
}

int knn_ssd_quantise(const Matrix *m, const float *importance, int64_t n_ranges, int64_t first, int64_t last, uint8_t *data,
                     uint16_t *scales) {
    if (!is_valid_source(m, n_ranges) || !is_valid_range(m, first, last)) return INVALID_SIZES;
    const int64_t first_block = first / BLOCK_ROWS;
    Quantisation quantisation = {m, importance, n_ranges, first_block, data, scales};
    pool_lock(); /* with one thread, too, it takes turns with forward passes */
    parallel_for(ceil_div(last, BLOCK_ROWS) - first_block, 1, quantise_blocks, &quantisation);
    pool_unlock();
    return SUCCESS;
}
