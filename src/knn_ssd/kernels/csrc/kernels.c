/* The sublayers of a Llama-like decoder for few rows at a time, on the processor.
 *
 * A row's result is the same bits whatever other rows stand beside it, how many threads work, and where a block
 * begins: every sum runs in an order that depends on nothing but the row itself. So a block that verifies eight drafted
 * tokens gives what eight single steps would have given. Activations, keys and values are float32; weights are read as
 * they lie in the checkpoint, float32 or bfloat16, or as 4-bit copies for drafting.
 *
 * Matrices are (rows, cols), row-major: y[i] = dot(weight row i, x) + bias[i].
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <omp.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#if defined(__linux__) && defined(__AVX512BW__) && defined(__AVX512BF16__) && defined(__AMX_BF16__)
#define HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
#define STEP (2 * LANES) /* columns that the inner loop takes at once; cols must be a multiple of 32 */
#define STRETCH 512      /* columns whose inputs stay in the nearest cache */
#define PORTION 32          /* matrix rows that one thread takes at once */
#define FETCH 32         /* matrix rows that are fetched ahead */
#define AHEAD 4096       /* bytes of a 4-bit matrix that are fetched ahead */
#define LOW_AHEAD 2048   /* bytes of keys and values of 8 bits that are fetched ahead */
#define MOST_ROWS 8      /* input rows that are multiplied with a matrix row while it is at hand */
#define GROUP 64         /* columns that share a scale in a 4-bit matrix */
#define INLINE static inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));
typedef Floats FloatsAt __attribute__((aligned(4), may_alias));
typedef Words WordsAt __attribute__((aligned(2), may_alias));
typedef Bytes BytesAt __attribute__((aligned(1), may_alias));

enum Kind { FLOAT32 = 0, BFLOAT16 = 1, INT4 = 2 };

typedef struct {
    const void *data;       /* (rows, cols); INT4: bytes, see `pack` */
    const uint16_t *scales; /* INT4: (bundles, ceil(cols / GROUP), LANES, 2) bfloat16, w = q * scale + zero */
    const float *bias;      /* (rows,) or null */
    int64_t rows, cols, kind;
    float *seen;            /* (cols,) or null; squares of the inputs are added, if it is the first that shares them */
} Matrix;

typedef struct {
    Matrix q, k, v, o;
    const float *norm, *q_norm, *k_norm; /* (D,), (head_dim,) or null */
    double epsilon, scale;
    int64_t heads, kv_heads, head_dim, rotary, window; /* window 0: no limit */
} Attention;

typedef struct {
    Matrix gate, up, down;
    const float *norm;
    double epsilon;
} Mlp;

/* Keys and values, and the same rounded to 8 bits: these are what low-bit attentions read and write. */
typedef struct {
    float *keys, *values;              /* (…, head_dim) */
    int8_t *low_keys, *low_values;     /* likewise */
    float *key_scales, *value_scales;  /* (…,) */
} Cache;

/* Where `count` rows of a pass stand; rows of several caches may run together. In a rehearsal (`run` > 0) nothing is
 * written to the cache: row i sees the cached keys up to the start of its run of `run` rows, and the pass's own from
 * there. */
typedef struct {
    const float *cosines, *sines; /* (context, rotary) */
    Cache cache;                  /* (layers, kv_heads, capacity, …); of one layer within an attention */
    int64_t capacity, position, run, count;
} Place;

/* ---- memory that a thread keeps between calls ---- */

static _Thread_local struct {
    char *data;
    size_t size, used;
} arena;

static void arena_begin(size_t size) {
    if (arena.size < size) {
        free(arena.data);
        arena.data = aligned_alloc(64, (size + 63) / 64 * 64);
        arena.size = arena.data ? size : 0;
        if (!arena.data) abort();
    }
    arena.used = 0;
}

static void *take(size_t bytes) {
    void *result = arena.data + arena.used;
    arena.used += (bytes + 63) / 64 * 64;
    return result;
}

static int64_t groups_of(const Matrix *m) { return (m->cols + GROUP - 1) / GROUP; }

static size_t tiled_memory(const Matrix *m, int64_t n);

static size_t linear_memory(const Matrix *m, int64_t n) {
    return (size_t)n * (m->cols * 4 + groups_of(m) * (GROUP + 8)) + 512 + tiled_memory(m, n);
}

/* ---- vectors ---- */

INLINE float sum_of(Floats a) {
    float part[LANES];
    memcpy(part, &a, sizeof a);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    return part[0];
}

INLINE Floats load(const float *p) { return *(const FloatsAt *)p; }
INLINE void store(float *p, Floats a) { *(FloatsAt *)p = a; }

INLINE Floats widen(const int8_t *p) { /* compilers take many instructions for it where they are not told these */
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__)
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    return __builtin_convertvector(__builtin_convertvector(*(const BytesAt *)p, Ints), Floats);
#endif
}

INLINE Floats exponential(Floats x) { /* as in the Cephes library; relative error about 1e-7 */
    const Floats low = (Floats){0} - 87.0f, high = (Floats){0} + 88.0f;
    x = (Floats)(((Words)x & (Words)(x > low)) | ((Words)low & ~(Words)(x > low)));
    x = (Floats)(((Words)x & (Words)(x < high)) | ((Words)high & ~(Words)(x < high)));
    Floats y = x * 1.44269504f;
    Ints n = __builtin_convertvector(y + (Floats)(((Words)y & 0x80000000u) | (Words)((Floats){0} + 0.5f)), Ints);
    Floats f = __builtin_convertvector(n, Floats);
    x = x - f * 0.693359375f + f * 2.12194440e-4f;
    Floats p = (Floats){0} + 1.9875691500e-4f;
    p = p * x + 1.3981999507e-3f;
    p = p * x + 8.3334519073e-3f;
    p = p * x + 4.1665795894e-2f;
    p = p * x + 1.6666665459e-1f;
    p = p * x + 5.0000001201e-1f;
    p = p * x * x + x + 1.0f;
    return p * (Floats)((n + 127) << 23);
}

INLINE float bfloat(uint16_t bits) {
    uint32_t word = (uint32_t)bits << 16;
    float result;
    memcpy(&result, &word, 4);
    return result;
}

/* ---- inputs of a linear, in the order in which its kernel reads them ---- */

typedef struct {
    float *blocks;      /* parts of up to MOST_ROWS rows: (cols / STEP, rows of the part, STEP) */
    int8_t *bytes;      /* (n, groups, GROUP) rounded to 8 bits */
    float *byte_scales; /* (n, groups) */
    float *group_sums;  /* likewise; sums of the rounded values */
    uint16_t *halves;   /* for the tile unit, see there */
} Input;

/* One row into its part. A bfloat16 kernel takes of every STEP columns the even ones first, then the odd ones. */
static void arrange_row(const float *x, float *to, int64_t cols, int64_t rows, int split) {
    for (int64_t c = 0; c < cols; c += STEP, to += rows * STEP)
        for (int i = 0; i < LANES; i++) {
            to[i] = x[c + (split ? 2 * i : i)];
            to[LANES + i] = x[c + (split ? 2 * i + 1 : LANES + i)];
        }
}

