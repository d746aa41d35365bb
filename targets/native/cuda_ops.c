/* The ops for NVIDIA GPUs.  A run looks up the kernel for its number of rows and launches it on the
 * session's stream.
 * Nothing waits for the device, and memory comes from the session's own, so that ONNX Runtime may
 * capture a run as a CUDA graph. */
#include <string.h>

#include "cuda_node.h"

/* A kernel may count the elements of one call with int32. */
static const int64_t MAX_CALL_ELEMENTS = INT32_MAX;

static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static int argument_of(const struct qc_op *op, size_t input) {
    const struct qc_anchor *anchor = op->spec->anchor;
    if (input < anchor->input_count) return anchor->arguments[input];
    return QC_EXTRA0 + (int)(input - anchor->input_count);
}

/* Bytes from one row of an argument to the next; 0 for what all rows share. */
static int64_t row_bytes(const struct qc_op *op, int argument) {
    const struct qc_op_spec *spec = op->spec;
    switch (argument) {
    case QC_X:
    case QC_A:
    case QC_B: return spec->k * 2;
    case QC_Q: return spec->k;
    case QC_S: return 4;
    case QC_Y: return qc_columns(spec) * 2;
    default: break;
    }
    if (argument >= QC_Y0) return spec->widths[argument - QC_Y0] * 2;
    return argument >= QC_EXTRA0 && spec->extras[argument - QC_EXTRA0] == 'T' ? spec->n * 2 : 0;
}

static OrtStatus *bind_input(struct qc_call *call, OrtKernelContext *context, size_t index,
                             int64_t *rows, struct qc_shape *shape) {
    static const char *const NAMES[QC_ARGUMENTS] = {
        "x", "q", "s", "w", "ws", "y", "workspace", "rows", "a", "b", "gamma", "beta", "z", "height",
        "width", "made", "extra0", "extra1", "extra2", "extra3", "extra4", "extra5", "extra6", "extra7"};
    const struct qc_op *op = call->node->op;
    const int argument = argument_of(op, index);
    const OrtValue *value;
    const void *data;
    QC_TRY(qc_input(context, index, &value, &data));
    if (index == 0) {
        QC_TRY(qc_tensor_shape(op, value, shape));
        QC_TRY(qc_row_count(op, shape, NAMES[argument], rows));
    } else if (argument == QC_S) {
        QC_TRY(qc_check_floats(op, value, "s", *rows));
    } else {
        const int is_extra = argument >= QC_EXTRA0;
        const int is_tensor = is_extra ? op->spec->extras[argument - QC_EXTRA0] == 'T'
                                       : argument == QC_B;
        QC_TRY(qc_check_elements(op, value, NAMES[argument],
                                 (is_tensor ? *rows : 1) * qc_columns(op->spec), 2));
    }
    /* Kernels load 16 bytes at a time; a fault would end the process's use of the device. */
    if (*rows && (uintptr_t)data % QC_ALIGNMENT)
        return qc_error(op, "input %s lies at %p; its address must be a multiple of %d",
                        NAMES[argument], data, QC_ALIGNMENT);
    call->pointers[argument] = (char *)data;
    return NULL;
}

static OrtStatus *bind(struct qc_call *call, OrtKernelContext *context, int64_t *rows) {
    const struct qc_op *op = call->node->op;
    const struct qc_anchor *anchor = op->spec->anchor;
    struct qc_shape shape;
    call->pointers[QC_W] = (char *)(uintptr_t)call->node->weights;
    call->pointers[QC_WS] = (char *)(uintptr_t)call->node->scales;
    for (size_t i = 0; i < anchor->input_count + strlen(op->spec->extras); i++)
        if (!(anchor->host_inputs >> i & 1)) QC_TRY(bind_input(call, context, i, rows, &shape));
    for (size_t i = 0; op->spec->outputs[i]; i++) {
        size_t output = qc_output_index(op, i);
        struct qc_shape actual = shape;
        actual.dims[shape.rank - 1] = anchor->last_dimension(op, output);
        const int argument =
            op->spec->widths[0] ? QC_Y0 + (int)i : anchor->arguments[anchor->input_count + output];
        QC_TRY(qc_output(context, i, &actual, (void **)&call->pointers[argument]));
    }
    return QC_ORT(KernelContext_GetGPUComputeStream)(context, &call->stream);
}

