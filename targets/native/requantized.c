/* The end of RequantizedQMatMul…: yq, ys = Quantize of the result y, or of y * smoothing. */
#include <stdlib.h>
#include <string.h>

#include "qmatmul.h"

/* Results below this many bytes are in a cache when the product is done. */
static const int64_t CACHED_BYTES = (int64_t)4 << 20;
/* A task of fewer rows reads the weights too often, even if a cache holds them; more are read again from
 * memory. */
static const int64_t LEAST_ROWS = 32, CACHED_WEIGHTS = 768 << 10;
/* As many floats lie on the stack. */
enum { FEW_FLOATS = 4096 };

/* Rows [row, row + rows) of the result, which lie at y. */
static void quantize_rows(const struct qmatmul_run *run, const float *y, int64_t row, int64_t rows) {
    const struct qc_op *op = run->kernel->op;
    const struct qc_quantize_args args = {
        .x = y,
        .smoothing = op->spec->form[0] ? run->args.extra[strlen(op->spec->extras) - 1] : NULL,
        .q = run->yq + row * op->spec->n,
        .s = run->ys + row,
        .rows = (int32_t)rows,
        .x_stride = (int32_t)op->spec->n,
    };
    qc_quantize_block(op->variant, &args, op->spec->n);
}

void qc_run_and_quantize(const struct qmatmul_run *run, struct qc_qmatmul_args *args, int64_t row) {
    float memory[RESULT_FLOATS] __attribute__((aligned(64)));
    float *const stored = (float *)run->y[0];
    float *const y = stored ? stored + row * run->kernel->op->spec->n : memory;
    char *const results[] = {(char *)y};
    qc_run_panels(run, args, results, 0, 0, run->kernel->panels);
    quantize_rows(run, y, row, args->rows);
}

static int64_t weight_bytes(const struct qc_op *op) {
    const int64_t count = op->spec->k * op->spec->n;
    if (!op->variant->chunk) return count;
    return count / 2 + ceil_div(op->spec->k, op->spec->g) * op->spec->n * (int64_t)sizeof(float);
}

static int in_tasks(const struct qmatmul_run *run) {
    const struct qc_op_spec *spec = run->kernel->op->spec;
    if (run->rows * spec->n * (int64_t)sizeof(float) >= CACHED_BYTES) return 1;
    return run->rows > LEAST_ROWS && weight_bytes(run->kernel->op) <= CACHED_WEIGHTS;
}

static void quantize_task(void *argument, size_t index) {
    const struct qmatmul_run *run = argument;
    const int64_t row = (int64_t)index * run->block_rows;
    const float *y = (const float *)run->y[0] + row * run->kernel->op->spec->n;
    quantize_rows(run, y, row, min(run->block_rows, run->rows - row));
}

static OrtStatus *run_then_quantize(struct qmatmul_run *run, OrtKernelContext *context) {
    QC_TRY(qc_run_qmatmul(run, context));
    /* What a core quantizes in a nanosecond, see quantize.c. */
    const double nanoseconds = (double)run->rows * (double)run->kernel->op->spec->n / 14;
    run->block_rows = ceil_div(run->rows, min(qc_task_count(nanoseconds), run->rows));
    return qc_parallel(context, quantize_task, (size_t)ceil_div(run->rows, run->block_rows), run);
}

OrtStatus *qc_run_requantized(struct qmatmul_run *run, OrtKernelContext *context) {
    const int64_t floats = run->rows * run->kernel->op->spec->n;
    run->in_tasks = in_tasks(run);
    if (run->in_tasks) return qc_run_qmatmul(run, context);
    if (run->y[0]) return run_then_quantize(run, context);
    float few[FEW_FLOATS] __attribute__((aligned(64)));
    float *memory = floats <= FEW_FLOATS ? few : malloc((size_t)floats * sizeof *memory);
    if (!memory)
        return qc_error(run->kernel->op, "out of memory for %lld results", (long long)floats);
    run->y[0] = (char *)memory;
    OrtStatus *status = run_then_quantize(run, context);
    if (memory != few) free(memory);
    return status;
}
