/* y[t, o] = sum over k of x[t, k] W[o, k], + bias[o]; W in float32 or bfloat16, row-major, all
 * arithmetic in float32: the output head, and matrices that are an adapter's own.
 *
 * Order of additions. Lane l of VL adds up the columns l, l + VL, ...; `sum_each` joins the lanes;
 * the bias comes last. It is the product A x of lowrank.h, whose tiles are used here.
 *
 * Up to two tiles of x the stored weights go to the registers directly. Beyond, the rows of a task
 * are made float32 once, in a buffer, and used for all rows of x.
 */
#include "kernels.h"
#include "lowrank.h"
#include "pool.h"
#include "simd.h"

#define DENSE_ROWS 16 /* rows of W in one task */

typedef struct {
    const void *w;
    const float *x, *bias;
    float *y, *panels;
    int64_t rows, in, out, stored;
} dense_job;

INLINE void dense_product(const void *w, const int64_t row[4], int64_t stored, const float *x,
                          int64_t in, int tile, float sums[][4]) {
    if (stored == STORED_BF16)
        shrink_bf16(w, row, x, in, tile, sums);
    else
        shrink_f32(w, row, x, in, tile, sums);
}

static void dense_panel(const dense_job *job, int64_t o0, int64_t count, float *panel) {
    for (int64_t r = 0; r < count; r++) {
        const uint16_t *from = (const uint16_t *)job->w + (o0 + r) * job->in;
        float *to = panel + r * job->in;
        int64_t k = 0;
        for (; k + VL <= job->in; k += VL) store(to + k, load_bf16(from + k));
        for (; k < job->in; k++) to[k] = from_bf16(from[k]);
    }
}

static void dense_task(const void *data, int64_t task, int worker) {
    const dense_job *job = data;
    const int64_t o0 = task * DENSE_ROWS, count = min_(DENSE_ROWS, job->out - o0);
    const int wide = job->rows > 2 * TILE && job->stored == STORED_BF16;
    float *panel = job->panels + worker * DENSE_ROWS * job->in;
    float sums[TILE][4];
    if (wide) dense_panel(job, o0, count, panel);
    for (int64_t t0 = 0, tile; t0 < job->rows; t0 += tile) {
        tile = ceil_div(job->rows - t0, ceil_div(job->rows - t0, TILE));
        for (int64_t r0 = 0; r0 < count; r0 += 4) {
            const int64_t used = min_(4, count - r0), first = wide ? r0 : o0 + r0;
            int64_t row[4];
            for (int64_t i = 0; i < 4; i++) row[i] = (first + min_(i, used - 1)) * job->in;
            dense_product(wide ? panel : job->w, row, wide ? STORED_F32 : job->stored,
                          job->x + t0 * job->in, job->in, (int)tile, sums);
            for (int64_t t = 0; t < tile; t++)
                for (int64_t r = 0; r < used; r++) {
                    const int64_t o = o0 + r0 + r;
                    job->y[(t0 + t) * job->out + o] =
                        job->bias ? sums[t][r] + job->bias[o] : sums[t][r];
                }
        }
    }
}

static int64_t dense_workspace(int64_t in, int64_t rows, int64_t stored, int threads) {
    return rows > 2 * TILE && stored == STORED_BF16 ? threads * DENSE_ROWS * in : 0;
}

static void dense_linear(const void *w, int64_t stored, const float *x, int64_t rows, int64_t in,
                         int64_t out, const float *bias, float *y, int threads, float *workspace) {
    const dense_job job = {w, x, bias, y, workspace, rows, in, out, stored};
    pool_run(dense_task, &job, ceil_div(out, DENSE_ROWS), threads);
}