/* The first row of a part when n rows are cut into parts of as many as are multiplied at once. */
INLINE int64_t part_start(int64_t n, int64_t part) { return part * MOST_ROWS < n ? part * MOST_ROWS : n; }

/* x (count,) rounded to 8 bits with one scale; gives the sum of the bytes. */
static int32_t round_vector(const float *x, int64_t count, int8_t *bytes, float *scale) {
    float most = 0;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < count; i++) {
        float size = fabsf(x[i]);
        most = size > most ? size : most;
    }
    float inverse = most > 0 ? 127 / most : 0;
    int32_t total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < count; i++) {
        int32_t level = (int32_t)rintf(x[i] * inverse);
        bytes[i] = (int8_t)level;
        total += level;
    }
    *scale = most / 127;
    return total;
}

static void round_group(const float *x, int64_t count, int8_t *bytes, float *scale, float *sum) {
    int32_t total = round_vector(x, count, bytes, scale);
    memset(bytes + count, 0, GROUP - count);
    *sum = *scale * (float)total;
}

/* What a thread keeps from one portion of a matrix to the next.
 * `cold`: nobody has fetched the portion's beginning; `rows`, `columns`: how tiles are shaped, 0 if they are not. */
typedef struct {
    int cold;
    int64_t rows, columns;
} Worker;

/* ---- the tile unit (AMX) ----
 *
 * It multiplies 16 matrix rows with up to 16 columns of inputs at once, 64 bytes deep, and adds every sum's terms in the
 * order of the matrix's columns, whatever stands in the other rows and columns. So all rows must go through it, or none.
 *
 * Its inputs are bfloat16. A float32 is the sum of two of them but for a 2^-17th of it at most. They stand in columns of
 * their own, and their sums are added at the end.
 */

static int uses_tiles;

#ifdef HAS_TILES

#define SIDE 16                    /* rows, and columns, of a tile */
#define BLOCK SIDE                 /* input rows whose halves are multiplied at once */
#define MOST_COLUMNS (2 * SIDE)    /* that they take */
#define AHEAD_STEPS 12             /* steps of 32 columns that a matrix is fetched ahead */
#define MOST_STEPS 64              /* of a region */
#define MOST_BLOCKS 8              /* that a region is multiplied with */

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} Shapes;

/* Sums are tiles 0 to 3, (rows, columns); 4 and 5 parts of the matrix, 6 and 7 of the input. */
static void shape_tiles(Worker *worker, int64_t rows, int64_t columns) {
    if (worker->rows == rows && worker->columns == columns) return;
    worker->rows = rows, worker->columns = columns;
    Shapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shapes.rows[i] = (uint8_t)(i < 6 ? rows : SIDE);
        shapes.bytes[i] = (uint16_t)(i == 4 || i == 5 ? 64 : 4 * columns);
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
}

/* Columns of an input tile when a block has so many in all. */
INLINE int64_t tile_columns(int64_t columns) { return columns < SIDE ? columns : SIDE; }

static size_t tiled_memory(const Matrix *m, int64_t n) {
    if (!uses_tiles) return 0;
    return (size_t)m->cols * 4 * (n + BLOCK) + 128;
}

/* Rows become columns. */
INLINE void transpose(__m512i a[SIDE]) {
    __m512i b[SIDE];
#pragma GCC unroll 8
    for (int i = 0; i < SIDE; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < SIDE; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* a[4 * j + i] holds, in its quarter k, column 4 * k + i of rows 4 * j and on */
        __m512i even = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), odd = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
        __m512i even2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
        __m512i odd2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
        b[i] = _mm512_shuffle_i32x4(even, even2, 0x88);
        b[8 + i] = _mm512_shuffle_i32x4(even, even2, 0xdd);
        b[4 + i] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
        b[12 + i] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; i++) a[i] = b[i];
}

/* The halves of 32 floats, each as 16 pairs. */
INLINE void split(const float *x, __m512i halves[2]) {
    __m512 left[2] = {_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16)};
    halves[0] = (__m512i)_mm512_cvtne2ps_pbh(left[1], left[0]);
    for (int i = 0; i < 2; i++) {
        __m256i taken = i ? _mm512_extracti64x4_epi64(halves[0], 1) : _mm512_castsi512_si256(halves[0]);
        left[i] -= (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(taken), 16);
    }
    halves[1] = (__m512i)_mm512_cvtne2ps_pbh(left[1], left[0]);
}

/* (blocks, cols / 32, tiles of the block, 16 pairs of columns, columns of the tile, 2): a block's columns are the first
 * halves of its rows, then the second ones. */
static void arrange_halves(const float *x, int64_t n, int64_t cols, uint16_t *to) {
#pragma omp parallel for if (n * cols > 32768)
    for (int64_t step = 0; step < cols / 32; step++)
        for (int64_t first = 0; first < n; first += BLOCK) {
            int64_t rows = n - first < BLOCK ? n - first : BLOCK, columns = 2 * rows, width = tile_columns(columns);
            int64_t tiles = (columns + width - 1) / width;
            uint32_t *at = (uint32_t *)(to + 2 * first * cols) + step * tiles * SIDE * width;
            __m512i every[MOST_COLUMNS];
            for (int64_t r = 0; r < rows; r++) {
                __m512i halves[2];
                split(x + (first + r) * cols + step * 32, halves);
                every[r] = halves[0], every[rows + r] = halves[1];
            }
            for (int64_t c = columns; c < tiles * SIDE; c++) every[c] = _mm512_setzero_si512();
            for (int64_t t = 0; t < tiles; t++) {
                transpose(every + t * SIDE);
                for (int k = 0; k < SIDE; k++, at += width)
                    _mm512_mask_storeu_epi32(at, (__mmask16)((1u << width) - 1), every[t * SIDE + k]);
            }
        }
}

/* What is brought into the second cache while a matrix is multiplied, line by line: `rows` of it from `ahead` on, each so
 * many steps long, `turn` steps of which are left before what comes next, `then` bytes on. */
typedef struct {
    const char *ahead;
    int64_t rows, turn, then;
} Fetch;

/* sums (16 or, as a pair of tiles, 32 matrix rows, 1 or 2 times width), which more columns are added to unless `begin`;
 * the last 16 may be fewer, as tiles are shaped. */
