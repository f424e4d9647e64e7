/* Bfloat16 matrices in the tile unit (AMX) of recent x86 processors.
 *
 * The unit multiplies 16 matrix rows with up to 16 columns of inputs at once, 64 bytes deep. It adds every sum's terms in
 * the order of the matrix's columns, whatever the other rows and columns contain. So all rows must go through it, or none.
 *
 * Its inputs are bfloat16. A float32 is split into a hi and a lo bfloat16, whose sum differs from it by 2^-17 of it at
 * most. They are multiplied as columns of their own, and their sums are added at the end.
 */
#include "gemm.h"
#include "thread_pool.h"

static int uses_tiles;

int amx_enabled(void) { return uses_tiles; }
int64_t knn_ssd_uses_tiles(void) { return uses_tiles; }

#if defined(__linux__) && defined(__AVX512BW__) && defined(__AVX512BF16__) && defined(__AMX_BF16__)

#include <sys/syscall.h>
#include <unistd.h>

#define TILE 16                /* rows, and columns, of a tile */
#define TILE_K 32              /* matrix columns that one instruction multiplies */
#define BLOCK TILE             /* input rows that are multiplied at once */
#define MAX_COLUMNS (2 * TILE) /* of a block: hi and lo of each of its rows */
#define PREFETCH_STEPS 12      /* steps of TILE_K columns that a matrix is prefetched ahead */
#define MAX_STEPS 64           /* of a region */
#define MAX_BLOCKS 8           /* that are multiplied with a region while it is in the L2 cache */

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileConfig;

/* Asks the system to let this process use the tiles; returns whether it does. */
static int tiles_granted(void) {
    const long request = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

void knn_ssd_enable_tiles(int64_t wanted) { uses_tiles = wanted && tiles_granted(); }

int64_t amx_packed_rows(int64_t n) { return n + BLOCK; }

void amx_release(const TileShape *shape) {
    if (shape->rows) _tile_release();
}

/* Tiles 0 to 3 hold sums (rows, cols), 4 and 5 a part of the matrix, 6 and 7 a part of the inputs. */
static void configure_tiles(TileShape *shape, int64_t rows, int64_t cols) {
    if (shape->rows == rows && shape->cols == cols) return;
    *shape = (TileShape){rows, cols};
    TileConfig config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.rows[i] = (uint8_t)(i < 6 ? rows : TILE);
        config.row_bytes[i] = (uint16_t)(i == 4 || i == 5 ? 64 : 4 * cols);
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

/* Transposes a matrix of TILE x TILE 32-bit values. */
INLINE void transpose(__m512i a[TILE]) {
    __m512i b[TILE];
#pragma GCC unroll 8
    for (int i = 0; i < TILE; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < TILE; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* a[4 * j + i] holds, in its quarter k, column 4 * k + i of the rows from 4 * j on */
        __m512i even = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), odd = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
        __m512i even2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
        __m512i odd2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
        b[i] = _mm512_shuffle_i32x4(even, even2, 0x88);
        b[8 + i] = _mm512_shuffle_i32x4(even, even2, 0xdd);
        b[4 + i] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
        b[12 + i] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < TILE; i++) a[i] = b[i];
}

/* Splits 32 floats into hi and lo bfloat16s, each as 16 pairs. */
INLINE void split_hi_lo(const float *x, __m512i *hi, __m512i *lo) {
    __m512 rest[2] = {_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16)};
    *hi = (__m512i)_mm512_cvtne2ps_pbh(rest[1], rest[0]);
    for (int i = 0; i < 2; i++) {
        __m256i taken = i ? _mm512_extracti64x4_epi64(*hi, 1) : _mm512_castsi512_si256(*hi);
        rest[i] -= (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(taken), 16);
    }
    *lo = (__m512i)_mm512_cvtne2ps_pbh(rest[1], rest[0]);
}

typedef struct {
    const float *x;
    int64_t n, cols;
    uint16_t *hi_lo;
} Packing;

/* Packs x (n, cols) as (blocks, cols / TILE_K, tiles of the block, 16 pairs of columns, columns of the tile, 2): a block's
 * columns are the hi parts of its rows, then the lo parts. */
