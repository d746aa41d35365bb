/* Weights and their scales in the order that targets/cuda/packing.py describes: tiles of 16 columns,
 * 16 bytes for each of 32 lanes, as the kernels' mma instructions take them. */
#include <string.h>

#include "cuda_driver.h"

enum { TILE_COLUMNS = 16, TILE_BYTES = 512, COLUMN_MULTIPLE = 128, LANES = 32, STEPS_BYTES = 16 };

size_t qc_weight_input(const struct qc_anchor *anchor) {
    size_t input = 0;
    while (anchor->arguments[input] != QC_W) input++;
    return input;
}

int qc_has_zeros(const struct qc_anchor *anchor) {
    return anchor->weight_bits == 4 && anchor->input_count > qc_weight_input(anchor) + 2;
}

/* The one element of an initializer. */
static OrtStatus *constant_scalar(const struct qc_op *op, const OrtKernelInfo *info, size_t index,
                                  const char *name, size_t size, const void **data) {
    int is_constant = 0;
    const OrtValue *value = NULL;
    QC_TRY(QC_ORT(KernelInfoGetConstantInput_tensor)(info, index, &is_constant, &value));
    if (!is_constant) return qc_error(op, "input %s must be an initializer", name);
    QC_TRY(qc_check_elements(op, value, name, 1, size));
    return QC_ORT(GetTensorMutableData)((OrtValue *)value, (void **)data);
}

static OrtStatus *constant_steps(const struct qc_op *op, const OrtKernelInfo *info,
                                 struct qc_weights *weights) {
    const void *scale, *zero;
    QC_TRY(constant_scalar(op, info, 1, "s", sizeof(float), &scale));
    QC_TRY(constant_scalar(op, info, 2, "z", 1, &zero));
    weights->scale = *(const float *)scale;
    weights->zero = *(const uint8_t *)zero;
    if (!qc_makes_image(op->spec)) return NULL;
    QC_TRY(constant_scalar(op, info, 5, "t", sizeof(float), &scale));
    QC_TRY(constant_scalar(op, info, 6, "u", 1, &zero));
    weights->made_scale = *(const float *)scale;
    weights->made_zero = *(const uint8_t *)zero;
    return NULL;
}

OrtStatus *qc_constant_weights(const struct qc_op *op, const OrtKernelInfo *info,
                               struct qc_weights *weights) {
    const struct qc_op_spec *spec = op->spec;
    const size_t first = qc_weight_input(spec->anchor);
    struct qc_shape w_shape = {2, {spec->k, spec->n}}, ws_shape = {1, {spec->n}};
    if (spec->r) w_shape = (struct qc_shape){4, {spec->n, spec->k / spec->group, spec->r, spec->s}};
    if (spec->anchor->weight_bits == 4)
        ws_shape = (struct qc_shape){2, {(spec->k + spec->g - 1) / spec->g, spec->n}};
    QC_TRY(qc_constant_input(op, info, first, "w", &w_shape, (const void **)&weights->w));
    QC_TRY(qc_constant_input(op, info, first + 1, "ws", &ws_shape, &weights->ws));
    weights->wz = NULL;
    weights->scale = 1;
    weights->zero = 128;
    if (spec->r) QC_TRY(constant_steps(op, info, weights));
    if (!qc_has_zeros(spec->anchor)) return NULL;
    return qc_constant_input(op, info, first + 2, "wz", &ws_shape, (const void **)&weights->wz);
}

static int64_t first_channel(const struct qc_packing *packing, int64_t column) {
    const int64_t first = column / COLUMN_MULTIPLE * COLUMN_MULTIPLE / packing->columns_of_group;
    const int64_t natural = first * packing->channels / QC_CHANNEL_MULTIPLE * QC_CHANNEL_MULTIPLE;
    const int64_t most = packing->padded_channels - packing->met_channels;
    return natural < most ? natural : most;
}