INLINE void dots_tiled(const char *data, int64_t cols, int64_t steps, const uint16_t *x, int64_t width, const int pair,
                       const int two, int begin, Fetch fetch, float *sums) {
    const int64_t stride = 4 * width * (1 + two);
    float *const at[4] = {sums, sums + width, sums + SIDE * (1 + two) * width, sums + SIDE * (1 + two) * width + width};
    if (begin) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, at[0], stride);
        if (two) _tile_loadd(1, at[1], stride);
        if (pair) _tile_loadd(2, at[2], stride);
        if (pair && two) _tile_loadd(3, at[3], stride);
    }
    for (int64_t step = 0; step < steps; step++, data += 64, x += (1 + two) * SIDE * width * 2) {
        for (int64_t i = 0; i < fetch.rows; i++) _mm_prefetch(fetch.ahead + i * 2 * cols, _MM_HINT_T1);
        fetch.ahead += --fetch.turn ? 64 : fetch.then;
        _tile_loadd(6, x, 4 * width);
        _tile_loadd(4, data, 2 * cols);
        _tile_dpbf16ps(0, 4, 6);
        if (two) {
            _tile_loadd(7, x + SIDE * width * 2, 4 * width);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (pair) {
            _tile_loadd(5, data + SIDE * 2 * cols, 2 * cols);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (pair && two) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, at[0], stride);
    if (two) _tile_stored(1, at[1], stride);
    if (pair) _tile_stored(2, at[2], stride);
    if (pair && two) _tile_stored(3, at[3], stride);
}

typedef void (*DotsTiled)(const char *, int64_t, int64_t, const uint16_t *, int64_t, int, Fetch, float *);
#define DOTS_TILED(pair, two)                                                                                          \
    static __attribute__((noinline)) void dots_tiled_##pair##two(const char *data, int64_t cols, int64_t steps,       \
                                                                 const uint16_t *x, int64_t width, int begin,         \
                                                                 Fetch fetch, float *sums) {                          \
        dots_tiled(data, cols, steps, x, width, pair, two, begin, fetch, sums);                                       \
    }
DOTS_TILED(0, 0) DOTS_TILED(0, 1) DOTS_TILED(1, 0) DOTS_TILED(1, 1)
static const DotsTiled DOTS_TILED_OF[2][2] = {{dots_tiled_00, dots_tiled_01}, {dots_tiled_10, dots_tiled_11}};

/* y (rows, some), its rows `stride` apart, from sums (SIDE, columns) of all halves. */
INLINE void add_halves(const float *sums, int64_t columns, int64_t rows, int64_t some, float *y, int64_t stride) {
    __m512 whole[SIDE];
#pragma GCC unroll 16
    for (int k = 0; k < SIDE; k++, sums += columns)
        whole[k] = _mm512_loadu_ps(sums) + _mm512_loadu_ps(sums + rows);
    transpose((__m512i *)whole);
    for (int64_t j = 0; j < rows; j++)
        _mm512_mask_storeu_ps(y + j * stride, (__mmask16)((1u << some) - 1), whole[j]);
}

/* The matrix is read once, a region of its rows and columns at a time, for all blocks. While the first block waits for a
 * region, the others would have nothing to read: so they bring in the next one, each a part of its rows. A block alone, and
 * the first block of a thread's first region (`cold`), fetch for themselves. */
static Fetch fetch_for(int64_t block, int64_t blocks, const char *region, const char *next, int64_t cols, int64_t steps,
                       int64_t rows, int cold) {
    if (block == 0) {
        int64_t lead = AHEAD_STEPS < steps ? AHEAD_STEPS : steps - 1;
        return (Fetch){region + lead * 64, cold || blocks == 1 ? rows : 0, steps - lead, next - (region + (steps - 1) * 64)};
    }
    int64_t from = (block - 1) * rows / (blocks - 1), to = block * rows / (blocks - 1);
    return (Fetch){next + from * 2 * cols, to - from, INT64_MAX, 0};
}

static void bfloats_tiled(const Matrix *m, int64_t first, int64_t count, const Input *in, int64_t n, Worker *worker,
                          float *y) {
    const int64_t cols = m->cols, total = cols / 32, stretches = (total + MOST_STEPS - 1) / MOST_STEPS;
    const int pair = count == 2 * SIDE;
    const char *data = (const char *)m->data + first * cols * 2;
    float sums[MOST_BLOCKS][2 * SIDE * MOST_COLUMNS + 2 * SIDE] __attribute__((aligned(64)));
    for (int64_t start = 0; start < n; start += MOST_BLOCKS * BLOCK) {
        int64_t left = n - start < MOST_BLOCKS * BLOCK ? n - start : MOST_BLOCKS * BLOCK, blocks = (left + BLOCK - 1) / BLOCK;
        for (int64_t s = 0; s < stretches; s++) {
            int64_t done = total * s / stretches, steps = total * (s + 1) / stretches - done;
            const char *region = data + done * 64, *next = s + 1 < stretches ? region + steps * 64 : data + count * cols * 2;
            for (int64_t b = 0; b < blocks; b++) {
                int64_t r = start + b * BLOCK, rows = n - r < BLOCK ? n - r : BLOCK, width = tile_columns(2 * rows);
                int two = 2 * rows > SIDE;
                const uint16_t *x = in->halves + 2 * r * cols + done * (1 + two) * SIDE * width * 2;
                Fetch fetch = fetch_for(b, blocks, region, next, cols, steps, count, worker->cold && !start && !s);
                if (pair) {
                    shape_tiles(worker, SIDE, width);
                    DOTS_TILED_OF[1][two](region, cols, steps, x, width, !s, fetch, sums[b]);
                } else
                    for (int64_t i = 0; i < count; i += SIDE, fetch.rows = 0) {
                        shape_tiles(worker, count - i < SIDE ? count - i : SIDE, width);
                        DOTS_TILED_OF[0][two](region + i * cols * 2, cols, steps, x, width, !s, fetch,
                                              sums[b] + i * width * (1 + two));
                    }
                for (int64_t k = 0; k < count && s + 1 == stretches; k += SIDE)
                    add_halves(sums[b] + k * width * (1 + two), width * (1 + two), rows, count - k < SIDE ? count - k : SIDE,
                               y + r * m->rows + first + k, m->rows);
            }
        }
    }
}

/* Whether the system lets this process use the tiles. */
static int tiles_granted(void) {
    const long ask = 0x1023, data = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    return syscall(SYS_arch_prctl, ask, data) == 0;
}

#else

static size_t tiled_memory(const Matrix *m, int64_t n) { return 0; }
static int tiles_granted(void) { return 0; }

#endif

void knn_ssd_enable_tiles(int64_t wanted) { uses_tiles = wanted && tiles_granted(); }

int64_t knn_ssd_uses_tiles(void) { return uses_tiles; }

