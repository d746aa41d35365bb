/* A product of one size, and one run of it: qmatmul.c binds operands, qmatmul_work.c hands out work. */
#ifndef QMATMUL_H
#define QMATMUL_H

#include "qcompiler.h"

/* What is quantized at once lies on the stack; less than this takes no longer than handing it out. */
enum { QUANTIZED_BYTES = 64 * 1024, QUANTIZED_ROWS = 512, FEW_BYTES = 32 * 1024 };
/* So do the results of a task that quantizes them. */
enum { RESULT_FLOATS = 48 * 1024 };
/* And windows that do not lie in x from end to end; one of MAX_QUANTIZED_DEPTH (x86/family.py) fits. */
enum { WINDOW_FLOATS = 4096 };

/* Of products by activations that came quantized. */
enum { INPUT_Q, INPUT_S, INPUT_Z };

struct qmatmul {
    const struct qc_op *op;
    int64_t panels;
    int8_t *weights; /* this and the next three in one allocation */
    int32_t *init; /* for zero point 128; the sums of the columns where rows are split */
    float *ws;
    int32_t *wz; /* less 128, U8U8 only */
    const float *extra[QC_MAX_EXTRAS]; /* those that are initializers, else NULL */
};

/* Activations as a kernel that `splits_rows` reads them, see split_rows.c. */
struct split_rows {
    const uint8_t *q;
    uint8_t zero_point;
    int is_centred; /* on values of the rows' own; else on the zero point */
    int64_t rows, k, block_rows, tile_rows;
    int64_t most_lacking; /* numbers that two groups of four may lack */
    int64_t block_tiles, tiles, numbers, tasks; /* planned */
    int8_t *split;
    int32_t *starts, *offsets, *counts, *values;
    uint16_t *groups;
};

/* Activations less 128, in whole chunks, and where the sums of each chunk start, see centred_rows.c. */
struct centred_rows {
    const uint8_t *q;
    int64_t rows, k, chunk, chunks, tasks;
    int8_t *centred;
    int32_t *starts;
};

struct qmatmul_run {
    const struct qmatmul *kernel;
    struct qc_qmatmul_args args; /* of the whole; y, rows and panels are set per task */
    const float *x; /* to be quantized; NULL if q and s are inputs */
    int64_t x_stride, batch_rows, batch_stride; /* of x, whose batches follow each other at a distance */
    int64_t inner_begin, inner_end; /* rows of a batch that lie in x from end to end: row i from element */
    int64_t inner_offset;           /* inner_offset + i x_stride of the batch on */
    int64_t first_row; /* the row of x that row 0 is */
    int64_t extra_rows[QC_MAX_EXTRAS]; /* of operands that have rows */
    int64_t period; /* rows after which one starts again, so that no block may go on */
    uint8_t zero_point;
    char *y[QC_MAX_PARTS];
    uint8_t *yq; /* the one result quantized, beside y[0] if that is not NULL; or NULL */
    float *ys;
    int in_tasks; /* whether a task quantizes its rows of it */
    int64_t rows, block_rows, panel_groups;
    struct split_rows split;
    struct centred_rows centred; /* of int4 weights */
};

struct quantized {
    uint8_t q[QUANTIZED_BYTES] __attribute__((aligned(64)));
    float s[QUANTIZED_ROWS];
};

/* More than `qc_plan_split` asks for of rows that are quantized at once, at least a tile of up to 4 of
 * at most 16 KiB: for them, and 2.25 times as much for what they and 3 rows more may lack. */
enum { SPLIT_BYTES = 4 * QUANTIZED_BYTES, MOST_TILE_ROWS = 8 };

static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline int has_shifted_weights(const struct qc_op *op) {
    return op->spec->anchor == &qc_qmatmul_u8u8;
}

static inline int has_zero_point(const struct qc_op *op) {
    return op->spec->anchor == &qc_qmatmul_u8s8 || has_shifted_weights(op);
}

/* Bytes of an element of the results. */
static inline int64_t result_size(const struct qc_op *op) {
    return op->spec->result_type == ORT_UINT8 ? 1 : sizeof(float);
}

