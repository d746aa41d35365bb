/* The CUDA driver, found when the library is registered, and the kernels it loads. */
#ifndef CUDA_DRIVER_H
#define CUDA_DRIVER_H

#include <string.h>

#include "qcompiler.h"

/* What a kernel takes, by number in the generated table; see targets/cuda/launch.py. */
enum {
    QC_X, QC_Q, QC_S, QC_W, QC_WS, QC_Y, QC_WORKSPACE, QC_ROWS, QC_A, QC_B, QC_GAMMA, QC_BETA,
    QC_Z, QC_HEIGHT, QC_WIDTH, QC_MADE,
    QC_EXTRA0,
    QC_Y0 = QC_EXTRA0 + QC_MAX_EXTRAS, /* the first of several results */
    QC_ARGUMENTS = QC_Y0 + QC_MAX_PARTS,
    QC_END = 255,
};

/* One kernel of a region and when it runs. */
struct qc_launch {
    const char *symbol;
    int64_t max_rows; /* 0: any */
    unsigned threads, shared_bytes, block_rows, block_columns, splits;
    const uint8_t *arguments; /* QC_END ends */
    const char *combine; /* NULL: none */
    const uint8_t *combine_arguments;
};

/* A region's machine code for one architecture. */
struct qc_cuda_kernels {
    const unsigned char *cubin;
    const struct qc_launch *launches; /* in order of max_rows */
    size_t launch_count;
};

/* Columns of what an op makes. */
static inline int64_t qc_columns(const struct qc_op_spec *spec) {
    return spec->n ? spec->n : spec->k;
}

enum { QC_CHANNEL_MULTIPLE = 16 }; /* of a stored image */

static inline int64_t qc_padded(int64_t size, int64_t multiple) {
    return (size + multiple - 1) / multiple * multiple;
}

/* Whether a convolution stores its result as an image. */
static inline int qc_makes_image(const struct qc_op_spec *spec) {
    return spec->r && strchr(spec->outputs, '1');
}

/* Columns of what parts of K leave in a workspace. */
static inline int64_t qc_summed_columns(const struct qc_op_spec *spec) {
    return qc_makes_image(spec) ? qc_padded(spec->n, QC_CHANNEL_MULTIPLE) : qc_columns(spec);
}

/* The CUDA of the compiler that made the cubins: 13000 is 13.0. */
extern const int qc_cuda_version;

/* How a region's weights lie in device memory; see targets/cuda/packing.py. */
struct qc_packing {
    int bits;
    int has_zeros; /* of groups of 4 bits */
    int has_sums; /* of columns of 8 bits, because activations are not centred */
    int64_t k, n, tile_depth, columns, depth, groups, given_groups, record_bytes;
    /* Of a convolution, whose k has taps of as many channels as 128 columns meet: */
    int64_t channels, columns_of_group; /* of one group */
    int64_t padded_channels, met_channels, taps;
    int is_depthwise, makes_image;
    size_t weight_bytes, scale_bytes;
};

/* The constants of a product on the host. */
struct qc_weights {
    const uint8_t *w; /* [k, n], 4 bits two to a byte; of a convolution [n, channels of a group, taps] */
    const void *ws; /* [given_groups, n] of float16 with 4 bits, else [n] of float32 */
    const uint8_t *wz; /* [given_groups, n], two to a byte; NULL: none */
    float scale; /* of what 8 bits are multiplied by, where it is a constant, else 1 */
    int zero; /* its zero point */
    float made_scale; /* of a result that is stored as an image */
    int made_zero;
};

/* Which input w is; ws and wz follow. */
size_t qc_weight_input(const struct qc_anchor *anchor);
int qc_has_zeros(const struct qc_anchor *anchor);
/* The inputs w, ws and wz, which must be initializers of the right shapes. */
OrtStatus *qc_constant_weights(const struct qc_op *op, const OrtKernelInfo *info,
                               struct qc_weights *weights);
struct qc_packing qc_packing_of(const struct qc_op_spec *spec);
void qc_pack_weights(const struct qc_packing *packing, const struct qc_weights *weights,
                     uint8_t *packed);
void qc_pack_scales(const struct qc_packing *packing, const struct qc_weights *weights,
                    uint8_t *packed);

/* Of a twin, which keeps nothing per node. */
OrtStatus *qc_twin_create(const struct qc_op *op, const OrtKernelInfo *info, void **kernel);
void qc_twin_destroy(void *kernel);