/* The matrices that share an input are all of one kind, or 4-bit beside it. */
static Input prepare(const float *x, int64_t n, const Matrix *m, int kinds) {
    Input in = {0};
    int64_t cols = m->cols, groups = groups_of(m), parts = (n + MOST_ROWS - 1) / MOST_ROWS;
#ifdef HAS_TILES
    if (uses_tiles && kinds & 1 << BFLOAT16) {
        in.halves = take((size_t)cols * 4 * (n + BLOCK));
        arrange_halves(x, n, cols, in.halves);
        kinds &= ~(1 << BFLOAT16);
    }
    if (!kinds) return in;
#endif
    if (kinds & ~(1 << INT4)) in.blocks = take((size_t)n * cols * 4);
    if (kinds & 1 << INT4) {
        in.bytes = take((size_t)n * groups * GROUP);
        in.byte_scales = take((size_t)n * groups * 4);
        in.group_sums = take((size_t)n * groups * 4);
    }
#pragma omp parallel for if (n * cols > 8192)
    for (int64_t part = 0; part < parts; part++) {
        int64_t first = part_start(n, part), rows = part_start(n, part + 1) - first;
        for (int64_t r = first; r < first + rows; r++) {
            if (in.blocks)
                arrange_row(x + r * cols, in.blocks + first * cols + (r - first) * STEP, cols, rows,
                            kinds & 1 << BFLOAT16);
            for (int64_t g = 0; in.bytes && g < groups; g++) {
                int64_t start = g * GROUP, count = cols - start < GROUP ? cols - start : GROUP;
                round_group(x + r * cols + start, count, in.bytes + (r * groups + g) * GROUP,
                            in.byte_scales + r * groups + g, in.group_sums + r * groups + g);
            }
        }
    }
    return in;
}

/* ---- dot products of NB matrix rows with MB input rows ---- */

INLINE void dots(const char *data, int kind, int64_t cols, int64_t steps, const float *x, Floats *sums, const int NB,
                 const int MB) {
    Floats sum[4][8];
    const int64_t size = kind == BFLOAT16 ? 2 : 4;
#pragma GCC unroll 4
    for (int i = 0; i < NB; i++)
#pragma GCC unroll 8
        for (int r = 0; r < MB; r++) sum[i][r] = sums[i * MB + r];
    for (int64_t s = 0; s < steps; s++, data += STEP * size, x += MB * STEP) {
        Floats first[4], second[4];
#pragma GCC unroll 4
        for (int i = 0; i < NB; i++) {
            const char *at = data + i * cols * size;
            __builtin_prefetch(at + FETCH * cols * size, 0, 2); /* of rows to come, into the second cache */
            if (kind == BFLOAT16) {
                Words pairs = *(const WordsAt *)at;
                first[i] = (Floats)(pairs << 16);
                second[i] = (Floats)(pairs & 0xffff0000u);
            } else {
                first[i] = load((const float *)at);
                second[i] = load((const float *)at + LANES);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < MB; r++)
#pragma GCC unroll 4
            for (int i = 0; i < NB; i++) {
                sum[i][r] += first[i] * load(x + r * STEP);
                sum[i][r] += second[i] * load(x + r * STEP + LANES);
            }
    }
#pragma GCC unroll 4
    for (int i = 0; i < NB; i++)
#pragma GCC unroll 8
        for (int r = 0; r < MB; r++) sums[i * MB + r] = sum[i][r];
}

/* For `count` matrix rows from `data` on: a stretch of `steps` steps is added to sums (count, MB). */
#define DOTS(kind, NB, MB)                                                                                           \
    static void dots_##kind##_##NB##_##MB(const char *data, int64_t cols, int64_t steps, int64_t count, const float *x, \
                                          Floats *sums) {                                                            \
        int64_t i = 0, size = cols * (kind == BFLOAT16 ? 2 : 4);                                                      \
        for (; i + NB <= count; i += NB) dots(data + i * size, kind, cols, steps, x, sums + i * MB, NB, MB);          \
        for (; i < count; i++) dots(data + i * size, kind, cols, steps, x, sums + i * MB, 1, MB);                     \
    }
#define DOTS_FOR(kind) \
    DOTS(kind, 4, 1) DOTS(kind, 4, 2) DOTS(kind, 2, 3) DOTS(kind, 2, 4) DOTS(kind, 2, 5) DOTS(kind, 2, 6) DOTS(kind, 1, 7) DOTS(kind, 1, 8)
DOTS_FOR(FLOAT32)
DOTS_FOR(BFLOAT16)

typedef void (*Dots)(const char *, int64_t, int64_t, int64_t, const float *, Floats *);
#define DOTS_TABLE(kind) \
    {dots_##kind##_4_1, dots_##kind##_4_2, dots_##kind##_2_3, dots_##kind##_2_4, dots_##kind##_2_5, dots_##kind##_2_6, dots_##kind##_1_7, dots_##kind##_1_8}
static const Dots DOTS_OF[2][MOST_ROWS] = {DOTS_TABLE(FLOAT32), DOTS_TABLE(BFLOAT16)};

/* Adds to sum[i] the products of its 4 weights, bytes without a sign, with the 4 bytes of an input. */
INLINE Ints add_products(Ints sum, Ints weights, int32_t input) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(input));
#elif defined(__AVX512BW__)
    __m512i pairs = _mm512_maddubs_epi16((__m512i)weights, _mm512_set1_epi32(input));
    return sum + (Ints)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    __m256i pairs = _mm256_maddubs_epi16((__m256i)weights, _mm256_set1_epi32(input));
    return sum + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    int8_t four[4];
    memcpy(four, &input, 4);
    for (int i = 0; i < 4; i++) sum += (weights >> (8 * i) & 255) * four[i];
    return sum;
#endif
}

/* LANES rows of a 4-bit matrix with MB input rows of bytes; y (MB, LANES), its rows `stride` apart. */
INLINE void dots_int4(const uint8_t *q, const uint16_t *scales, int64_t groups, const int8_t *x, const float *x_scales,
                      const float *x_sums, float *y, int64_t stride, const int MB) {
    Floats sum[8];
    for (int r = 0; r < MB; r++) sum[r] = (Floats){0};
    for (int64_t g = 0; g < groups; g++, scales += 2 * LANES) {
        Ints part[8];
        for (int r = 0; r < MB; r++) part[r] = (Ints){0};
#pragma GCC unroll 8
        for (int k = 0; k < GROUP / 8; k++, q += 4 * LANES) {
            Ints both = (Ints) * (const WordsAt *)q;
            __builtin_prefetch(q + AHEAD, 0, 2); /* into the second cache */
            Ints low = both & 0x0f0f0f0f, high = both >> 4 & 0x0f0f0f0f;
#pragma GCC unroll 8
            for (int r = 0; r < MB; r++) {
                int32_t four[2];
                memcpy(four, x + (r * groups + g) * GROUP + 4 * k, 4);
                memcpy(four + 1, x + (r * groups + g) * GROUP + GROUP / 2 + 4 * k, 4);
                part[r] = add_products(add_products(part[r], low, four[0]), high, four[1]);
            }
        }
        Words both = *(const WordsAt *)scales;
        Floats scale = (Floats)(both << 16), zero = (Floats)(both & 0xffff0000u);
#pragma GCC unroll 8
        for (int r = 0; r < MB; r++) {
            sum[r] += zero * x_sums[r * groups + g];
            sum[r] += __builtin_convertvector(part[r], Floats) * (scale * x_scales[r * groups + g]);
        }
    }
    for (int r = 0; r < MB; r++) store(y + r * stride, sum[r]);
}

#define DOTS_INT4(MB)                                                                                                 \
    static void dots_int4_##MB(const uint8_t *q, const uint16_t *scales, int64_t groups, const int8_t *x,             \
                               const float *x_scales, const float *x_sums, float *y, int64_t stride) {                \
        dots_int4(q, scales, groups, x, x_scales, x_sums, y, stride, MB);                                             \
    }
