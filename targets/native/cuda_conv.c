/* Convolutions on NVIDIA GPUs: QuantizeImage stores images with their border and channels last, and
 * QConvW8A8 multiplies them.  Rows are pixels of what is made; a call has as many whole images as its
 * grid and indices take, and one at least. */
#include <string.h>

#include "cuda_node.h"

/* Of one call: blocks count beyond its last row. */
static const int64_t MAX_NUMBER = INT32_MAX - QC_TALL_BLOCKS * 128;

static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

/* How many images of so many rows one call takes; `numbers` is the most that it counts of each. */
static OrtStatus *images_of_call(const struct qc_gpu_node *node, int64_t rows, int64_t numbers,
                                 int64_t *images) {
    const struct qc_cuda_kernels *kernels = node->variant->cuda;
    const int64_t blocks = kernels->launches[kernels->launch_count - 1].block_rows;
    /* One image may have more pixels than a grid has blocks of in y. */
    *images = min(max(QC_MAX_GRID_Y * blocks / rows, 1), MAX_NUMBER / max(numbers, rows));
    if (*images) return NULL;
    return qc_error(node->op,
                    "an image of %lld pixels, of which %lld numbers are counted, is too large for "
                    "kernels; at most %lld are supported: cut the image, or set QCOMPILER_ISA=none to "
                    "run function bodies",
                    (long long)rows, (long long)numbers, (long long)MAX_NUMBER);
}

/* --- QuantizeImage ---------------------------------------------------------------------------- */

OrtStatus *qc_image_shapes(const struct qc_op *op, OrtKernelContext *context, struct qc_images *images) {
    const struct qc_op_spec *spec = op->spec;
    const OrtValue *value;
    char text[256];
    QC_TRY(qc_input(context, 0, &value, &images->data));
    QC_TRY(qc_tensor_shape(op, value, &images->given));
    const int64_t *dims = images->given.dims;
    if (images->given.rank != 4 || dims[1] != spec->k)
        return qc_error(op, "input x has shape %s; it must be [images, %lld, height, width]",
                        qc_shape_text(&images->given, text), (long long)spec->k);
    QC_TRY(qc_input(context, 1, &value, &images->scale));
    QC_TRY(qc_check_elements(op, value, "s", 1, sizeof(float)));
    QC_TRY(qc_input(context, 2, &value, &images->zero));
    QC_TRY(qc_check_elements(op, value, "z", 1, 1));
    const int64_t *pads = spec->pads;
    images->made = (struct qc_shape){
        4, {dims[0], dims[2] + pads[1] + pads[5], dims[3] + pads[2] + pads[6], spec->k + pads[7]}};
    return qc_output(context, 0, &images->made, &images->result);
}

static OrtStatus *image_compute(void *state, OrtKernelContext *context) {
    struct qc_call call = {.node = state};
    struct qc_images images;
    int64_t step;
    QC_TRY(qc_image_shapes(call.node->op, context, &images));
    QC_TRY(QC_ORT(KernelContext_GetGPUComputeStream)(context, &call.stream));
    const int64_t *given = images.given.dims, *made = images.made.dims;
    const int64_t pixels = made[1] * made[2];
    if (made[0] * pixels == 0) return NULL;
    QC_TRY(images_of_call(call.node, pixels, pixels, &step));
    call.height = (int32_t)given[2];
    call.width = (int32_t)given[3];
    call.pointers[QC_S] = (char *)(uintptr_t)images.scale;
    call.pointers[QC_Z] = (char *)(uintptr_t)images.zero;
    for (int64_t image = 0; image < made[0]; image += step) {
        call.pointers[QC_X] = (char *)(uintptr_t)images.data + image * given[1] * given[2] * given[3] * 2;
        call.pointers[QC_Q] = (char *)images.result + image * pixels * made[3];
        call.rows = (int32_t)(min(step, made[0] - image) * pixels);
        QC_TRY(qc_run_rows(&call, context));
    }
    return NULL;
}

/* --- QConvW8A8 -------------------------------------------------------------------------------- */

static int64_t result_size(int64_t size, int64_t taps, int64_t dilation, int64_t stride) {
    const int64_t span = (taps - 1) * dilation + 1;
    return size < span ? -1 : (size - span) / stride + 1;
}

OrtStatus *qc_conv_shapes(const struct qc_op *op, OrtKernelContext *context, struct qc_images *images) {
    const struct qc_op_spec *spec = op->spec;
    const int64_t channels = qc_padded(spec->k, QC_CHANNEL_MULTIPLE);
    const OrtValue *value;
    char text[256];
    QC_TRY(qc_input(context, 0, &value, &images->data));
    QC_TRY(qc_tensor_shape(op, value, &images->given));
    const int64_t *dims = images->given.dims;
    if (images->given.rank != 4 || dims[3] != channels)
        return qc_error(op, "input q has shape %s; it must be [images, height, width, %lld]",
                        qc_shape_text(&images->given, text), (long long)channels);
    const int64_t height = result_size(dims[1], spec->r, spec->dilations[0], spec->strides[0]);
    const int64_t width = result_size(dims[2], spec->s, spec->dilations[1], spec->strides[1]);
    if (height < 0 || width < 0)
        return qc_error(op, "input q has shape %s; its images are smaller than the kernel",
                        qc_shape_text(&images->given, text));
    images->made = (struct qc_shape){4, {dims[0], spec->n, height, width}};
    const int64_t *pads = spec->pads;
    images->stored = (struct qc_shape){
        4, {dims[0], height + pads[1] + pads[5], width + pads[2] + pads[6], spec->n + pads[7]}};
    for (size_t i = 0; spec->extras[i]; i++) {
        const char name[] = {'e', 'x', 't', 'r', 'a', (char)('0' + i), 0};
        const int64_t pixels = spec->extras[i] == 'T' ? dims[0] * height * width : 1;
        QC_TRY(qc_input(context, op->spec->anchor->input_count + i, &value, &images->extras[i]));
        QC_TRY(qc_check_elements(op, value, name, pixels * spec->n, 2));
    }
    images->result = images->image = NULL;
    for (size_t i = 0; spec->outputs[i]; i++) {
        const int is_image = qc_output_index(op, i) == 1;
        QC_TRY(qc_output(context, i, is_image ? &images->stored : &images->made,
                         is_image ? &images->image : &images->result));
    }
    return NULL;
}

