/* Why not OpenMP: its regions end when every thread of the team has come by, also the one whose
 * core another process holds, and where torch brings a second runtime the two spin against each
 * other. Here the caller does the work itself, whoever comes helps, and only those who came are
 * waited for. An idle worker watches for the next job for some microseconds (the products of one
 * step follow each other closely), then sleeps.
 */
#include "pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>

#define MOST_WORKERS 255
#define WATCH 2000      /* looks before a worker goes to sleep: some tens of microseconds */

static struct {
    task_function function;
    const void *job;
    int64_t tasks;
    int threads;
    _Atomic int64_t next;    /* the next task */
    _Atomic int joined;      /* workers given a number in this job, the caller included */
    _Atomic uint64_t posted; /* jobs posted so far */
    _Atomic int open;        /* may a worker still join? */
    _Atomic int inside;      /* workers that may be reading the fields above */
    _Atomic int asleep;
} now;

static pthread_mutex_t callers = PTHREAD_MUTEX_INITIALIZER; /* one job at a time */
static pthread_mutex_t bed = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t alarm_clock = PTHREAD_COND_INITIALIZER;
static int workers = 0;

static void draw_tasks(int worker) {
    for (int64_t task; (task = atomic_fetch_add(&now.next, 1)) < now.tasks;)
        now.function(now.job, task, worker);
}

static void *work(void *unused) {
    uint64_t seen = 0;
    (void)unused;
    for (;;) {
        for (int i = 0; i < WATCH && atomic_load(&now.posted) == seen; i++) pool_look(0);
        if (atomic_load(&now.posted) == seen) {
            pthread_mutex_lock(&bed);
            atomic_fetch_add(&now.asleep, 1);
            while (atomic_load(&now.posted) == seen) pthread_cond_wait(&alarm_clock, &bed);
            atomic_fetch_sub(&now.asleep, 1);
            pthread_mutex_unlock(&bed);
        }
        seen = atomic_load(&now.posted);
        /* Come in first, look second: the caller closes first, counts second. So either it waits
         * for us or we find the door closed and touch nothing. */
        atomic_fetch_add(&now.inside, 1);
        if (atomic_load(&now.open)) {
            const int number = atomic_fetch_add(&now.joined, 1);
            if (number < now.threads) draw_tasks(number);
        }
        atomic_fetch_sub(&now.inside, 1);
    }
    return NULL;
}

/* A forked child has none of the workers. */
static void forget_workers(void) {
    workers = 0;
    atomic_store(&now.inside, 0);
    atomic_store(&now.asleep, 0);
    atomic_store(&now.open, 0);
    pthread_mutex_init(&callers, NULL);
    pthread_mutex_init(&bed, NULL);
    pthread_cond_init(&alarm_clock, NULL);
}

static void hire(int wanted) {
    static int registered = 0;
    if (!registered) registered = !pthread_atfork(NULL, NULL, forget_workers);
    while (workers < wanted && workers < MOST_WORKERS) {
        pthread_t thread;
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        const int failed = pthread_create(&thread, &attributes, work, NULL);
        pthread_attr_destroy(&attributes);
        if (failed) return; /* fewer helpers, same result */
        workers++;
    }
}

void pool_run(task_function function, const void *job, int64_t tasks, int threads) {
    if (threads <= 1 || tasks <= 1 || pthread_mutex_trylock(&callers)) {
        for (int64_t task = 0; task < tasks; task++) function(job, task, 0);
        return;
    }
    hire(threads - 1);
    now.function = function;
    now.job = job;
    now.tasks = tasks;
    now.threads = threads;
    atomic_store(&now.next, 0);
    atomic_store(&now.joined, 1);
    atomic_store(&now.open, 1);
    atomic_fetch_add(&now.posted, 1);
    if (atomic_load(&now.asleep)) {
        pthread_mutex_lock(&bed);
        pthread_cond_broadcast(&alarm_clock);
        pthread_mutex_unlock(&bed);
    }
    draw_tasks(0);
    atomic_store(&now.open, 0);
    for (int64_t looks = 0; atomic_load(&now.inside);) pool_look(looks++);
    pthread_mutex_unlock(&callers);
}
