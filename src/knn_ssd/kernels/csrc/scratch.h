/* Scratch memory of the process, kept from one call to the next. It belongs to the thread that holds `pool_lock`.
 *
 * `scratch_reset` makes all of it available again. `scratch_take` grows it as needed, and what was taken before stays
 * where it is. A failed allocation is remembered until the next reset: `scratch_take` then returns null, so callers take
 * all they need and ask `scratch_failed` once. The product of `count` and `size` is checked: callers pass the number of
 * rows or positions as `count`, and what the model's sizes alone decide as `size`.
 */
#ifndef KNN_SSD_SCRATCH_H
#define KNN_SSD_SCRATCH_H

#include <stddef.h>

void scratch_reset(void);
void *scratch_take(size_t count, size_t size); /* 64-byte aligned room for `count` elements of `size` bytes */
int scratch_failed(void);

#endif
