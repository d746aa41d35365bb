/* y = epilogue(QMatMulW8A8(q, s, w, ws), extra...): int8 weights, int8 activations per row.
 * QMatMulU8S8(q, s, z, w, ws) has one scale and one zero point for all activations, and
 * QMatMulU8U8(q, s, z, w, ws, wz) weights of uint8 with zero points: sum (q - z) (w - wz) is
 * sum (q - z) (w - 128) - (wz - 128) sum (q - z).
 * Merged products of one input are one with several results, each some columns of the whole.
 *
 * DynamicQMatMulW8A8(x, w, ws) quantizes x itself: a small x before the work is handed out, of a large
 * one each task the rows it multiplies, so that no task waits for another and what a core quantized is
 * still in its cache. */
#define _DEFAULT_SOURCE /* madvise */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "qcompiler.h"

enum { INPUT_Q, INPUT_S, INPUT_Z };

/* What one core does per nanosecond: multiply-adds, weight bytes from memory, results stored. */
static const double MULTIPLY_RATE = 500, STREAM_RATE = 40, EPILOGUE_RATE = 10;
/* Activations of a block of rows, which every panel reads again: half of a 1 MiB L2. */
static const int64_t BLOCK_BYTES = 512 * 1024;
/* Kernels index a block with int32. */
static const int64_t MAX_BLOCK_ELEMENTS = (int64_t)1 << 30;
/* What is quantized at once lies on the stack; less than this takes no longer than handing it out. */
enum { QUANTIZED_BYTES = 64 * 1024, QUANTIZED_ROWS = 512, FEW_BYTES = 32 * 1024 };
/* So many sums of columns and rows lie on the stack. */
enum { FEW_NUMBERS = 4096 };

struct qmatmul {
    const struct qc_op *op;
    int64_t panels;
    int8_t *weights; /* this and the next three in one allocation */
    int32_t *init; /* for zero point 128 */
    float *ws;
    int32_t *wz; /* less 128, U8U8 only */
};

struct qmatmul_run {
    const struct qmatmul *kernel;
    struct qc_qmatmul_args args; /* of the whole; y, rows and panels are set per task */
    const float *x; /* to be quantized; NULL if q and s are inputs */
    float *y[QC_MAX_PARTS];
    int64_t rows, block_rows, panel_groups;
};

static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static int has_shifted_weights(const struct qc_op *op) {
    return op->spec->anchor == &qc_qmatmul_u8u8;
}

static int has_zero_point(const struct qc_op *op) {
    return op->spec->anchor == &qc_qmatmul_u8s8 || has_shifted_weights(op);
}

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

struct quantized {
    uint8_t q[QUANTIZED_BYTES] __attribute__((aligned(64)));
    float s[QUANTIZED_ROWS];
};

/* Quantizes rows of x, for args to read. */
static void quantize(const struct qc_op *op, const float *x, int64_t rows, struct quantized *memory,
                     struct qc_qmatmul_args *args) {
    op->variant->quantize(&(struct qc_quantize_args){x, memory->q, memory->s, (int32_t)rows});
    args->q = memory->q;
    args->s = memory->s;
}

/* The rows of a task, which it quantizes first. */
static void quantize_and_run(const struct qmatmul_run *run, struct qc_qmatmul_args *args,
                             int64_t row) {
    const struct qc_op *op = run->kernel->op;
    struct quantized memory;
    quantize(op, run->x + row * op->spec->k, args->rows, &memory, args);
    run_panels(run, args, row, 0, run->kernel->panels);
}

static void qmatmul_task(void *argument, size_t index) {
    const struct qmatmul_run *run = argument;
    const struct qmatmul *kernel = run->kernel;
    const struct qc_op_spec *spec = kernel->op->spec;
    int64_t row = (int64_t)index / run->panel_groups * run->block_rows;
    int64_t group = (int64_t)index % run->panel_groups;
    int64_t rows = run->rows - row < run->block_rows ? run->rows - row : run->block_rows;

    struct qc_qmatmul_args args = run->args;
    for (size_t i = 0; spec->extras[i]; i++)
        if (spec->extras[i] == 'T') args.extra[i] += row * spec->n;
    args.rows = (int32_t)rows;
    if (run->x) {
        quantize_and_run(run, &args, row);
        return;
    }
    args.q += row * spec->k;
    if (!has_zero_point(kernel->op)) args.s += row;
    if (args.row_sums) args.row_sums += row;
    run_panels(run, &args, row, kernel->panels * group / run->panel_groups,
               kernel->panels * (group + 1) / run->panel_groups);
}

