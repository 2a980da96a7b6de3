/* A small pool of threads that draw tasks from a counter. */
#ifndef NIBBLE_POOL_H
#define NIBBLE_POOL_H

#include <sched.h>
#include <stdint.h>

#define LOOKS_IN_WAIT 4000 /* looks of one who waits before it yields its core */

/* Does task number `task`; `worker` < threads is its own among those at work. */
typedef void (*task_function)(const void *job, int64_t task, int worker);

/* Runs tasks 0 to tasks - 1 on at most `threads` threads, the calling one included, and returns
 * when all are done. They begin in order. No result may depend on who does which. */
void pool_run(task_function function, const void *job, int64_t tasks, int threads);

/* Between two looks at what another thread is at. */
static inline void pool_look(int64_t looks) {
    if (looks >= LOOKS_IN_WAIT) sched_yield();
#if defined(__x86_64__)
    else __builtin_ia32_pause();
#elif defined(__aarch64__)
    else __asm__ volatile("yield");
#endif
}

static inline int64_t min_(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_i(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#endif
