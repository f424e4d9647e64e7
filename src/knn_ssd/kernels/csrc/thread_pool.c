/* One pool of threads for all kernels of a process.
 *
 * A forward pass issues hundreds of jobs of 5 to 300 microseconds, on a machine whose cores other programs may use too.
 * So nothing waits for a thread that has taken no items, and nothing spins for long:
 *
 * - The items of a job are divided into one part per thread, each a single atomic word (begin, end). A thread takes
 *   chunks from the front of its own part, then from the back of the part with most left. Each time it takes a quarter of
 *   what is left there, so a thread whose core is slow or busy with another program is relieved of what it has not begun.
 * - A job ends when all its items are done, however many threads came. A worker that comes late finds empty parts.
 * - Both sides spin for SPIN_NS and then sleep, on a futex or, outside Linux, on a condition variable.
 *
 * Why a late worker does no harm: it reads the job only after it has taken a chunk, and a job with a chunk that is taken
 * but not yet reported cannot end, so what it reads is the job to which the chunk belongs. If the part that it looked at
 * has become part of a later job meanwhile, its compare-and-swap either fails or takes a chunk of that later job, which is
 * as good. No tag is needed against reuse, and nothing of a caller's stack is read without a chunk of that caller's. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE /* syscall, also under -std=c11 */
#endif
#include "thread_pool.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <time.h>
#if defined(__linux__) && !defined(POOL_CONDITION_VARIABLE)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_FUTEX
#endif

#ifndef SPIN_NS
#define SPIN_NS 30000 /* longer than the gaps between the jobs of a forward pass, far shorter than a time slice */
#endif
#define PAUSES 16      /* between two looks at the clock */
#define CACHE_LINE 128 /* bytes; two lines of 64, which processors fetch in pairs */

typedef struct {
    _Alignas(CACHE_LINE) _Atomic uint32_t word;
    _Atomic uint32_t sleepers;
} Signal;

typedef struct {
    _Alignas(CACHE_LINE) _Atomic uint64_t range; /* units not taken yet: begin in the low half, end in the high half */
} Part;

typedef struct {
    uint32_t begin, end; /* units */
} Chunk;

static struct {
    Signal generation; /* grows by one with each job, and when workers are to end */
    Signal pending;    /* units of the current job that are not reported as done */
    Part parts[POOL_MAX_THREADS];
    struct {
        _Alignas(CACHE_LINE) PoolBody body;
        void *context;
        int64_t n_items, unit; /* a unit is what parts count: `grain` items, or more where there are very many */
    } job;
    /* What follows changes only under the lock while no worker runs, `ending` excepted. */
    pthread_t workers[POOL_MAX_THREADS];
    int n_workers;
    bool started;
    _Atomic bool ending;
} pool;

static _Atomic int threads_wanted = 1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local int lock_depth;
static _Thread_local int running_as = -1; /* this thread's number while it runs a body, else -1 */

/* ---- waiting ---- */

#ifdef HAS_FUTEX
static void sleep_while(_Atomic uint32_t *word, uint32_t value) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void wake(_Atomic uint32_t *word, int count) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0); }

static void reset_sleep(void) {}
#else
static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t sleep_condition = PTHREAD_COND_INITIALIZER;

static void sleep_while(_Atomic uint32_t *word, uint32_t value) {
    pthread_mutex_lock(&sleep_lock);
    if (atomic_load(word) == value) pthread_cond_wait(&sleep_condition, &sleep_lock);
    pthread_mutex_unlock(&sleep_lock);
}

static void wake(_Atomic uint32_t *word, int count) {
    (void)word, (void)count; /* one condition serves both signals, and each sleeper looks at its own again */
    pthread_mutex_lock(&sleep_lock);
    pthread_cond_broadcast(&sleep_condition);
    pthread_mutex_unlock(&sleep_lock);
}

static void reset_sleep(void) {
    sleep_lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    sleep_condition = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
}
#endif

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void spin_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
    __asm__ volatile("yield");
#endif
}

