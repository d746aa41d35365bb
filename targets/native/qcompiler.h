/* What the files of the library share: the generated table of ops (kernels.c), the anchors that run
 * them (quantize.c, norm.c, qmatmul.c; cuda.c, twins.c), what this machine can run (x86.c; cuda.c) and
 * access to ONNX Runtime. */
#ifndef QCOMPILER_H
#define QCOMPILER_H

#include "ort_abi.h"

enum { QC_MAX_RANK = 16, QC_MAX_EXTRAS = 8, QC_MAX_PARTS = 8 };

struct qc_variant;

/* --- kernels: pure, serial, one range of the work per call ----------------------------------- */

struct qc_quantize_args {
    const float *x;
    const float *smoothing; /* what its columns are multiplied by first; NULL: nothing */
    uint8_t *q;
    float *s;
    int32_t rows, x_stride; /* floats from one row of x to the next, which may overlap */
};

/* x is an input, or with a residual the sum a + b; what a region does not have is NULL. */
struct qc_norm_args {
    const float *a, *b, *gamma, *beta, *smoothing;
    float *x, *y;
    uint8_t *q;
    float *s;
    int32_t rows;
};

/* What activations that were split lack, by tile: see x86/activations.py. */
struct qc_excess {
    const int32_t *counts;
    const uint16_t *groups;
    const int32_t *values;
};

struct qc_qmatmul_args {
    const uint8_t *q;
    const float *s;
    const int8_t *weights;
    const int32_t *init; /* where sums start: of each column, or row where rows are split */
    const float *ws;
    struct qc_excess excess; /* where rows are split */
    const int32_t *offsets, *column_sums; /* where split rows have centres: z less those; sum_k w */
    const int32_t *row_sums, *wz; /* U8U8: sum_k (q - z) per row; zero points of w less 128 */
    const float *extra[QC_MAX_EXTRAS];
    void *y; /* float or uint8_t, as the op's results are */
    int32_t rows, panel_begin, panel_end;
    int32_t y_columns, y_first; /* of the result that `y` is: its width, its first column */
};

/* Strides count floats from row to row; mask_step is 0 for a mask with one value per row. */
struct qc_attention_args {
    const float *q, *k, *v, *mask;
    float *y;
    int32_t q_stride, k_stride, v_stride, y_stride, mask_row_stride, mask_step;
    int32_t rows, keys, zero_empty;
    float scale;
};

struct qc_isa {
    const char *name;
    int (*is_available)(void);
    const struct qc_isa *includes; /* what a CPU that has it has too, for ops without kernels for it */
    /* Whether the GPU of this number, or with QC_ANY_DEVICE any, runs this kernel too; NULL: yes. */
    int (*fits)(const struct qc_variant *, int device);
    /* w [k, n] to panels of `vectors` * 16 columns; init[column] = -128 * sum_k w. */
    void (*pack_w8)(const int8_t *w, int64_t k, int64_t n, int vectors, int8_t *packed,
                    int32_t *init);
};

/* Whether the CPU has these instructions, and all that such kernels use, and the system saves its
 * registers: cpu.c. */
int qc_has_avx2(void), qc_has_avx_vnni(void), qc_has_avx512_vnni(void), qc_has_avx512_bf16(void);
/* Whether ONNX Runtime's sums of products of uint8 and int8 do: on x86 without VNNI. */
int qc_sums_saturate(void);

extern const struct qc_isa qc_avx512_bf16, qc_avx512_vnni, qc_avx_vnni, qc_avx2;
extern const struct qc_isa qc_sm_90a, qc_sm_89, qc_sm_80;

/* All that a library of this architecture may have kernels for, in order of preference; NULL ends. */
extern const struct qc_isa *const qc_all_isa[];
/* Whether this machine has it and `only`, a name, "none" or "", allows it: as if the machine had the
 * one named and what that includes. */
int qc_is_allowed(const struct qc_isa *isa, const char *only);
enum { QC_ANY_DEVICE = -1 };
/* Says, once, why `missing` of `all` ops are not registered for that GPU, or for any, where that would
 * surprise. */
void qc_tell_missing(size_t missing, size_t all, int device);