DOTS_INT4(1) DOTS_INT4(2) DOTS_INT4(3) DOTS_INT4(4) DOTS_INT4(5) DOTS_INT4(6) DOTS_INT4(7) DOTS_INT4(8)
static void (*const DOTS_INT4_OF[MOST_ROWS])(const uint8_t *, const uint16_t *, int64_t, const int8_t *, const float *,
                                             const float *, float *, int64_t) = {
    dots_int4_1, dots_int4_2, dots_int4_3, dots_int4_4, dots_int4_5, dots_int4_6, dots_int4_7, dots_int4_8};

static void portion_int4(const Matrix *m, int64_t first, int64_t count, const Input *in, int64_t n, float *y) {
    int64_t groups = groups_of(m);
    for (int64_t r = 0, rows; r < n; r += rows) {
        rows = n - r < MOST_ROWS ? n - r : MOST_ROWS;
        for (int64_t i = first; i < first + count; i += LANES) {
            const uint8_t *q = (const uint8_t *)m->data + i * groups * (GROUP / 2);
            const uint16_t *scales = m->scales + i * groups * 2;
            float some[MOST_ROWS * LANES], *out = y + r * m->rows + i;
            int whole = i + LANES <= m->rows;
            DOTS_INT4_OF[rows - 1](q, scales, groups, in->bytes + r * groups * GROUP, in->byte_scales + r * groups,
                                   in->group_sums + r * groups, whole ? out : some, whole ? m->rows : LANES);
            for (int64_t j = 0; !whole && j < rows; j++)
                memcpy(out + j * m->rows, some + j * LANES, (size_t)4 * (m->rows - i));
        }
    }
}

static void portion(const Matrix *m, int64_t first, int64_t count, const Input *in, int64_t n, Worker *worker, float *y) {
    int64_t cols = m->cols;
#ifdef HAS_TILES
    if (uses_tiles && m->kind == BFLOAT16) {
        bfloats_tiled(m, first, count, in, n, worker, y);
    } else
#endif
    if (m->kind == INT4) {
        portion_int4(m, first, count, in, n, y);
    } else {
        int64_t size = m->kind == BFLOAT16 ? 2 : 4;
        const char *data = (const char *)m->data + first * cols * size;
        for (int64_t part = 0, r = 0, rows; r < n; part++, r += rows) {
            rows = part_start(n, part + 1) - r;
            Floats sums[PORTION * MOST_ROWS] = {0};
            for (int64_t c = 0; c < cols; c += STRETCH) {
                int64_t width = cols - c < STRETCH ? cols - c : STRETCH;
                DOTS_OF[m->kind][rows - 1](data + c * size, cols, width / STEP, count, in->blocks + r * cols + c * rows,
                                           sums);
            }
            for (int64_t i = 0; i < count; i++)
                for (int64_t j = 0; j < rows; j++) y[(r + j) * m->rows + first + i] = sum_of(sums[i * rows + j]);
        }
    }
    for (int64_t r = 0; m->bias && r < n; r++)
        for (int64_t i = first; i < first + count; i++) y[r * m->rows + i] += m->bias[i];
}

/* y[j] (n, rows of matrix j) = matrix j applied to x (n, cols), for matrices of the same number of columns. */
static void linear(const Matrix *const *matrices, int count, const float *x, int64_t n, float *const *y) {
    int kinds = 0;
    int64_t starts[4] = {0};
    for (int j = 0; j < count; j++) {
        kinds |= 1 << matrices[j]->kind;
        starts[j + 1] = starts[j] + (matrices[j]->rows + PORTION - 1) / PORTION;
    }
    float *seen = matrices[0]->seen;
    for (int64_t r = 0; seen && r < n; r++)
        for (int64_t c = 0; c < matrices[0]->cols; c++) seen[c] += x[r * matrices[0]->cols + c] * x[r * matrices[0]->cols + c];
    Input in = prepare(x, n, matrices[0], kinds);
#pragma omp parallel
    {
        Worker worker = {0};
        int64_t after = -1; /* what this thread has just done */
#pragma omp for schedule(guided, 2) /* for one thread's processor may be slower than another's for a while */
        for (int64_t t = 0; t < starts[count]; t++) {
            int j = 0;
            while (t >= starts[j + 1]) j++;
            int64_t first = (t - starts[j]) * PORTION, left = matrices[j]->rows - first;
            worker.cold = t != after || !first;
            portion(matrices[j], first, left < PORTION ? left : PORTION, &in, n, &worker, y[j]);
            after = t + 1;
        }
#ifdef HAS_TILES
        if (worker.rows) _tile_release();
#endif
    }
}

static void normalise(const float *x, int64_t size, const float *weight, double epsilon, float *y) {
    Floats squares = {0};
    for (int64_t i = 0; i < size; i += LANES) squares += load(x + i) * load(x + i);
    float factor = 1.0f / sqrtf(sum_of(squares) / (float)size + (float)epsilon);
    for (int64_t i = 0; i < size; i += LANES) store(y + i, load(weight + i) * (load(x + i) * factor));
}

static void add_to(float *x, const float *y, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) store(x + i, load(x + i) + load(y + i));
}

/* ---- attention ---- */

static void rotate(float *x, const float *cosines, const float *sines, int64_t size) {
    int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cosines[i] - b * sines[i];
        x[i + half] = b * cosines[i + half] + a * sines[i + half];
    }
}

/* From its vector number `index` on. */
static Cache cache_from(Cache c, int64_t index, int64_t head_dim) {
    int64_t at = index * head_dim;
    return (Cache){c.keys + at,       c.values + at,         c.low_keys + at,
                   c.low_values + at, c.key_scales + index, c.value_scales + index};
}

typedef struct {
    Cache cache;
    int64_t count;
} Span;

INLINE Floats shuffle(Floats a, Floats b, Ints which) {
#ifdef __clang__
    Floats result;
    for (int i = 0; i < LANES; i++) result[i] = which[i] < LANES ? a[which[i]] : b[which[i] - LANES];
    return result;
#else
    return __builtin_shuffle(a, b, which);
#endif
}

/* Which of two vectors' components to take for the first and second half of every pair of runs, by the runs' width. */
#if LANES == 16
static const Ints FIRST_HALVES[4] = {{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30},
                                     {0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29},
                                     {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27},
                                     {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}};
#else
static const Ints FIRST_HALVES[3] = {
    {0, 2, 4, 6, 8, 10, 12, 14}, {0, 1, 4, 5, 8, 9, 12, 13}, {0, 1, 2, 3, 8, 9, 10, 11}};
#endif

/* The sums of LANES vectors, each in the order of `sum_of`. */
INLINE Floats sums_of(Floats *v) {
#pragma GCC unroll 4
    for (int level = LANES == 16 ? 3 : 2; level >= 0; level--) {
        Ints low = FIRST_HALVES[level], high = low + (1 << level);
#pragma GCC unroll 8
        for (int i = 0; i < 1 << level; i++)
            v[i] = shuffle(v[2 * i], v[2 * i + 1], low) + shuffle(v[2 * i], v[2 * i + 1], high);
    }
    return v[0];
}