/* Returns when the word differs from `value`. */
static void wait_while(Signal *signal, uint32_t value) {
    int64_t end_ns = now_ns() + SPIN_NS;
    do {
        for (int i = 0; i < PAUSES; i++, spin_pause())
            if (atomic_load_explicit(&signal->word, memory_order_acquire) != value) return;
    } while (now_ns() < end_ns);
    atomic_fetch_add(&signal->sleepers, 1);
    while (atomic_load(&signal->word) == value) sleep_while(&signal->word, value);
    atomic_fetch_sub(&signal->sleepers, 1);
}

/* Called after the word has changed. Both sides are sequentially consistent: either the sleeper is seen here, or the
 * change is seen there before it sleeps. */
static void wake_sleepers(Signal *signal, int count) {
    if (atomic_load(&signal->sleepers)) wake(&signal->word, count);
}

/* ---- taking and doing chunks ---- */

static uint64_t packed(uint32_t begin, uint32_t end) { return (uint64_t)end << 32 | begin; }

static uint32_t begin_of(uint64_t range) { return (uint32_t)range; }

static uint32_t end_of(uint64_t range) { return (uint32_t)(range >> 32); }

static uint32_t left_in(uint64_t range) { return end_of(range) - begin_of(range); }

static uint32_t quarter_of(uint32_t units) { return units / 4 + (units % 4 != 0); }

static bool take_from_own(Part *part, Chunk *chunk) {
    uint64_t range = atomic_load_explicit(&part->range, memory_order_relaxed);
    do {
        if (!left_in(range)) return false;
        *chunk = (Chunk){begin_of(range), begin_of(range) + quarter_of(left_in(range))};
    } while (!atomic_compare_exchange_weak_explicit(&part->range, &range, packed(chunk->end, end_of(range)),
                                                    memory_order_acquire, memory_order_relaxed));
    return true;
}

static bool take_from_fullest(Chunk *chunk) {
    for (;;) {
        int fullest = 0;
        uint64_t range = 0;
        for (int i = 0; i <= pool.n_workers; i++) {
            uint64_t other = atomic_load_explicit(&pool.parts[i].range, memory_order_relaxed);
            if (left_in(other) > left_in(range)) fullest = i, range = other;
        }
        if (!left_in(range)) return false;
        *chunk = (Chunk){end_of(range) - quarter_of(left_in(range)), end_of(range)};
        if (atomic_compare_exchange_strong_explicit(&pool.parts[fullest].range, &range,
                                                    packed(begin_of(range), chunk->begin), memory_order_acquire,
                                                    memory_order_relaxed))
            return true;
    }
}

/* Does what it can get of the current job, and reports it at the end: until then the job cannot end. */
static void work(int thread) {
    uint32_t done = 0;
    running_as = thread;
    for (Chunk chunk; take_from_own(&pool.parts[thread], &chunk) || take_from_fullest(&chunk);) {
        int64_t first = chunk.begin * pool.job.unit, last = chunk.end * pool.job.unit;
        pool.job.body(pool.job.context, first, last < pool.job.n_items ? last : pool.job.n_items, thread);
        done += chunk.end - chunk.begin;
    }
    running_as = -1;
    if (done && atomic_fetch_sub(&pool.pending.word, done) == done) wake_sleepers(&pool.pending, 1);
}

/* ---- workers ---- */

typedef struct {
    int thread;
    uint32_t generation; /* the last one that is not the worker's business */
} Start;

static Start starts[POOL_MAX_THREADS];

static void *run_worker(void *start) {
    int thread = ((Start *)start)->thread;
    uint32_t generation = ((Start *)start)->generation;
    for (;;) {
        wait_while(&pool.generation, generation);
        generation = atomic_load(&pool.generation.word);
        if (pool.ending) return NULL;
        work(thread);
    }
}

static void forget_workers(void) {
    pool.n_workers = 0;
    pool.started = false;
    pool.ending = false;
}

