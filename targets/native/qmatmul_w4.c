/* y = epilogue(QMatMulW4A8(q, s, w, ws), extra...): int4 weights in groups of K with a scale each, int8
 * activations per row.  QMatMulW4S8A8(q, s, w, gs, cs) has the scales gs cs, an int8 of each group times
 * a float of each column.  See x86/qmatmul_w4.py for the layouts.
 *
 * yq, ys = RequantizedQMatMulW4A8(q, s, w, ws, extra...), and the other so, quantize y, see
 * requantized.c. */
#include <stdlib.h>
#include <string.h>

#include "qmatmul.h"

enum { INPUT_W = 2, INPUT_WS, INPUT_GS = INPUT_WS, INPUT_CS, EIGHT = 8, LANES = 16, VECTOR = 64 };

static int64_t eights(const struct qc_op *op) {
    return (int64_t)op->variant->chunk * op->variant->chunks / EIGHT;
}

static int64_t groups(const struct qc_op *op) { return ceil_div(op->spec->k, op->spec->g); }

static int64_t panel_columns(const struct qc_op *op) { return op->variant->tile_vectors * LANES; }

/* Row `row` of w, two weights in a byte, 8 more than they are; of a row after the last nothing. */
static void unpack(const uint8_t *w, const struct qc_op *op, int64_t row, uint8_t *weights) {
    const int64_t n = op->spec->n;
    if (row >= op->spec->k) return;
    for (int64_t column = 0, i = row * n; column < n; column++, i++)
        weights[column] = (uint8_t)((w[i / 2] >> (i % 2 * 4) & 15) ^ 8);
}

/* Rows [8 eight, 8 eight + 8) of w to all panels; `rows` has room for them, in whole panels. */
static void pack_eight(const struct qmatmul *kernel, const uint8_t *w, int64_t eight, uint8_t *rows) {
    const struct qc_op *op = kernel->op;
    const int64_t columns = kernel->panels * panel_columns(op), vectors = op->variant->tile_vectors;
    memset(rows, 8, (size_t)(EIGHT * columns));
    for (int64_t i = 0; i < EIGHT; i++) unpack(w, op, eight * EIGHT + i, rows + i * columns);
    for (int64_t panel = 0; panel < kernel->panels; panel++)
        for (int64_t vector = 0; vector < vectors; vector++) {
            const uint8_t *from = rows + (panel * vectors + vector) * LANES;
            int8_t *to = kernel->weights + ((panel * eights(op) + eight) * vectors + vector) * VECTOR;
            for (int64_t lane = 0; lane < LANES; lane++)
                for (int64_t i = 0; i < EIGHT / 2; i++)
                    to[lane * EIGHT / 2 + i] = (int8_t)(from[i * columns + lane] |
                                                        from[(i + EIGHT / 2) * columns + lane] << 4);
        }
}

/* ws [groups, n] to [panel][group][columns of a panel]. */
static void pack_scales(const struct qmatmul *kernel, const float *ws) {
    const struct qc_op *op = kernel->op;
    const int64_t width = panel_columns(op), n = op->spec->n, count = groups(op);
    for (int64_t panel = 0; panel < kernel->panels; panel++)
        for (int64_t group = 0; group < count; group++) {
            float *to = kernel->ws + (panel * count + group) * width;
            const int64_t columns = min(n - panel * width, width);
            memset(to, 0, (size_t)width * sizeof *to);
            memcpy(to, ws + group * n + panel * width, (size_t)columns * sizeof *to);
        }
}

/* gs cs [groups, n]; to be freed. */
static OrtStatus *multiply_scales(const struct qc_op *op, const OrtKernelInfo *info, float **scales) {
    const int64_t n = op->spec->n;
    const struct qc_shape gs_shape = {2, {groups(op), n}}, cs_shape = {1, {n}};
    const void *gs, *cs;
    QC_TRY(qc_constant_input(op, info, INPUT_GS, "gs", &gs_shape, &gs));
    QC_TRY(qc_constant_input(op, info, INPUT_CS, "cs", &cs_shape, &cs));
    *scales = malloc((size_t)(groups(op) * n) * sizeof **scales);
    if (!*scales) return qc_error(op, "out of memory for %lld scales", (long long)(groups(op) * n));
    for (int64_t i = 0; i < groups(op) * n; i++)
        (*scales)[i] = (float)((const int8_t *)gs)[i] * ((const float *)cs)[i % n];
    return NULL;
}

