/* Tries the thread pool; `tests/test_thread_pool.py` compiles it and runs one case each: driver CASE [JOBS].
 * It contains the pool's source, so that it can delay the start of workers. */
#define _DEFAULT_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define DELAY_MS 300

static _Atomic int delayed; /* whether workers begin late, as if their core were busy with another program */

typedef struct {
    void *(*run)(void *);
    void *start;
} Routine;

static void sleep_ms(int ms) {
    struct timespec time = {ms / 1000, ms % 1000 * 1000000L};
    while (nanosleep(&time, &time)) {}
}

static void *run_late(void *given) {
    Routine routine = *(Routine *)given;
    free(given);
    sleep_ms(DELAY_MS);
    return routine.run(routine.start);
}

static int create_thread(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *start) {
    if (!delayed) return pthread_create(thread, attributes, run, start);
    Routine *routine = malloc(sizeof *routine);
    *routine = (Routine){run, start};
    return pthread_create(thread, attributes, run_late, routine);
}

#define pthread_create create_thread
#include "thread_pool.c"
#undef pthread_create

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition), exit(1);                      \
    } while (0)

static double milliseconds(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
}

/* A job that counts how often each of its items is done, without atomics: an item done twice at once is a data race. */
enum { MOST_ITEMS = 5000 };

typedef struct {
    int64_t n_items, grain;
    int counts[MOST_ITEMS];
    int busy[POOL_MAX_THREADS]; /* scratch memory of each thread */
} Count;

static void count_items(void *context, int64_t first, int64_t last, int thread) {
    Count *count = context;
    CHECK(0 <= thread && thread < pool_threads());
    CHECK(0 <= first && first < last && last <= count->n_items && first % count->grain == 0);
    CHECK(count->busy[thread]++ == 0);
    for (int64_t i = first; i < last; i++) count->counts[i]++;
    count->busy[thread]--;
}

/* The job lies on the caller's stack, which the next one overwrites. */
static void count_all(int64_t n_items, int64_t grain) {
    Count count = {.n_items = n_items, .grain = grain};
    CHECK(n_items <= MOST_ITEMS);
    parallel_for(n_items, grain, count_items, &count);
    for (int64_t i = 0; i < MOST_ITEMS; i++) CHECK(count.counts[i] == (i < n_items));
    memset(&count, 0xff, sizeof count);
}

static void count_some(int64_t jobs) {
    for (int64_t i = 0; i < jobs; i++) count_all(1 + (i * 7919) % 97, 1 + i % 3);
}

static void every_item_once(int64_t jobs) {
    const int64_t sizes[] = {1, 2, 3, 7, 8, 63, 64, 65, 1000, 4999}, grains[] = {1, 2, 5, 64, 5000};
    (void)jobs;
    for (int threads = 1; threads <= 8; threads++) {
        pool_set_threads(threads);
        CHECK(pool_threads() == threads);
        for (int s = 0; s < 10; s++)
            for (int g = 0; g < 5; g++)
                for (int again = 0; again < 3; again++) count_all(sizes[s], grains[g]);
    }
}

static void no_items(int64_t jobs) {
    (void)jobs;
    pool_set_threads(2);
    parallel_for(0, 1, NULL, NULL);
    parallel_for(-1, 1, NULL, NULL);
}

static void add_length(void *context, int64_t first, int64_t last, int thread) {
    (void)thread;
    atomic_fetch_add((_Atomic int64_t *)context, last - first);
}

static void very_many_items(int64_t jobs) {
    _Atomic int64_t total = 0;
    (void)jobs;
    pool_set_threads(4);
    parallel_for(INT64_MAX / 2, 3, add_length, &total);
    CHECK(total == INT64_MAX / 2);
}

static void threads_are_bounded(int64_t jobs) {
    (void)jobs;
    CHECK(pool_threads() == 1);
    pool_set_threads(0);
    CHECK(pool_threads() == 1);
    pool_set_threads(POOL_MAX_THREADS + 1);
    CHECK(pool_threads() == POOL_MAX_THREADS);
}

static void stress(int64_t jobs) {
    pool_set_threads(3);
    count_some(jobs);
}

static void oversubscribed(int64_t jobs) {
    pool_set_threads(32);
    count_some(jobs);
}

static void resized(int64_t jobs) {
    for (int64_t i = 0; i < jobs / 50; i++) {
        pool_set_threads(1 + (int)(i % 5));
        count_some(20);
        if (i % 3 == 0) pool_shutdown();
        count_some(5);
    }
}

static void *call_many(void *jobs) {
    for (int64_t i = 0; i < *(int64_t *)jobs; i++) {
        if (i % 10 == 0) {
            pool_lock();
            pool_lock();
            count_some(3);
            pool_unlock();
        }
        count_some(1);
        if (i % 10 == 0) pool_unlock();
    }
    return NULL;
}

static void several_callers(int64_t jobs) {
    pthread_t callers[4];
    int64_t each = jobs / 4;
    pool_set_threads(3);
    for (int i = 0; i < 4; i++) CHECK(!pthread_create(&callers[i], NULL, call_many, &each));
    for (int i = 0; i < 4; i++) pthread_join(callers[i], NULL);
}

typedef struct {
    int inner_thread;
    pthread_t inner_id;
    int64_t calls;
} Inner;

static void note_thread(void *context, int64_t first, int64_t last, int thread) {
    Inner *inner = context;
    *inner = (Inner){thread, pthread_self(), inner->calls + (first == 0 && last == 50)};
}

