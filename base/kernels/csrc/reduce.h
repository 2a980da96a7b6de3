/* What sampling asks of logits [rows, width], the rows `stride` apart:
 *     best[t] = the first place of the largest;   log_sum[t] = log of the sum over j of e^x[t, j]
 * and the `count` largest of one row, largest first, of equals the first. NaN is above all numbers.
 *
 * A row goes by chunks of REDUCED values. For each, m = its largest and l = sum of e^(x - m); then, M
 * being the largest m, log_sum = M + log(sum over the chunks of l e^(m - M)).
 *
 * Order of additions. Lane j of VL adds up the values j, j + VL, ... of a chunk; `sum_lanes` joins
 * them; then chunks ascending. Rows and threads do not enter.
 */
#define REDUCED 8192

typedef struct {
    float top, sum; /* m, or NaN where the chunk has one; l */
} chunk_sums;

typedef struct {
    const float *x;
    int64_t rows, width, stride;
    chunk_sums *chunks; /* [rows, chunks of a row] */
    int64_t *best;
    float *log_sum;
} reduce_job;

/* `count` values at p, and -inf for the rest of the vector. */
INLINE vf load_or_least(const float *p, int64_t count) {
    float lane[VL];
    if (count >= VL) return load(p);
    for (int64_t l = 0; l < VL; l++) lane[l] = l < count ? p[l] : -INFINITY;
    return load(lane);
}

INLINE int any_lane(lanes condition) {
    for (int l = 0; l < VL; l++)
        if (condition[l]) return 1;
    return 0;
}

static chunk_sums sum_chunk(const float *x, int64_t count) {
    vf best = splat(-INFINITY), sum = splat(0.0f);
    lanes wrong = (lanes)(best != best);
    for (int64_t i = 0; i < count; i += VL) {
        const vf value = load_or_least(x + i, count - i);
        wrong |= (lanes)(value != value);
        best = max_(best, value);
    }
    if (any_lane(wrong)) return (chunk_sums){NAN, NAN};
    const float top = max_lanes(best);
    if (isinf(top)) return (chunk_sums){top, top > 0.0f ? INFINITY : 0.0f};
    for (int64_t i = 0; i < count; i += VL)
        sum = sum + exp_(load_or_least(x + i, count - i) - splat(top));
    return (chunk_sums){top, sum_lanes(sum)};
}

static void chunk_task(const void *data, int64_t task, int worker) {
    const reduce_job *job = data;
    const int64_t each = ceil_div(job->width, REDUCED), first = task % each * REDUCED;
    (void)worker;
    job->chunks[task] =
        sum_chunk(job->x + task / each * job->stride + first, min_(REDUCED, job->width - first));
}

/* The first place in [from, to) that is not below `top`; NaN is not. */
static int64_t first_place(const float *x, int64_t from, int64_t to, float top) {
    while (from < to && (isnan(top) ? !isnan(x[from]) : x[from] != top)) from++;
    return from;
}

static void join_chunks(const reduce_job *job, int64_t row) {
    const int64_t each = ceil_div(job->width, REDUCED);
    const chunk_sums *chunks = job->chunks + row * each;
    int64_t best = 0;
    float sum = 0.0f;
    for (int64_t c = 1; c < each && !isnan(chunks[best].top); c++)
        if (isnan(chunks[c].top) || chunks[c].top > chunks[best].top) best = c;
    const float top = chunks[best].top;
    const int64_t from = best * REDUCED;
    job->best[row] = first_place(job->x + row * job->stride, from,
                                 min_(job->width, from + REDUCED) - 1, top);
    if (!isfinite(top)) {
        job->log_sum[row] = top;
        return;
    }
    for (int64_t c = 0; c < each; c++) {
        float factor[VL];
        store(factor, exp_(splat(chunks[c].top - top)));
        sum = sum + chunks[c].sum * factor[0];
    }
    job->log_sum[row] = top + logf(sum);
}

static void reduce(const float *x, int64_t rows, int64_t width, int64_t stride, int64_t *best,
                   float *log_sum, int threads, float *workspace) {
    const reduce_job job = {x, rows, width, stride, (chunk_sums *)workspace, best, log_sum};
    pool_run(chunk_task, &job, rows * ceil_div(width, REDUCED), threads);
    for (int64_t row = 0; row < rows; row++) join_chunks(&job, row);
}

/* Floats. */
static int64_t reduce_workspace(int64_t rows, int64_t width) {
    return 2 * rows * ceil_div(width, REDUCED);
}

INLINE int above(float a, float b) { return a > b || (isnan(a) && !isnan(b)); }

/* values and places [count], count <= width. They are kept sorted; a later one must be above. */
static void largest(const float *x, int64_t width, int64_t count, float *values, int64_t *places) {
    int64_t held = 0;
    for (int64_t i = 0; i < width; i += VL) {
        const int64_t these = min_(VL, width - i);
        if (held == count) {
            const vf value = load_or_least(x + i, these);
            if (!any_lane(~(lanes)(value <= splat(values[count - 1])))) continue;
        }
        for (int64_t j = i; j < i + these; j++) {
            if (held == count && !above(x[j], values[count - 1])) continue;
            int64_t place = held < count ? held++ : count - 1;
            for (; place > 0 && above(x[j], values[place - 1]); place--) {
                values[place] = values[place - 1];
                places[place] = places[place - 1];
            }
            values[place] = x[j];
            places[place] = j;
        }
    }
}
