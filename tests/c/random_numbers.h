/* Random numbers that need no library, so that they are the same on all processors. */
#ifndef RANDOM_NUMBERS_H
#define RANDOM_NUMBERS_H

#include <stdint.h>

static _Thread_local uint64_t state;

static void seed_with(uint64_t seed) { state = seed * 0x9e3779b97f4a7c15u + 1; }

static uint64_t random_bits(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static int64_t random_below(int64_t n) { return (int64_t)(random_bits() >> 11) % n; }

/* In [-1, 1). */
static float random_float(void) { return (float)(int32_t)(random_bits() >> 32) / 2147483648.0f; }

#endif
