/* y = epilogue(QMatMulW8A8(q, s, w, ws), extra...): int8 weights, int8 activations per row.
 * QMatMulU8S8(q, s, z, w, ws) has one scale and one zero point for all activations, and
 * QMatMulU8U8(q, s, z, w, ws, wz) weights of uint8 with zero points: sum (q - z) (w - wz) is
 * sum (q - z) (w - 128) - (wz - 128) sum (q - z).
 * Merged products of one input are one with several results, each some columns of the whole.
 *
 * DynamicQMatMulW8A8(x, w, ws) quantizes x itself: a small x before the work is handed out, of a large
 * one each task the rows it multiplies, so that no task waits for another and what a core quantized is
 * still in its cache.
 *
 * WindowedQMatMulW8A8 has rows of several rows of x that follow each other: windows, which may overlap,
 * have holes, and reach into rows of zeros before the first and behind the last.
 *
 * yq, ys = RequantizedQMatMulW8A8(q, s, w, ws, extra...) quantizes y, see requantized.c. */
#define _DEFAULT_SOURCE /* madvise */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "qmatmul.h"

/* So many sums of columns and rows lie on the stack. */
enum { FEW_NUMBERS = 4096 };

/* w and ws are the last inputs before the extra operands, but for wz. */
static size_t input_w(const struct qc_op *op) {
    return op->spec->anchor->input_count - (has_shifted_weights(op) ? 3 : 2);
}

static int64_t all_columns(const struct qmatmul *kernel) {
    return kernel->panels * kernel->op->variant->tile_vectors * 16;
}

/* Makes what the zero point of this run asks for, in `few` if that is enough, else in memory that is
 * to be freed. */
static OrtStatus *bind_zero_point(struct qmatmul_run *run, OrtKernelContext *context, int32_t *few,
                                  int32_t **allocated) {
    const struct qmatmul *kernel = run->kernel;
    const int is_split = kernel->op->variant->most_lacking != 0;
    const int64_t columns = is_split ? 0 : all_columns(kernel);
    const int64_t numbers = columns + (kernel->wz ? run->rows : 0);
    const OrtValue *value;
    const uint8_t *zero_point;
    size_t bytes;
    QC_TRY(qc_input(context, INPUT_Z, &value, (const void **)&zero_point));
    QC_TRY(QC_ORT(GetTensorSizeInBytes)(value, &bytes));
    if (bytes != 1) return qc_error(kernel->op, "input z holds %zu values; it must hold one", bytes);
    run->zero_point = *zero_point;
    int32_t *init = few;
    if (numbers > FEW_NUMBERS) {
        *allocated = init = malloc((size_t)numbers * sizeof *init);
        if (!init) return qc_error(kernel->op, "out of memory for %lld sums", (long long)numbers);
    }
    /* -128 sums / 128 is exact. */
    for (int64_t i = 0; i < columns; i++) init[i] = (kernel->init[i] >> 7) * (int32_t)*zero_point;
    if (is_split)
        run->args.column_sums = kernel->init;
    else
        run->args.init = init;
    if (!kernel->wz) return NULL;
    qc_sum_rows(run->args.q, run->rows, kernel->op->spec->k, *zero_point, init + columns);
    run->args.row_sums = init + columns;
    return NULL;
}

static OrtStatus *quantize_then_run(struct qmatmul_run *run, OrtKernelContext *context) {
    struct quantized memory;
    qc_quantize_rows(run, 0, run->rows, &memory, &run->args);
    run->x = NULL;
    return qc_run_qmatmul(run, context);
}

static struct qmatmul_run start(const struct qmatmul *kernel) {
    return (struct qmatmul_run){
        .kernel = kernel,
        .zero_point = 128,
        .args = {.weights = kernel->weights, .init = kernel->init, .ws = kernel->ws, .wz = kernel->wz},
    };
}

static OrtStatus *compute_rows(struct qmatmul_run *run, OrtKernelContext *context) {
    if (run->x && run->rows <= QUANTIZED_ROWS && run->rows * run->kernel->op->spec->k <= FEW_BYTES)
        return quantize_then_run(run, context);
    if (run->yq) return qc_run_requantized(run, context);
    return qc_run_qmatmul(run, context);
}