/* Whole tiles that a task can quantize. */
static int64_t most_quantized(const struct qc_op *op) {
    const int64_t tile_rows = op->variant->tile_rows;
    return min(QUANTIZED_BYTES / op->spec->k, QUANTIZED_ROWS) / tile_rows * tile_rows;
}

/* Rows of a block that all panels are multiplied with in turn, for about so many tasks. */
static int64_t choose_block_rows(const struct qmatmul_run *run, int64_t tasks) {
    const struct qc_op *op = run->kernel->op;
    const int64_t tile_rows = op->variant->tile_rows, k = op->spec->k, n = op->spec->n;
    /* Never below two tiles, since every block reads all of w. */
    const int64_t least = 2 * tile_rows;
    if (run->x) return min(max(ceil_div(run->rows, min(tasks, 16)), least), most_quantized(op));
    int64_t rows = max(BLOCK_BYTES / k, 4 * tile_rows);
    /* Few panels: cut the rows too. */
    int64_t wanted_blocks = ceil_div(min(tasks, 16), run->kernel->panels);
    rows = min(rows, max(ceil_div(run->rows, wanted_blocks), least));
    rows = ceil_div(rows, tile_rows) * tile_rows;
    return max(min(rows, MAX_BLOCK_ELEMENTS / max(k, n)), 1);
}

/* Cuts the work into blocks of rows times groups of panels; returns the number of tasks. */
static int64_t split(struct qmatmul_run *run) {
    const struct qmatmul *kernel = run->kernel;
    const struct qc_op_spec *spec = kernel->op->spec;
    double m = (double)run->rows, k = (double)spec->k, n = (double)spec->n;
    double multiply = m * k * n / MULTIPLY_RATE, stream = k * n / STREAM_RATE;
    int64_t tasks =
        qc_task_count((multiply > stream ? multiply : stream) + m * n / EPILOGUE_RATE);
    run->block_rows = choose_block_rows(run, tasks);
    int64_t blocks = ceil_div(run->rows, run->block_rows);
    /* A single row reads two panels at a time, so it wants them in pairs. */
    int64_t most_groups = run->rows == 1 ? max(kernel->panels / 2, 1) : kernel->panels;
    int64_t groups = run->x ? 1 : min(ceil_div(tasks, blocks), most_groups);
    run->panel_groups = groups;
    /* Equal groups finish together; look for such a number, but not below half. */
    for (int64_t equal = groups; equal > groups / 2; equal--)
        if (kernel->panels % equal == 0) {
            run->panel_groups = equal;
            break;
        }
    return blocks * run->panel_groups;
}

/* w and ws are the last inputs before the extra operands, but for wz. */
static size_t input_w(const struct qc_op *op) {
    return op->spec->anchor->input_count - (has_shifted_weights(op) ? 3 : 2);
}

static OrtStatus *bind_activations(struct qmatmul_run *run, OrtKernelContext *context,
                                   struct qc_shape *shape) {
    const struct qc_op *op = run->kernel->op;
    const OrtValue *value;
    const void *data;
    QC_TRY(qc_input(context, 0, &value, &data));
    QC_TRY(qc_tensor_shape(op, value, shape));
    QC_TRY(qc_row_count(op, shape, op->variant->quantize ? "x" : "q", &run->rows));
    if (op->variant->quantize) {
        run->x = data;
        return NULL;
    }
    run->args.q = data;
    QC_TRY(qc_input(context, INPUT_S, &value, (const void **)&run->args.s));
    return qc_check_floats(op, value, "s", has_zero_point(op) ? 1 : run->rows);
}

static int64_t all_columns(const struct qmatmul *kernel) {
    return kernel->panels * kernel->op->variant->tile_vectors * 16;
}

/* Makes what the zero point of this run asks for, in `few` if that is enough, else in memory that is
 * to be freed. */
