/* Threads: OpenMP's, which is torch's own pool where both load the same libgomp.
 *
 * Only `parallel` and `barrier` are used; work is drawn from a counter, so a core that is busy
 * elsewhere takes less of it. No result depends on who draws what.
 */
#ifndef NIBBLE_THREADS_H
#define NIBBLE_THREADS_H

#include <stdint.h>

#if defined(_OPENMP)
#include <omp.h>
#define PARALLEL(n) _Pragma_(omp parallel num_threads(n) if ((n) > 1))
#define BARRIER _Pragma_(omp barrier)
#define THREAD_INDEX omp_get_thread_num()
#define _Pragma_(x) _Pragma(#x)
#else
#define PARALLEL(n)
#define BARRIER
#define THREAD_INDEX 0
#endif

static inline int64_t draw(int64_t *counter) {
    return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
}

static inline int64_t min_(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_i(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#endif