/* scores (count,) of a query (head_dim,) and up to LANES keys; writes LANES of them. */
INLINE void score(const float *query, const float *keys, const int64_t head_dim, int64_t count, float scale, float *scores) {
    Floats sums[LANES];
#pragma GCC unroll 16
    for (int t = 0; t < LANES; t++) sums[t] = (Floats){0};
    if (count == LANES)
        for (int64_t i = 0; i < head_dim; i += LANES) {
            Floats q = load(query + i);
#pragma GCC unroll 16
            for (int t = 0; t < LANES; t++) sums[t] += q * load(keys + t * head_dim + i);
        }
    else
        for (int t = 0; t < count; t++)
            for (int64_t i = 0; i < head_dim; i += LANES) sums[t] += load(query + i) * load(keys + t * head_dim + i);
    store(scores, sums_of(sums) * scale);
}

/* Scores of `count` queries, each with `room`, and of a span's keys. */
INLINE void score_all(const float *queries, int64_t count, const Span *span, const int64_t head_dim, const int low,
                      float scale, float *scores, int64_t room) {
    float wide[low ? LANES * head_dim : 1];
    for (int64_t t = 0; t < span->count; t += LANES) {
        int64_t some = span->count - t < LANES ? span->count - t : LANES;
        const float *keys = low ? wide : span->cache.keys + t * head_dim;
        const int8_t *low_keys = span->cache.low_keys + t * head_dim;
        for (int64_t i = 0; low && i < LANES * head_dim; i += 64) __builtin_prefetch(low_keys + LOW_AHEAD + i);
        for (int64_t i = 0; low && i < some * head_dim; i += LANES) store(wide + i, widen(low_keys + i));
        for (int64_t q = 0; q < count; q++) {
            float *to = scores + q * room + t;
            score(queries + q * head_dim, keys, head_dim, some, scale, to);
            for (int64_t i = 0; low && i < some; i++) to[i] *= span->cache.key_scales[t + i];
        }
    }
}

/* Scores (total,) become weights; gives the inverse of their sum. */
static float weigh(float *scores, int64_t total) {
    for (int64_t t = total; t % LANES; t++) scores[t] = -INFINITY;
    Floats many = (Floats){0} - INFINITY, sums = {0};
    for (int64_t t = 0; t < total; t += LANES) {
        Floats s = load(scores + t);
        many = (Floats)(((Words)s & (Words)(s > many)) | ((Words)many & ~(Words)(s > many)));
    }
    float most = -INFINITY;
    for (int i = 0; i < LANES; i++) most = many[i] > most ? many[i] : most;
    for (int64_t t = 0; t < total; t += LANES) {
        Floats weight = exponential(load(scores + t) - most);
        store(scores + t, weight);
        for (int i = 0; i < LANES && t + i >= total - LANES; i++)
            if (t + i >= total) scores[t + i] = 0;
        sums += load(scores + t);
    }
    return 1.0f / sum_of(sums);
}

INLINE Floats value_at(const Cache *c, int64_t at, const int low) {
    return low ? widen(c->low_values + at) : load(c->values + at);
}

/* out[q][i..] = the values' components from i on, `count` vectors of them, weighted by a query's scores. */
INLINE void mix(const Span spans[2], int64_t head_dim, const float *scores, int64_t room, const float *inverse, int64_t i,
                const int count, const int queries, const int low, float *out) {
    Floats sum[4][4];
#pragma GCC unroll 4
    for (int q = 0; q < queries; q++)
#pragma GCC unroll 4
        for (int j = 0; j < count; j++) sum[q][j] = (Floats){0};
    for (int s = 0; s < 2; s++)
        for (int64_t t = 0; t < spans[s].count; t++, scores++) {
            Floats value[4];
            if (low) __builtin_prefetch(spans[s].cache.low_values + t * head_dim + i + LOW_AHEAD);
#pragma GCC unroll 4
            for (int j = 0; j < count; j++) value[j] = value_at(&spans[s].cache, t * head_dim + i + j * LANES, low);
#pragma GCC unroll 4
            for (int q = 0; q < queries; q++)
#pragma GCC unroll 4
                for (int j = 0; j < count; j++) sum[q][j] += scores[q * room] * value[j];
        }
#pragma GCC unroll 4
    for (int q = 0; q < queries; q++)
#pragma GCC unroll 4
        for (int j = 0; j < count; j++) store(out + q * head_dim + i + j * LANES, sum[q][j] * inverse[q]);
}

INLINE void mix_all(const Span spans[2], int64_t head_dim, const float *scores, int64_t room, const float *inverse,
                    const int queries, const int low, float *out) {
    int64_t i = 0;
    for (; i + 4 * LANES <= head_dim; i += 4 * LANES) mix(spans, head_dim, scores, room, inverse, i, 4, queries, low, out);
    for (; i < head_dim; i += LANES) mix(spans, head_dim, scores, room, inverse, i, 1, queries, low, out);
}

/* Weights take on the scales of the values that they are for. */
static void scale_weights(const Span spans[2], float *weights) {
    for (int s = 0; s < 2; weights += spans[s++].count)
        for (int64_t t = 0; t < spans[s].count; t++) weights[t] *= spans[s].cache.value_scales[t];
}

INLINE void attend_in(const float *queries, int64_t count, const Span spans[2], int64_t head_dim, const int low, float scale,
                      float *scores, int64_t room, float *out) {
    int64_t total = 0;
    for (int s = 0; s < 2; total += spans[s++].count) { /* the usual sizes are known to the compiler */
        if (head_dim == 64) score_all(queries, count, spans + s, 64, low, scale, scores + total, room);
        else if (head_dim == 128) score_all(queries, count, spans + s, 128, low, scale, scores + total, room);
        else score_all(queries, count, spans + s, head_dim, low, scale, scores + total, room);
    }
    for (int64_t q = 0, some; q < count; q += some) {
        float inverse[4];
        some = count - q < 4 ? count - q : 4;
        for (int64_t j = 0; j < some; j++) {
            inverse[j] = weigh(scores + (q + j) * room, total);
            if (low) scale_weights(spans, scores + (q + j) * room);
        }
        const float *from = scores + q * room;
        float *to = out + q * head_dim;
        if (some == 4) mix_all(spans, head_dim, from, room, inverse, 4, low, to);
        else if (some == 3) mix_all(spans, head_dim, from, room, inverse, 3, low, to);
        else if (some == 2) mix_all(spans, head_dim, from, room, inverse, 2, low, to);
        else mix_all(spans, head_dim, from, room, inverse, 1, low, to);
    }
}

