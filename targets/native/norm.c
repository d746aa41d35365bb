/* x?, y?, (q, s)? = a norm of x, or of x = a + b: LayerNorm(x, gamma, beta) or RMSNorm(x, gamma);
 * q, s = Quantize(y), or of y * smoothing where a region has that extra operand. */
#include <math.h>
#include <stdlib.h>

#include "qcompiler.h"

/* A node; operands that are no initializers are NULL. */
struct norm {
    const struct qc_op *op;
    const float *gamma, *beta, *smoothing;
};

/* float32 elements of x one core normalizes and quantizes per nanosecond, from L2. */
static const double NORM_RATE = 8;
/* Kernels index a block with int32. */
static const int64_t MAX_BLOCK_ELEMENTS = (int64_t)1 << 30;

struct norm_run {
    const struct qc_op *op;
    struct qc_norm_args args; /* of the whole; pointers are moved per task */
    int64_t rows, tasks;
};

static struct qc_norm_args from_row(const struct norm_run *run, int64_t row) {
    struct qc_norm_args args = run->args;
    float **floats[] = {&args.x, &args.y};
    const float **operands[] = {&args.a, &args.b};
    for (int i = 0; i < 2; i++) {
        if (*floats[i]) *floats[i] += row * run->op->spec->k;
        if (*operands[i]) *operands[i] += row * run->op->spec->k;
    }
    if (args.q) args.q += row * run->op->spec->k;
    if (args.s) args.s += row;
    return args;
}

/* As `qc_keep_nan`, of a y that need not be stored: it is NaN throughout if x is not finite, and of a
 * LayerNorm if the sum of x is not. */
static void keep_nan(const struct qc_norm_args *args, int64_t k) {
    for (int64_t row = 0; row < args->rows; row++) {
        if (!qc_has_least_scale(args->s[row])) continue;
        float sum = 0, magnitudes = 0;
        for (int64_t i = row * k; i < (row + 1) * k; i++) {
            float x = args->x ? args->x[i] : args->a[i] + args->b[i];
            sum += 0 * x;
            if (args->beta) magnitudes += fabsf(x);
        }
        if (isnan(sum) || isinf(magnitudes)) args->s[row] = NAN;
    }
}

static void norm_task(void *argument, size_t index) {
    const struct norm_run *run = argument;
    int64_t begin = run->rows * (int64_t)index / run->tasks;
    int64_t end = run->rows * ((int64_t)index + 1) / run->tasks;
    int64_t step = MAX_BLOCK_ELEMENTS / run->op->spec->k;
    for (int64_t row = begin; row < end; row += step) {
        struct qc_norm_args args = from_row(run, row);
        args.rows = (int32_t)(end - row < step ? end - row : step);
        run->op->variant->norm(&args);
        if (args.s) keep_nan(&args, run->op->spec->k);
    }
}

static int has_residual(const struct qc_op *op) {
    return op->spec->anchor == &qc_add_layer_norm || op->spec->anchor == &qc_add_rms_norm;
}

static size_t gamma_input(const struct qc_op *op) { return has_residual(op) ? 2 : 1; }

static int has_beta(const struct qc_op *op) {
    return op->spec->anchor->input_count > gamma_input(op) + 1;
}

static OrtStatus *bind_inputs(struct norm_run *run, OrtKernelContext *context,
                              struct qc_shape *shape) {
    const struct qc_op *op = run->op;
    const int residual = has_residual(op);
    const OrtValue *value;
    const float *data;
    QC_TRY(qc_input(context, 0, &value, (const void **)&data));
    QC_TRY(qc_tensor_shape(op, value, shape));
    QC_TRY(qc_row_count(op, shape, residual ? "a" : "x", &run->rows));
    if (residual) {
        run->args.a = data;
        QC_TRY(qc_floats(op, context, 1, "b", run->rows * op->spec->k, &run->args.b));
    } else {
        run->args.x = (float *)data; /* only read */
    }
    size_t index = gamma_input(op);
    QC_TRY(qc_floats(op, context, index++, "gamma", op->spec->k, &run->args.gamma));
    if (has_beta(op))
        QC_TRY(qc_floats(op, context, index++, "beta", op->spec->k, &run->args.beta));
    if (!op->spec->extras[0]) return NULL;
    return qc_floats(op, context, index, "smoothing", op->spec->k, &run->args.smoothing);
}