static OrtStatus *qmatmul_compute(void *state, OrtKernelContext *context) {
    struct qmatmul_run run = start(state);
    QC_TRY(qc_bind_qmatmul(&run, context));
    return qc_run_periods(&run, context, compute_rows);
}

static OrtStatus *qmatmul_u8_compute(void *state, OrtKernelContext *context) {
    struct qmatmul_run run = start(state);
    int32_t few[FEW_NUMBERS], *allocated = NULL;
    QC_TRY(qc_bind_qmatmul(&run, context));
    if (run.rows == 0) return NULL;
    OrtStatus *status = bind_zero_point(&run, context, few, &allocated);
    if (!status) status = qc_run_periods(&run, context, qc_run_qmatmul);
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
void *qc_allocate(size_t bytes) {
    const size_t page = (size_t)2 << 20;
    const int is_large = bytes >= 2 * page;
    void *memory = NULL;
    if (posix_memalign(&memory, is_large ? page : 64, bytes)) return NULL;
    if (is_large) (void)madvise(memory, bytes, MADV_HUGEPAGE);
    return memory;
}

static void pack(struct qmatmul *kernel, const int8_t *w) {
    const struct qc_op *op = kernel->op;
    const struct qc_variant *variant = op->variant;
    variant->isa->pack_w8(w, op->spec->k, op->spec->n, variant->tile_vectors, kernel->weights,
                          kernel->init);
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
    void *memory = kernel ? qc_allocate(weight_bytes + columns * 12) : NULL;
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
    OrtStatus *status = qc_find_extras(kernel, info);
    if (status)
        qmatmul_destroy(kernel);
    else
        *state = kernel;
    return status;
}

const int qc_float_results[QC_MAX_PARTS] = {ORT_FLOAT, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT,
                                            ORT_FLOAT, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT};
const int qc_quantized_results[] = {ORT_FLOAT, ORT_UINT8, ORT_FLOAT};

#define QMATMUL(types, inputs, run)                                                                \
    .input_types = types, .input_count = inputs, .create = qmatmul_create, .compute = run,         \
    .destroy = qmatmul_destroy
#define TO_FLOATS .output_types = qc_float_results, .last_dimension = width

static const int Q_S_W_WS[] = {ORT_UINT8, ORT_FLOAT, ORT_INT8, ORT_FLOAT};
static const int Q_S_Z_W_WS[] = {ORT_UINT8, ORT_FLOAT, ORT_UINT8, ORT_INT8, ORT_FLOAT};
static const int Q_S_Z_W_WS_WZ[] = {ORT_UINT8, ORT_FLOAT, ORT_UINT8,
                                    ORT_UINT8, ORT_FLOAT, ORT_UINT8};
static const int X_W_WS[] = {ORT_FLOAT, ORT_INT8, ORT_FLOAT};

const struct qc_anchor qc_qmatmul_w8a8 = {QMATMUL(Q_S_W_WS, 4, qmatmul_compute), TO_FLOATS};
const struct qc_anchor qc_qmatmul_u8s8 = {QMATMUL(Q_S_Z_W_WS, 5, qmatmul_u8_compute), TO_FLOATS};
const struct qc_anchor qc_qmatmul_u8u8 = {QMATMUL(Q_S_Z_W_WS_WZ, 6, qmatmul_u8_compute), TO_FLOATS};
const struct qc_anchor qc_dynamic_qmatmul_w8a8 = {QMATMUL(X_W_WS, 3, qmatmul_compute), TO_FLOATS};
const struct qc_anchor qc_windowed_qmatmul_w8a8 = {QMATMUL(X_W_WS, 3, qmatmul_compute), TO_FLOATS,
                                                   .rows = window_count};
const struct qc_anchor qc_requantized_qmatmul_w8a8 = {
    QMATMUL(Q_S_W_WS, 4, qmatmul_compute), .output_types = qc_quantized_results,
    .last_dimension = width_or_scale};