/* `count` queries (head_dim,) over the same keys, those of two spans in their order; scores has `room` for each. */
static void attend(const float *queries, int64_t count, const Span spans[2], int64_t head_dim, int low, float scale,
                   float *scores, int64_t room, float *out) {
    if (low) attend_in(queries, count, spans, head_dim, 1, scale, scores, room, out);
    else attend_in(queries, count, spans, head_dim, 0, scale, scores, room, out);
}

static int is_low(const Attention *a) { return a->q.kind == INT4; }

/* The keys and values that a pass's rows bring with them: the cache's next places, or apart from it. */
typedef struct {
    Cache cache;    /* from the first row on, of the first head */
    int64_t stride; /* rows from one head to the next */
} Fresh;

/* Some heads of a row that share keys and values: those of head `kv`. */
static void attend_row(const Attention *a, const Place *p, const Fresh *fresh, int64_t row, int64_t kv, int64_t count,
                       const float *queries, float *scores, int64_t room, float *out) {
    int64_t position = p->position + row, cached = p->position;
    int64_t lowest = a->window && position + 1 > a->window ? position + 1 - a->window : 0;
    if (p->run) cached += row - row % p->run;
    int64_t own = lowest > cached ? lowest : cached;
    int64_t old_at = kv * p->capacity + lowest, new_at = kv * fresh->stride + own - p->position;
    Span spans[2] = {{cache_from(p->cache, old_at, a->head_dim), own - lowest},
                     {cache_from(fresh->cache, new_at, a->head_dim), position + 1 - own}};
    attend(queries, count, spans, a->head_dim, is_low(a), (float)a->scale, scores, room, out);
}

/* Puts queries and keys at their positions, and keys and values where they belong. */
static void place_rows(const Attention *a, const Place *p, const Fresh *fresh, float *q, float *k, const float *v) {
    int64_t size = a->head_dim;
    for (int64_t r = 0; r < p->count; r++) {
        const float *cosines = p->cosines + (p->position + r) * a->rotary, *sines = p->sines + (p->position + r) * a->rotary;
        for (int64_t h = 0; h < a->heads; h++) {
            float *head = q + (r * a->heads + h) * size;
            if (a->q_norm) normalise(head, size, a->q_norm, a->epsilon, head);
            rotate(head, cosines, sines, a->rotary);
        }
        for (int64_t h = 0; h < a->kv_heads; h++) {
            float *head = k + (r * a->kv_heads + h) * size;
            const float *value = v + (r * a->kv_heads + h) * size;
            if (a->k_norm) normalise(head, size, a->k_norm, a->epsilon, head);
            rotate(head, cosines, sines, a->rotary);
            Cache to = cache_from(fresh->cache, h * fresh->stride + r, size);
            round_vector(head, size, to.low_keys, to.key_scales);
            round_vector(value, size, to.low_values, to.value_scales);
            if (is_low(a)) continue;
            memcpy(to.keys, head, (size_t)4 * size);
            memcpy(to.values, value, (size_t)4 * size);
        }
    }
}

/* x (n, D) += attention(norm(x)), for rows at `places`. */
static void attention(const Attention *a, const Place *places, int64_t num_places, float *x, int64_t n) {
    int64_t width = a->q.cols, inner = a->heads * a->head_dim, kv_inner = a->kv_heads * a->head_dim, longest = 0;
    for (int64_t i = 0; i < num_places; i++) {
        int64_t end = places[i].position + places[i].count;
        longest = end > longest ? end : longest;
    }
    int64_t room = (longest + 2 * LANES) / LANES * LANES, threads = omp_get_max_threads(); /* for one query's scores */
    int64_t shared = a->heads / a->kv_heads; /* heads that share keys, read once for all where that leaves enough to do */
    if (n * a->kv_heads < 4 * threads && n * a->kv_heads % threads) shared = 1;
    arena_begin(linear_memory(&a->q, n) + linear_memory(&a->o, n) + 8192 + (size_t)16 * n +
                (size_t)num_places * (sizeof(Fresh) + 6 * 64) + (size_t)8 * n * a->kv_heads + (size_t)2 * n * kv_inner +
                (size_t)4 * (n * (2 * width + 2 * inner + 4 * kv_inner) + threads * shared * room));
    float *normed = take((size_t)4 * n * width), *q = take((size_t)4 * n * inner), *k = take((size_t)4 * n * kv_inner);
    float *v = take((size_t)4 * n * kv_inner), *mixed = take((size_t)4 * n * inner), *out = take((size_t)4 * n * width);
    float *all_scores = take((size_t)4 * threads * shared * room);
    Fresh *fresh = take((size_t)num_places * sizeof(Fresh));
    int64_t *owner = take((size_t)8 * n), *row_of = take((size_t)8 * n);
    for (int64_t r = 0; r < n; r++) normalise(x + r * width, width, a->norm, a->epsilon, normed + r * width);
    linear((const Matrix *[]){&a->q, &a->k, &a->v}, 3, normed, n, (float *[]){q, k, v});
    for (int64_t i = 0, first = 0; i < num_places; first += places[i++].count) {
        const Place *p = places + i;
        size_t size = p->count * kv_inner, vectors = p->count * a->kv_heads;
        fresh[i] = (Fresh){cache_from(p->cache, p->position, a->head_dim), p->capacity};
        if (p->run)
            fresh[i] = (Fresh){{take(4 * size), take(4 * size), take(size), take(size), take(4 * vectors), take(4 * vectors)},
                               p->count};
        place_rows(a, p, fresh + i, q + first * inner, k + first * kv_inner, v + first * kv_inner);
        for (int64_t r = 0; r < p->count; r++) {
            owner[first + r] = i;
            row_of[first + r] = r;
        }
    }
#pragma omp parallel for schedule(guided)
    for (int64_t item = 0; item < n * a->heads / shared; item++) {
        int64_t r = item * shared / a->heads, kv = item * shared % a->heads / (a->heads / a->kv_heads);
        int64_t at = item * shared * a->head_dim;
        attend_row(a, places + owner[r], fresh + owner[r], row_of[r], kv, shared, q + at,
                   all_scores + omp_get_thread_num() * shared * room, room, mixed + at);
    }
    linear((const Matrix *[]){&a->o}, 1, mixed, n, (float *[]){out});
    add_to(x, out, n * width);
}

/* x (n, D) += down(silu(gate(h)) * up(h)) with h = norm(x). */
static void mlp(const Mlp *m, float *x, int64_t n) {
    int64_t width = m->gate.cols, inner = m->gate.rows;
    arena_begin(linear_memory(&m->gate, n) + linear_memory(&m->down, n) + 2048 + (size_t)4 * n * (2 * width + 2 * inner));
    float *normed = take((size_t)4 * n * width), *gate = take((size_t)4 * n * inner), *up = take((size_t)4 * n * inner);
    float *out = take((size_t)4 * n * width);
    for (int64_t r = 0; r < n; r++) normalise(x + r * width, width, m->norm, m->epsilon, normed + r * width);
    linear((const Matrix *[]){&m->gate, &m->up}, 2, normed, n, (float *[]){gate, up});
#pragma omp parallel for if (n * inner > 16384)
    for (int64_t i = 0; i < n * inner; i += LANES) {
        Floats g = load(gate + i);
        store(gate + i, g / (1.0f + exponential(-g)) * load(up + i));
    }
    linear((const Matrix *[]){&m->down}, 1, gate, n, (float *[]){out});
    add_to(x, out, n * width);
}

