/* y = softmax(q k^T scale + mask) v, per batch and head.
 *
 * Shapes meet as they do in the body: batch, heads and mask broadcast like those of MatMul and Add,
 * which costs nothing here, because a dimension of 1 is walked with stride 0. */
#include <stdlib.h>
#include <string.h>

#include "qcompiler.h"

enum { INPUT_Q, INPUT_K, INPUT_V, INPUT_SCALE, INPUT_MASK };

/* What one core does per nanosecond: multiply-adds, exponentials, floats packed. */
static const double MULTIPLY_RATE = 110, EXP_RATE = 12, PACK_RATE = 16;
/* Keys and values are packed once per block of rows: fewer rows than this waste more than 5%. */
static const int64_t FEWEST_ROWS = 64;
/* With 12 heads, those of BERT, 2 and 4 threads finish together. */
static const int64_t ENOUGH_TASKS = 12;
/* Kernels index one head of a tensor with int32. */
static const int64_t MAX_SPAN = (int64_t)1 << 30;

/* A tensor as [batch, heads, tokens, last]; the strides count floats. */
struct operand {
    const float *data;
    int64_t size[4], stride[4];
};

struct attention_run {
    const struct qc_op *op;
    struct operand q, k, v, mask, y;
    int64_t heads, rows, keys; /* rows per head */
    int64_t group;             /* heads that read one of k and v */
    int64_t block_rows, blocks, units, tasks;
    float scale;
};

static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static void run_unit(const struct attention_run *run, int64_t unit) {
    int64_t block = unit % run->blocks, head = unit / run->blocks % run->heads;
    int64_t batch = unit / run->blocks / run->heads, row = block * run->block_rows;
    const struct operand *q = &run->q, *k = &run->k, *v = &run->v, *mask = &run->mask, *y = &run->y;
    const int64_t group = head / run->group;
    run->op->variant->attention(&(struct qc_attention_args){
        .q = q->data + batch * q->stride[0] + head * q->stride[1] + row * q->stride[2],
        .k = k->data + batch * k->stride[0] + group * k->stride[1],
        .v = v->data + batch * v->stride[0] + group * v->stride[1],
        .mask = mask->data + batch * mask->stride[0] + head * mask->stride[1] +
                row * mask->stride[2],
        .y = (float *)y->data + batch * y->stride[0] + head * y->stride[1] + row * y->stride[2],
        .q_stride = (int32_t)q->stride[2],
        .k_stride = (int32_t)k->stride[2],
        .v_stride = (int32_t)v->stride[2],
        .y_stride = (int32_t)y->stride[2],
        .mask_row_stride = (int32_t)mask->stride[2],
        .mask_step = (int32_t)mask->stride[3],
        .rows = (int32_t)min(run->block_rows, run->rows - row),
        .keys = (int32_t)run->keys,
        .zero_empty = strstr(run->op->spec->form, "zero") != NULL,
        .scale = run->scale,
    });
}

static void attention_task(void *argument, size_t index) {
    const struct attention_run *run = argument;
    int64_t end = run->units * ((int64_t)index + 1) / run->tasks;
    for (int64_t unit = run->units * (int64_t)index / run->tasks; unit < end; unit++)
        run_unit(run, unit);
}

/* Cuts the rows of each head into blocks, and blocks of all heads into tasks. */
static void split(struct attention_run *run, int64_t batch_heads) {
    const int64_t most = run->op->variant->block_rows;
    int64_t blocks = ceil_div(run->rows, most);
    while (blocks * batch_heads < ENOUGH_TASKS && ceil_div(run->rows, 2 * blocks) >= FEWEST_ROWS)
        blocks *= 2;
    run->block_rows = min(most, ceil_div(ceil_div(run->rows, blocks), 8) * 8);
    run->blocks = ceil_div(run->rows, run->block_rows);
    run->units = run->blocks * batch_heads;
    double keys = (double)run->keys, d = (double)run->op->spec->d;
    double scores = (double)(batch_heads * run->rows) * keys;
    double packed = 2 * (double)run->units * keys * d;
    run->tasks = min(run->units, qc_task_count(2 * scores * d / MULTIPLY_RATE + scores / EXP_RATE +
                                               packed / PACK_RATE));
}

