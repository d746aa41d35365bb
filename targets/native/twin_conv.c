/* Convolutions of GPUs on the CPU, in plain C; see twins.c. */
#include <string.h>

#include "cuda_driver.h"
#include "half.h"

struct conv_run {
    const struct qc_op *op;
    struct qc_images images;
    struct qc_weights weights;
};

/* --- QuantizeImage ---------------------------------------------------------------------------- */

static uint8_t byte_of(uint16_t x, float scale, int zero) {
    /* NaN and what is far outside come to an end of the bytes. */
    const float bounded = fminf(fmaxf(qc_from_half(x) / scale, -512), 512);
    const long number = lrintf(bounded) + zero;
    return (uint8_t)(number < 0 ? 0 : number > 255 ? 255 : number);
}

/* One line of a stored image. */
static void image_task(void *argument, size_t index) {
    const struct conv_run *run = argument;
    const int64_t *given = run->images.given.dims, *made = run->images.made.dims;
    const int64_t *pads = run->op->spec->pads, image = (int64_t)index / made[1];
    const int64_t i = (int64_t)index % made[1] - pads[1];
    const float scale = *(const float *)run->images.scale;
    const uint8_t zero = *(const uint8_t *)run->images.zero;
    const uint16_t *x = run->images.data;
    uint8_t *q = (uint8_t *)run->images.result + (int64_t)index * made[2] * made[3];
    for (int64_t column = 0; column < made[2]; column++)
        for (int64_t c = 0; c < made[3]; c++) {
            const int64_t j = column - pads[2];
            const int is_inside = i >= 0 && i < given[2] && j >= 0 && j < given[3] && c < given[1];
            const int64_t at = ((image * given[1] + c) * given[2] + i) * given[3] + j;
            q[column * made[3] + c] = is_inside ? byte_of(x[at], scale, zero) : zero;
        }
}

static OrtStatus *image_compute(void *kernel, OrtKernelContext *context) {
    struct conv_run run = {.op = kernel};
    QC_TRY(qc_image_shapes(run.op, context, &run.images));
    const int64_t *made = run.images.made.dims, lines = made[0] * made[1];
    return lines && made[2] ? qc_parallel(context, image_task, (size_t)lines, &run) : NULL;
}

/* --- QConvW8A8 -------------------------------------------------------------------------------- */

/* sum_rsc (q - z) w of one result. */
static int32_t sum_of(const struct conv_run *run, int64_t n, const uint8_t *first) {
    const struct qc_op_spec *spec = run->op->spec;
    const int64_t *given = run->images.given.dims, taps = spec->r * spec->s;
    const int64_t channels = spec->k / spec->group, begin = n / (spec->n / spec->group) * channels;
    const int8_t *w = (const int8_t *)run->weights.w + n * channels * taps;
    int32_t sum = 0;
    for (int64_t r = 0; r < spec->r; r++)
        for (int64_t s = 0; s < spec->s; s++) {
            const int64_t pixel = r * spec->dilations[0] * given[2] + s * spec->dilations[1];
            for (int64_t c = 0; c < channels; c++)
                sum += (first[pixel * given[3] + begin + c] - run->weights.zero) *
                       w[c * taps + r * spec->s + s];
        }
    return sum;
}

static uint16_t finish(const struct conv_run *run, int64_t n, int64_t at, int32_t sum) {
    const struct qc_op_spec *spec = run->op->spec;
    const float scale = ((const float *)run->weights.ws)[n] * run->weights.scale;
    float value = (float)sum * scale, extras[QC_MAX_EXTRAS];
    for (size_t i = 0; spec->extras[i]; i++)
        extras[i] = qc_from_half(
            ((const uint16_t *)run->images.extras[i])[spec->extras[i] == 'T' ? at : n]);
    return qc_to_half(spec->epilogue ? spec->epilogue(value, extras) : value);
}

/* A result, in planes and in the image. */
static void store(const struct conv_run *run, int64_t n, int64_t pixel, int64_t at, uint16_t value) {
    const struct qc_images *images = &run->images;
    if (images->result) ((uint16_t *)images->result)[at] = value;
    if (!images->image) return;
    const int64_t *made = images->made.dims, *stored = images->stored.dims;
    const int64_t *pads = run->op->spec->pads, line = pixel / made[3] % made[2] + pads[1];
    const int64_t image = pixel / made[3] / made[2], column = pixel % made[3] + pads[2];
    ((uint8_t *)images->image)[((image * stored[1] + line) * stored[2] + column) * stored[3] + n] =
        byte_of(value, run->weights.made_scale, run->weights.made_zero);
}

/* One line of a plane of the results. */
static void conv_task(void *argument, size_t index) {
    const struct conv_run *run = argument;
    const struct qc_op_spec *spec = run->op->spec;
    const int64_t *given = run->images.given.dims, *made = run->images.made.dims;
    const int64_t line = (int64_t)index % made[2], plane = (int64_t)index / made[2];
    const int64_t n = plane % spec->n, image = plane / spec->n;
    const int64_t above = image * given[1] + line * spec->strides[0];
    for (int64_t column = 0; column < made[3]; column++) {
        const int64_t first = above * given[2] + column * spec->strides[1];
        const int64_t at = (int64_t)index * made[3] + column;
        const int32_t sum = sum_of(run, n, (const uint8_t *)run->images.data + first * given[3]);
        const int64_t pixel = (image * made[2] + line) * made[3] + column;
        store(run, n, pixel, at, finish(run, n, at, sum));
    }
}

static OrtStatus *conv_compute(void *kernel, OrtKernelContext *context) {
    struct conv_run run = {.op = kernel};
    const OrtValue *value;
    const void *scale, *zero;
    QC_TRY(qc_conv_shapes(run.op, context, &run.images));
    QC_TRY(qc_input(context, 1, &value, &scale));
    QC_TRY(qc_input(context, 2, &value, &zero));
    QC_TRY(qc_input(context, 3, &value, (const void **)&run.weights.w));
    QC_TRY(qc_input(context, 4, &value, &run.weights.ws));
    run.weights.scale = *(const float *)scale;
    run.weights.zero = *(const uint8_t *)zero;
    if (run.images.image) {
        QC_TRY(qc_input(context, 5, &value, &scale));
        QC_TRY(qc_input(context, 6, &value, &zero));
        run.weights.made_scale = *(const float *)scale;
        run.weights.made_zero = *(const uint8_t *)zero;
        const int64_t *stored = run.images.stored.dims;
        memset(run.images.image, run.weights.made_zero,
               (size_t)(stored[0] * stored[1] * stored[2] * stored[3]));
    }
    const int64_t *made = run.images.made.dims, lines = made[0] * made[1] * made[2];
    return lines && made[3] ? qc_parallel(context, conv_task, (size_t)lines, &run) : NULL;
}

const struct qc_anchor qc_twin_image = {
    .create = qc_twin_create, .compute = image_compute, .destroy = qc_twin_destroy};
const struct qc_anchor qc_twin_conv = {
    .create = qc_twin_create, .compute = conv_compute, .destroy = qc_twin_destroy};