/* x (n, D) through all layers, for rows at `places`. A sublayer whose pointer is null is skipped. */
void knn_ssd_forward(const Attention *const *attentions, const Mlp *const *mlps, int64_t layers, const Place *places,
                  int64_t num_places, float *x) {
    Place here[num_places];
    int64_t n = 0;
    for (int64_t i = 0; i < num_places; i++) n += places[i].count;
    for (int64_t l = 0; l < layers; l++) {
        if (attentions[l]) {
            for (int64_t i = 0; i < num_places; i++) {
                int64_t vectors = attentions[l]->kv_heads * places[i].capacity;
                here[i] = places[i];
                here[i].cache = cache_from(places[i].cache, l * vectors, attentions[l]->head_dim);
            }
            attention(attentions[l], here, num_places, x, n);
        }
        if (mlps[l]) mlp(mlps[l], x, n);
    }
}

/* hidden (n, D) = norm(x); logits (wanted, V) = head(hidden) of the rows that are wanted. */
void knn_ssd_lm_head(const Matrix *head, const float *norm, double epsilon, const float *x, int64_t n,
                  const int64_t *rows, int64_t wanted, float *hidden, float *logits) {
    int64_t width = head->cols;
    for (int64_t r = 0; r < n; r++) normalise(x + r * width, width, norm, epsilon, hidden + r * width);
    if (!wanted) return;
    arena_begin(linear_memory(head, wanted) + 4096 + (size_t)4 * wanted * width);
    float *chosen = take((size_t)4 * wanted * width);
    for (int64_t r = 0; r < wanted; r++) memcpy(chosen + r * width, hidden + rows[r] * width, (size_t)4 * width);
    linear((const Matrix *[]){head}, 1, chosen, wanted, (float *[]){logits});
}

int64_t knn_ssd_lanes(void) { return LANES; }

/* Ends the calling thread's idle helpers. While they live, another thread's helpers count as one too many for the
 * processor, and go to sleep at each of a pass's hundreds of barriers instead of waiting awake. */
void knn_ssd_release_threads(void) {
#if __GNUC__ >= 9 || _OPENMP >= 201811
    omp_pause_resource_all(omp_pause_hard);
#endif
}

/* ---- 4-bit copies ---- */

static uint16_t to_bfloat(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    return (uint16_t)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

/* Rounds w (count,) with one scale and zero; gives the squared error, weighted by importance. */
static float round_to(const float *w, const float *importance, int64_t count, float scale, float zero, float *q) {
    float inverse = scale != 0 ? 1 / scale : 0, error = 0;
#pragma omp simd reduction(+ : error)
    for (int64_t i = 0; i < count; i++) {
        float level = rintf((w[i] - zero) * inverse);
        level = level < 0 ? 0 : level > 15 ? 15 : level;
        q[i] = level;
        float off = level * scale + zero - w[i];
        error += importance[i] * off * off;
    }
    return error;
}

/* The scale and zero that suit the levels q best: weighted least squares. */
static void refit(const float *w, const float *importance, int64_t count, const float *q, float *scale, float *zero) {
    float a = 0, b = 0, c = 0, d = 0, e = 0;
#pragma omp simd reduction(+ : a, b, c, d, e)
    for (int64_t i = 0; i < count; i++) {
        a += importance[i];
        b += importance[i] * q[i];
        c += importance[i] * q[i] * q[i];
        d += importance[i] * w[i];
        e += importance[i] * q[i] * w[i];
    }
    float determinant = a * c - b * b;
    if (determinant <= 1e-12f * a * c) return;
    *scale = (a * e - b * d) / determinant;
    *zero = (c * d - b * e) / determinant;
}

/* levels (GROUP,), w = level * scales[0] + scales[1] */
static void round_weights(const float *w, const float *importance, int64_t count, int64_t tries, uint8_t *levels,
                          uint16_t *scales) {
    float low = w[0], high = w[0], best = INFINITY, q[GROUP], best_q[GROUP] = {0};
    for (int64_t i = 1; i < count; i++) {
        low = fminf(low, w[i]);
        high = fmaxf(high, w[i]);
    }
    float middle = (low + high) / 2, half = (high - low) / 2;
    for (int64_t attempt = 0; attempt < tries; attempt++) {
        float width = half * (1 - 0.05f * (float)attempt), scale = width / 7.5f, zero = middle - width;
        for (int pass = 0; pass < (tries > 1 ? 3 : 1); pass++) {
            if (pass) refit(w, importance, count, q, &scale, &zero);
            uint16_t coded[2] = {to_bfloat(scale), to_bfloat(zero)};
            float error = round_to(w, importance, count, bfloat(coded[0]), bfloat(coded[1]), q);
            if (error < best) {
                best = error;
                memcpy(best_q, q, sizeof q);
                memcpy(scales, coded, sizeof coded);
            }
        }
    }
    for (int i = 0; i < GROUP; i++) levels[i] = i < count ? (uint8_t)best_q[i] : 0;
}

/* Puts the levels of a matrix row's group where the kernels read them: bytes (bundles of LANES rows, groups, GROUP / 8,
 * LANES, 4), each with columns i and i + GROUP / 2 of its group. */
static void pack(const uint8_t *levels, const uint16_t *scale, int64_t row, int64_t group, int64_t groups, uint8_t *bytes,
                 uint16_t *scales) {
    int64_t at = row / LANES * groups + group, lane = row % LANES;
    for (int i = 0; i < GROUP / 2; i++)
        bytes[((at * (GROUP / 8) + i / 4) * LANES + lane) * 4 + i % 4] = (uint8_t)(levels[i] | levels[i + GROUP / 2] << 4);
    memcpy(scales + (at * LANES + lane) * 2, scale, 4);
}

/* A 4-bit copy of m in `bytes` and `scales`, which have room for a multiple of LANES rows. `importance` (cols,) weighs the
 * columns' errors; `tries` ranges are tried. */
void knn_ssd_quantise(const Matrix *m, const float *importance, int64_t tries, uint8_t *bytes, uint16_t *scales) {
    int64_t cols = m->cols, groups = groups_of(m);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < m->rows; i++)
        for (int64_t g = 0; g < groups; g++) {
            float w[GROUP] = {0};
            uint8_t levels[GROUP];
            uint16_t scale[2] = {0, 0};
            int64_t first = g * GROUP, count = cols - first < GROUP ? cols - first : GROUP;
            for (int64_t c = 0; c < count; c++)
                w[c] = m->kind == BFLOAT16 ? bfloat(((const uint16_t *)m->data)[i * cols + first + c])
                                           : ((const float *)m->data)[i * cols + first + c];
            round_weights(w, importance + first, count, tries, levels, scale);
            pack(levels, scale, i, g, groups, bytes, scales);
        }
}