static OrtStatus *bind_zero_point(struct qmatmul_run *run, OrtKernelContext *context, int32_t *few,
                                  int32_t **allocated) {
    const struct qmatmul *kernel = run->kernel;
    const int64_t columns = all_columns(kernel);
    const int64_t numbers = columns + (kernel->wz ? run->rows : 0);
    const OrtValue *value;
    const uint8_t *zero_point;
    size_t bytes;
    QC_TRY(qc_input(context, INPUT_Z, &value, (const void **)&zero_point));
    QC_TRY(QC_ORT(GetTensorSizeInBytes)(value, &bytes));
    if (bytes != 1) return qc_error(kernel->op, "input z holds %zu values; it must hold one", bytes);
    int32_t *init = few;
    if (numbers > FEW_NUMBERS) {
        *allocated = init = malloc((size_t)numbers * sizeof *init);
        if (!init) return qc_error(kernel->op, "out of memory for %lld sums", (long long)numbers);
    }
    /* -128 sums / 128 is exact. */
    for (int64_t i = 0; i < columns; i++) init[i] = (kernel->init[i] >> 7) * (int32_t)*zero_point;
    run->args.init = init;
    if (!kernel->wz) return NULL;
    qc_sum_rows(run->args.q, run->rows, kernel->op->spec->k, *zero_point, init + columns);
    run->args.row_sums = init + columns;
    return NULL;
}

static OrtStatus *bind_extras(struct qmatmul_run *run, OrtKernelContext *context) {
    static const char *const INPUT_NAMES[] = {"0", "1", "2", "3",  "4",  "5",  "6",
                                              "7", "8", "9", "10", "11", "12", "13"};
    const struct qc_op *op = run->kernel->op;
    for (size_t i = 0; op->spec->extras[i]; i++) {
        const size_t input = op->spec->anchor->input_count + i;
        const int64_t rows = op->spec->extras[i] == 'T' ? run->rows : 1;
        const OrtValue *value;
        QC_TRY(qc_input(context, input, &value, (const void **)&run->args.extra[i]));
        QC_TRY(qc_check_floats(op, value, INPUT_NAMES[input], rows * op->spec->n));
    }
    return NULL;
}

static OrtStatus *quantize_then_run(struct qmatmul_run *run, OrtKernelContext *context) {
    struct quantized memory;
    quantize(run->kernel->op, run->x, run->rows, &memory, &run->args);
    run->x = NULL;
    return qc_parallel(context, qmatmul_task, (size_t)split(run), run);
}

static OrtStatus *bind(struct qmatmul_run *run, OrtKernelContext *context) {
    const struct qc_op *op = run->kernel->op;
    struct qc_shape shape;
    QC_TRY(bind_activations(run, context, &shape));
    QC_TRY(bind_extras(run, context));
    for (size_t part = 0; op->spec->outputs[part]; part++) {
        shape.dims[shape.rank - 1] = width(op, part);
        QC_TRY(qc_output(context, part, &shape, (void **)&run->y[part]));
    }
    return NULL;
}

static struct qmatmul_run start(const struct qmatmul *kernel) {
    return (struct qmatmul_run){
        .kernel = kernel,
        .args = {.weights = kernel->weights, .init = kernel->init, .ws = kernel->ws, .wz = kernel->wz},
    };
}

static OrtStatus *qmatmul_compute(void *state, OrtKernelContext *context) {
    struct qmatmul_run run = start(state);
    QC_TRY(bind(&run, context));
    if (run.rows == 0) return NULL;
    if (run.x && run.rows <= QUANTIZED_ROWS && run.rows * run.kernel->op->spec->k <= FEW_BYTES)
        return quantize_then_run(&run, context);
    return qc_parallel(context, qmatmul_task, (size_t)split(&run), &run);
}

static OrtStatus *qmatmul_u8_compute(void *state, OrtKernelContext *context) {
    struct qmatmul_run run = start(state);
    int32_t few[FEW_NUMBERS], *allocated = NULL;
    QC_TRY(bind(&run, context));
    if (run.rows == 0) return NULL;
    OrtStatus *status = bind_zero_point(&run, context, few, &allocated);
    if (!status) status = qc_parallel(context, qmatmul_task, (size_t)split(&run), &run);
    free(allocated);
    return status;
}

static void qmatmul_destroy(void *state) {
    struct qmatmul *kernel = state;
    free(kernel->weights);
    free(kernel);
}

/* Large weights in large pages, if the system gives them to who asks: one row is multiplied 1.7 times
 * as fast then.  64: so that no load of a whole vector crosses a cache line. */
static void *allocate(size_t bytes) {
    const size_t page = (size_t)2 << 20;
    const int is_large = bytes >= 2 * page;
    void *memory = NULL;
    if (posix_memalign(&memory, is_large ? page : 64, bytes)) return NULL;
    if (is_large) (void)madvise(memory, bytes, MADV_HUGEPAGE);
    return memory;
}

static void pack(struct qmatmul *kernel, const int8_t *w) {
    const struct qc_op *op = kernel->op;
    op->variant->isa->pack_w8(w, op->spec->k, op->spec->n, op->variant->tile_vectors,
                              kernel->weights, kernel->init);
}

