/* y = epilogue(QMatMulW8A8(q, s, w, ws), extra...): int8 weights, int8 activations per row.
 * Merged products of one input are one with several results, each some columns of the whole. */
#include <stdlib.h>
#include <string.h>

#include "qcompiler.h"

enum { INPUT_Q, INPUT_S, INPUT_W, INPUT_WS, INPUT_EXTRA };

/* What one core does per nanosecond: multiply-adds, weight bytes from memory, results stored. */
static const double MULTIPLY_RATE = 500, STREAM_RATE = 40, EPILOGUE_RATE = 10;
/* Activations of a block of rows, which every panel reads again: half of a 1 MiB L2. */
static const int64_t BLOCK_BYTES = 512 * 1024;
/* Kernels index a block with int32. */
static const int64_t MAX_BLOCK_ELEMENTS = (int64_t)1 << 30;

struct qmatmul {
    const struct qc_op *op;
    int64_t panels;
    int8_t *weights; /* this and the next two in one allocation */
    int32_t *init;
    float *ws;
};

struct qmatmul_run {
    const struct qmatmul *kernel;
    struct qc_qmatmul_args args; /* of the whole; y, rows and panels are set per task */
    float *y[QC_MAX_PARTS];
    int64_t rows, block_rows, panel_groups;
};

static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Columns of result `part`. */
static int64_t width(const struct qc_op *op, size_t part) {
    return op->spec->widths[0] ? op->spec->widths[part] : op->spec->n;
}

/* Panels [begin, end) of rows from `row` on; each call of the kernel stores to one result. */
static void run_panels(const struct qmatmul_run *run, struct qc_qmatmul_args *args, int64_t row,
                       int64_t begin, int64_t end) {
    const struct qc_op *op = run->kernel->op;
    const int64_t panel_columns = op->variant->tile_vectors * 16;
    int64_t first = 0;
    for (size_t part = 0; op->spec->outputs[part]; part++) {
        int64_t columns = width(op, part);
        args->panel_begin = (int32_t)max(begin, first / panel_columns);
        args->panel_end = (int32_t)min(end, ceil_div(first + columns, panel_columns));
        args->y = run->y[part] + row * columns;
        args->y_columns = (int32_t)columns;
        args->y_first = (int32_t)first;
        if (args->panel_begin < args->panel_end) op->variant->qmatmul(args);
        first += columns;
    }
}

static void qmatmul_task(void *argument, size_t index) {
    const struct qmatmul_run *run = argument;
    const struct qmatmul *kernel = run->kernel;
    const struct qc_op_spec *spec = kernel->op->spec;
    int64_t row = (int64_t)index / run->panel_groups * run->block_rows;
    int64_t group = (int64_t)index % run->panel_groups;
    int64_t rows = run->rows - row < run->block_rows ? run->rows - row : run->block_rows;

    struct qc_qmatmul_args args = run->args;
    args.q += row * spec->k;
    args.s += row;
    for (size_t i = 0; spec->extras[i]; i++)
        if (spec->extras[i] == 'T') args.extra[i] += row * spec->n;
    args.rows = (int32_t)rows;
    run_panels(run, &args, row, kernel->panels * group / run->panel_groups,
               kernel->panels * (group + 1) / run->panel_groups);
}

/* Cuts the work into blocks of rows times groups of panels; returns the number of tasks. */
static int64_t split(struct qmatmul_run *run) {
    const struct qmatmul *kernel = run->kernel;
    const struct qc_op_spec *spec = kernel->op->spec;
    const int64_t tile_rows = kernel->op->variant->tile_rows;
    double m = (double)run->rows, k = (double)spec->k, n = (double)spec->n;
    double multiply = m * k * n / MULTIPLY_RATE, stream = k * n / STREAM_RATE;
    int64_t tasks =
        qc_task_count((multiply > stream ? multiply : stream) + m * n / EPILOGUE_RATE);

    int64_t rows = max(BLOCK_BYTES / spec->k, 4 * tile_rows);
    /* Few panels: cut the rows too, but never below two tiles, since every block reads all of w. */
    int64_t wanted_blocks = ceil_div(min(tasks, 16), kernel->panels);
    rows = min(rows, max(ceil_div(run->rows, wanted_blocks), 2 * tile_rows));
    rows = ceil_div(rows, tile_rows) * tile_rows;
    run->block_rows = max(min(rows, MAX_BLOCK_ELEMENTS / max(spec->k, spec->n)), 1);

    int64_t blocks = ceil_div(run->rows, run->block_rows);
    /* A single row reads two panels at a time, so it wants them in pairs. */
    int64_t most_groups = run->rows == 1 ? max(kernel->panels / 2, 1) : kernel->panels;
    int64_t groups = min(ceil_div(tasks, blocks), most_groups);
    run->panel_groups = groups;
    /* Equal groups finish together; look for such a number, but not below half. */
    for (int64_t equal = groups; equal > groups / 2; equal--)
        if (kernel->panels % equal == 0) {
            run->panel_groups = equal;
            break;
        }
    return blocks * run->panel_groups;
}

