/* The ops of GPUs on the CPU, in plain C: what runs in a session without the CUDA provider on a
 * machine where their names are registered for it.
 *
 * y = epilogue(sum_k a w * scales, extras...), in float32 up to the result; sums are exact for int8. */
#include <string.h>

#include "cuda_driver.h"
#include "half.h"

enum { BLOCK_ROWS = 16, BLOCK_COLUMNS = 64 };

struct twin_run {
    const struct qc_op *op;
    const void *a; /* x or q */
    struct qc_weights weights;
    const float *s;
    const uint16_t *extra[QC_MAX_EXTRAS];
    uint16_t *y[QC_MAX_PARTS];
    int64_t rows, column_blocks;
};

static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static float number(int type, const void *data, int64_t index) {
    const uint8_t *bytes = data;
    switch (type) {
    case ORT_FLOAT16: return qc_from_half(((const uint16_t *)data)[index]);
    case ORT_FLOAT8E4M3FN: return qc_from_e4m3(bytes[index]);
    case ORT_INT8: return (int8_t)bytes[index];
    case ORT_UINT8: return (float)bytes[index] - 128;
    default: /* int4, two to a byte */
        return (float)(((bytes[index / 2] >> 4 * (index % 2)) & 15) ^ 8) - 8;
    }
}

/* Row k of the weights, from column n on. */
static void widen(const struct twin_run *run, int64_t k, int64_t n, int64_t count, double *weights) {
    const struct qc_op_spec *spec = run->op->spec;
    const int type = spec->anchor->input_types[qc_weight_input(spec->anchor)];
    for (int64_t i = 0; i < count; i++) {
        float weight = number(type, run->weights.w, k * spec->n + n + i);
        if (spec->g) {
            const int64_t group = k / spec->g * spec->n + n + i;
            float scale = number(ORT_FLOAT16, run->weights.ws, group);
            if (run->weights.wz) weight -= number(ORT_INT4, run->weights.wz, group);
            weight = qc_from_half(qc_to_half(weight * scale)); /* as DequantizeLinear does */
        }
        weights[i] = weight;
    }
}

static uint16_t finish(const struct twin_run *run, int64_t row, int64_t column, double sum) {
    const struct qc_op_spec *spec = run->op->spec;
    float value = (float)sum, extras[QC_MAX_EXTRAS];
    if (!spec->g) value = value * run->s[row] * ((const float *)run->weights.ws)[column];
    for (size_t i = 0; spec->extras[i]; i++)
        extras[i] = qc_from_half(
            run->extra[i][(spec->extras[i] == 'T' ? row * spec->n : 0) + column]);
    return qc_to_half(spec->epilogue ? spec->epilogue(value, extras) : value);
}

static void store(const struct twin_run *run, int64_t row, int64_t column, uint16_t value) {
    const int64_t *widths = run->op->spec->widths;
    size_t part = 0;
    for (; widths[0] && column >= widths[part]; part++) column -= widths[part];
    run->y[part][row * (widths[0] ? widths[part] : run->op->spec->n) + column] = value;
}

static void product_task(void *argument, size_t index) {
    const struct twin_run *run = argument;
    const struct qc_op_spec *spec = run->op->spec;
    const int64_t row = (int64_t)index / run->column_blocks * BLOCK_ROWS;
    const int64_t column = (int64_t)index % run->column_blocks * BLOCK_COLUMNS;
    const int64_t rows = min(BLOCK_ROWS, run->rows - row);
    const int64_t columns = min(BLOCK_COLUMNS, spec->n - column);
    double sums[BLOCK_ROWS][BLOCK_COLUMNS] = {{0}}, weights[BLOCK_COLUMNS];
    for (int64_t k = 0; k < spec->k; k++) {
        widen(run, k, column, columns, weights);
        for (int64_t i = 0; i < rows; i++) {
            double a = number(spec->anchor->input_types[0], run->a, (row + i) * spec->k + k);
            for (int64_t j = 0; j < columns; j++) sums[i][j] += a * weights[j];
        }
    }
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++)
            store(run, row + i, column + j, finish(run, row + i, column + j, sums[i][j]));
}