/* uint8 weights less 128, and their zero points too. */
static OrtStatus *pack_shifted(struct qmatmul *kernel, const OrtKernelInfo *info, const uint8_t *w) {
    const struct qc_op *op = kernel->op;
    const int64_t n = op->spec->n, count = op->spec->k * n;
    const struct qc_shape shape = {1, {n}};
    const void *wz;
    QC_TRY(qc_constant_input(op, info, input_w(op) + 2, "wz", &shape, &wz));
    int8_t *shifted = malloc((size_t)count);
    if (!shifted) return qc_error(op, "out of memory for %lld weights", (long long)count);
    for (int64_t i = 0; i < count; i++) shifted[i] = (int8_t)(w[i] ^ 0x80);
    pack(kernel, shifted);
    free(shifted);
    memset(kernel->wz, 0, (size_t)all_columns(kernel) * sizeof *kernel->wz);
    for (int64_t i = 0; i < n; i++) kernel->wz[i] = ((const uint8_t *)wz)[i] - 128;
    return NULL;
}

static OrtStatus *qmatmul_create(const struct qc_op *op, const OrtKernelInfo *info, void **state) {
    const int64_t k = op->spec->k, n = op->spec->n;
    const void *w, *ws;
    const struct qc_shape w_shape = {2, {k, n}}, ws_shape = {1, {n}};
    QC_TRY(qc_constant_input(op, info, input_w(op), "w", &w_shape, &w));
    QC_TRY(qc_constant_input(op, info, input_w(op) + 1, "ws", &ws_shape, &ws));

    const int64_t panel_columns = op->variant->tile_vectors * 16;
    const int64_t panels = ceil_div(n, panel_columns);
    const size_t columns = (size_t)(panels * panel_columns);
    const size_t weight_bytes = columns * (size_t)ceil_div(k, 4) * 4;
    struct qmatmul *kernel = malloc(sizeof *kernel);
    void *memory = kernel ? allocate(weight_bytes + columns * 12) : NULL;
    if (!memory) {
        free(kernel);
        return qc_error(op, "out of memory for %zu bytes of packed weights", weight_bytes);
    }
    kernel->op = op;
    kernel->panels = panels;
    kernel->weights = memory;
    kernel->init = (int32_t *)(kernel->weights + weight_bytes);
    kernel->ws = (float *)(kernel->init + columns);
    kernel->wz = NULL;
    if (has_shifted_weights(op)) {
        kernel->wz = (int32_t *)(kernel->ws + columns);
        OrtStatus *status = pack_shifted(kernel, info, w);
        if (status) {
            qmatmul_destroy(kernel);
            return status;
        }
    } else
        pack(kernel, w);
    memset(kernel->ws, 0, columns * sizeof(float));
    memcpy(kernel->ws, ws, (size_t)n * sizeof(float));
    *state = kernel;
    return NULL;
}


static const int FLOATS[QC_MAX_PARTS] = {ORT_FLOAT, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT,
                                         ORT_FLOAT, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT};

#define QMATMUL(types, inputs, run)                                                                \
    {                                                                                              \
        .input_types = types, .input_count = inputs, .output_types = FLOATS,                       \
        .create = qmatmul_create, .compute = run, .destroy = qmatmul_destroy,                      \
        .last_dimension = width,                                                                   \
    }

static const int Q_S_W_WS[] = {ORT_UINT8, ORT_FLOAT, ORT_INT8, ORT_FLOAT};
static const int Q_S_Z_W_WS[] = {ORT_UINT8, ORT_FLOAT, ORT_UINT8, ORT_INT8, ORT_FLOAT};
static const int Q_S_Z_W_WS_WZ[] = {ORT_UINT8, ORT_FLOAT, ORT_UINT8,
                                    ORT_UINT8, ORT_FLOAT, ORT_UINT8};
static const int X_W_WS[] = {ORT_FLOAT, ORT_INT8, ORT_FLOAT};

const struct qc_anchor qc_qmatmul_w8a8 = QMATMUL(Q_S_W_WS, 4, qmatmul_compute);
const struct qc_anchor qc_qmatmul_u8s8 = QMATMUL(Q_S_Z_W_WS, 5, qmatmul_u8_compute);
const struct qc_anchor qc_qmatmul_u8u8 = QMATMUL(Q_S_Z_W_WS_WZ, 6, qmatmul_u8_compute);
const struct qc_anchor qc_dynamic_qmatmul_w8a8 = QMATMUL(X_W_WS, 3, qmatmul_compute);
