/* 20,000 jobs of changing size on a changing number of threads: each task is done once, tasks that
 * wait for those before them find what they left, and ThreadSanitizer sees no two threads at one
 * place. sanitize.sh builds and runs it. */
#include "pool.h"

#include <stdatomic.h>
#include <stdio.h>
#include <unistd.h>

#define TASKS 64
#define MAKERS 7 /* the tasks that the others wait for, as B u waits for A x in terms.h */

typedef struct {
    long step;
} job;

static long cells[TASKS];

static void add(const void *data, int64_t task, int worker) {
    (void)worker;
    cells[task] += ((const job *)data)->step;
}

typedef struct {
    long made[MAKERS], seen[TASKS];
    _Atomic int64_t left;
} relay;

static void pass(const void *data, int64_t task, int worker) {
    relay *own = (relay *)data;
    (void)worker;
    if (task < MAKERS) {
        own->made[task] = task + 1;
        atomic_fetch_sub_explicit(&own->left, 1, memory_order_release);
        return;
    }
    for (int64_t looks = 0; atomic_load_explicit(&own->left, memory_order_acquire);)
        pool_look(looks++);
    for (int i = 0; i < MAKERS; i++) own->seen[task] += own->made[i];
}

/* Tasks whose sum of what the makers left is wrong. */
static int relayed(int tasks, int threads) {
    relay own = {{0}, {0}, MAKERS};
    int wrong = 0;
    pool_run(pass, &own, tasks, threads);
    for (int i = MAKERS; i < tasks; i++) wrong += own.seen[i] != MAKERS * (MAKERS + 1) / 2;
    return wrong;
}

int main(void) {
    long wanted = 0, found = 0, lost = 0;
    for (int round = 0; round < 20000; round++) {
        const job one = {round % 7};
        const int tasks = 1 + round % TASKS;
        pool_run(add, &one, tasks, 1 + round % 5);
        wanted += tasks * one.step;
        if (tasks > MAKERS) lost += relayed(tasks, 1 + round % 5);
        if (round % 500 == 0) usleep(1000); /* long enough for the workers to fall asleep */
    }
    for (int i = 0; i < TASKS; i++) found += cells[i];
    if (found != wanted) printf("%ld tasks' work was done, %ld asked for\n", found, wanted);
    if (lost) printf("%ld tasks did not see what they waited for\n", lost);
    return found != wanted || lost;
}
