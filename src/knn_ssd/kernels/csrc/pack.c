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

static void gather_float16(const Matrix *source, int64_t block, int64_t unit, uint16_t *values) {
    for (int64_t row = 0; row < BLOCK_ROWS; row++) {
        uint16_t *out = values + row / LANES * HALF + row % LANES;
        const uint16_t *weights = (const uint16_t *)source->data + source_row(source, block, row) * source->cols;
        for (int c = 0; c < UNIT_COLS; c++) out[c * LANES] = weights[unit * UNIT_COLS + c];
    }
}

/* Half a quantised unit, for one of its LANES rows. */
typedef struct {
    uint8_t *half;
    int64_t lane;
} Lane;

/* Writes 2 bytes of a lane after `offset` bytes of each of the lanes. */
static void put_two(Lane to, int64_t offset, const uint8_t *bytes) {
    memcpy(to.half + offset * LANES + 2 * to.lane, bytes, 2);
}

/* Writes `count` bytes of a lane after `offset` bytes of each of the lanes. */
static void put(Lane to, int64_t offset, const uint8_t *bytes, int count) {
    for (int i = 0; i < count; i++) to.half[(offset + i) * LANES + to.lane] = bytes[i];
}

/* block_q8_0: scale, codes. */
static void pack_q8_0(const uint8_t *row, int64_t unit, Lane to) {
    const uint8_t *from = row + unit * 34;
    put_two(to, 0, from);
    put(to, 2, from + 2, 32);
}

/* block_q5_0: scale, upper bits of all columns, lower 4 bits of columns i and i + 16. */
static void pack_q5_0(const uint8_t *row, int64_t unit, Lane to) {
    const uint8_t *from = row + unit * 22;
    uint8_t bits[4] = {0};
    for (int c = 0; c < 32; c++) bits[c % 4] |= (uint8_t)((from[2 + c / 8] >> (c % 8) & 1) << (c / 4));
    put_two(to, 0, from);
    put(to, 2, from + 6, 16);
    put(to, 18, bits, 4);
}

/* block_q4_0: scale, codes of columns i and i + 16. */
static void pack_q4_0(const uint8_t *row, int64_t unit, Lane to) {
    const uint8_t *from = row + unit * 18;
    put_two(to, 0, from);
    put(to, 2, from + 2, 16);
}

/* block_q4_K, of 256 columns: scale, minimum, 8 times 6 bits for each of the two, and codes of columns i and i + 32. */
static void pack_q4_k(const uint8_t *row, int64_t unit, Lane to) {
    const uint8_t *from = row + unit / 8 * 144, *six = from + 4, *codes = from + 16 + unit % 8 / 2 * 32;
    const int64_t j = unit % 8, shift = unit % 2 * 4;
    const uint8_t scale = (uint8_t)(j < 4 ? six[j] & 63 : (six[j + 4] & 15) | six[j - 4] >> 6 << 4);
    const uint8_t minimum = (uint8_t)(j < 4 ? six[j + 4] & 63 : six[j + 4] >> 4 | six[j] >> 6 << 4);
    uint8_t nibbles[16];
    for (int i = 0; i < 16; i++) nibbles[i] = (uint8_t)((codes[i] >> shift & 15) | (codes[i + 16] >> shift & 15) << 4);
    put_two(to, 0, from);
    put_two(to, 2, from + 2);
    put(to, 4, &scale, 1);
    put(to, 5, &minimum, 1);
    put(to, 6, nibbles, 16);
}

/* block_q6_K, of 256 columns: for each 128 of them, lower 4 bits of columns i and i + 64, then upper 2 bits of columns i,
 * i + 32, i + 64 and i + 96; 16 bytes that multiply the scale, and the scale. */
static void pack_q6_k(const uint8_t *row, int64_t unit, Lane to) {
    const uint8_t *from = row + unit / 8 * 210;
    const int64_t j = unit % 8;
    const uint8_t *lower = from + j / 4 * 64 + j % 2 * 32, *upper = from + 128 + j / 4 * 32;
    uint8_t nibbles[16] = {0}, two_bits[8] = {0};
    for (int i = 0; i < 32; i++) {
        nibbles[i % 16] |= (uint8_t)((lower[i] >> (j % 4 / 2 * 4) & 15) << (i / 16 * 4));
        two_bits[i % 8] |= (uint8_t)((upper[i] >> (j % 4 * 2) & 3) << (i / 8 * 2));
    }
    put_two(to, 0, from + 208);
    put(to, 2, from + 192 + 2 * j, 2);
    put(to, 4, nibbles, 16);
    put(to, 20, two_bits, 8);
}

