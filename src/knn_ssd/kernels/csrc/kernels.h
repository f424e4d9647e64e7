/* The structures and entry points that the Python binding knows. `kernels/binding.py` mirrors them field by field.
 *
 * The sublayers of a Llama-like decoder run here on the CPU, for a few rows at a time. A row's result has the same bits
 * whatever other rows are in its batch, however many threads work, and wherever a block of rows begins: every sum runs in
 * an order that depends on the row alone. So a forward pass that verifies eight draft tokens computes what eight single
 * steps would have computed. Activations are float32, and so are keys and values unless a session keeps them in bfloat16;
 * weights have the values of the checkpoint, as floats or as a GGUF file's quantised blocks, or are 4-bit copies for
 * drafting.
 *
 * A matrix has (rows, cols): y[i] = dot(weight row i, x) + bias[i].
 */
#ifndef KNN_SSD_KERNELS_H
#define KNN_SSD_KERNELS_H

#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

/* The first ones are row-major, as checkpoints have them: (rows, cols) floats, or rows of a GGUF file's quantised blocks (see
 * ggml's ggml-common.h). Only the tile unit multiplies one of them, BFLOAT16. The others are in blocks of rows: see
 * `store_group` in quantise.c for INT4, and blocks.h. */
enum Kind {
    FLOAT32,
    FLOAT16,
    BFLOAT16,
    Q8_0,
    Q6_K,
    Q5_0,
    Q4_K,
    Q4_0,
    INT4,
    FLOAT32_BLOCKS,
    FLOAT16_BLOCKS,
    BFLOAT16_BLOCKS,
    BFLOAT16_PACKED,
    Q8_0_BLOCKS,
    Q6_K_BLOCKS,
    Q5_0_BLOCKS,
    Q4_K_BLOCKS,
    Q4_0_BLOCKS
};
/* INVALID_SIZES: the arguments violate what contract.c checks, and the last output was not written. */
enum Status { SUCCESS = 0, OUT_OF_MEMORY = 1, INVALID_SIZES = 2 };

/* A weight that the 4-bit codes of its packed unit cannot hold. */
typedef struct {
    uint32_t unit;        /* of its block */
    uint16_t index, bits; /* in the unit as BFLOAT16_BLOCKS; the bfloat16 value */
} Escape;

typedef struct {
    const void *data;
    const uint16_t *scales; /* INT4: (ceil(rows / LANES), groups, LANES, 2) bfloat16, w = level * scale + zero */
    const float *bias;      /* (rows,) or null */
    int64_t rows, cols, kind; /* cols: a multiple of 2 * LANES */
    float *input_squares; /* (cols,) or null; a linear adds the squares of its inputs to that of its first matrix */
    const uint8_t *upper_bytes;   /* BFLOAT16_PACKED: (16,) the upper byte of each code */
    const int64_t *escape_starts; /* BFLOAT16_PACKED: (blocks + 1,) of each block */
    const Escape *escapes;        /* BFLOAT16_PACKED: in the order of blocks, units and indices */
} Matrix;

typedef struct {
    Matrix q, k, v, o;
    const float *norm, *q_norm, *k_norm; /* (D,), (head_dim,) or null */
    double epsilon, scale;
    int64_t heads, kv_heads, head_dim, rotary_dim, window; /* head_dim: a multiple of LANES; window 0: no limit */
} Attention;

enum Activation { SILU, GELU_TANH };

typedef struct {
    Matrix gate, up, down;
    const float *norm;
    double epsilon;
    int64_t activation;
} Mlp;

/* Keys and values, and their 8-bit copies, which 4-bit attention sublayers read and write. */
typedef struct {
    void *keys, *values;              /* (…, head_dim) float32 or bfloat16 */
    int8_t *int8_keys, *int8_values;  /* (…, head_dim) */
    float *key_scales, *value_scales; /* (…,) */
} KVCache;

/* The rows of one session in a batch. In teacher-forced scoring (run_length > 0) nothing is written to the KV cache: row i
 * sees the cached keys up to the start of its run of `run_length` rows, and the forward pass's own keys from there. */
typedef struct {
    const float *cosines, *sines; /* (context, rotary_dim) */
    KVCache cache;                /* (layers, kv_heads, capacity, …) */
    int64_t capacity, position, run_length, n_rows; /* without a run length, position + n_rows <= capacity */
    int64_t kv_kind; /* of keys and values: FLOAT32 or BFLOAT16, to which new ones are rounded before they are used */
} BatchEntry;

/* The attention of one layer of a model that runs outside this library. */
typedef struct {
    double scale, softcap; /* softcap 0: none */
    const float *sinks;    /* (heads,) or null: a score of each head that takes weight away from the keys' */
    int64_t heads, kv_heads, head_dim; /* head_dim: a multiple of LANES, padded with zeros */
} OuterAttention;