/* The channels that any 128 columns meet; see channels_at_once in ir/dialect_image.py. */
static int64_t met_channels(const struct qc_op_spec *spec) {
    const int64_t given = spec->k / spec->group, made = spec->n / spec->group;
    int64_t most = 0;
    for (int64_t first = 0; first < spec->n; first += COLUMN_MULTIPLE) {
        const int64_t end = first + COLUMN_MULTIPLE < spec->n ? first + COLUMN_MULTIPLE : spec->n;
        const int64_t start = first / made * given / QC_CHANNEL_MULTIPLE * QC_CHANNEL_MULTIPLE;
        const int64_t met = qc_padded(((end - 1) / made + 1) * given, QC_CHANNEL_MULTIPLE) - start;
        if (met > most) most = met;
    }
    return most;
}

/* How a convolution lies, and how long its sums are. */
static void set_taps(struct qc_packing *packing, const struct qc_op_spec *spec) {
    packing->taps = spec->r * spec->s;
    packing->channels = spec->k / spec->group;
    packing->columns_of_group = spec->n / spec->group;
    packing->padded_channels = qc_padded(spec->k, QC_CHANNEL_MULTIPLE);
    packing->is_depthwise = spec->group > 1 && spec->group == spec->k && spec->k == spec->n;
    packing->met_channels = packing->is_depthwise ? 1 : met_channels(spec);
    packing->makes_image = qc_makes_image(spec);
    packing->k = packing->taps * packing->met_channels;
}

struct qc_packing qc_packing_of(const struct qc_op_spec *spec) {
    const int bits = spec->anchor->weight_bits, has_zeros = qc_has_zeros(spec->anchor);
    const int has_sums = spec->anchor->input_types[0] == ORT_UINT8;
    const int64_t size = has_sums ? 8 : bits == 8 ? 4 : has_zeros ? 3 : 2;
    struct qc_packing packing = {
        .bits = bits,
        .has_zeros = has_zeros,
        .has_sums = has_sums,
        .k = spec->k,
        .n = spec->n,
        .tile_depth = bits == 4 ? 64 : 32,
        .columns = qc_padded(spec->n, COLUMN_MULTIPLE),
        .groups = 1,
        .given_groups = 1,
        .record_bytes = TILE_COLUMNS * size,
    };
    if (spec->r) set_taps(&packing, spec);
    packing.depth = qc_padded(packing.k, packing.is_depthwise ? 4 : bits == 4 ? 64 : 128);
    if (bits == 4) {
        if (spec->g < spec->k) packing.groups = (packing.depth + spec->g - 1) / spec->g;
        packing.given_groups = (spec->k + spec->g - 1) / spec->g;
    }
    packing.weight_bytes = (size_t)(packing.columns * packing.depth * bits / 8);
    packing.scale_bytes = (size_t)(packing.groups * packing.columns * size);
    if (packing.makes_image) packing.scale_bytes += STEPS_BYTES;
    return packing;
}

/* The 4 bits of an int4, plus 8. */
static uint32_t four_bits(const uint8_t *values, int64_t index) {
    return (uint32_t)(values[index / 2] >> 4 * (index % 2) & 15) ^ 8;
}

/* Those of w[row, column]; 0 is stored as 8 beyond the edges. */
static uint32_t code(const struct qc_packing *packing, const uint8_t *w, int64_t row,
                     int64_t column) {
    if (row >= packing->k || column >= packing->n) return 8;
    return four_bits(w, row * packing->n + column);
}

static void pack_tile4(const struct qc_packing *packing, const uint8_t *w, int64_t row,
                       int64_t column, uint8_t *tile) {
    for (int lane = 0; lane < LANES; lane++)
        for (int step = 0; step < 4; step++) {
            uint32_t word = 0;
            for (int place = 0; place < 8; place++) {
                int half_column = place & 1, half_row = place >> 1 & 1, parity = place >> 2;
                int64_t k = row + step * 16 + half_row * 8 + lane % 4 * 2 + parity;
                word |= code(packing, w, k, column + half_column * 8 + lane / 4) << 4 * place;
            }
            for (int byte = 0; byte < 4; byte++)
                tile[lane * 16 + step * 4 + byte] = (uint8_t)(word >> 8 * byte);
        }
}