static OrtStatus *bind_extras(struct twin_run *run, OrtKernelContext *context) {
    const struct qc_op *op = run->op;
    for (size_t i = 0; op->spec->extras[i]; i++) {
        const char name[] = {'e', 'x', 't', 'r', 'a', (char)('0' + i), 0};
        const int64_t rows = op->spec->extras[i] == 'T' ? run->rows : 1;
        const OrtValue *value;
        QC_TRY(qc_input(context, op->spec->anchor->input_count + i, &value,
                        (const void **)&run->extra[i]));
        QC_TRY(qc_check_elements(op, value, name, rows * op->spec->n, sizeof(uint16_t)));
    }
    return NULL;
}

static OrtStatus *product_compute(void *kernel, OrtKernelContext *context) {
    const struct qc_op *op = kernel;
    const size_t w = qc_weight_input(op->spec->anchor);
    struct twin_run run = {.op = op};
    struct qc_shape shape;
    const OrtValue *value;
    QC_TRY(qc_input(context, 0, &value, &run.a));
    QC_TRY(qc_tensor_shape(op, value, &shape));
    QC_TRY(qc_row_count(op, &shape, w == 1 ? "x" : "q", &run.rows));
    if (w == 2) {
        QC_TRY(qc_input(context, 1, &value, (const void **)&run.s));
        QC_TRY(qc_check_floats(op, value, "s", run.rows));
    }
    QC_TRY(qc_input(context, w, &value, (const void **)&run.weights.w));
    QC_TRY(qc_input(context, w + 1, &value, &run.weights.ws));
    if (qc_has_zeros(op->spec->anchor))
        QC_TRY(qc_input(context, w + 2, &value, (const void **)&run.weights.wz));
    QC_TRY(bind_extras(&run, context));
    for (size_t i = 0; op->spec->outputs[i]; i++) {
        shape.dims[shape.rank - 1] = op->spec->widths[0] ? op->spec->widths[i] : op->spec->n;
        QC_TRY(qc_output(context, i, &shape, (void **)&run.y[i]));
    }
    if (run.rows == 0) return NULL;
    run.column_blocks = ceil_div(op->spec->n, BLOCK_COLUMNS);
    return qc_parallel(context, product_task,
                       (size_t)(ceil_div(run.rows, BLOCK_ROWS) * run.column_blocks), &run);
}

/* --- Quantize --------------------------------------------------------------------------------- */

struct quantize_run {
    const struct qc_op *op;
    const uint16_t *x;
    uint8_t *q;
    float *s;
};

static void quantize_task(void *argument, size_t row) {
    const struct quantize_run *run = argument;
    const int64_t k = run->op->spec->k;
    const int is_fp8 = run->op->spec->anchor->output_types[0] == ORT_FLOAT8E4M3FN;
    const uint16_t *x = run->x + (int64_t)row * k;
    uint8_t *q = run->q + (int64_t)row * k;
    float largest = NAN; /* which fmaxf passes over */
    for (int64_t i = 0; i < k; i++) largest = fmaxf(largest, fabsf(qc_from_half(x[i])));
    const float scale = qc_token_scale(largest, is_fp8);
    for (int64_t i = 0; i < k; i++) q[i] = qc_quantized(qc_from_half(x[i]) / scale, is_fp8);
    run->s[row] = scale;
}

static OrtStatus *quantize_compute(void *kernel, OrtKernelContext *context) {
    struct quantize_run run = {.op = kernel};
    const OrtValue *value;
    struct qc_shape shape;
    int64_t rows;
    QC_TRY(qc_input(context, 0, &value, (const void **)&run.x));
    QC_TRY(qc_tensor_shape(run.op, value, &shape));
    QC_TRY(qc_row_count(run.op, &shape, "x", &rows));
    QC_TRY(qc_output(context, 0, &shape, (void **)&run.q));
    shape.dims[shape.rank - 1] = 1;
    QC_TRY(qc_output(context, 1, &shape, (void **)&run.s));
    return rows ? qc_parallel(context, quantize_task, (size_t)rows, &run) : NULL;
}

OrtStatus *qc_twin_create(const struct qc_op *op, const OrtKernelInfo *info, void **kernel) {
    struct qc_weights weights;
    *kernel = (void *)op; /* nothing to keep per node */
    return op->spec->anchor->weight_bits ? qc_constant_weights(op, info, &weights) : NULL;
}

void qc_twin_destroy(void *kernel) { (void)kernel; }

const struct qc_anchor qc_twin_product = {
    .create = qc_twin_create, .compute = product_compute, .destroy = qc_twin_destroy};
const struct qc_anchor qc_twin_quantize = {
    .create = qc_twin_create, .compute = quantize_compute, .destroy = qc_twin_destroy};
