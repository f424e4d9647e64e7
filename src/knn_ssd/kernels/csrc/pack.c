/* Puts matrices of checkpoints into blocks; see blocks.h. */
#include "blocks.h"
#include "contract.h"
#include "thread_pool.h"

#define SAMPLED_BLOCKS 64 /* at most, whose upper bytes are counted to choose those that get codes */

typedef struct {
    const Matrix *source;
    int64_t kind;
    uint8_t *data;
    const uint8_t *upper_bytes;
    uint8_t codes[256];    /* of the upper bytes */
    uint8_t is_coded[256];
    int64_t *counts;       /* escapes of each block */
    const int64_t *starts;
    Escape *escapes;
} Packing;

/* The row of the source that a row of a block has; beyond the last one it is repeated. */
static int64_t source_row(const Matrix *source, int64_t block, int64_t row) {
    return min_int(block * BLOCK_ROWS + row, source->rows - 1);
}

static void gather_pairs(const Matrix *source, int64_t block, int64_t unit, uint16_t *values) {
    for (int64_t row = 0; row < BLOCK_ROWS; row++) {
        uint16_t *out = values + row / LANES * HALF + row % LANES * 2;
        const uint16_t *weights = (const uint16_t *)source->data + source_row(source, block, row) * source->cols;
        for (int c = 0; c < UNIT_COLS; c += 2) memcpy(out + c * LANES, weights + unit * UNIT_COLS + c, 4);
    }
}

static void gather_floats(const Matrix *source, int64_t block, int64_t unit, float *values) {
    for (int64_t row = 0; row < BLOCK_ROWS; row++) {
        float *out = values + row / LANES * HALF + row % LANES;
        const float *weights = (const float *)source->data + source_row(source, block, row) * source->cols;
        for (int c = 0; c < UNIT_COLS; c++) out[c * LANES] = weights[unit * UNIT_COLS + c];
    }
}

/* Packs half a unit and returns how many of its values are escapes. */
static int64_t pack_half(const Packing *p, const uint16_t *values, uint8_t *bytes) {
    uint8_t *const coded = bytes + 8 * LANES;
    int64_t escapes = 0;
    memset(coded, 0, 4 * LANES);
    for (int vector = 0; vector < 2; vector++, bytes += 4 * LANES)
        for (int last = 0; last < 2; last++) /* in the order in which `interleave` takes the bytes */
            for (int part = 0; part < 4 * LANES; part += 16)
                for (int i = part + 8 * last; i < part + 8 * last + 8; i++, values++) {
                    bytes[i] = (uint8_t)*values;
                    coded[i] |= (uint8_t)(p->codes[*values >> 8] << 4 * vector);
                    escapes += !p->is_coded[*values >> 8];
                }
    return escapes;
}

static void pack_blocks(void *context, int64_t first, int64_t last, int thread) {
    const Packing *p = context;
    const int64_t units = p->source->cols / UNIT_COLS, size = unit_bytes(p->kind);
    (void)thread;
    for (int64_t block = first; block < last; block++) {
        int64_t escapes = 0;
        for (int64_t unit = 0; unit < units; unit++) {
            uint8_t *out = p->data + (block * units + unit) * size;
            uint16_t values[UNIT];
            if (p->kind == FLOAT32_BLOCKS) gather_floats(p->source, block, unit, (float *)(void *)out);
            else gather_pairs(p->source, block, unit, p->kind == BFLOAT16_BLOCKS ? (uint16_t *)(void *)out : values);
            for (int half = 0; p->kind == BFLOAT16_PACKED && half < 2; half++)
                escapes += pack_half(p, values + half * HALF, out + half * size / 2);
        }
        if (p->counts) p->counts[block] = escapes;
    }
}

int knn_ssd_pack(const Matrix *source, int64_t kind, const uint8_t *upper_bytes, void *data, int64_t *counts) {
    const int64_t needed = kind == FLOAT32_BLOCKS ? FLOAT32 : BFLOAT16;
    if (!is_valid_source(source, 1) || source->cols % UNIT_COLS || source->kind != needed || !is_blocks(kind)) return INVALID_SIZES;
    Packing p = {.source = source, .kind = kind, .data = data, .counts = kind == BFLOAT16_PACKED ? counts : NULL};
    for (int i = 0; kind == BFLOAT16_PACKED && i < 16; i++) {
        p.codes[upper_bytes[i]] = (uint8_t)i;
        p.is_coded[upper_bytes[i]] = 1;
    }
    parallel_for(ceil_div(source->rows, BLOCK_ROWS), 1, pack_blocks, &p);
    return SUCCESS;
}

/* The 16 most frequent upper bytes, the most frequent first; the least of those that are equally frequent. */
static void choose_upper_bytes(int64_t *frequencies, uint8_t *upper_bytes) {
    for (int i = 0; i < 16; i++) {
        int best = 0;
        for (int byte = 1; byte < 256; byte++)
            if (frequencies[byte] > frequencies[best]) best = byte;
        upper_bytes[i] = (uint8_t)best;
        frequencies[best] = -1;
    }
}

int knn_ssd_upper_bytes(const Matrix *source, uint8_t *upper_bytes) {
    if (!is_valid_source(source, 1) || source->kind != BFLOAT16) return INVALID_SIZES;
    const uint16_t *weights = source->data;
    const int64_t blocks = ceil_div(source->rows, BLOCK_ROWS), step = ceil_div(blocks, SAMPLED_BLOCKS);
    int64_t frequencies[256] = {0};
    for (int64_t block = 0; block < blocks; block += step)
        for (int64_t row = block * BLOCK_ROWS; row < min_int((block + 1) * BLOCK_ROWS, source->rows); row++)
            for (int64_t c = 0; c < source->cols; c++) frequencies[weights[row * source->cols + c] >> 8]++;
    choose_upper_bytes(frequencies, upper_bytes);
    return SUCCESS;
}

static void list_blocks(void *context, int64_t first, int64_t last, int thread) {
    const Packing *p = context;
    (void)thread;
    for (int64_t block = first; block < last; block++) {
        Escape *next = p->escapes + p->starts[block];
        for (int64_t unit = 0; unit < p->source->cols / UNIT_COLS && next < p->escapes + p->starts[block + 1]; unit++) {
            uint16_t values[UNIT];
            gather_pairs(p->source, block, unit, values);
            for (int64_t i = 0; i < UNIT; i++)
                if (!p->is_coded[values[i] >> 8]) *next++ = (Escape){(uint32_t)unit, (uint16_t)i, values[i]};
        }
    }
}

int knn_ssd_list_escapes(const Matrix *source, const uint8_t *upper_bytes, const int64_t *starts, Escape *escapes) {
    if (!is_valid_source(source, 1) || source->cols % UNIT_COLS || source->kind != BFLOAT16) return INVALID_SIZES;
    Packing p = {.source = source, .starts = starts, .escapes = escapes};
    for (int i = 0; i < 16; i++) p.is_coded[upper_bytes[i]] = 1;
    parallel_for(ceil_div(source->rows, BLOCK_ROWS), 1, list_blocks, &p);
    return SUCCESS;
}
