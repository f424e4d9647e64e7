/* Matrices as the vector kernels read them: in blocks of 2 * LANES rows, which are divided into units of 8 columns, or 32 if
 * they are quantised. So a block is read from its first byte to its last one. A unit has two halves, of LANES rows each.
 *
 * A vector then holds the weights of LANES rows in one column, so every row's sum has a lane of its own. Half a unit is
 *
 *   FLOAT32_BLOCKS      (8 columns, LANES) float32
 *   FLOAT16_BLOCKS      (8 columns, LANES) float16
 *   BFLOAT16_BLOCKS     (4 pairs of columns, LANES, 2) bfloat16
 *   BFLOAT16_PACKED     the same bfloat16 values in 12 bits: their lower bytes, and 4-bit codes of their upper bytes
 *
 * Trained weights have some 16 different upper bytes (the sign and the upper 7 bits of the exponent), so packing loses
 * nothing: the few weights with another upper byte are listed as escapes. Packed, half a unit holds the lower bytes of the
 * pairs in the order in which `unpack_pairs` interleaves them, and then, for each of its first 4 * LANES bytes, the code of
 * that weight and the code of the weight 4 * LANES bytes further on.
 *
 * Quantised matrices have the codes and scales of a GGUF file. Half a unit is, in this order, each (…, LANES):
 *
 *   Q8_0_BLOCKS         float16 scale; (32 columns) signed bytes
 *   Q6_K_BLOCKS         float16 scale; (2) signed bytes that multiply it, for 16 columns each; (16) lower 4 bits of columns i
 *                       and i + 16; (8) upper 2 bits of columns i, i + 8, i + 16 and i + 24
 *   Q4_K_BLOCKS         float16 scale and minimum; bytes that multiply the one and the other; (16) 4 bits as above
 *   Q5_0_BLOCKS         float16 scale; (16) lower 4 bits as above; (4) upper bits of columns i, i + 4, … and i + 28
 *   Q4_0_BLOCKS         float16 scale; (16) 4 bits as above
 *
 * A weight is the code times the scale, less the minimum. A product of what a file has in so few bits is exact in float32,
 * so whatever is multiplied first, the weight has the bits that the `gguf` package gives for it.
 */
#ifndef KNN_SSD_BLOCKS_H
#define KNN_SSD_BLOCKS_H

#include "kernels.h"
#include "vectors.h"

#define UNIT_COLS 8 /* of floats */
#define BLOCK_ROWS (2 * LANES)
#define HALF (UNIT_COLS * LANES) /* weights of half a unit of floats */
#define UNIT (2 * HALF)
#define QUANTISED_COLS 32 /* of a quantised unit */

INLINE int is_blocks(int64_t kind) { return kind >= FLOAT32_BLOCKS && kind <= Q4_0_BLOCKS; }
INLINE int is_bfloat16(int64_t kind) { return kind == BFLOAT16_BLOCKS || kind == BFLOAT16_PACKED; } /* of those in blocks */
INLINE int is_quantised(int64_t kind) { return kind >= Q8_0_BLOCKS; } /* of those in blocks */
INLINE int64_t unit_cols(int64_t kind) { return is_quantised(kind) ? QUANTISED_COLS : UNIT_COLS; }

INLINE int64_t unit_bytes(int64_t kind) {
    switch (kind) {
    case FLOAT32_BLOCKS: return 4 * UNIT;
    case BFLOAT16_PACKED: return 3 * HALF;
    case Q8_0_BLOCKS: return BLOCK_ROWS * (2 + 32);
    case Q6_K_BLOCKS: return BLOCK_ROWS * (2 + 2 + 16 + 8);
    case Q5_0_BLOCKS: return BLOCK_ROWS * (2 + 16 + 4);
    case Q4_K_BLOCKS: return BLOCK_ROWS * (4 + 2 + 16);
    case Q4_0_BLOCKS: return BLOCK_ROWS * (2 + 16);
    default: return 2 * UNIT;
    }
}

