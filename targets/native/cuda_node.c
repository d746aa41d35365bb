/* Making the nodes of a session: kernels are looked up, weights packed on the host and uploaded. */
#include <stdlib.h>

#include "cuda_node.h"

enum { PLAIN_SHARED_BYTES = 48 * 1024, SHARED_BYTES_ATTRIBUTE = 8 }; /* CUfunction_attribute */

static OrtStatus *find_device(struct qc_gpu_node *node, const OrtKernelInfo *info) {
    int ordinal;
    QC_TRY(QC_ORT(KernelInfoGetAllocator)(info, ORT_MEMORY_DEFAULT, &node->allocator));
    QC_TRY(QC_ORT(AllocatorGetInfo)(node->allocator, &node->memory));
    QC_TRY(QC_ORT(MemoryInfoGetId)(node->memory, &ordinal));
    node->device = qc_find_device(ordinal);
    if (node->device) return NULL;
    return qc_error(node->op, "there is no GPU %d%s%s", ordinal, *qc_device_problem() ? ": " : "",
                    qc_device_problem());
}

/* The first that runs on a device; NULL: none. */
static const struct qc_variant *choose_variant(const struct qc_op *op, const struct qc_device *device) {
    const struct qc_variant *end = op->spec->variants + op->spec->variant_count;
    for (const struct qc_variant *variant = op->spec->variants; variant < end; variant++)
        if (qc_is_allowed(variant->isa, op->only) && qc_device_runs(device, variant)) return variant;
    return NULL;
}

/* The op was registered, because another GPU of this machine runs it. */
static OrtStatus *tell_unable(const struct qc_op *op, const struct qc_device *device) {
    const struct qc_device *able;
    char reason[320];
    int other = 0;
    while ((able = qc_find_device(other)) && !choose_variant(op, able)) other++;
    qc_explain(device, reason, sizeof reason);
    return qc_error(op,
                    "there is no kernel for GPU %d%s%s: %s.  GPU %d (%s) has one: choose it by device_id "
                    "of the CUDA provider or by CUDA_VISIBLE_DEVICES; or, for function bodies on GPU %d, "
                    "set the session config entry qcompiler.device_id to %d before the library is "
                    "registered (qcompiler.load does), or QCOMPILER_ISA=none",
                    device->ordinal, *op->only ? " under QCOMPILER_ISA=" : "", op->only, reason, other,
                    able ? able->name : "?", device->ordinal, device->ordinal);
}

static OrtStatus *find_function(const struct qc_gpu_node *node, qc_module module, const char *symbol,
                                unsigned shared_bytes, qc_function *function) {
    const struct qc_op *op = node->op;
    QC_TRY(qc_cuda_check(op, qc_driver.find_function(function, module, symbol),
                         "cannot find the kernel %s", symbol));
    if (shared_bytes <= PLAIN_SHARED_BYTES) return NULL;
    return qc_cuda_check(
        op, qc_driver.set_attribute(*function, SHARED_BYTES_ATTRIBUTE, (int)shared_bytes),
        "cannot give %s %u bytes of shared memory", symbol, shared_bytes);
}

static OrtStatus *find_functions(struct qc_gpu_node *node) {
    const struct qc_cuda_kernels *kernels = node->variant->cuda;
    qc_module module;
    QC_TRY(qc_load(node->op, node->device, node->variant, &module));
    for (size_t i = 0; i < kernels->launch_count; i++) {
        const struct qc_launch *launch = &kernels->launches[i];
        struct qc_functions *functions = &node->functions[i];
        QC_TRY(find_function(node, module, launch->symbol, launch->shared_bytes,
                             &functions->kernel));
        if (launch->combine)
            QC_TRY(find_function(node, module, launch->combine, 0, &functions->combine));
    }
    return NULL;
}

/* Memory of the node's own on the device, filled from the host's. */
static OrtStatus *upload(const struct qc_gpu_node *node, const char *what, const void *data,
                         size_t bytes, qc_pointer *target) {
    size_t free_bytes = 0, all_bytes = 0;
    int result = qc_driver.allocate(target, bytes);
    if (result) {
        *target = 0;
        qc_driver.free_memory(&free_bytes, &all_bytes);
        return qc_cuda_check(node->op, result,
                             "cannot allocate %zu bytes for %s on GPU %d, where %zu of %zu are free",
                             bytes, what, node->device->ordinal, free_bytes, all_bytes);
    }
    result = qc_driver.upload(*target, data, bytes);
    /* It returns when the host's memory was read.  Streams of ONNX Runtime do not wait for the default
     * one, where the rest of the copy may still be under way. */
    if (!result) result = qc_driver.wait(NULL);
    return qc_cuda_check(node->op, result, "cannot copy %zu bytes of %s to GPU %d", bytes, what,
                         node->device->ordinal);
}

static OrtStatus *upload_weights(struct qc_gpu_node *node, const struct qc_weights *weights) {
    const struct qc_op *op = node->op;
    const struct qc_packing packing = qc_packing_of(op->spec);
    const size_t most = packing.weight_bytes > packing.scale_bytes ? packing.weight_bytes
                                                                   : packing.scale_bytes;
    void *packed = malloc(most);
    if (!packed) return qc_error(op, "out of memory for %zu bytes of packed weights", most);
    qc_pack_weights(&packing, weights, packed);
    OrtStatus *status = upload(node, "weights", packed, packing.weight_bytes, &node->weights);
    if (!status) {
        qc_pack_scales(&packing, weights, packed);
        status = upload(node, "scales", packed, packing.scale_bytes, &node->scales);
    }
    free(packed);
    return status;
}

static OrtStatus *fill_node(struct qc_gpu_node *node, const OrtKernelInfo *info) {
    struct qc_weights weights;
    QC_TRY(find_functions(node));
    if (!node->op->spec->anchor->weight_bits) return NULL;
    QC_TRY(qc_constant_weights(node->op, info, &weights));
    return upload_weights(node, &weights);
}

void qc_gpu_destroy(void *state) {
    struct qc_gpu_node *node = state;
    /* At the end of a process the driver may be gone, and all memory with it. */
    if ((node->weights || node->scales) && !qc_driver.push_context(node->device->context)) {
        if (node->weights) qc_driver.free(node->weights);
        if (node->scales) qc_driver.free(node->scales);
        qc_leave();
    }
    if (node->allocator) QC_ORT(ReleaseAllocator)(node->allocator);
    free(node);
}

OrtStatus *qc_gpu_create(const struct qc_op *op, const OrtKernelInfo *info, void **state) {
    size_t most = 0;
    for (size_t i = 0; i < op->spec->variant_count; i++)
        if (op->spec->variants[i].cuda->launch_count > most)
            most = op->spec->variants[i].cuda->launch_count;
    struct qc_gpu_node *node = calloc(1, sizeof *node + most * sizeof *node->functions);
    if (!node) return qc_error(op, "out of memory for a node");
    node->op = op;
    OrtStatus *status = find_device(node, info);
    if (!status) node->variant = choose_variant(op, node->device);
    if (!status && !node->variant) status = tell_unable(op, node->device);
    if (!status) status = qc_enter(op, node->device);
    if (!status) {
        status = fill_node(node, info);
        qc_leave();
    }
    if (status) qc_gpu_destroy(node);
    else *state = node;
    return status;
}
