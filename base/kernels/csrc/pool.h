/* A small pool of threads that draw tasks from a counter. */
#ifndef NIBBLE_POOL_H
#define NIBBLE_POOL_H

#include <stdint.h>

/* Does task number `task`; `worker` < threads is its own among those at work. */
typedef void (*task_function)(const void *job, int64_t task, int worker);

/* Runs tasks 0 to tasks - 1 on at most `threads` threads, the calling one included, and returns
 * when all are done. No result may depend on who does which. */
void pool_run(task_function function, const void *job, int64_t tasks, int threads);

static inline int64_t min_(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_i(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#endif