INLINE int64_t num_units(const Matrix *m) { return m->cols / unit_cols(m->kind); }

INLINE const uint8_t *unit_of(const Matrix *m, int64_t block, int64_t unit) {
    return (const uint8_t *)m->data + (block * num_units(m) + unit) * unit_bytes(m->kind);
}

/* A table of 16 bytes in every 16 bytes of a vector. */
INLINE Uints load_table(const uint8_t *table) {
    uint8_t bytes[4 * LANES];
    for (int i = 0; i < 4 * LANES; i += 16) memcpy(bytes + i, table, 16);
    return load_uints(bytes);
}

/* The byte of `table` for each byte of `codes`, which are below 16. */
INLINE Uints look_up(Uints table, Uints codes) {
#if defined(__AVX512BW__)
    return (Uints)_mm512_shuffle_epi8((__m512i)table, (__m512i)codes);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return (Uints)_mm256_shuffle_epi8((__m256i)table, (__m256i)codes);
#elif defined(__aarch64__)
    uint8x16_t tables[2], parts[2];
    memcpy(tables, &table, sizeof table);
    memcpy(parts, &codes, sizeof codes);
    for (int i = 0; i < 2; i++) parts[i] = vqtbl1q_u8(tables[i], parts[i]);
    memcpy(&codes, parts, sizeof codes);
    return codes;
#else
    uint8_t tables[4 * LANES], parts[4 * LANES];
    memcpy(tables, &table, sizeof table);
    memcpy(parts, &codes, sizeof codes);
    for (int i = 0; i < 4 * LANES; i++) parts[i] = tables[parts[i]];
    memcpy(&codes, parts, sizeof codes);
    return codes;
#endif
}

/* In every 16 bytes, the first 8 bytes of `low` (or the last 8, with `last`), each followed by that of `high`. */
INLINE Uints interleave(Uints low, Uints high, const int last) {
#if defined(__AVX512BW__)
    const __m512i a = (__m512i)low, b = (__m512i)high;
    return (Uints)(last ? _mm512_unpackhi_epi8(a, b) : _mm512_unpacklo_epi8(a, b));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i a = (__m256i)low, b = (__m256i)high;
    return (Uints)(last ? _mm256_unpackhi_epi8(a, b) : _mm256_unpacklo_epi8(a, b));
#elif defined(__aarch64__)
    uint8x16_t lows[2], highs[2];
    memcpy(lows, &low, sizeof low);
    memcpy(highs, &high, sizeof high);
    for (int i = 0; i < 2; i++) lows[i] = last ? vzip2q_u8(lows[i], highs[i]) : vzip1q_u8(lows[i], highs[i]);
    memcpy(&low, lows, sizeof low);
    return low;
#else
    uint8_t lows[4 * LANES], highs[4 * LANES], both[4 * LANES];
    memcpy(lows, &low, sizeof low);
    memcpy(highs, &high, sizeof high);
    for (int i = 0; i < 2 * LANES; i++) {
        const int from = i / 8 * 16 + i % 8 + 8 * last;
        both[2 * i] = lows[from], both[2 * i + 1] = highs[from];
    }
    memcpy(&low, both, sizeof low);
    return low;
#endif
}

/* The pairs of bfloat16 values of half a packed unit; those of escapes are wrong. */
INLINE void unpack_pairs(const uint8_t *half, Uints table, Uints pairs[4]) {
    const Uints codes = load_uints(half + 8 * LANES);
    const Uints high[2] = {look_up(table, codes & 0x0f0f0f0fu), look_up(table, codes >> 4 & 0x0f0f0f0fu)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) pairs[i] = interleave(load_uints(half + i / 2 * 4 * LANES), high[i / 2], i % 2);
}

/* Half a quantised unit: weight = code * scale - minimum, with a scale for 16 columns each. */
typedef struct {
    const int8_t *codes; /* (32, LANES) */
    Floats scales[2], minimum;
} Quantised;

