/* y = GroupSumsA8(q, s): of each row the sums of groups of activations less 128, times the row's scale. */
#include "qcompiler.h"

/* Bytes that a core adds up in a nanosecond. */
static const double SUM_RATE = 8;

struct sums_run {
    const uint8_t *q;
    const float *s;
    float *y;
    int64_t rows, k, group, groups, tasks;
};

static void sums_task(void *argument, size_t index) {
    const struct sums_run *run = argument;
    const int64_t end = run->rows * ((int64_t)index + 1) / run->tasks;
    for (int64_t row = run->rows * (int64_t)index / run->tasks; row < end; row++)
        for (int64_t group = 0; group < run->groups; group++) {
            const int64_t first = group * run->group, left = run->k - first;
            const int64_t count = left < run->group ? left : run->group;
            int32_t sum;
            qc_sum_rows(run->q + row * run->k + first, 1, count, 128, &sum);
            run->y[row * run->groups + group] = (float)sum * run->s[row];
        }
}

static OrtStatus *sums_compute(void *kernel, OrtKernelContext *context) {
    const struct qc_op *op = kernel;
    struct sums_run run = {.group = op->spec->g, .rows = 1};
    struct qc_shape shape;
    const OrtValue *value;
    QC_TRY(qc_input(context, 0, &value, (const void **)&run.q));
    QC_TRY(qc_tensor_shape(op, value, &shape));
    for (size_t i = 0; i + 1 < shape.rank; i++) run.rows *= shape.dims[i];
    run.k = shape.dims[shape.rank - 1];
    run.groups = (run.k + run.group - 1) / run.group;
    QC_TRY(qc_floats(op, context, 1, "s", run.rows, &run.s));
    shape.dims[shape.rank - 1] = run.groups;
    QC_TRY(qc_output(context, 0, &shape, (void **)&run.y));
    if (run.rows * run.groups == 0) return NULL;
    run.tasks = qc_task_count((double)run.rows * (double)run.k / SUM_RATE);
    if (run.tasks > run.rows) run.tasks = run.rows;
    return qc_parallel(context, sums_task, (size_t)run.tasks, &run);
}

static OrtStatus *sums_create(const struct qc_op *op, const OrtKernelInfo *info, void **kernel) {
    (void)info;
    *kernel = (void *)op; /* nothing to keep per node */
    return NULL;
}

static void sums_destroy(void *kernel) { (void)kernel; }

const struct qc_anchor qc_group_sums = {
    .input_types = (const int[]){ORT_UINT8, ORT_FLOAT},
    .input_count = 2,
    .output_types = (const int[]){ORT_FLOAT},
    .output_count = 1,
    .create = sums_create,
    .compute = sums_compute,
    .destroy = sums_destroy,
};
