/* The operands and results of one run of a product. */
#include "qmatmul.h"

static const char *const INPUT_NAMES[] = {"0", "1", "2", "3",  "4",  "5",  "6",
                                          "7", "8", "9", "10", "11", "12", "13"};

static OrtStatus *bind_rows(struct qmatmul_run *run, const struct qc_shape *shape) {
    const struct qc_op *op = run->kernel->op;
    QC_TRY(qc_row_count(op, shape, "x", &run->rows));
    run->x_stride = op->spec->k;
    run->batch_rows = run->inner_end = run->rows;
    return NULL;
}

/* Which windows of `rows` rows reach into none of the zeros around them, and have no holes. */
static void find_inner(struct qmatmul_run *run, int64_t rows) {
    const struct qc_op_spec *spec = run->kernel->op->spec;
    if (spec->dilations[0] > 1) return;
    const int64_t last = rows + spec->pads[0] - spec->r; /* where the last begins, with the zeros */
    run->inner_begin = ceil_div(spec->pads[0], spec->s);
    run->inner_end = last < 0 ? 0 : min(last / spec->s + 1, run->batch_rows);
    run->inner_offset = -spec->pads[0] * (spec->k / spec->r);
}

/* A row of the product is r rows of x, one behind the other or some rows apart; `shape` becomes that of
 * the rows. */
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
    const int64_t rows = dims[0];
    dims[0] = run->batch_rows = window_count(op, rows);
    dims[1] = op->spec->k;
    find_inner(run, rows);
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
        /* Of no rows there may be windows that are zeros. */
        static const float nothing;
        run->x = data ? data : &nothing;
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
        if (op->spec->extras[i] != 'C') continue;
        QC_TRY(qc_constant_floats(op, info, input, INPUT_NAMES[input], op->spec->n, &kernel->extra[i]));
    }
    return NULL;
}

/* An operand that has the last dimensions of the result, whose others are those of `shape`. */
static OrtStatus *bind_repeated(struct qmatmul_run *run, OrtKernelContext *context, size_t i,
                                const struct qc_shape *shape) {
    const struct qc_op *op = run->kernel->op;
    const size_t input = op->spec->anchor->input_count + i;
    const OrtValue *value;
    struct qc_shape own;
    QC_TRY(qc_input(context, input, &value, (const void **)&run->args.extra[i]));
    QC_TRY(qc_tensor_shape(op, value, &own));
    size_t same = 0, ones = 0;
    int64_t rows = 1;
    if (own.rank <= shape->rank && own.dims[own.rank - 1] == op->spec->n) same = 1;
    while (same && same < own.rank &&
           own.dims[own.rank - 1 - same] == shape->dims[shape->rank - 1 - same])
        rows *= own.dims[own.rank - 1 - same++];
    while (same + ones < own.rank && own.dims[own.rank - 1 - same - ones] == 1) ones++;
    if (!same || same + ones < own.rank) {
        char text[256];
        return qc_error(op, "input %s has shape %s; it must be that of the result's last dimensions",
                        INPUT_NAMES[input], qc_shape_text(&own, text));
    }
    run->extra_rows[i] = rows;
    run->period = min(run->period, rows);
    return NULL;
}

static OrtStatus *bind_extras(struct qmatmul_run *run, OrtKernelContext *context,
                              const struct qc_shape *shape) {
    const struct qc_op *op = run->kernel->op;
    run->period = run->rows;
    for (size_t i = 0; op->spec->extras[i]; i++) {
        const size_t input = op->spec->anchor->input_count + i;
        const float **data = &run->args.extra[i];
        if (op->spec->extras[i] == 'R') {
            QC_TRY(bind_repeated(run, context, i, shape));
            continue;
        }
        run->extra_rows[i] = op->spec->extras[i] == 'T' ? run->rows : 0;
        *data = run->kernel->extra[i];
        const int64_t rows = op->spec->extras[i] == 'T' ? run->rows : 1;
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
    QC_TRY(bind_extras(run, context, &shape));
    if (quantizes_result(op)) return bind_quantized_result(run, context, &shape);
    for (size_t part = 0; op->spec->outputs[part]; part++) {
        shape.dims[shape.rank - 1] = width(op, part);
        QC_TRY(qc_output(context, part, &shape, (void **)&run->y[part]));
    }
    return NULL;
}

/* Lets a run begin at `row`. */
static void skip_rows(struct qmatmul_run *run, int64_t row) {
    const struct qc_op *op = run->kernel->op;
    run->first_row += row;
    if (!run->x) {
        run->args.q += row * op->spec->k;
        if (!has_zero_point(op)) run->args.s += row;
    }
    if (run->args.row_sums) run->args.row_sums += row;
    for (size_t i = 0; op->spec->extras[i]; i++)
        if (run->extra_rows[i]) run->args.extra[i] += row % run->extra_rows[i] * op->spec->n;
    for (size_t part = 0; part < QC_MAX_PARTS && run->y[part]; part++)
        run->y[part] += row * width(op, part) * result_size(op);
    if (!run->yq) return;
    run->yq += row * op->spec->n;
    run->ys += row;
}

OrtStatus *qc_run_periods(struct qmatmul_run *run, OrtKernelContext *context,
                          OrtStatus *(*compute)(struct qmatmul_run *, OrtKernelContext *)) {
    if (run->rows == 0) return NULL;
    if (run->period == run->rows) return compute(run, context);
    for (int64_t row = 0; row < run->rows; row += run->period) {
        struct qmatmul_run part = *run;
        skip_rows(&part, row);
        part.rows = run->period;
        QC_TRY(compute(&part, context));
    }
    return NULL;
}