static OrtStatus *bind_outputs(struct norm_run *run, OrtKernelContext *context,
                               const struct qc_shape *shape) {
    void **const targets[] = {(void **)&run->args.x, (void **)&run->args.y, (void **)&run->args.q,
                              (void **)&run->args.s};
    void **const *outputs = has_residual(run->op) ? targets : targets + 1;
    for (size_t i = 0; run->op->spec->outputs[i]; i++) {
        size_t output = qc_output_index(run->op, i);
        struct qc_shape actual = *shape;
        actual.dims[shape->rank - 1] = run->op->spec->anchor->last_dimension(run->op, output);
        QC_TRY(qc_output(context, i, &actual, outputs[output]));
    }
    return NULL;
}

static OrtStatus *norm_compute(void *kernel, OrtKernelContext *context) {
    const struct norm *norm = kernel;
    struct norm_run run = {
        .op = norm->op,
        .args = {.gamma = norm->gamma, .beta = norm->beta, .smoothing = norm->smoothing},
    };
    struct qc_shape shape;
    QC_TRY(bind_inputs(&run, context, &shape));
    QC_TRY(bind_outputs(&run, context, &shape));
    if (run.rows == 0) return NULL;
    run.tasks = qc_task_count((double)run.rows * (double)run.op->spec->k / NORM_RATE);
    if (run.tasks > run.rows) run.tasks = run.rows;
    return qc_parallel(context, norm_task, (size_t)run.tasks, &run);
}

static OrtStatus *find_operands(struct norm *norm, const OrtKernelInfo *info) {
    const struct qc_op *op = norm->op;
    size_t index = gamma_input(op);
    QC_TRY(qc_constant_floats(op, info, index++, "gamma", op->spec->k, &norm->gamma));
    if (has_beta(op))
        QC_TRY(qc_constant_floats(op, info, index++, "beta", op->spec->k, &norm->beta));
    if (!op->spec->extras[0]) return NULL;
    return qc_constant_floats(op, info, index, "smoothing", op->spec->k, &norm->smoothing);
}

static OrtStatus *norm_create(const struct qc_op *op, const OrtKernelInfo *info, void **kernel) {
    struct norm *norm = calloc(1, sizeof *norm);
    if (!norm) return qc_error(op, "out of memory for a node");
    norm->op = op;
    OrtStatus *status = find_operands(norm, info);
    if (status)
        free(norm);
    else
        *kernel = norm;
    return status;
}

/* s, the last output, has one value per row. */
static int64_t norm_last_dimension(const struct qc_op *op, size_t output) {
    return output + 1 == op->spec->anchor->output_count ? 1 : op->spec->k;
}

static const int FLOATS[] = {ORT_FLOAT, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT};
static const int X_Y_Q_S[] = {ORT_FLOAT, ORT_FLOAT, ORT_UINT8, ORT_FLOAT};

#define NORM(inputs, types, outputs)                                                               \
    {                                                                                              \
        .input_types = FLOATS, .input_count = inputs, .output_types = types,                       \
        .output_count = outputs, .create = norm_create, .compute = norm_compute,                   \
        .destroy = free, .last_dimension = norm_last_dimension,                                    \
    }

const struct qc_anchor qc_layer_norm = NORM(3, X_Y_Q_S + 1, 3);
const struct qc_anchor qc_add_layer_norm = NORM(4, X_Y_Q_S, 4);
const struct qc_anchor qc_rms_norm = NORM(2, X_Y_Q_S + 1, 3);
const struct qc_anchor qc_add_rms_norm = NORM(3, X_Y_Q_S, 4);