static OrtStatus *bind_inputs(struct qmatmul_run *run, OrtKernelContext *context,
                              struct qc_shape *shape) {
    static const char *const EXTRA_NAMES[QC_MAX_EXTRAS] = {"4", "5", "6", "7", "8", "9", "10", "11"};
    const struct qc_op *op = run->kernel->op;
    const OrtValue *value;
    QC_TRY(qc_input(context, INPUT_Q, &value, (const void **)&run->args.q));
    QC_TRY(qc_tensor_shape(op, value, shape));
    QC_TRY(qc_row_count(op, shape, "q", &run->rows));
    QC_TRY(qc_input(context, INPUT_S, &value, (const void **)&run->args.s));
    QC_TRY(qc_check_floats(op, value, "s", run->rows));
    for (size_t i = 0; op->spec->extras[i]; i++) {
        int64_t rows = op->spec->extras[i] == 'T' ? run->rows : 1;
        QC_TRY(qc_input(context, INPUT_EXTRA + i, &value, (const void **)&run->args.extra[i]));
        QC_TRY(qc_check_floats(op, value, EXTRA_NAMES[i], rows * op->spec->n));
    }
    return NULL;
}

static OrtStatus *qmatmul_compute(void *state, OrtKernelContext *context) {
    const struct qmatmul *kernel = state;
    struct qmatmul_run run = {
        .kernel = kernel,
        .args = {.weights = kernel->weights, .init = kernel->init, .ws = kernel->ws},
    };
    struct qc_shape shape;
    QC_TRY(bind_inputs(&run, context, &shape));
    for (size_t part = 0; kernel->op->spec->outputs[part]; part++) {
        shape.dims[shape.rank - 1] = width(kernel->op, part);
        QC_TRY(qc_output(context, part, &shape, (void **)&run.y[part]));
    }
    if (run.rows == 0) return NULL;
    return qc_parallel(context, qmatmul_task, (size_t)split(&run), &run);
}

/* The data of an input that must be an initializer with these dimensions. */
static OrtStatus *constant_input(const struct qc_op *op, const OrtKernelInfo *info, size_t index,
                                 const char *name, const struct qc_shape *expected,
                                 const void **data) {
    int is_constant = 0;
    const OrtValue *value = NULL;
    QC_TRY(QC_ORT(KernelInfoGetConstantInput_tensor)(info, index, &is_constant, &value));
    if (!is_constant) return qc_error(op, "input %s must be an initializer", name);
    struct qc_shape shape;
    QC_TRY(qc_tensor_shape(op, value, &shape));
    if (shape.rank != expected->rank ||
        memcmp(shape.dims, expected->dims, shape.rank * sizeof *shape.dims)) {
        char actual_text[256], expected_text[256];
        return qc_error(op, "input %s has shape %s; it must be %s", name,
                        qc_shape_text(&shape, actual_text),
                        qc_shape_text(expected, expected_text));
    }
    return QC_ORT(GetTensorMutableData)((OrtValue *)value, (void **)data);
}

static void qmatmul_destroy(void *state) {
    struct qmatmul *kernel = state;
    free(kernel->weights);
    free(kernel);
}

static OrtStatus *qmatmul_create(const struct qc_op *op, const OrtKernelInfo *info, void **state) {
    const int64_t k = op->spec->k, n = op->spec->n;
    const void *w, *ws;
    QC_TRY(constant_input(op, info, INPUT_W, "w", &(struct qc_shape){2, {k, n}}, &w));
    QC_TRY(constant_input(op, info, INPUT_WS, "ws", &(struct qc_shape){1, {n}}, &ws));

    const int64_t panel_columns = op->variant->tile_vectors * 16;
    const int64_t panels = ceil_div(n, panel_columns);
    const size_t columns = (size_t)(panels * panel_columns);
    const size_t weight_bytes = columns * (size_t)ceil_div(k, 4) * 4;
    struct qmatmul *kernel = malloc(sizeof *kernel);
    void *memory = NULL;
    /* 64: so that no load of a whole vector crosses a cache line. */
    if (!kernel || posix_memalign(&memory, 64, weight_bytes + columns * 8)) {
        free(kernel);
        return qc_error(op, "out of memory for %zu bytes of packed weights", weight_bytes);
    }
    kernel->op = op;
    kernel->panels = panels;
    kernel->weights = memory;
    kernel->init = (int32_t *)(kernel->weights + weight_bytes);
    kernel->ws = (float *)(kernel->init + columns);
    op->variant->isa->pack_w8(w, k, n, op->variant->tile_vectors, kernel->weights, kernel->init);
    memset(kernel->ws, 0, columns * sizeof(float));
    memcpy(kernel->ws, ws, (size_t)n * sizeof(float));
    *state = kernel;
    return NULL;
}


const struct qc_anchor qc_qmatmul_w8a8 = {
    .input_types = (const int[]){ORT_UINT8, ORT_FLOAT, ORT_INT8, ORT_FLOAT},
    .input_count = INPUT_EXTRA,
    .output_types = (const int[QC_MAX_PARTS]){ORT_FLOAT, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT,
                                              ORT_FLOAT, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT},
    .create = qmatmul_create,
    .compute = qmatmul_compute,
    .destroy = qmatmul_destroy,
    .last_dimension = width,
};