static OrtStatus *check_alignment(const struct qc_op *op, const void *data) {
    if ((uintptr_t)data % QC_ALIGNMENT == 0) return NULL;
    return qc_error(op, "input q lies at %p; its address must be a multiple of %d", data,
                    QC_ALIGNMENT);
}

static OrtStatus *conv_compute(void *state, OrtKernelContext *context) {
    struct qc_call call = {.node = state};
    const struct qc_op_spec *spec = call.node->op->spec;
    struct qc_images images;
    int64_t step;
    QC_TRY(qc_conv_shapes(call.node->op, context, &images));
    QC_TRY(QC_ORT(KernelContext_GetGPUComputeStream)(context, &call.stream));
    const int64_t *given = images.given.dims, *made = images.made.dims;
    const int64_t pixels = made[2] * made[3], stored = given[1] * given[2] * given[3];
    if (made[0] * pixels == 0) return NULL;
    QC_TRY(check_alignment(call.node->op, images.data));
    /* Kernels count 16 bytes of images, and elements of the workspace. */
    const int64_t results = pixels * spec->n, parts = stored / QC_ALIGNMENT;
    const int64_t summed = pixels * qc_summed_columns(spec);
    const int64_t image_bytes = images.stored.dims[1] * images.stored.dims[2] * images.stored.dims[3];
    QC_TRY(images_of_call(call.node, pixels, summed > parts ? summed : parts, &step));
    call.height = (int32_t)given[1];
    call.width = (int32_t)given[2];
    call.pointers[QC_W] = (char *)(uintptr_t)call.node->weights;
    call.pointers[QC_WS] = (char *)(uintptr_t)call.node->scales;
    for (int64_t image = 0; image < made[0]; image += step) {
        const int64_t offset = image * results * 2;
        call.pointers[QC_Q] = (char *)(uintptr_t)images.data + image * stored;
        if (images.result) call.pointers[QC_Y] = (char *)images.result + offset;
        if (images.image) call.pointers[QC_MADE] = (char *)images.image + image * image_bytes;
        for (size_t i = 0; spec->extras[i]; i++)
            call.pointers[QC_EXTRA0 + i] =
                (char *)(uintptr_t)images.extras[i] + (spec->extras[i] == 'T' ? offset : 0);
        call.rows = (int32_t)(min(step, made[0] - image) * pixels);
        QC_TRY(qc_run_rows(&call, context));
    }
    return NULL;
}

extern const struct qc_anchor qc_twin_image, qc_twin_conv;

static const int BYTES[] = {ORT_UINT8}, HALF_AND_BYTES[] = {ORT_FLOAT16, ORT_UINT8};

const struct qc_anchor qc_cuda_image = {
    .input_types = (const int[]){ORT_FLOAT16, ORT_FLOAT, ORT_UINT8},
    .input_count = 3,
    .output_types = BYTES,
    .output_count = 1,
    .provider = QC_PROVIDER,
    .twin = &qc_twin_image,
    .arguments = (const uint8_t[]){QC_X, QC_S, QC_Z, QC_Q},
    .create = qc_gpu_create,
    .compute = image_compute,
    .destroy = qc_gpu_destroy,
};

#define CONV(inputs, outputs, ...)                                                                 \
    {                                                                                              \
        .input_types = (const int[]){ORT_UINT8, ORT_FLOAT, ORT_UINT8, ORT_INT8, ORT_FLOAT,         \
                                     ORT_FLOAT, ORT_UINT8},                                        \
        .input_count = inputs, .extra_type = ORT_FLOAT16, .output_types = HALF_AND_BYTES,          \
        .output_count = outputs, .provider = QC_PROVIDER,                                          \
        .host_inputs = (1u << inputs) - 2, /* all but q */                                         \
        .twin = &qc_twin_conv, .arguments = (const uint8_t[]){__VA_ARGS__}, .weight_bits = 8,      \
        .create = qc_gpu_create, .compute = conv_compute, .destroy = qc_gpu_destroy                \
    }

const struct qc_anchor qc_cuda_conv = CONV(5, 1, QC_Q, QC_S, QC_Z, QC_W, QC_WS, QC_Y);
const struct qc_anchor qc_cuda_conv_image =
    CONV(7, 2, QC_Q, QC_S, QC_Z, QC_W, QC_WS, QC_END, QC_END, QC_Y, QC_MADE);
