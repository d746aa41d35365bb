/* The norms of GPUs on the CPU, in plain C; see twins.c.
 *
 * x = a + b; y = a norm of x; q, s = Quantize(y), or of y * extra0; x and y are rounded to float16. */
#include "cuda_driver.h"
#include "half.h"

struct norm_run {
    const struct qc_op *op;
    void *pointers[QC_ARGUMENTS]; /* NULL: the region has none */
    int64_t rows;
};

/* How a row is brought to deviation 1. */
struct moments {
    double mean, inverse;
};

static float half_at(const struct norm_run *run, int argument, int64_t index) {
    return qc_from_half(((const uint16_t *)run->pointers[argument])[index]);
}

static float operand(const struct norm_run *run, int64_t index) {
    if (!run->pointers[QC_A]) return half_at(run, QC_X, index);
    return qc_from_half(qc_to_half(half_at(run, QC_A, index) + half_at(run, QC_B, index)));
}

static struct moments moments_of(const struct norm_run *run, int64_t row) {
    const int64_t k = run->op->spec->k, start = row * k;
    double sum = 0, squares = 0;
    if (run->pointers[QC_BETA])
        for (int64_t i = 0; i < k; i++) sum += operand(run, start + i);
    const double mean = sum / (double)k;
    for (int64_t i = 0; i < k; i++) {
        const double centred = operand(run, start + i) - mean;
        squares += centred * centred;
    }
    return (struct moments){mean, 1 / sqrt(squares / (double)k + run->op->spec->epsilon)};
}

static uint16_t normalized(const struct norm_run *run, int64_t row, int64_t i, struct moments of) {
    const double x = operand(run, row * run->op->spec->k + i);
    double y = (x - of.mean) * of.inverse * half_at(run, QC_GAMMA, i);
    if (run->pointers[QC_BETA]) y += half_at(run, QC_BETA, i);
    return qc_to_half((float)y);
}

/* What is quantized of y. */
static float smoothed(const struct norm_run *run, int64_t i, uint16_t y) {
    return qc_from_half(y) * (run->pointers[QC_EXTRA0] ? half_at(run, QC_EXTRA0, i) : 1);
}

static void norm_task(void *argument, size_t index) {
    const struct norm_run *run = argument;
    const struct qc_anchor *anchor = run->op->spec->anchor;
    const int64_t k = run->op->spec->k, row = (int64_t)index, start = row * k;
    const int is_fp8 = anchor->output_types[anchor->output_count - 2] == ORT_FLOAT8E4M3FN;
    const struct moments of = moments_of(run, row);
    float largest = NAN; /* which fmaxf passes over */
    for (int64_t i = 0; i < k; i++)
        largest = fmaxf(largest, fabsf(smoothed(run, i, normalized(run, row, i, of))));
    const float scale = qc_token_scale(largest, is_fp8);
    for (int64_t i = 0; i < k; i++) {
        const uint16_t y = normalized(run, row, i, of);
        if (run->pointers[QC_A] && run->pointers[QC_X])
            ((uint16_t *)run->pointers[QC_X])[start + i] = qc_to_half(operand(run, start + i));
        if (run->pointers[QC_Y]) ((uint16_t *)run->pointers[QC_Y])[start + i] = y;
        ((uint8_t *)run->pointers[QC_Q])[start + i] =
            qc_quantized(smoothed(run, i, y) / scale, is_fp8);
    }
    ((float *)run->pointers[QC_S])[row] = scale;
}

static OrtStatus *bind_inputs(struct norm_run *run, OrtKernelContext *context,
                              struct qc_shape *shape) {
    const struct qc_op *op = run->op;
    const struct qc_anchor *anchor = op->spec->anchor;
    static const char *const NAMES[QC_ARGUMENTS] = {
        [QC_B] = "b", [QC_GAMMA] = "gamma", [QC_BETA] = "beta", [QC_EXTRA0] = "extra0"};
    for (size_t i = 0; i < anchor->input_count + (op->spec->extras[0] != 0); i++) {
        const int argument = i < anchor->input_count ? anchor->arguments[i] : QC_EXTRA0;
        const OrtValue *value;
        QC_TRY(qc_input(context, i, &value, (const void **)&run->pointers[argument]));
        if (i) {
            const int64_t rows = argument == QC_B ? run->rows : 1;
            QC_TRY(qc_check_elements(op, value, NAMES[argument], rows * op->spec->k, 2));
            continue;
        }
        QC_TRY(qc_tensor_shape(op, value, shape));
        QC_TRY(qc_row_count(op, shape, argument == QC_A ? "a" : "x", &run->rows));
    }
    return NULL;
}

static OrtStatus *norm_compute(void *kernel, OrtKernelContext *context) {
    struct norm_run run = {.op = kernel};
    const struct qc_anchor *anchor = run.op->spec->anchor;
    struct qc_shape shape;
    QC_TRY(bind_inputs(&run, context, &shape));
    for (size_t i = 0; run.op->spec->outputs[i]; i++) {
        const size_t output = qc_output_index(run.op, i);
        struct qc_shape actual = shape;
        actual.dims[shape.rank - 1] = anchor->last_dimension(run.op, output);
        QC_TRY(qc_output(context, i, &actual,
                         &run.pointers[anchor->arguments[anchor->input_count + output]]));
    }
    return run.rows ? qc_parallel(context, norm_task, (size_t)run.rows, &run) : NULL;
}

const struct qc_anchor qc_twin_norm = {
    .create = qc_twin_create, .compute = norm_compute, .destroy = qc_twin_destroy};
