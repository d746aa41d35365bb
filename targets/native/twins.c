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
    const void *a, *w, *ws; /* a: x or q */
    const float *s;
    const uint16_t *extra[QC_MAX_EXTRAS];
    uint16_t *y;
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
    const int type = spec->anchor->input_types[spec->anchor->input_count - 2];
    for (int64_t i = 0; i < count; i++) {
        float weight = number(type, run->w, k * spec->n + n + i);
        if (spec->g) {
            float scale = number(ORT_FLOAT16, run->ws, k / spec->g * spec->n + n + i);
            weight = qc_from_half(qc_to_half(weight * scale)); /* as DequantizeLinear does */
        }
        weights[i] = weight;
    }
}

static uint16_t finish(const struct twin_run *run, int64_t row, int64_t column, double sum) {
    const struct qc_op_spec *spec = run->op->spec;
    float value = (float)sum, extras[QC_MAX_EXTRAS];
    if (!spec->g) value = value * run->s[row] * ((const float *)run->ws)[column];
    for (size_t i = 0; spec->extras[i]; i++)
        extras[i] = qc_from_half(
            run->extra[i][(spec->extras[i] == 'T' ? row * spec->n : 0) + column]);
    return qc_to_half(spec->epilogue ? spec->epilogue(value, extras) : value);
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
            run->y[(row + i) * spec->n + column + j] = finish(run, row + i, column + j, sums[i][j]);
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
    const size_t last = op->spec->anchor->input_count - 1;
    struct twin_run run = {.op = op};
    struct qc_shape shape;
    const OrtValue *value;
    QC_TRY(qc_input(context, 0, &value, &run.a));
    QC_TRY(qc_tensor_shape(op, value, &shape));
    QC_TRY(qc_row_count(op, &shape, last == 2 ? "x" : "q", &run.rows));
    if (last == 3) {
        QC_TRY(qc_input(context, 1, &value, (const void **)&run.s));
        QC_TRY(qc_check_floats(op, value, "s", run.rows));
    }
    QC_TRY(qc_input(context, last - 1, &value, &run.w));
    QC_TRY(qc_input(context, last, &value, &run.ws));
    QC_TRY(bind_extras(&run, context));
    shape.dims[shape.rank - 1] = op->spec->n;
    QC_TRY(qc_output(context, 0, &shape, (void **)&run.y));
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
    float largest = 1e-20f;
    for (int64_t i = 0; i < k; i++) largest = fmaxf(largest, fabsf(qc_from_half(x[i])));
    const float scale = largest / (is_fp8 ? 448.0f : 127.0f);
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
    const void *w, *ws;
    *kernel = (void *)op; /* nothing to keep per node */
    return op->spec->anchor->weight_bits ? qc_constant_weights(op, info, &w, &ws) : NULL;
}

void qc_twin_destroy(void *kernel) { (void)kernel; }

const struct qc_anchor qc_twin_product = {
    .create = qc_twin_create, .compute = product_compute, .destroy = qc_twin_destroy};
const struct qc_anchor qc_twin_quantize = {
    .create = qc_twin_create, .compute = quantize_compute, .destroy = qc_twin_destroy};