static void *value_of(const struct qc_call *call, int argument) {
    switch (argument) {
    case QC_ROWS: return (void *)&call->rows;
    case QC_HEIGHT: return (void *)&call->height;
    case QC_WIDTH: return (void *)&call->width;
    default: return (void *)&call->pointers[argument];
    }
}

static OrtStatus *launch(const struct qc_call *call, qc_function function, const char *symbol,
                         const uint8_t *arguments, const unsigned grid[3], unsigned shared_bytes) {
    void *values[QC_ARGUMENTS];
    for (size_t i = 0; arguments[i] != QC_END; i++)
        values[i] = value_of(call, arguments[i]);
    int result = qc_driver.launch(function, grid[0], grid[1], grid[2], call->launch->threads, 1, 1,
                                  shared_bytes, call->stream, values, NULL);
    return qc_cuda_check(call->node->op, result,
                         "cannot launch %s for %d rows (grid %u x %u x %u, %u threads, %u bytes of "
                         "shared memory)",
                         symbol, call->rows, grid[0], grid[1], grid[2], call->launch->threads,
                         shared_bytes);
}

static OrtStatus *launch_all(const struct qc_call *call) {
    const struct qc_launch *launch_ = call->launch;
    const struct qc_op_spec *spec = call->node->op->spec;
    const int64_t columns = qc_columns(spec);
    const int64_t blocks = ceil_div(call->rows, launch_->block_rows);
    const int is_tall = blocks > QC_MAX_GRID_Y; /* only of images, whose kernels are written for it */
    const unsigned grid[] = {(unsigned)ceil_div(columns, launch_->block_columns),
                             is_tall ? QC_TALL_BLOCKS : (unsigned)blocks,
                             is_tall ? (unsigned)ceil_div(blocks, QC_TALL_BLOCKS) : launch_->splits};
    QC_TRY(launch(call, call->functions.kernel, launch_->symbol, launch_->arguments, grid,
                  launch_->shared_bytes));
    if (!launch_->combine) return NULL;
    const int64_t block = (int64_t)launch_->threads * 4;
    const unsigned combine_grid[] = {(unsigned)ceil_div(call->rows * qc_summed_columns(spec), block), 1, 1};
    return launch(call, call->functions.combine, launch_->combine, launch_->combine_arguments,
                  combine_grid, 0);
}

/* In the context of the session's device, which is current already but in the threads of others. */
static OrtStatus *launch_on_device(const struct qc_call *call) {
    const struct qc_gpu_node *node = call->node;
    qc_context current = NULL;
    QC_TRY(qc_cuda_check(node->op, qc_driver.current_context(&current), "cannot ask for the GPU"));
    if (current == node->device->context) return launch_all(call);
    QC_TRY(qc_enter(node->op, node->device));
    OrtStatus *status = launch_all(call);
    qc_leave();
    return status;
}

static OrtStatus *ask_for(const struct qc_gpu_node *node, OrtKernelContext *context, size_t bytes,
                          char **memory) {
    /* Belongs to the run's stream: given back right after the launch, it is not given to another
     * stream before the kernel is done. */
    return QC_ORT(KernelContext_GetScratchBuffer)(context, node->memory, bytes, (void **)memory);
}

