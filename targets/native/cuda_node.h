/* A node of a session: its kernels on a device, and its weights there. */
#ifndef CUDA_NODE_H
#define CUDA_NODE_H

#include "cuda_driver.h"

struct qc_functions {
    qc_function kernel, combine;
};

/* A node of a session. */
struct qc_gpu_node {
    const struct qc_op *op;
    const struct qc_variant *variant;
    struct qc_device *device;
    OrtAllocator *allocator; /* of the session's memory on the device */
    const OrtMemoryInfo *memory;
    qc_pointer weights, scales; /* 0: none */
    struct qc_functions functions[]; /* one for each launch of the variant */
};

enum { QC_MAX_GRID_Y = 65535, QC_TALL_BLOCKS = 32768, QC_ALIGNMENT = 16 };

#define QC_PROVIDER "CUDAExecutionProvider"

/* Some rows of a run. */
struct qc_call {
    const struct qc_gpu_node *node;
    const struct qc_launch *launch;
    struct qc_functions functions;
    void *stream;
    char *pointers[QC_ARGUMENTS];
    int32_t rows, height, width;
};

/* Launches the kernel for so many rows, and what adds its parts. */
OrtStatus *qc_run_rows(struct qc_call *call, OrtKernelContext *context);

OrtStatus *qc_gpu_create(const struct qc_op *op, const OrtKernelInfo *info, void **node);
void qc_gpu_destroy(void *node);

#endif