/* Describes dimensions in the order of the letter `layout`, h or s. */
static void set_strides(struct operand *operand, const int64_t dims[4], char layout) {
    const int heads = layout == 's' ? 2 : 1, tokens = layout == 's' ? 1 : 2;
    operand->size[0] = dims[0];
    operand->size[1] = dims[heads];
    operand->size[2] = dims[tokens];
    operand->size[3] = dims[3];
    int64_t stride[4] = {dims[1] * dims[2] * dims[3], dims[2] * dims[3], dims[3], 1};
    operand->stride[0] = stride[0];
    operand->stride[1] = stride[heads];
    operand->stride[2] = stride[tokens];
    operand->stride[3] = 1;
}

/* A dimension of 1 repeats. */
static void broadcast(struct operand *operand) {
    for (int i = 0; i < 4; i++)
        if (operand->size[i] == 1) operand->stride[i] = 0;
}

static OrtStatus *bind(struct attention_run *run, OrtKernelContext *context, size_t index,
                       const char *name, struct operand *operand) {
    const struct qc_op *op = run->op;
    const OrtValue *value;
    struct qc_shape shape;
    char text[256];
    QC_TRY(qc_input(context, index, &value, (const void **)&operand->data));
    QC_TRY(qc_tensor_shape(op, value, &shape));
    int is_mask = index == INPUT_MASK;
    if (is_mask ? shape.rank > 4 : shape.rank != 4)
        return qc_error(op, "input %s has shape %s; it must have rank 4", name,
                        qc_shape_text(&shape, text));
    if (!is_mask && shape.dims[3] != op->spec->d)
        return qc_error(op, "input %s has shape %s; its last dimension must be %lld", name,
                        qc_shape_text(&shape, text), (long long)op->spec->d);
    int64_t dims[4] = {1, 1, 1, 1};
    memcpy(dims + 4 - shape.rank, shape.dims, shape.rank * sizeof *dims);
    set_strides(operand, dims, is_mask ? 'h' : op->spec->form[index]);
    /* Keys and values are walked whole, the others a block of rows at a time. */
    int whole = index == INPUT_K || index == INPUT_V;
    int64_t walked = whole ? operand->size[2] : min(operand->size[2], op->variant->block_rows);
    if (walked * operand->stride[2] > MAX_SPAN)
        return qc_error(op, "input %s has shape %s; its rows lie more than 2^30 values apart", name,
                        qc_shape_text(&shape, text));
    broadcast(operand);
    if (whole) operand->size[1] *= run->group;
    return NULL;
}

/* The size that `a` and `b` broadcast to, -1 if they do not. */
static int64_t meet(int64_t a, int64_t b) { return a == b || b == 1 ? a : a == 1 ? b : -1; }

/* The shape of y by heads, from all inputs as MatMul and Add would combine them. */
static OrtStatus *combine(struct attention_run *run, int64_t result[4]) {
    const struct operand *q = &run->q, *k = &run->k, *v = &run->v, *mask = &run->mask;
    for (int i = 0; i < 2; i++) {
        int64_t scores = meet(meet(q->size[i], k->size[i]), mask->size[i]);
        result[i] = scores < 0 ? -1 : meet(scores, v->size[i]);
    }
    result[2] = meet(q->size[2], mask->size[2]);
    result[3] = run->op->spec->d;
    run->keys = meet(k->size[2], mask->size[3]);
    if (result[0] >= 0 && result[1] >= 0 && result[2] >= 0 && run->keys == v->size[2]) return NULL;
    return qc_error(run->op,
                    "q [%lld, %lld, %lld, ..], k [%lld, %lld, %lld, ..], v [%lld, %lld, %lld, ..] "
                    "and mask [%lld, %lld, %lld, %lld] (batch, heads, tokens) do not fit",
                    (long long)q->size[0], (long long)q->size[1], (long long)q->size[2],
                    (long long)k->size[0], (long long)k->size[1], (long long)k->size[2],
                    (long long)v->size[0], (long long)v->size[1], (long long)v->size[2],
                    (long long)mask->size[0], (long long)mask->size[1], (long long)mask->size[2],
                    (long long)mask->size[3]);
}