static void call_inner(void *context, int64_t first, int64_t last, int thread) {
    Inner inner = {0};
    parallel_for(50, 1, note_thread, &inner);
    CHECK(inner.calls == 1 && inner.inner_thread == thread && pthread_equal(inner.inner_id, pthread_self()));
    atomic_fetch_add((_Atomic int64_t *)context, last - first);
}

static void nested(int64_t jobs) {
    pool_set_threads(4);
    for (int64_t i = 0; i < jobs / 10; i++) {
        _Atomic int64_t done = 0;
        parallel_for(100, 1, call_inner, &done);
        CHECK(done == 100);
    }
}

static void *keep_calling(void *stop) {
    while (!*(_Atomic int *)stop) {
        pool_lock();
        for (int i = 0; i < 20; i++) count_all(50, 1);
        pool_unlock();
    }
    return NULL;
}

/* The parent's pool is in use, by another thread, whenever the child is made. */
static void forked(int64_t jobs) {
    _Atomic int stop = 0;
    pthread_t caller;
    pool_set_threads(3);
    CHECK(!pthread_create(&caller, NULL, keep_calling, &stop));
    for (int64_t i = 0; i < jobs / 200; i++) {
        count_some(5);
        sleep_ms(1); /* now the other thread has the lock again */
        pid_t child = fork();
        CHECK(child >= 0);
        if (!child) {
            alarm(20);
            CHECK(pool_threads() == 3 && pool.n_workers == 0);
            count_some(20);
            CHECK(pool.n_workers == 2);
            pool_shutdown();
            _exit(0);
        }
        int status;
        CHECK(waitpid(child, &status, 0) == child);
        if (status) fprintf(stderr, "the child ended with status %#x\n", (unsigned)status), exit(1);
    }
    stop = 1;
    pthread_join(caller, NULL);
}

/* Workers that have not come do not delay a job, and find nothing of it when they come. */
static void late_workers(int64_t jobs) {
    (void)jobs;
    delayed = 1;
    pool_set_threads(4);
    double start = milliseconds(CLOCK_MONOTONIC);
    count_some(100);
    CHECK(milliseconds(CLOCK_MONOTONIC) - start < DELAY_MS * 2 / 3);
    while (milliseconds(CLOCK_MONOTONIC) - start < DELAY_MS + 50) count_some(10);
    pool_shutdown();
}

/* The items of a thread that is held up in a chunk are done by others, but for those of that chunk. */
static void hold_up_first(void *context, int64_t first, int64_t last, int thread) {
    (void)thread;
    if (first == 0) sleep_ms(200);
    if (first == 0) CHECK(atomic_load((_Atomic int64_t *)context) == 1000 - last);
    atomic_fetch_add((_Atomic int64_t *)context, last - first);
}

static void held_up(int64_t jobs) {
    _Atomic int64_t done = 0;
    (void)jobs;
    pool_set_threads(2);
    parallel_for(1000, 1, hold_up_first, &done);
    CHECK(done == 1000);
}

/* After its last job a pool uses no processor time; nor does a caller that waits for a body, or for its turn. */
static void sleep_long(void *context, int64_t first, int64_t last, int thread) {
    (void)context, (void)last, (void)thread;
    if (first == 0) sleep_ms(200);
}

static void *call_once(void *context) {
    parallel_for(100, 1, sleep_long, context);
    return NULL;
}

static void idle_is_idle(int64_t jobs) {
    pthread_t caller;
    (void)jobs;
    pool_set_threads(4);
    count_some(10);
    double used = milliseconds(CLOCK_PROCESS_CPUTIME_ID);
    sleep_ms(300);
    CHECK(!pthread_create(&caller, NULL, call_once, NULL));
    call_once(NULL);
    pthread_join(caller, NULL);
    CHECK(milliseconds(CLOCK_PROCESS_CPUTIME_ID) - used < 50);
}

static pthread_t main_thread;

static void note_signal(int number) { (void)number, _exit(pthread_equal(pthread_self(), main_thread) ? 0 : 1); }

static void signal_reaches_caller(int64_t jobs) {
    sigset_t before, after;
    (void)jobs;
    main_thread = pthread_self();
    signal(SIGINT, note_signal);
    pool_set_threads(8);
    pthread_sigmask(SIG_SETMASK, NULL, &before);
    sigaddset(&before, SIGINT);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    count_some(10);
    pthread_sigmask(SIG_SETMASK, NULL, &after);
    for (int i = 1; i < 32; i++) CHECK(sigismember(&before, i) == sigismember(&after, i));
    kill(getpid(), SIGINT); /* a worker would take it now if it could */
    sleep_ms(50);
    sigdelset(&before, SIGINT);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    sleep_ms(50);
    CHECK(!"the signal came");
}

#define CASE(name) {#name, name}

static const struct {
    const char *name;
    void (*run)(int64_t jobs);
} CASES[] = {CASE(every_item_once), CASE(no_items),       CASE(very_many_items), CASE(threads_are_bounded),
             CASE(stress),          CASE(oversubscribed), CASE(resized),         CASE(several_callers),
             CASE(nested),          CASE(forked),         CASE(late_workers),    CASE(held_up),
             CASE(idle_is_idle),    CASE(signal_reaches_caller)};

int main(int count, char **arguments) {
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++)
        if (count == 3 && !strcmp(arguments[1], CASES[i].name)) {
            CASES[i].run(atoll(arguments[2]));
            pool_shutdown();
            return 0;
        }
    fprintf(stderr, "usage: driver CASE JOBS\n");
    return 2;
}
