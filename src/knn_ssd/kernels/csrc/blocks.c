#include "blocks.h"

#include "contract.h"
#include "thread_pool.h"

Escapes escapes_from(const Matrix *m, int64_t block, int64_t unit) {
    if (m->kind != BFLOAT16_PACKED) return (Escapes){0};
    Escapes result = {m->escapes + m->escape_starts[block], m->escapes + m->escape_starts[block + 1]};
    while (result.next < result.end && result.next->unit < unit) result.next++;
    return result;
}

void unpack_unit(const uint8_t *packed, Uints table, int64_t unit, Escapes *escapes, uint16_t *values) {
    for (int half = 0; half < 2; half++) {
        Uints pairs[4];
        unpack_pairs(packed + half * 3 * HALF / 2, table, pairs);
        memcpy(values + half * HALF, pairs, sizeof pairs);
    }
    for (; escapes->next < escapes->end && escapes->next->unit == unit; escapes->next++)
        values[escapes->next->index] = escapes->next->bits;
}

/* Writes a unit of pairs as columns of float32. */
static void widen_pairs(const uint16_t *pairs, float *values) {
    for (int i = 0; i < UNIT_COLS; i++) { /* pairs of columns of two halves */
        const Uints both = load_uints(pairs + 2 * LANES * i);
        store(values + 2 * LANES * i, (Floats)(both << 16));
        store(values + 2 * LANES * i + LANES, (Floats)(both & 0xffff0000u));
    }
}

/* Writes a quantised unit as 4 units of float32. */
INLINE void widen_quantised(const uint8_t *unit, const int kind, float *values) {
    for (int half = 0; half < 2; half++) {
        int8_t buffer[QUANTISED_COLS * LANES];
        const Quantised quantised = read_quantised(unit + half * unit_bytes(kind) / 2, kind, buffer);
        for (int c = 0; c < QUANTISED_COLS; c++)
            store(values + c / UNIT_COLS * UNIT + half * HALF + c % UNIT_COLS * LANES, quantised_column(&quantised, kind, c));
    }
}

/* Writes a unit of float16, or a quantised one, as float32. */
static void widen_unit(const uint8_t *unit, int64_t kind, float *values) {
    switch (kind) {
    case Q8_0_BLOCKS: widen_quantised(unit, Q8_0_BLOCKS, values); break;
    case Q6_K_BLOCKS: widen_quantised(unit, Q6_K_BLOCKS, values); break;
    case Q5_0_BLOCKS: widen_quantised(unit, Q5_0_BLOCKS, values); break;
    case Q4_K_BLOCKS: widen_quantised(unit, Q4_K_BLOCKS, values); break;
    case Q4_0_BLOCKS: widen_quantised(unit, Q4_0_BLOCKS, values); break;
    default:
        for (int i = 0; i < UNIT; i += LANES) store(values + i, load_float16(unit + 2 * i));
    }
}

void read_units(const Matrix *m, int64_t block, int64_t first, int64_t count, float *values) {
    const uint8_t *unit = unit_of(m, block, first);
    Escapes escapes = escapes_from(m, block, first);
    const Uints table = m->kind == BFLOAT16_PACKED ? load_table(m->upper_bytes) : (Uints){0};
    for (int64_t i = 0; i < count; i++, unit += unit_bytes(m->kind), values += unit_cols(m->kind) * BLOCK_ROWS) {
        uint16_t pairs[UNIT];
        if (m->kind == BFLOAT16_BLOCKS) memcpy(pairs, unit, sizeof pairs);
        else if (m->kind == BFLOAT16_PACKED) unpack_unit(unit, table, first + i, &escapes, pairs);
        if (m->kind == FLOAT32_BLOCKS) memcpy(values, unit, sizeof(float) * UNIT);
        else if (m->kind == BFLOAT16_BLOCKS || m->kind == BFLOAT16_PACKED) widen_pairs(pairs, values);
        else widen_unit(unit, m->kind, values);
    }
}

static void read_row(const Matrix *m, int64_t row, float *values) {
    const int64_t width = unit_cols(m->kind);
    for (int64_t unit = 0; unit < num_units(m); unit++) {
        float columns[QUANTISED_COLS * BLOCK_ROWS];
        const float *of_row = columns + row % BLOCK_ROWS / LANES * HALF + row % LANES;
        read_units(m, row / BLOCK_ROWS, unit, 1, columns);
        for (int c = 0; c < width; c++) values[unit * width + c] = of_row[c / UNIT_COLS * UNIT + c % UNIT_COLS * LANES];
    }
}

typedef struct {
    const Matrix *m;
    const int64_t *rows;
    float *values;
} Reading;

static void read_some(void *context, int64_t first, int64_t last, int thread) {
    const Reading *r = context;
    (void)thread;
    for (int64_t i = first; i < last; i++) read_row(r->m, r->rows[i], r->values + i * r->m->cols);
}

int knn_ssd_read_rows(const Matrix *m, const int64_t *rows, int64_t n, float *values) {
    if (!is_valid_blocks(m)) return INVALID_SIZES;
    for (int64_t i = 0; i < n; i++)
        if (rows[i] < 0 || rows[i] >= m->rows) return INVALID_SIZES;
    Reading reading = {m, rows, values};
    parallel_for(n, n > 8 ? 4 : n, read_some, &reading);
    return SUCCESS;
}