/* sums[row] = sum_k (q - z) of q [rows, k]; for processors that have any of the instruction sets. */
void qc_sum_rows(const uint8_t *q, int64_t rows, int64_t k, uint8_t z, int32_t *sums);

/* One kernel of an op, compiled for one instruction set. */
struct qc_variant {
    const struct qc_isa *isa;
    void (*quantize)(const struct qc_quantize_args *);
    void (*norm)(const struct qc_norm_args *);
    void (*qmatmul)(const struct qc_qmatmul_args *);
    void (*attention)(const struct qc_attention_args *);
    int tile_rows, tile_vectors;
    int most_lacking; /* of split rows, see split_rows.c; 0: it reads activations as they are */
    int chunk, chunks; /* of int4 weights: elements that are added up as integers, and how many so */
    int block_rows; /* the most rows of one call of attention */
    const struct qc_cuda_kernels *cuda;
};

/* --- ops: the generated table ---------------------------------------------------------------- */

struct qc_op;

/* A family of ops that differ in sizes and epilogue. */
struct qc_anchor {
    const int *input_types;
    size_t input_count; /* without extra operands */
    int extra_type; /* of those; 0: float */
    const int *output_types;
    size_t output_count;
    const char *provider; /* NULL: the CPU */
    unsigned host_inputs; /* bit i: input i lies in host memory whatever the provider */
    const struct qc_anchor *twin; /* the same op on the CPU, where `provider` is another */
    const uint8_t *arguments; /* of kernels for GPUs: which each input is, then each output */
    int weight_bits;
    OrtStatus *(*create)(const struct qc_op *, const OrtKernelInfo *, void **kernel);
    OrtStatus *(*compute)(void *kernel, OrtKernelContext *);
    void (*destroy)(void *kernel);
    /* The last dimension of the anchor's output `i`; the others are those of input 0.
     * NULL if shapes are not inferred. */
    int64_t (*last_dimension)(const struct qc_op *, size_t i);
    /* The dimension before it, of that of input 0; NULL: the same. */
    int64_t (*rows)(const struct qc_op *, int64_t rows);
};

extern const struct qc_anchor qc_quantize;
extern const struct qc_anchor qc_qmatmul_w8a8, qc_qmatmul_u8s8, qc_qmatmul_u8u8;
extern const struct qc_anchor qc_dynamic_qmatmul_w8a8, qc_windowed_qmatmul_w8a8;
extern const struct qc_anchor qc_requantized_qmatmul_w8a8;
extern const struct qc_anchor qc_qmatmul_w4a8, qc_qmatmul_w4s8a8;
extern const struct qc_anchor qc_requantized_qmatmul_w4a8, qc_requantized_qmatmul_w4s8a8;
extern const struct qc_anchor qc_group_sums;
extern const struct qc_anchor qc_attention, qc_masked_attention;
extern const struct qc_anchor qc_layer_norm, qc_add_layer_norm, qc_rms_norm, qc_add_rms_norm;

struct qc_op_spec {
    const char *name;
    const struct qc_anchor *anchor;
    int64_t k, n, d, g;
    int64_t r, s, strides[2], dilations[2]; /* of a convolution: its taps, down and across */
                                            /* of windows: r rows each, s from one to the next */
    int64_t group; /* of a convolution: how many there are */
    int64_t pads[8]; /* of an image, as ONNX's Pad has them; of windows: rows before and behind x */
    const char *form;   /* the region's flags */
    const char *extras; /* a letter per extra operand: C per channel, T same shape as the result,
                         * R its last dimensions, the same for all others */
    const char *outputs; /* a digit per output: which of the anchor's it is */
    int result_type; /* of every output; 0: the anchor's */
    const int64_t *widths; /* columns of each result, ends with 0; empty for a single result */
    const struct qc_variant *variants; /* in order of preference */
    size_t variant_count;
    float (*epilogue)(float anchor, const float *extras); /* of twins; NULL: none */
    float epsilon; /* the same, of norms */
};

extern const char qc_domain[];
extern const struct qc_op_spec qc_specs[];
extern const size_t qc_spec_count;

