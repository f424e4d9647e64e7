/* Float matrices as the vector kernels read them: in blocks of 2 * LANES rows, which are divided into units of 8 columns. So
 * a block is read from its first byte to its last one. A unit has two halves, of LANES rows each.
 *
 * A vector then holds the weights of LANES rows in one column, so every row's sum has a lane of its own. Half a unit is
 *
 *   FLOAT32_BLOCKS      (8 columns, LANES) float32
 *   BFLOAT16_BLOCKS     (4 pairs of columns, LANES, 2) bfloat16
 *   BFLOAT16_PACKED     the same bfloat16 values in 12 bits: their lower bytes, and 4-bit codes of their upper bytes
 *
 * Trained weights have some 16 different upper bytes (the sign and the upper 7 bits of the exponent), so packing loses
 * nothing: the few weights with another upper byte are listed as escapes. Packed, half a unit holds the lower bytes of the
 * pairs in the order in which `unpack_pairs` interleaves them, and then, for each of its first 4 * LANES bytes, the code of
 * that weight and the code of the weight 4 * LANES bytes further on.
 */
#ifndef KNN_SSD_BLOCKS_H
#define KNN_SSD_BLOCKS_H

#include "kernels.h"
#include "vectors.h"

#define UNIT_COLS 8
#define BLOCK_ROWS (2 * LANES)
#define HALF (UNIT_COLS * LANES) /* weights of half a unit */
#define UNIT (2 * HALF)

INLINE int is_blocks(int64_t kind) { return kind == FLOAT32_BLOCKS || kind == BFLOAT16_BLOCKS || kind == BFLOAT16_PACKED; }

INLINE int64_t unit_bytes(int64_t kind) {
    return kind == FLOAT32_BLOCKS ? 4 * UNIT : kind == BFLOAT16_BLOCKS ? 2 * UNIT : 3 * HALF;
}

INLINE int64_t num_units(const Matrix *m) { return m->cols / UNIT_COLS; }

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

/* The escapes of a block from a unit on. */
typedef struct {
    const Escape *next, *end;
} Escapes;

Escapes escapes_from(const Matrix *m, int64_t block, int64_t unit);

/* Writes a packed unit as BFLOAT16_BLOCKS. `escapes` begins with those of this unit, if it has any, and is moved past them. */
void unpack_unit(const uint8_t *packed, Uints table, int64_t unit, Escapes *escapes, uint16_t *values);

/* Writes `count` units of a block as FLOAT32_BLOCKS. */
void read_units(const Matrix *m, int64_t block, int64_t first, int64_t count, float *values);

#endif