/* Bytes of a row of a GGUF file's blocks; 0 for a kind or a number of columns that has none. */
static int64_t gguf_row_bytes(const Matrix *source) {
    const int64_t cols = source->cols;
    switch (source->kind) {
    case Q8_0: return cols % 32 ? 0 : cols / 32 * 34;
    case Q5_0: return cols % 32 ? 0 : cols / 32 * 22;
    case Q4_0: return cols % 32 ? 0 : cols / 32 * 18;
    case Q6_K: return cols % 256 ? 0 : cols / 256 * 210;
    case Q4_K: return cols % 256 ? 0 : cols / 256 * 144;
    default: return 0;
    }
}

static void gather_quantised(const Matrix *source, int64_t block, int64_t unit, uint8_t *out) {
    const int64_t half = unit_bytes(source->kind == Q8_0   ? Q8_0_BLOCKS
                                    : source->kind == Q6_K ? Q6_K_BLOCKS
                                    : source->kind == Q5_0 ? Q5_0_BLOCKS
                                    : source->kind == Q4_K ? Q4_K_BLOCKS
                                                           : Q4_0_BLOCKS) / 2;
    for (int64_t row = 0; row < BLOCK_ROWS; row++) {
        const uint8_t *from = (const uint8_t *)source->data + source_row(source, block, row) * gguf_row_bytes(source);
        const Lane to = {out + row / LANES * half, row % LANES};
        if (source->kind == Q8_0) pack_q8_0(from, unit, to);
        else if (source->kind == Q6_K) pack_q6_k(from, unit, to);
        else if (source->kind == Q5_0) pack_q5_0(from, unit, to);
        else if (source->kind == Q4_K) pack_q4_k(from, unit, to);
        else pack_q4_0(from, unit, to);
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
    const int64_t units = p->source->cols / unit_cols(p->kind), size = unit_bytes(p->kind);
    (void)thread;
    for (int64_t block = first; block < last; block++) {
        int64_t escapes = 0;
        for (int64_t unit = 0; unit < units; unit++) {
            uint8_t *out = p->data + (block * units + unit) * size;
            uint16_t values[UNIT];
            if (is_quantised(p->kind)) gather_quantised(p->source, block, unit, out);
            else if (p->kind == FLOAT32_BLOCKS) gather_floats(p->source, block, unit, (float *)(void *)out);
            else if (p->kind == FLOAT16_BLOCKS) gather_float16(p->source, block, unit, (uint16_t *)(void *)out);
            else gather_pairs(p->source, block, unit, p->kind == BFLOAT16_BLOCKS ? (uint16_t *)(void *)out : values);
            for (int half = 0; p->kind == BFLOAT16_PACKED && half < 2; half++)
                escapes += pack_half(p, values + half * HALF, out + half * size / 2);
        }
        if (p->counts) p->counts[block] = escapes;
    }
}

/* The row-major kind that blocks of a kind are made from. */
static int64_t source_kind(int64_t kind) {
    switch (kind) {
    case FLOAT32_BLOCKS: return FLOAT32;
    case FLOAT16_BLOCKS: return FLOAT16;
    case Q8_0_BLOCKS: return Q8_0;
    case Q6_K_BLOCKS: return Q6_K;
    case Q5_0_BLOCKS: return Q5_0;
    case Q4_K_BLOCKS: return Q4_K;
    case Q4_0_BLOCKS: return Q4_0;
    default: return BFLOAT16;
    }
}

int knn_ssd_pack(const Matrix *source, int64_t kind, const uint8_t *upper_bytes, void *data, int64_t *counts) {
    const int is_known = is_blocks(kind) && source->kind == source_kind(kind) && source->data;
    if (!is_known || source->rows <= 0 || source->cols <= 0 || source->cols % LANES) return INVALID_SIZES;
    if (is_quantised(kind) && !gguf_row_bytes(source)) return INVALID_SIZES;
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