/* A spec and the variant chosen for this machine or GPU, as ONNX Runtime sees it. */
struct qc_op {
    OrtCustomOp base;
    const struct qc_op_spec *spec;
    const struct qc_variant *variant; /* of an op for a GPU the best of any; a session's may be another */
    const struct qc_anchor *anchor; /* that of the spec, or its twin */
    const char *only; /* QCOMPILER_ISA as it was when the op was registered; empty: none */
};

/* --- ONNX Runtime ---------------------------------------------------------------------------- */

struct qc_shape {
    size_t rank;
    int64_t dims[QC_MAX_RANK];
};

/* Entry `name` of the API table. */
#define QC_ORT(name) ((qc_ort_##name)qc_api[QC_ORT_INDEX_##name])
#define QC_ORT_DECLARE(index, name, result, ...)                                                   \
    typedef result (*qc_ort_##name)(__VA_ARGS__);                                                  \
    enum { QC_ORT_INDEX_##name = index };
QC_ORT_API(QC_ORT_DECLARE)
QC_ORT_API_24(QC_ORT_DECLARE)
extern void *const *qc_api;
extern int qc_has_api_24;

/* Returns from the caller with the status of `call`, unless that is success. */
#define QC_TRY(call)                                                                               \
    do {                                                                                           \
        OrtStatus *status_ = (call);                                                               \
        if (status_) return status_;                                                               \
    } while (0)

/* A status "<op>: <message>". */
OrtStatus *qc_error(const struct qc_op *op, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
/* "[2, 128, 384]" into `text`. */
const char *qc_shape_text(const struct qc_shape *shape, char text[static 256]);

OrtStatus *qc_tensor_shape(const struct qc_op *op, const OrtValue *value, struct qc_shape *shape);
OrtStatus *qc_input(const OrtKernelContext *context, size_t index, const OrtValue **value,
                    const void **data);
/* The data of an input of this many float32, unless it is known already. */
OrtStatus *qc_floats(const struct qc_op *op, const OrtKernelContext *context, size_t index,
                     const char *name, int64_t elements, const float **data);
/* The same of an initializer, which spares every run the asking; NULL if it is none. */
OrtStatus *qc_constant_floats(const struct qc_op *op, const OrtKernelInfo *info, size_t index,
                              const char *name, int64_t elements, const float **data);
/* The data of an input that must be an initializer with these dimensions. */
OrtStatus *qc_constant_input(const struct qc_op *op, const OrtKernelInfo *info, size_t index,
                             const char *name, const struct qc_shape *expected, const void **data);
OrtStatus *qc_output(OrtKernelContext *context, size_t index, const struct qc_shape *shape,
                     void **data);
/* The type of output `i` of the op. */
int qc_output_type(const struct qc_op *op, size_t i);
/* Which of the anchor's outputs is output `i` of the op. */
size_t qc_output_index(const struct qc_op *op, size_t i);
/* An error unless the input holds this many float32. */
OrtStatus *qc_check_floats(const struct qc_op *op, const OrtValue *value, const char *input,
                           int64_t elements);
/* The same for elements of `size` bytes. */
OrtStatus *qc_check_elements(const struct qc_op *op, const OrtValue *value, const char *input,
                             int64_t elements, size_t size);
/* The number of rows: the product of all dimensions but the last, which must be k. */
OrtStatus *qc_row_count(const struct qc_op *op, const struct qc_shape *shape, const char *input,
                        int64_t *rows);

/* Quantizes rows of k; one of NaN, with nothing else above the least magnitude, by a scale of NaN. */
void qc_quantize_block(const struct qc_variant *variant, const struct qc_quantize_args *args, int64_t k);
/* Whether a row was so small, or all NaN, that it has the least scale of all. */
int qc_has_least_scale(float s);

/* Runs task(argument, 0 .. count - 1) on the session's threads; a single task runs right here. */
OrtStatus *qc_parallel(OrtKernelContext *context, void (*task)(void *, size_t), size_t count,
                       void *argument);
/* How many tasks work of `nanoseconds` is worth: a power of two, to share out evenly among threads,
 * of at least 1 us each. */
int64_t qc_task_count(double nanoseconds);

#endif
