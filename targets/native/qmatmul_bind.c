/* The operands and results of one run of a product. */
#include "qmatmul.h"

static const char *const INPUT_NAMES[] = {"0", "1", "2", "3",  "4",  "5",  "6",
                                          "7", "8", "9", "10", "11", "12", "13"};

static OrtStatus *bind_rows(struct qmatmul_run *run, const struct qc_shape *shape) {
    const struct qc_op *op = run->kernel->op;
    QC_TRY(qc_row_count(op, shape, "x", &run->rows));
    run->x_stride = op->spec->k;
    run->batch_rows = run->rows;
    return NULL;
}

/* A row of the product is r rows of x, which lie behind each other; `shape` becomes that of the rows. */
static OrtStatus *bind_windows(struct qmatmul_run *run, struct qc_shape *shape) {
    const struct qc_op *op = run->kernel->op;
    const int64_t columns = op->spec->k / op->spec->r;
    if (shape->rank < 2 || shape->dims[shape->rank - 1] != columns) {
        char text[256];
        return qc_error(op, "input x has shape %s; it must have two dimensions or more, the last %lld",
                        qc_shape_text(shape, text), (long long)columns);
    }
    int64_t *const dims = shape->dims + shape->rank - 2;
    run->x_stride = op->spec->s * columns;
    run->batch_stride = dims[0] * columns;
    dims[0] = run->batch_rows = window_count(op, dims[0]);
    dims[1] = op->spec->k;
    return qc_row_count(op, shape, "x", &run->rows);
}

static OrtStatus *bind_activations(struct qmatmul_run *run, OrtKernelContext *context,
                                   struct qc_shape *shape) {
    const struct qc_op *op = run->kernel->op;
    const OrtValue *value;
    const void *data;
    QC_TRY(qc_input(context, 0, &value, &data));
    QC_TRY(qc_tensor_shape(op, value, shape));
    if (quantizes_input(op)) {
        run->x = data;
        return has_windows(op) ? bind_windows(run, shape) : bind_rows(run, shape);
    }
    QC_TRY(qc_row_count(op, shape, "q", &run->rows));
    run->args.q = data;
    return qc_floats(op, context, INPUT_S, "s", has_zero_point(op) ? 1 : run->rows, &run->args.s);
}

OrtStatus *qc_find_extras(struct qmatmul *kernel, const OrtKernelInfo *info) {
    const struct qc_op *op = kernel->op;
    for (size_t i = 0; op->spec->extras[i]; i++) {
        const size_t input = op->spec->anchor->input_count + i;
        kernel->extra[i] = NULL;
        if (op->spec->extras[i] == 'T') continue;
        QC_TRY(qc_constant_floats(op, info, input, INPUT_NAMES[input], op->spec->n, &kernel->extra[i]));
    }
    return NULL;
}

static OrtStatus *bind_extras(struct qmatmul_run *run, OrtKernelContext *context) {
    const struct qc_op *op = run->kernel->op;
    for (size_t i = 0; op->spec->extras[i]; i++) {
        const size_t input = op->spec->anchor->input_count + i;
        const int64_t rows = op->spec->extras[i] == 'T' ? run->rows : 1;
        const float **data = &run->args.extra[i];
        *data = run->kernel->extra[i];
        QC_TRY(qc_floats(op, context, input, INPUT_NAMES[input], rows * op->spec->n, data));
    }
    return NULL;
}

static OrtStatus *bind_quantized_result(struct qmatmul_run *run, OrtKernelContext *context,
                                        struct qc_shape *shape) {
    const struct qc_op *op = run->kernel->op;
    void **const targets[] = {(void **)&run->y[0], (void **)&run->yq, (void **)&run->ys};
    for (size_t i = 0; op->spec->outputs[i]; i++) {
        const size_t output = qc_output_index(op, i);
        shape->dims[shape->rank - 1] = width_or_scale(op, output);
        QC_TRY(qc_output(context, i, shape, targets[output]));
    }
    return NULL;
}

OrtStatus *qc_bind_qmatmul(struct qmatmul_run *run, OrtKernelContext *context) {
    const struct qc_op *op = run->kernel->op;
    struct qc_shape shape;
    QC_TRY(bind_activations(run, context, &shape));
    QC_TRY(bind_extras(run, context));
    if (quantizes_result(op)) return bind_quantized_result(run, context, &shape);
    for (size_t part = 0; op->spec->outputs[part]; part++) {
        shape.dims[shape.rank - 1] = width(op, part);
        QC_TRY(qc_output(context, part, &shape, (void **)&run->y[part]));
    }
    return NULL;
}