/* In a child process after fork: there are no workers, and the lock is free, even if a thread of the parent held it. */
static void reset_in_child(void) {
    lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    reset_sleep();
    lock_depth = 0, running_as = -1;
    forget_workers();
    pool.generation.sleepers = pool.pending.sleepers = pool.pending.word = 0;
    for (int i = 0; i < POOL_MAX_THREADS; i++) pool.parts[i].range = 0;
}

static void register_fork_handler(void) { pthread_atfork(NULL, NULL, reset_in_child); }

/* Signals go to the program's own threads, but for those that a fault in a body raises in the worker itself. */
static void block_signals(sigset_t *before) {
    const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
    sigset_t blocked;
    sigfillset(&blocked);
    for (int i = 0; i < 4; i++) sigdelset(&blocked, faults[i]);
    pthread_sigmask(SIG_SETMASK, &blocked, before);
}

/* Where the system gives fewer threads than wanted, those that there are do the work. */
static void start_workers(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    sigset_t before;
    pthread_once(&once, register_fork_handler);
    block_signals(&before);
    while (pool.n_workers < threads_wanted - 1) {
        int thread = pool.n_workers + 1;
        starts[thread] = (Start){thread, pool.generation.word};
        if (pthread_create(&pool.workers[pool.n_workers], NULL, run_worker, &starts[thread])) break;
        pool.n_workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pool.started = true;
}

static void end_workers(void) {
    pool.ending = true;
    atomic_fetch_add(&pool.generation.word, 1);
    wake_sleepers(&pool.generation, POOL_MAX_THREADS);
    for (int i = 0; i < pool.n_workers; i++) pthread_join(pool.workers[i], NULL);
    forget_workers();
}

/* ---- what callers use ---- */

void pool_lock(void) {
    if (!lock_depth++) pthread_mutex_lock(&lock);
}

void pool_unlock(void) {
    if (lock_depth && !--lock_depth) pthread_mutex_unlock(&lock);
}

int pool_threads(void) { return threads_wanted; }

void pool_set_threads(int threads) {
    pool_lock();
    end_workers();
    threads_wanted = threads < 1 ? 1 : threads > POOL_MAX_THREADS ? POOL_MAX_THREADS : threads;
    pool_unlock();
}

void pool_shutdown(void) {
    pool_lock();
    end_workers();
    pool_unlock();
}

static void publish(int64_t n_items, int64_t unit, PoolBody body, void *context) {
    uint64_t units = (uint64_t)((n_items - 1) / unit + 1), n_parts = (uint64_t)pool.n_workers + 1;
    pool.job.body = body, pool.job.context = context, pool.job.n_items = n_items, pool.job.unit = unit;
    atomic_store_explicit(&pool.pending.word, (uint32_t)units, memory_order_relaxed);
    for (uint64_t i = 0; i < n_parts; i++) {
        uint64_t range = packed((uint32_t)(units * i / n_parts), (uint32_t)(units * (i + 1) / n_parts));
        atomic_store_explicit(&pool.parts[i].range, range, memory_order_release);
    }
    atomic_fetch_add(&pool.generation.word, 1);
    wake_sleepers(&pool.generation, (int)(units < n_parts ? units : n_parts) - 1);
}

static void run_here(int64_t n_items, PoolBody body, void *context) {
    int outer = running_as;
    running_as = outer < 0 ? 0 : outer;
    body(context, 0, n_items, running_as);
    running_as = outer;
}

void parallel_for(int64_t n_items, int64_t grain, PoolBody body, void *context) {
    if (n_items <= 0) return;
    int64_t unit = grain < 1 ? 1 : grain;
    while ((n_items - 1) / unit >= INT32_MAX) unit *= 2;
    if (running_as >= 0 || n_items <= unit || threads_wanted == 1) {
        run_here(n_items, body, context);
        return;
    }
    pool_lock();
    if (!pool.started) start_workers();
    publish(n_items, unit, body, context);
    work(0);
    for (uint32_t left; (left = atomic_load(&pool.pending.word));) wait_while(&pool.pending, left);
    pool_unlock();
}