/* ONNX Runtime's own message does not say for what; and a kernel must not be given no memory. */
static OrtStatus *allocate(struct qc_call *call, OrtKernelContext *context, size_t bytes) {
    const struct qc_gpu_node *node = call->node;
    char **memory = &call->pointers[QC_WORKSPACE];
    OrtStatus *failed = ask_for(node, context, bytes, memory);
    if (!failed && *memory) return NULL;
    OrtStatus *status = qc_error(
        node->op, "cannot allocate a workspace of %zu bytes for %d rows on GPU %d: run fewer rows at "
                  "once, or raise gpu_mem_limit of the CUDA provider (%s)",
        bytes, call->rows, node->device->ordinal,
        failed ? QC_ORT(GetErrorMessage)(failed) : "its allocator gave none");
    if (failed) QC_ORT(ReleaseStatus)(failed);
    return status;
}

OrtStatus *qc_run_rows(struct qc_call *call, OrtKernelContext *context) {
    const struct qc_gpu_node *node = call->node;
    const struct qc_cuda_kernels *kernels = node->variant->cuda;
    size_t i = 0;
    while (i + 1 < kernels->launch_count && kernels->launches[i].max_rows &&
           call->rows > kernels->launches[i].max_rows)
        i++;
    call->launch = &kernels->launches[i];
    call->functions = node->functions[i];
    if (!call->launch->combine) return launch_on_device(call);
    const size_t bytes = (size_t)call->launch->splits * (size_t)call->rows *
                         (size_t)qc_summed_columns(node->op->spec) * sizeof(float);
    QC_TRY(allocate(call, context, bytes));
    OrtStatus *status = launch_on_device(call);
    OrtStatus *freed = QC_ORT(AllocatorFree)(node->allocator, call->pointers[QC_WORKSPACE]);
    return status ? status : freed;
}

/* As many rows as one call takes, a multiple of 16 so that all pointers stay aligned. */
static int64_t most_rows(const struct qc_gpu_node *node) {
    const struct qc_op_spec *spec = node->op->spec;
    const struct qc_cuda_kernels *kernels = node->variant->cuda;
    const int64_t blocks = kernels->launches[kernels->launch_count - 1].block_rows;
    const int64_t rows = min(MAX_CALL_ELEMENTS / max(spec->k, spec->n), QC_MAX_GRID_Y * blocks);
    return max(rows / QC_ALIGNMENT * QC_ALIGNMENT, 1);
}

static OrtStatus *gpu_compute(void *state, OrtKernelContext *context) {
    struct qc_call call = {.node = state};
    const struct qc_op *op = call.node->op;
    int64_t rows = 0;
    QC_TRY(bind(&call, context, &rows));
    const int64_t step = most_rows(call.node);
    for (int64_t row = 0; row < rows; row += step) {
        call.rows = (int32_t)min(step, rows - row);
        QC_TRY(qc_run_rows(&call, context));
        for (int argument = 0; argument < QC_ARGUMENTS; argument++)
            if (call.pointers[argument]) call.pointers[argument] += step * row_bytes(op, argument);
    }
    return NULL;
}

/* --- the anchors ------------------------------------------------------------------------------ */

static int64_t product_columns(const struct qc_op *op, size_t output) {
    return op->spec->widths[0] ? op->spec->widths[output] : op->spec->n;
}

/* q has the shape of x, s one value per row. */
static int64_t quantize_columns(const struct qc_op *op, size_t output) {
    return output == 0 ? op->spec->k : 1;
}

/* s, the last output of a norm, has one value per row. */
static int64_t norm_columns(const struct qc_op *op, size_t output) {
    return output + 1 == op->spec->anchor->output_count ? 1 : op->spec->k;
}

extern const struct qc_anchor qc_twin_product, qc_twin_quantize, qc_twin_norm;

#define GPU_OPS                                                                                    \
    .extra_type = ORT_FLOAT16, .provider = QC_PROVIDER, .create = qc_gpu_create,                      \
    .compute = gpu_compute, .destroy = qc_gpu_destroy

#define PRODUCT(bits, arguments_, inputs, on_host, ...)                                            \
    {                                                                                              \
        .input_types = (const int[]){__VA_ARGS__}, .input_count = inputs, .output_types = HALVES,  \
        .output_count = 1, .host_inputs = on_host, .weight_bits = bits, .twin = &qc_twin_product,  \
        .arguments = arguments_, .last_dimension = product_columns, GPU_OPS                        \
    }

