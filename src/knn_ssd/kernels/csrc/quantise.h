/* Quantisation to 8 bits, of inputs and of keys and values. */
#ifndef KNN_SSD_QUANTISE_H
#define KNN_SSD_QUANTISE_H

#include <math.h>

#include "vectors.h"

/* Of x (count,), where `count` is a multiple of LANES. */
INLINE float largest_magnitude(const float *x, int64_t count) {
    Floats maxima = {0};
    for (int64_t i = 0; i < count; i += LANES) {
        const Floats magnitude = (Floats)((Uints)load(x + i) & 0x7fffffffu);
        maxima = select_lanes(magnitude > maxima, magnitude, maxima);
    }
    return horizontal_max(maxima);
}

/* Quantises x (count,) to 8 bits with one scale; returns the sum of the bytes. `count` is a multiple of LANES. */
INLINE int32_t quantise_vector(const float *x, int64_t count, int8_t *bytes, float *scale) {
    const float largest = largest_magnitude(x, count), inverse = largest > 0 ? 127 / largest : 0;
    uint32_t total = 0; /* unsigned, for a NaN gives the least int32_t, and two of them overflow */
    for (int64_t i = 0; i < count; i++) {
        int32_t level = (int32_t)rintf(x[i] * inverse);
        bytes[i] = (int8_t)level;
        total += (uint32_t)level;
    }
    *scale = largest / 127;
    return (int32_t)total;
}

#endif