/* Columns of result `part`. */
static inline int64_t width(const struct qc_op *op, size_t part) {
    return op->spec->widths[0] ? op->spec->widths[part] : op->spec->n;
}

static inline int has_windows(const struct qc_op *op) {
    return op->spec->anchor == &qc_windowed_qmatmul_w8a8;
}

static inline int quantizes_input(const struct qc_op *op) {
    return op->spec->anchor == &qc_dynamic_qmatmul_w8a8 || has_windows(op);
}

/* The types of a product's results: floats, or y, yq, ys. */
extern const int qc_float_results[QC_MAX_PARTS], qc_quantized_results[3];

static inline int quantizes_result(const struct qc_op *op) {
    return op->spec->anchor->output_types == qc_quantized_results;
}

/* Rows from the first of a window to behind its last. */
static inline int64_t window_reach(const struct qc_op *op) {
    return (op->spec->r - 1) * op->spec->dilations[0] + 1;
}

/* How many windows rows of x make, with the zeros before and behind them. */
static inline int64_t window_count(const struct qc_op *op, int64_t rows) {
    rows += op->spec->pads[0] + op->spec->pads[1] - window_reach(op);
    return rows < 0 ? 0 : rows / op->spec->s + 1;
}

/* The last dimension of y, yq, ys. */
static inline int64_t width_or_scale(const struct qc_op *op, size_t output) {
    return output == 2 ? 1 : op->spec->n;
}

/* Quantizes rows [row, row + rows) of x, for args to read. */
void qc_quantize_rows(const struct qmatmul_run *run, int64_t row, int64_t rows,
                      struct quantized *memory, struct qc_qmatmul_args *args);

/* The memory that splitting rows takes; they come in blocks, each multiplied by calls of its own. */
size_t qc_plan_split(struct split_rows *split);
void qc_place_split(struct split_rows *split, char *memory);
/* Splits them, on this thread for want of a context. */
OrtStatus *qc_split(struct split_rows *split, OrtKernelContext *context);
/* Lets args read the block from `row` on. */
void qc_read_split(const struct split_rows *split, int64_t row, struct qc_qmatmul_args *args);

/* The memory that centred rows take. */
size_t qc_plan_centred(const struct centred_rows *centred);
void qc_place_centred(struct centred_rows *centred, char *memory);
OrtStatus *qc_centre(struct centred_rows *centred, OrtKernelContext *context);
/* Lets args read the rows from `row` on. */
void qc_read_centred(const struct centred_rows *centred, int64_t row, struct qc_qmatmul_args *args);

/* Memory for packed weights, to be freed. */
void *qc_allocate(size_t bytes);
/* The extra operands that are initializers. */
OrtStatus *qc_find_extras(struct qmatmul *kernel, const OrtKernelInfo *info);
/* The operands and results of a run by activations with a scale per row. */
OrtStatus *qc_bind_qmatmul(struct qmatmul_run *run, OrtKernelContext *context);

/* Computes the rows of each period, as `compute` does. */
OrtStatus *qc_run_periods(struct qmatmul_run *run, OrtKernelContext *context,
                          OrtStatus *(*compute)(struct qmatmul_run *, OrtKernelContext *));

/* Runs it, and quantizes the result: each task its rows where that pays, else all of them at the end. */
OrtStatus *qc_run_requantized(struct qmatmul_run *run, OrtKernelContext *context);

/* Panels [begin, end) of rows from `row` of the results `y` on. */
void qc_run_panels(const struct qmatmul_run *run, struct qc_qmatmul_args *args, char *const *y,
                   int64_t row, int64_t begin, int64_t end);
/* All panels of the rows of a task, the first of which is `row`, and quantizes them. */
void qc_run_and_quantize(const struct qmatmul_run *run, struct qc_qmatmul_args *args, int64_t row);

/* Cuts the work into blocks of rows times groups of panels, and runs it. */
OrtStatus *qc_run_qmatmul(struct qmatmul_run *run, OrtKernelContext *context);

#endif