/* codes (32, LANES) = codes of 4 bits, each column's byte with that of 16 columns further on; less `offset`. */
INLINE void unpack_nibbles(const uint8_t *nibbles, const int8_t offset, int8_t *codes) {
#pragma GCC unroll 4
    for (int i = 0; i < 16 * LANES; i += 4 * LANES) {
        const Uints both = load_uints(nibbles + i);
        const Codes low = (Codes)(both & 0x0f0f0f0fu) - offset, high = (Codes)(both >> 4 & 0x0f0f0f0fu) - offset;
        memcpy(codes + i, &low, sizeof low);
        memcpy(codes + 16 * LANES + i, &high, sizeof high);
    }
}

/* codes (32, LANES) = codes of 6 bits, less 32. */
INLINE void unpack_6_bits(const uint8_t *nibbles, const uint8_t *upper, int8_t *codes) {
    unpack_nibbles(nibbles, 0, codes);
#pragma GCC unroll 8
    for (int i = 0; i < 32 * LANES; i += 4 * LANES) {
        const Uints two = load_uints(upper + i % (8 * LANES)) >> (2 * (i / (8 * LANES))) & 0x03030303u;
        const Codes all = (Codes)(load_uints(codes + i) | two << 4) - 32;
        memcpy(codes + i, &all, sizeof all);
    }
}

/* codes (32, LANES) = codes of 5 bits, less 16. */
INLINE void unpack_5_bits(const uint8_t *nibbles, const uint8_t *upper, int8_t *codes) {
    const Uints bits = load_uints(upper);
    unpack_nibbles(nibbles, 0, codes);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        const Codes all = (Codes)(load_uints(codes + 4 * LANES * i) | (bits >> i & 0x01010101u) << 4) - 16;
        memcpy(codes + 4 * LANES * i, &all, sizeof all);
    }
}

/* Half a quantised unit; `buffer` (32, LANES) has room for its codes. */
INLINE Quantised read_quantised(const uint8_t *half, const int kind, int8_t *buffer) {
    const Floats scale = load_float16(half);
    const int8_t *bytes = (const int8_t *)half + 2 * LANES; /* after the scale */
    Quantised result = {.codes = kind == Q8_0_BLOCKS ? bytes : buffer, .scales = {scale, scale}};
    if (kind == Q6_K_BLOCKS) {
        result.scales[0] = scale * load_int8(bytes);
        result.scales[1] = scale * load_int8(bytes + LANES);
        unpack_6_bits(half + 4 * LANES, half + 20 * LANES, buffer);
    } else if (kind == Q5_0_BLOCKS) {
        unpack_5_bits(half + 2 * LANES, half + 18 * LANES, buffer);
    } else if (kind == Q4_K_BLOCKS) {
        result.scales[0] = result.scales[1] = scale * load_int8(bytes + 2 * LANES);
        result.minimum = load_float16(bytes) * load_int8(bytes + 3 * LANES);
        unpack_nibbles(half + 6 * LANES, 0, buffer);
    } else if (kind == Q4_0_BLOCKS) {
        unpack_nibbles(half + 2 * LANES, 8, buffer);
    }
    return result;
}

/* The weights of a column of half a quantised unit. */
INLINE Floats quantised_column(const Quantised *q, const int kind, int64_t column) {
    const Floats codes = load_int8(q->codes + column * LANES), scale = q->scales[column / 16];
    return kind == Q4_K_BLOCKS ? fmadd(codes, scale, -q->minimum) : codes * scale;
}

/* The escapes of a block from a unit on. */
typedef struct {
    const Escape *next, *end;
} Escapes;

Escapes escapes_from(const Matrix *m, int64_t block, int64_t unit);

/* Writes a packed unit as BFLOAT16_BLOCKS. `escapes` begins with those of this unit, if it has any, and is moved past them. */
void unpack_unit(const uint8_t *packed, Uints table, int64_t unit, Escapes *escapes, uint16_t *values);

/* Writes `count` units of a block as FLOAT32_BLOCKS, whose units have 8 columns. */
void read_units(const Matrix *m, int64_t block, int64_t first, int64_t count, float *values);

#endif