#define QUANTIZE(type)                                                                             \
    {                                                                                              \
        .input_types = (const int[]){ORT_FLOAT16}, .input_count = 1,                               \
        .output_types = (const int[]){type, ORT_FLOAT}, .output_count = 2,                         \
        .arguments = (const uint8_t[]){QC_X, QC_Q, QC_S}, .twin = &qc_twin_quantize,               \
        .last_dimension = quantize_columns, GPU_OPS                                                \
    }

#define NORM(inputs, outputs, type, ...)                                                           \
    {                                                                                              \
        .input_types = HALVES, .input_count = inputs, .output_count = outputs,                     \
        .output_types = (const int[]){ORT_FLOAT16, ORT_FLOAT16, type, ORT_FLOAT} + 4 - outputs,    \
        .arguments = (const uint8_t[]){__VA_ARGS__, QC_Y, QC_Q, QC_S}, .twin = &qc_twin_norm,      \
        .last_dimension = norm_columns, GPU_OPS                                                    \
    }

static const uint8_t X_W_WS_Y[] = {QC_X, QC_W, QC_WS, QC_Y};
static const uint8_t X_W_WS_WZ_Y[] = {QC_X, QC_W, QC_WS, QC_WS, QC_Y}; /* wz is packed into ws */
static const uint8_t Q_S_W_WS_Y[] = {QC_Q, QC_S, QC_W, QC_WS, QC_Y};
static const int HALVES[QC_MAX_PARTS] = {ORT_FLOAT16, ORT_FLOAT16, ORT_FLOAT16, ORT_FLOAT16,
                                         ORT_FLOAT16, ORT_FLOAT16, ORT_FLOAT16, ORT_FLOAT16};

const struct qc_anchor qc_cuda_w4a16 =
    PRODUCT(4, X_W_WS_Y, 3, 6, ORT_FLOAT16, ORT_INT4, ORT_FLOAT16);
const struct qc_anchor qc_cuda_w4z4a16 =
    PRODUCT(4, X_W_WS_WZ_Y, 4, 14, ORT_FLOAT16, ORT_INT4, ORT_FLOAT16, ORT_INT4);
const struct qc_anchor qc_cuda_w8a8 =
    PRODUCT(8, Q_S_W_WS_Y, 4, 12, ORT_UINT8, ORT_FLOAT, ORT_INT8, ORT_FLOAT);
const struct qc_anchor qc_cuda_fp8 =
    PRODUCT(8, Q_S_W_WS_Y, 4, 12, ORT_FLOAT8E4M3FN, ORT_FLOAT, ORT_FLOAT8E4M3FN, ORT_FLOAT);
const struct qc_anchor qc_cuda_quantize = QUANTIZE(ORT_UINT8);
const struct qc_anchor qc_cuda_quantize_fp8 = QUANTIZE(ORT_FLOAT8E4M3FN);

#define NORMS(suffix, type)                                                                        \
    const struct qc_anchor qc_cuda_layer_norm##suffix =                                            \
        NORM(3, 3, type, QC_X, QC_GAMMA, QC_BETA);                                                 \
    const struct qc_anchor qc_cuda_add_layer_norm##suffix =                                        \
        NORM(4, 4, type, QC_A, QC_B, QC_GAMMA, QC_BETA, QC_X);                                     \
    const struct qc_anchor qc_cuda_rms_norm##suffix = NORM(2, 3, type, QC_X, QC_GAMMA);            \
    const struct qc_anchor qc_cuda_add_rms_norm##suffix =                                          \
        NORM(3, 4, type, QC_A, QC_B, QC_GAMMA, QC_X);

NORMS(, ORT_UINT8)
NORMS(_fp8, ORT_FLOAT8E4M3FN)