/* w[k, n], of 8 bits. */
static uint8_t byte_at(const struct qc_packing *packing, const uint8_t *w, int64_t k, int64_t n) {
    if (!packing->taps) return w[k * packing->n + n];
    if (packing->is_depthwise) return w[n * packing->taps + k];
    const int64_t tap = k / packing->met_channels;
    const int64_t group_begin = n / packing->columns_of_group * packing->channels;
    const int64_t channel = first_channel(packing, n) + k % packing->met_channels - group_begin;
    if (channel < 0 || channel >= packing->channels) return 0;
    return w[(n * packing->channels + channel) * packing->taps + tap];
}

static void pack_tile8(const struct qc_packing *packing, const uint8_t *w, int64_t row,
                       int64_t column, uint8_t *tile) {
    for (int lane = 0; lane < LANES; lane++)
        for (int byte = 0; byte < 16; byte++) {
            int half_column = byte >> 2 & 1, half_row = byte >> 3;
            int64_t k = row + half_row * 16 + lane % 4 * 4 + byte % 4;
            int64_t n = column + half_column * 8 + lane / 4;
            int is_inside = k < packing->k && n < packing->n;
            tile[lane * 16 + byte] = is_inside ? byte_at(packing, w, k, n) : 0;
        }
}

static void pack_depthwise(const struct qc_packing *packing, const uint8_t *w, uint8_t *packed) {
    memset(packed, 0, packing->weight_bytes);
    for (int64_t k = 0; k < packing->k; k++)
        for (int64_t n = 0; n < packing->n; n++)
            packed[(k / 4 * packing->columns + n) * 4 + k % 4] = byte_at(packing, w, k, n);
}

void qc_pack_weights(const struct qc_packing *packing, const struct qc_weights *weights,
                     uint8_t *packed) {
    if (packing->is_depthwise) {
        pack_depthwise(packing, weights->w, packed);
        return;
    }
    const int64_t tiles_down = packing->depth / packing->tile_depth;
    /* Along rows of w, in whose order it lies in memory, or in a file. */
    for (int64_t down = 0; down < tiles_down; down++)
        for (int64_t across = 0; across < packing->columns / TILE_COLUMNS; across++) {
            uint8_t *tile = packed + (across * tiles_down + down) * TILE_BYTES;
            int64_t row = down * packing->tile_depth, column = across * TILE_COLUMNS;
            (packing->bits == 4 ? pack_tile4 : pack_tile8)(packing, weights->w, row, column, tile);
        }
}

/* sums[column] = zero * sum_k w */
static void add_columns(const struct qc_packing *packing, const struct qc_weights *weights,
                        int32_t *sums) {
    for (int64_t k = 0; k < packing->k; k++)
        for (int64_t n = 0; n < packing->n; n++)
            sums[n] += weights->zero * (int8_t)byte_at(packing, weights->w, k, n);
}

void qc_pack_scales(const struct qc_packing *packing, const struct qc_weights *weights,
                    uint8_t *packed) {
    memset(packed, 0, packing->scale_bytes);
    if (packing->bits != 4) {
        for (int64_t n = 0; n < packing->n; n++)
            ((float *)packed)[n] = ((const float *)weights->ws)[n] * weights->scale;
        if (packing->has_sums)
            add_columns(packing, weights, (int32_t *)packed + packing->columns);
        if (packing->makes_image) {
            uint8_t *steps = packed + packing->scale_bytes - STEPS_BYTES;
            memcpy(steps, &weights->made_scale, 4);
            memcpy(steps + 4, &weights->made_zero, 4);
        }
        return;
    }
    const uint16_t *scales = weights->ws;
    for (int64_t group = 0; group < packing->given_groups; group++)
        for (int64_t n = 0; n < packing->n; n++) {
            const int64_t tile = n / TILE_COLUMNS, place = n % 8 * 2 + n % TILE_COLUMNS / 8;
            uint8_t *record = packed + (tile * packing->groups + group) * packing->record_bytes;
            const int64_t index = group * packing->n + n;
            memcpy(record + place * 2, &scales[index], 2);
            if (packing->has_zeros)
                record[TILE_COLUMNS * 2 + place] =
                    (uint8_t)(four_bits(weights->wz, index) << 4 * (place & 1));
        }
}