static void pack_steps(void *context, int64_t first_step, int64_t last_step, int thread) {
    const Packing *p = context;
    const float *x = p->x;
    const int64_t n = p->n, cols = p->cols;
    (void)thread;
    for (int64_t step = first_step; step < last_step; step++)
        for (int64_t first = 0; first < n; first += BLOCK) {
            const int64_t n_rows = min_int(n - first, BLOCK), columns = 2 * n_rows, width = min_int(columns, TILE);
            const int64_t tiles = ceil_div(columns, width);
            uint32_t *out = (uint32_t *)(p->hi_lo + 2 * first * cols) + step * tiles * TILE * width;
            __m512i pairs[MAX_COLUMNS];
            for (int64_t r = 0; r < n_rows; r++)
                split_hi_lo(x + (first + r) * cols + step * TILE_K, pairs + r, pairs + n_rows + r);
            for (int64_t c = columns; c < tiles * TILE; c++) pairs[c] = _mm512_setzero_si512();
            for (int64_t t = 0; t < tiles; t++) {
                transpose(pairs + t * TILE);
                for (int k = 0; k < TILE; k++, out += width)
                    _mm512_mask_storeu_epi32(out, (__mmask16)((1u << width) - 1), pairs[t * TILE + k]);
            }
        }
}

void amx_pack_inputs(const float *x, int64_t n, int64_t cols, uint16_t *hi_lo) {
    Packing packing = {x, n, cols, hi_lo};
    const int64_t steps = cols / TILE_K;
    parallel_for(steps, n * cols > 32768 ? 1 : steps, pack_steps, &packing);
}

/* What is prefetched into the L2 cache while a matrix is multiplied, a cache line at a time: `rows` matrix rows from `data`
 * on. After `steps_left` steps, it goes on `jump` bytes further. */
typedef struct {
    const char *data;
    int64_t rows, steps_left, jump;
} Prefetch;

/* sums (16 matrix rows, or 32 with `two_rows`; one tile of columns, or two with `two_columns`) of the products over `steps`
 * steps. They are added to what is there unless `begin`. The last 16 rows may be fewer, as the tiles are configured. */
INLINE void tile_products(const char *data, int64_t cols, int64_t steps, const uint16_t *x, int64_t width,
                          const int two_rows, const int two_columns, int begin, Prefetch prefetch, float *sums) {
    const int64_t columns = width * (1 + two_columns), stride = 4 * columns;
    float *const lower = sums + TILE * columns;
    if (begin) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, stride);
        if (two_columns) _tile_loadd(1, sums + width, stride);
        if (two_rows) _tile_loadd(2, lower, stride);
        if (two_rows && two_columns) _tile_loadd(3, lower + width, stride);
    }
    for (int64_t step = 0; step < steps; step++, data += 64, x += (1 + two_columns) * TILE * width * 2) {
        for (int64_t i = 0; i < prefetch.rows; i++) _mm_prefetch(prefetch.data + i * 2 * cols, _MM_HINT_T1);
        prefetch.data += --prefetch.steps_left ? 64 : prefetch.jump;
        _tile_loadd(6, x, 4 * width);
        _tile_loadd(4, data, 2 * cols);
        _tile_dpbf16ps(0, 4, 6);
        if (two_columns) {
            _tile_loadd(7, x + TILE * width * 2, 4 * width);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (two_rows) {
            _tile_loadd(5, data + TILE * 2 * cols, 2 * cols);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (two_rows && two_columns) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, stride);
    if (two_columns) _tile_stored(1, sums + width, stride);
    if (two_rows) _tile_stored(2, lower, stride);
    if (two_rows && two_columns) _tile_stored(3, lower + width, stride);
}

#define KERNEL(two_rows, two_columns)                                                                                \
    static __attribute__((noinline)) void kernel_##two_rows##two_columns(                                            \
        const char *data, int64_t cols, int64_t steps, const uint16_t *x, int64_t width, int begin,                  \
        Prefetch prefetch, float *sums) {                                                                            \
        tile_products(data, cols, steps, x, width, two_rows, two_columns, begin, prefetch, sums);                    \
    }
KERNEL(0, 0) KERNEL(0, 1) KERNEL(1, 0) KERNEL(1, 1)

typedef void (*Kernel)(const char *, int64_t, int64_t, const uint16_t *, int64_t, int, Prefetch, float *);
static const Kernel KERNEL_OF[2][2] = {{kernel_00, kernel_01}, {kernel_10, kernel_11}};