static OrtStatus *bind_output(struct attention_run *run, OrtKernelContext *context,
                              const int64_t size[4]) {
    char layout = run->op->spec->form[3];
    struct qc_shape shape = {4, {size[0], size[1], size[2], size[3]}};
    if (layout == 's') shape.dims[1] = size[2], shape.dims[2] = size[1];
    set_strides(&run->y, shape.dims, layout);
    return qc_output(context, 0, &shape, (void **)&run->y.data);
}

/* The number after g in a form such as "hhhs_g3_zero". */
static int64_t group_size(const char *form) {
    const char *flag = strstr(form, "_g");
    return flag ? strtol(flag + 2, NULL, 10) : 1;
}

static OrtStatus *compute(const struct qc_op *op, OrtKernelContext *context, int masked) {
    static const float no_mask = 0;
    static const struct operand NO_MASK = {&no_mask, {1, 1, 1, 1}, {0, 0, 0, 0}};
    struct attention_run run = {.op = op, .mask = NO_MASK, .group = group_size(op->spec->form)};
    const float *scale = NULL;
    int64_t size[4];
    QC_TRY(bind(&run, context, INPUT_Q, "q", &run.q));
    QC_TRY(bind(&run, context, INPUT_K, "k", &run.k));
    QC_TRY(bind(&run, context, INPUT_V, "v", &run.v));
    QC_TRY(qc_floats(op, context, INPUT_SCALE, "scale", 1, &scale));
    run.scale = *scale;
    if (masked) QC_TRY(bind(&run, context, INPUT_MASK, "mask", &run.mask));
    QC_TRY(combine(&run, size));
    QC_TRY(bind_output(&run, context, size));
    run.heads = size[1];
    run.rows = size[2];
    int64_t rows = size[0] * size[1] * size[2];
    if (rows && !run.keys) memset((void *)run.y.data, 0, (size_t)(rows * size[3]) * sizeof(float));
    if (rows == 0 || run.keys == 0) return NULL;
    split(&run, size[0] * size[1]);
    return qc_parallel(context, attention_task, (size_t)run.tasks, &run);
}

static OrtStatus *attention_compute(void *kernel, OrtKernelContext *context) {
    return compute(kernel, context, 0);
}

static OrtStatus *masked_attention_compute(void *kernel, OrtKernelContext *context) {
    return compute(kernel, context, 1);
}

static OrtStatus *attention_create(const struct qc_op *op, const OrtKernelInfo *info,
                                   void **kernel) {
    (void)info;
    *kernel = (void *)op; /* nothing to keep per node */
    return NULL;
}

static void attention_destroy(void *kernel) { (void)kernel; }

const struct qc_anchor qc_attention = {
    .input_types = (const int[]){ORT_FLOAT, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT},
    .input_count = INPUT_MASK,
    .output_types = (const int[]){ORT_FLOAT},
    .output_count = 1,
    .create = attention_create,
    .compute = attention_compute,
    .destroy = attention_destroy,
};

const struct qc_anchor qc_masked_attention = {
    .input_types = (const int[]){ORT_FLOAT, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT},
    .input_count = INPUT_MASK + 1,
    .output_types = (const int[]){ORT_FLOAT},
    .output_count = 1,
    .create = attention_create,
    .compute = masked_attention_compute,
    .destroy = attention_destroy,
};
