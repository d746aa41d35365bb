/* q, s = Quantize(x): int8 per row, as uint8 with zero point 128. */
#include <math.h>

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
void qc_keep_nan(const float *x, int64_t rows, int64_t k, float *s) {
    for (int64_t row = 0; row < rows; row++) {
        if (!qc_has_least_scale(s[row])) continue;
        float sum = 0;
        for (int64_t i = 0; i < k; i++) sum += x[row * k + i];
        if (isnan(sum)) s[row] = sum;
    }
}

struct quantize_run {
    const struct qc_variant *variant;
    const float *x;
    uint8_t *q;
    float *s;
    int64_t rows, k, tasks;
};

static void quantize_task(void *argument, size_t index) {
    const struct quantize_run *run = argument;
    int64_t begin = run->rows * (int64_t)index / run->tasks;
    int64_t end = run->rows * ((int64_t)index + 1) / run->tasks;
    int64_t step = MAX_BLOCK_ELEMENTS / run->k;
    for (int64_t row = begin; row < end; row += step) {
        int64_t rows = end - row < step ? end - row : step;
        run->variant->quantize(&(struct qc_quantize_args){
            run->x + row * run->k, run->q + row * run->k, run->s + row, (int32_t)rows});
        qc_keep_nan(run->x + row * run->k, rows, run->k, run->s + row);
    }
}

static OrtStatus *quantize_compute(void *kernel, OrtKernelContext *context) {
    const struct qc_op *op = kernel;
    struct quantize_run run = {.variant = op->variant, .k = op->spec->k};
    const OrtValue *x;
    struct qc_shape shape;
    QC_TRY(qc_input(context, 0, &x, (const void **)&run.x));
    QC_TRY(qc_tensor_shape(op, x, &shape));
    QC_TRY(qc_row_count(op, &shape, "x", &run.rows));
    QC_TRY(qc_output(context, 0, &shape, (void **)&run.q));
    shape.dims[shape.rank - 1] = 1;
    QC_TRY(qc_output(context, 1, &shape, (void **)&run.s));
    if (run.rows == 0) return NULL;
    run.tasks = qc_task_count((double)run.rows * (double)run.k / QUANTIZE_RATE);
    if (run.tasks > run.rows) run.tasks = run.rows;
    return qc_parallel(context, quantize_task, (size_t)run.tasks, &run);
}

static OrtStatus *quantize_create(const struct qc_op *op, const OrtKernelInfo *info,
                                  void **kernel) {
    (void)info;
    *kernel = (void *)op; /* nothing to keep per node */
    return NULL;
}

static void quantize_destroy(void *kernel) { (void)kernel; }

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
    .destroy = quantize_destroy,
    .last_dimension = quantize_last_dimension,
};