/* y (n_rows, count), its rows `stride` apart, = hi + lo of sums (TILE, columns). */
INLINE void add_hi_lo(const float *sums, int64_t columns, int64_t n_rows, int64_t count, float *y, int64_t stride) {
    __m512 total[TILE];
#pragma GCC unroll 16
    for (int k = 0; k < TILE; k++, sums += columns) total[k] = _mm512_loadu_ps(sums) + _mm512_loadu_ps(sums + n_rows);
    transpose((__m512i *)total);
    for (int64_t j = 0; j < n_rows; j++)
        _mm512_mask_storeu_ps(y + j * stride, (__mmask16)((1u << count) - 1), total[j]);
}

/* The matrix is read once, a region of its rows and columns at a time, for all blocks. While the first block waits for a
 * region, the others would have nothing to read: so they prefetch the next region, each a part of its rows. A single block,
 * and the first block of a thread's first region (`is_cold`), prefetch for themselves. */
static Prefetch prefetch_for(int64_t block, int64_t blocks, const char *region, const char *next, int64_t cols,
                             int64_t steps, int64_t rows, int is_cold) {
    if (block == 0) {
        const int64_t lead = min_int(PREFETCH_STEPS, steps - 1);
        return (Prefetch){region + lead * 64, is_cold || blocks == 1 ? rows : 0, steps - lead,
                          next - (region + (steps - 1) * 64)};
    }
    const int64_t from = (block - 1) * rows / (blocks - 1), to = block * rows / (blocks - 1);
    return (Prefetch){next + from * 2 * cols, to - from, INT64_MAX, 0};
}

void amx_gemm(const Matrix *m, int64_t first, int64_t count, const uint16_t *hi_lo, int64_t n, TileShape *shape, int is_cold,
              float *y) {
    const int64_t cols = m->cols, total = cols / TILE_K, regions = ceil_div(total, MAX_STEPS);
    const int two_rows = count == 2 * TILE;
    const char *data = (const char *)m->data + first * cols * 2;
    float sums[MAX_BLOCKS][2 * TILE * MAX_COLUMNS + 2 * TILE] __attribute__((aligned(64)));
    for (int64_t start = 0; start < n; start += MAX_BLOCKS * BLOCK) {
        const int64_t blocks = ceil_div(min_int(n - start, MAX_BLOCKS * BLOCK), BLOCK);
        for (int64_t s = 0; s < regions; s++) {
            const int64_t done = total * s / regions, steps = total * (s + 1) / regions - done;
            const char *region = data + done * 64, *next = s + 1 < regions ? region + steps * 64 : data + count * cols * 2;
            for (int64_t b = 0; b < blocks; b++) {
                const int64_t r = start + b * BLOCK, n_rows = min_int(n - r, BLOCK), width = min_int(2 * n_rows, TILE);
                const int two_columns = 2 * n_rows > TILE;
                const int64_t columns = width * (1 + two_columns);
                const uint16_t *x = hi_lo + 2 * r * cols + done * TILE * columns * 2;
                Prefetch prefetch = prefetch_for(b, blocks, region, next, cols, steps, count, is_cold && !start && !s);
                if (two_rows) {
                    configure_tiles(shape, TILE, width);
                    KERNEL_OF[1][two_columns](region, cols, steps, x, width, !s, prefetch, sums[b]);
                } else
                    for (int64_t i = 0; i < count; i += TILE, prefetch.rows = 0) {
                        configure_tiles(shape, min_int(count - i, TILE), width);
                        KERNEL_OF[0][two_columns](region + i * cols * 2, cols, steps, x, width, !s, prefetch,
                                                  sums[b] + i * columns);
                    }
                for (int64_t i = 0; i < count && s + 1 == regions; i += TILE)
                    add_hi_lo(sums[b] + i * columns, columns, n_rows, min_int(count - i, TILE), y + r * m->rows + first + i,
                              m->rows);
            }
        }
    }
}

#else /* a processor without the tile unit: `amx_enabled` is 0, and the other functions are never called */

#define UNUSED __attribute__((unused))

void knn_ssd_enable_tiles(UNUSED int64_t wanted) {}
int64_t amx_packed_rows(UNUSED int64_t n) { return 0; }
void amx_pack_inputs(UNUSED const float *x, UNUSED int64_t n, UNUSED int64_t cols, UNUSED uint16_t *hi_lo) {}
void amx_gemm(UNUSED const Matrix *m, UNUSED int64_t first, UNUSED int64_t count, UNUSED const uint16_t *hi_lo,
              UNUSED int64_t n, UNUSED TileShape *shape, UNUSED int is_cold, UNUSED float *y) {}
void amx_release(UNUSED const TileShape *shape) {}

#endif