/* Images that a call reads and makes, and what else it reads of the activations. */
struct qc_images {
    struct qc_shape given, made, stored; /* the last of a result that is stored as an image */
    const void *data, *scale, *zero, *extras[QC_MAX_EXTRAS];
    void *result, *image; /* NULL where it is not made */
};

/* The operands of QuantizeImage and QConvW8A8, of the right shapes, and their result. */
OrtStatus *qc_image_shapes(const struct qc_op *op, OrtKernelContext *context, struct qc_images *images);
OrtStatus *qc_conv_shapes(const struct qc_op *op, OrtKernelContext *context, struct qc_images *images);

/* --- the driver ------------------------------------------------------------------------------- */

typedef unsigned long long qc_pointer; /* CUdeviceptr */
typedef void *qc_function, *qc_module, *qc_context;

/* X(name, symbol, parameters...); all return 0 or a CUresult. */
#define QC_CUDA_DRIVER(X)                                                                          \
    X(init, cuInit, unsigned)                                                                      \
    X(version, cuDriverGetVersion, int *)                                                          \
    X(error_name, cuGetErrorName, int, const char **)                                              \
    X(error_text, cuGetErrorString, int, const char **)                                            \
    X(device_count, cuDeviceGetCount, int *)                                                       \
    X(device, cuDeviceGet, int *, int)                                                             \
    X(device_name, cuDeviceGetName, char *, int, int)                                              \
    X(device_attribute, cuDeviceGetAttribute, int *, int, int)                                     \
    X(retain_context, cuDevicePrimaryCtxRetain, qc_context *, int)                                 \
    X(current_context, cuCtxGetCurrent, qc_context *)                                              \
    X(push_context, cuCtxPushCurrent_v2, qc_context)                                               \
    X(pop_context, cuCtxPopCurrent_v2, qc_context *)                                               \
    X(load_module, cuModuleLoadData, qc_module *, const void *)                                    \
    X(find_function, cuModuleGetFunction, qc_function *, qc_module, const char *)                  \
    X(set_attribute, cuFuncSetAttribute, qc_function, int, int)                                    \
    X(launch, cuLaunchKernel, qc_function, unsigned, unsigned, unsigned, unsigned, unsigned,       \
      unsigned, unsigned, void *, void **, void **)                                                \
    X(allocate, cuMemAlloc_v2, qc_pointer *, size_t)                                               \
    X(free, cuMemFree_v2, qc_pointer)                                                              \
    X(upload, cuMemcpyHtoD_v2, qc_pointer, const void *, size_t)                                   \
    X(wait, cuStreamSynchronize, void *)                                                           \
    X(free_memory, cuMemGetInfo_v2, size_t *, size_t *)

#define QC_CUDA_MEMBER(name, symbol, ...) int (*name)(__VA_ARGS__);
struct qc_driver {
    QC_CUDA_DRIVER(QC_CUDA_MEMBER)
};
extern struct qc_driver qc_driver;

struct qc_device {
    int ordinal, major, minor, shared_bytes; /* shared memory that a block may ask for */
    char name[64];
    qc_context context; /* the one that ONNX Runtime uses too; NULL until a session does */
    struct qc_loaded *loaded;
};

/* NULL where no such device can be used. */
struct qc_device *qc_find_device(int ordinal);
/* Why there is none at all; empty if there is one. */
const char *qc_device_problem(void);
/* What a process should do that was forked from one that had opened the driver; NULL of others. */
const char *qc_fork_problem(void);
/* "T4 has compute capability 7.5, and kernels need 8.0 or newer". */
void qc_explain(const struct qc_device *device, char *text, size_t size);
/* Guard what is made once. */
void qc_lock(void), qc_unlock(void);
/* Whether the device runs the kernels of a variant. */
int qc_device_runs(const struct qc_device *device, const struct qc_variant *variant);

/* Makes the device's context current; to be undone by qc_leave, if that succeeds. */
OrtStatus *qc_enter(const struct qc_op *op, struct qc_device *device);
void qc_leave(void);
/* The kernels of a variant on the device whose context is current; loaded once. */
OrtStatus *qc_load(const struct qc_op *op, struct qc_device *device,
                   const struct qc_variant *variant, qc_module *module);

/* An error unless `result` is 0: "<op>: <message>: CUDA_ERROR_OUT_OF_MEMORY (out of memory)". */
OrtStatus *qc_cuda_check(const struct qc_op *op, int result, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

#endif
