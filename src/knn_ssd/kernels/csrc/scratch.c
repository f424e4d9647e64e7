/* The scratch memory: a chain of blocks, which a reset replaces by one block of their total size. */
#include "scratch.h"

#include <stdint.h>
#include <stdlib.h>

#define ALIGNMENT 64
#define MIN_BLOCK_BYTES ((size_t)1 << 18)

#ifdef __SANITIZE_ADDRESS__ /* the sanitiser then finds what is read or written between two areas that were taken */
#include <sanitizer/asan_interface.h>
#define GAP ALIGNMENT
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define GAP 0
#endif

typedef struct Block {
    struct Block *previous;
    size_t size, used; /* bytes, the header included */
} Block;

_Static_assert(sizeof(Block) <= ALIGNMENT, "a block's first aligned address is behind its header");

static struct {
    Block *last;
    int failed;
} scratch;

/* Makes all of the last block unreadable under the sanitiser, but for its header. */
static void poison_block(void) {
    ASAN_POISON_MEMORY_REGION((char *)scratch.last + ALIGNMENT, scratch.last->size - ALIGNMENT);
}

/* Puts a new block of at least `size` bytes at the end of the chain, or leaves the chain as it is. */
static int add_block(size_t size) {
    size = (size < MIN_BLOCK_BYTES ? MIN_BLOCK_BYTES : size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    Block *block = aligned_alloc(ALIGNMENT, size);
    if (!block) return 0;
    *block = (Block){scratch.last, size, ALIGNMENT};
    scratch.last = block;
    poison_block();
    return 1;
}

static void free_blocks(void) {
    while (scratch.last) {
        Block *previous = scratch.last->previous;
        free(scratch.last);
        scratch.last = previous;
    }
}

void scratch_reset(void) {
    scratch.failed = 0;
    if (!scratch.last) return;
    if (scratch.last->previous) {
        size_t total = 0;
        for (const Block *block = scratch.last; block; block = block->previous) total += block->size;
        free_blocks();
        if (!add_block(total)) return;
    }
    scratch.last->used = ALIGNMENT;
    poison_block();
}

void *scratch_take(size_t count, size_t size) {
    size_t bytes;
    scratch.failed |= __builtin_mul_overflow(count, size, &bytes) || bytes > PTRDIFF_MAX - 3 * ALIGNMENT;
    if (scratch.failed) return NULL;
    const size_t exact_bytes = bytes;
    bytes = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT + GAP;
    if (!scratch.last || bytes > scratch.last->size - scratch.last->used)
        if (!add_block(bytes + ALIGNMENT)) {
            scratch.failed = 1;
            return NULL;
        }
    void *result = (char *)scratch.last + scratch.last->used;
    scratch.last->used += bytes;
    ASAN_UNPOISON_MEMORY_REGION(result, exact_bytes);
    return result;
}

int scratch_failed(void) { return scratch.failed; }
