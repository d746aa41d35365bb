/* q, s = Quantize(x), or of x * smoothing where a region has that extra operand: int8 per row, as uint8
 * with zero point 128. */
#include <math.h>
#include <stdlib.h>

#include "qcompiler.h"

/* float32 elements one core quantizes per nanosecond, from L2. */
static const double QUANTIZE_RATE = 14;
/* Kernels index a block with int32. */
static const int64_t MAX_BLOCK_ELEMENTS = (int64_t)1 << 30;

/* SMALLEST_MAGNITUDE in ir/dialect_ops.py, and a little for how it was divided. */
static const float LEAST_SCALE = 1.0001f * 1e-20f / 127;

int qc_has_least_scale(float s) { return s <= LEAST_SCALE; }

/* Maxima pass over NaN, in ONNX Runtime as in kernels.  But a row that is NaN throughout, as norms make
 * of a single one, is NaN by the function's body, and would be about 0 by the least scale.  Rows of
 * zeros are read once more for it, all others cost a comparison. */
static void keep_nan(const struct qc_quantize_args *args, int64_t k) {
    for (int64_t row = 0; row < args->rows; row++) {
        if (!qc_has_least_scale(args->s[row])) continue;
        const float *x = args->x + row * args->x_stride;
        float sum = 0;
        for (int64_t i = 0; i < k; i++) sum += args->smoothing ? x[i] * args->smoothing[i] : x[i];
        if (isnan(sum)) args->s[row] = sum;
    }
}

void qc_quantize_block(const struct qc_variant *variant, const struct qc_quantize_args *args, int64_t k) {
    variant->quantize(args);
    keep_nan(args, k);
}

struct quantize {
    const struct qc_op *op;
    const float *smoothing; /* if it is an initializer */
};

struct quantize_run {
    const struct qc_variant *variant;
    struct qc_quantize_args args; /* of all rows */
    int64_t rows, k, tasks;
};

static void quantize_task(void *argument, size_t index) {
    const struct quantize_run *run = argument;
    int64_t begin = run->rows * (int64_t)index / run->tasks;
    int64_t end = run->rows * ((int64_t)index + 1) / run->tasks;
    int64_t step = MAX_BLOCK_ELEMENTS / run->k;
    for (int64_t row = begin; row < end; row += step) {
        struct qc_quantize_args args = run->args;
        args.x += row * run->k;
        args.q += row * run->k;
        args.s += row;
        args.rows = (int32_t)(end - row < step ? end - row : step);
        qc_quantize_block(run->variant, &args, run->k);
    }
}

static OrtStatus *quantize_compute(void *state, OrtKernelContext *context) {
    const struct quantize *kernel = state;
    const struct qc_op *op = kernel->op;
    struct quantize_run run = {
        .variant = op->variant,
        .k = op->spec->k,
        .args = {.smoothing = kernel->smoothing, .x_stride = (int32_t)op->spec->k},
    };
    const OrtValue *x;
    struct qc_shape shape;
    QC_TRY(qc_input(context, 0, &x, (const void **)&run.args.x));
    QC_TRY(qc_tensor_shape(op, x, &shape));
    QC_TRY(qc_row_count(op, &shape, "x", &run.rows));
    QC_TRY(qc_output(context, 0, &shape, (void **)&run.args.q));
    shape.dims[shape.rank - 1] = 1;
    QC_TRY(qc_output(context, 1, &shape, (void **)&run.args.s));
    if (op->spec->extras[0])
        QC_TRY(qc_floats(op, context, 1, "smoothing", op->spec->k, &run.args.smoothing));
    if (run.rows == 0) return NULL;
    run.tasks = qc_task_count((double)run.rows * (double)run.k / QUANTIZE_RATE);
    if (run.tasks > run.rows) run.tasks = run.rows;
    return qc_parallel(context, quantize_task, (size_t)run.tasks, &run);
}

static OrtStatus *quantize_create(const struct qc_op *op, const OrtKernelInfo *info,
                                  void **state) {
    const float *smoothing = NULL;
    if (op->spec->extras[0])
        QC_TRY(qc_constant_floats(op, info, 1, "smoothing", op->spec->k, &smoothing));
    struct quantize *kernel = malloc(sizeof *kernel);
    if (!kernel) return qc_error(op, "out of memory for %zu bytes", sizeof *kernel);
    *kernel = (struct quantize){op, smoothing};
    *state = kernel;
    return NULL;
}

static int64_t quantize_last_dimension(const struct qc_op *op, size_t output) {
    return output == 0 ? op->spec->k : 1;
}

const struct qc_anchor qc_quantize = {
    .input_types = (const int[]){ORT_FLOAT},
    .input_count = 1,
    .output_types = (const int[]){ORT_UINT8, ORT_FLOAT},
    .output_count = 2,
    .create = quantize_create,
    .compute = quantize_compute,
    .destroy = free,
    .last_dimension = quantize_last_dimension,
};