/* One session's keys and values of that layer. New ones, from `position` on, are apart in teacher-forced scoring. */
typedef struct {
    const float *keys, *values;         /* (kv_heads, capacity, head_dim) */
    const float *new_keys, *new_values; /* (kv_heads, n_new, head_dim) or null */
    int64_t capacity, position, n_new;
} OuterCache;

/* The positions that one row sees: from `first` on in its session's cache, and from `split` to `end` - 1 among new ones. */
typedef struct {
    int64_t cache, first, split, end; /* cache: the index of its session */
} VisibleKeys;

/* x (n, D) goes through all layers, for the rows of the batch's entries. A sublayer whose pointer is null is skipped. */
EXPORT int knn_ssd_forward(const Attention *const *attentions, const Mlp *const *mlps, int64_t layers,
                           const BatchEntry *entries, int64_t n_entries, float *x);

/* hidden (n, D) = norm(x); logits (n_selected, V) = head(hidden[selected]), each of `selected` below n. */
EXPORT int knn_ssd_lm_head(const Matrix *head, const float *norm, double epsilon, const float *x, int64_t n,
                           const int64_t *selected, int64_t n_selected, float *hidden, float *logits);

/* y (n, rows) = the matrix applied to x (n, cols), for a linear layer of a model that runs outside this library. */
EXPORT int knn_ssd_linear(const Matrix *m, const float *x, int64_t n, float *y);

/* y (n, D) = down(activation(gate(x)) * up(x)) of x (n, D), likewise; there is no norm. */
EXPORT int knn_ssd_mlp(const Mlp *m, const float *x, int64_t n, float *y);

/* y (n, width) = RMS norm of each row of x (n, width) times weight (width,); width is a multiple of LANES. */
EXPORT int knn_ssd_rms_norm(const float *x, int64_t n, int64_t width, const float *weight, double epsilon, float *y);

/* out (n, heads, head_dim) = attention of queries (n, heads, head_dim), each row over the keys that it sees. */
EXPORT int knn_ssd_attend(const OuterAttention *a, const OuterCache *caches, int64_t n_caches, const VisibleKeys *rows,
                          int64_t n, const float *queries, float *out);

/* Writes the 4-bit copy of `m` to `data` and `scales`, which have room for a multiple of LANES rows. `importance` (cols,)
 * weights the columns' squared errors; `n_ranges` ranges are tried for each group. Only the rows first .. last - 1 are
 * written, which begin and end at multiples of 2 * LANES or end with the last row. */
EXPORT int knn_ssd_quantise(const Matrix *m, const float *importance, int64_t n_ranges, int64_t first, int64_t last,
                            uint8_t *data, uint16_t *scales);

/* Chooses the 16 upper bytes that get codes for a BFLOAT16 matrix. */
EXPORT int knn_ssd_upper_bytes(const Matrix *source, uint8_t *upper_bytes);

/* Writes a row-major matrix in blocks of a kind to `data`, which has room for a multiple of 2 * LANES rows. For
 * BFLOAT16_PACKED, `counts` (blocks,) gets the number of escapes of each block, and `upper_bytes` is given. */
EXPORT int knn_ssd_pack(const Matrix *source, int64_t kind, const uint8_t *upper_bytes, void *data, int64_t *counts);

/* Lists the escapes of a BFLOAT16 matrix; those of block i go to `escapes` + starts[i]. */
EXPORT int knn_ssd_list_escapes(const Matrix *source, const uint8_t *upper_bytes, const int64_t *starts, Escape *escapes);

/* values (n, cols) = n rows of a matrix in blocks. */
EXPORT int knn_ssd_read_rows(const Matrix *m, const int64_t *rows, int64_t n, float *values);

/* The sizes in bytes of Matrix, Attention, Mlp, BatchEntry, OuterAttention, OuterCache and VisibleKeys. */
EXPORT const int64_t *knn_ssd_struct_sizes(void);

EXPORT int64_t knn_ssd_lanes(void);
EXPORT void knn_ssd_enable_tiles(int64_t wanted);
EXPORT int64_t knn_ssd_uses_tiles(void);

/* Whether bfloat16 matrices in blocks are multiplied with inputs that are rounded to bfloat16, where the processor does that:
 * set for all threads, and kept from one by `keep_float32`, as the last function says for the thread that calls it. */
EXPORT void knn_ssd_enable_rounding(int64_t wanted);
EXPORT void knn_ssd_keep_float32(int64_t wanted);
EXPORT int64_t knn_ssd_rounds_inputs(void);

#endif
