/* The threads that the kernels share: one pool in a process, without OpenMP. */
#ifndef KNN_SSD_THREAD_POOL_H
#define KNN_SSD_THREAD_POOL_H

#include <stdint.h>

enum { POOL_MAX_THREADS = 256 };

/* Does items first .. last - 1. `thread` is below pool_threads() and differs between bodies that run at the same time,
 * so it can index scratch memory. A body neither fails nor forks, nor does it call pool_set_threads or pool_shutdown. */
typedef void (*PoolBody)(void *context, int64_t first, int64_t last, int thread);

#pragma GCC visibility push(default)

/* How many threads take part in a parallel_for, the calling one included; 1 until pool_set_threads. */
int pool_threads(void);

/* Sets that number (at least 1, at most POOL_MAX_THREADS) and ends the workers that there are. New ones start with the
 * next parallel_for. Waits until other threads have released the pool. */
void pool_set_threads(int threads);

/* Ends the workers; the next parallel_for starts new ones. */
void pool_shutdown(void);

#pragma GCC visibility pop
#pragma GCC visibility push(hidden)

/* Calls `body` so that each of the items 0 .. n_items - 1 is done once, and returns when all are. Ranges begin at
 * multiples of `grain`. A thread walks forwards through a contiguous part of the items, and then helps with the parts
 * of others. What a body wrote is visible to the caller afterwards. Within a body, it runs in the thread that calls it. */
void parallel_for(int64_t n_items, int64_t grain, PoolBody body, void *context);

/* Reserve the pool for the calling thread, so that several parallel_for follow each other without those of another
 * thread in between, and pool_threads() stays as it is; other threads sleep meanwhile. May be nested. A parallel_for does
 * it by itself where the caller has not. */
void pool_lock(void);
void pool_unlock(void);

#pragma GCC visibility pop

#endif