static void qmatmul_w4_destroy(void *state) {
    struct qmatmul *kernel = state;
    free(kernel->weights);
    free(kernel);
}

static OrtStatus *create(const struct qc_op *op, const OrtKernelInfo *info, const float *ws,
                         void **state) {
    const int64_t n = op->spec->n, panels = ceil_div(n, panel_columns(op));
    const struct qc_shape w_shape = {2, {op->spec->k, n}};
    const size_t columns = (size_t)(panels * panel_columns(op));
    const size_t weight_bytes = columns * (size_t)eights(op) * EIGHT / 2;
    const void *w;
    QC_TRY(qc_constant_input(op, info, INPUT_W, "w", &w_shape, &w));
    struct qmatmul *kernel = calloc(1, sizeof *kernel);
    uint8_t *rows = malloc(EIGHT * columns);
    if (kernel)
        kernel->weights = qc_allocate(weight_bytes + columns * (size_t)groups(op) * sizeof(float));
    if (!kernel || !rows || !kernel->weights) {
        if (kernel) qmatmul_w4_destroy(kernel);
        free(rows);
        return qc_error(op, "out of memory for %zu bytes of packed weights", weight_bytes);
    }
    kernel->op = op;
    kernel->panels = panels;
    kernel->ws = (float *)(kernel->weights + weight_bytes);
    for (int64_t eight = 0; eight < eights(op); eight++) pack_eight(kernel, w, eight, rows);
    pack_scales(kernel, ws);
    free(rows);
    OrtStatus *status = qc_find_extras(kernel, info);
    if (status)
        qmatmul_w4_destroy(kernel);
    else
        *state = kernel;
    return status;
}

static OrtStatus *qmatmul_w4_create(const struct qc_op *op, const OrtKernelInfo *info, void **state) {
    const struct qc_shape shape = {2, {groups(op), op->spec->n}};
    const void *ws;
    QC_TRY(qc_constant_input(op, info, INPUT_WS, "ws", &shape, &ws));
    return create(op, info, ws, state);
}

static OrtStatus *qmatmul_w4s8_create(const struct qc_op *op, const OrtKernelInfo *info, void **state) {
    float *scales;
    QC_TRY(multiply_scales(op, info, &scales));
    OrtStatus *status = create(op, info, scales, state);
    free(scales);
    return status;
}

static OrtStatus *qmatmul_w4_compute(void *state, OrtKernelContext *context) {
    const struct qmatmul *kernel = state;
    struct qmatmul_run run = {.kernel = kernel, .args = {.weights = kernel->weights, .ws = kernel->ws}};
    QC_TRY(qc_bind_qmatmul(&run, context));
    return qc_run_periods(&run, context, run.yq ? qc_run_requantized : qc_run_qmatmul);
}

#define QMATMUL(types, inputs, make)                                                               \
    .input_types = types, .input_count = inputs, .create = make, .compute = qmatmul_w4_compute,    \
    .destroy = qmatmul_w4_destroy
#define TO_FLOATS .output_types = qc_float_results, .last_dimension = width
#define QUANTIZED .output_types = qc_quantized_results, .last_dimension = width_or_scale

static const int Q_S_W_WS[] = {ORT_UINT8, ORT_FLOAT, ORT_INT4, ORT_FLOAT};
static const int Q_S_W_GS_CS[] = {ORT_UINT8, ORT_FLOAT, ORT_INT4, ORT_INT8, ORT_FLOAT};

#define W4A8 QMATMUL(Q_S_W_WS, 4, qmatmul_w4_create)
#define W4S8A8 QMATMUL(Q_S_W_GS_CS, 5, qmatmul_w4s8_create)

const struct qc_anchor qc_qmatmul_w4a8 = {W4A8, TO_FLOATS};
const struct qc_anchor qc_qmatmul_w4s8a8 = {W4S8A8, TO_FLOATS};
const struct qc_anchor qc_requantized_qmatmul_w4a8 = {W4A8, QUANTIZED};
const struct qc_anchor qc_requantized_qmatmul_w4s8a8 = {W4S8A8, QUANTIZED};
