/* 20,000 jobs of changing size on a changing number of threads: each task is done once, and
 * ThreadSanitizer sees no two threads at one place. sanitize.sh builds and runs it. */
#include "pool.h"

#include <stdio.h>
#include <unistd.h>

#define TASKS 64

typedef struct {
    long step;
} job;

static long cells[TASKS];

static void add(const void *data, int64_t task, int worker) {
    (void)worker;
    cells[task] += ((const job *)data)->step;
}

int main(void) {
    long wanted = 0, found = 0;
    for (int round = 0; round < 20000; round++) {
        const job one = {round % 7};
        const int tasks = 1 + round % TASKS;
        pool_run(add, &one, tasks, 1 + round % 5);
        wanted += tasks * one.step;
        if (round % 500 == 0) usleep(1000); /* long enough for the workers to fall asleep */
    }
    for (int i = 0; i < TASKS; i++) found += cells[i];
    if (found != wanted) printf("%ld tasks' work was done, %ld asked for\n", found, wanted);
    return found != wanted;
}
