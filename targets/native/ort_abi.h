/* The part of the ONNX Runtime C ABI that a custom-op library needs.
 *
 * No onnxruntime wheel ships the official header.  OrtApi is a table of function pointers that is
 * only ever appended to, so an entry is its index and its signature; tests/test_library.py compares
 * every line below with the official header where one is installed. */
#ifndef QC_ORT_ABI_H
#define QC_ORT_ABI_H

#include <stddef.h>
#include <stdint.h>

/* Oldest API with all entries of QC_ORT_API: 22 brought GetTensorSizeInBytes, which spares a run
 * the allocations that asking for a shape costs. */
#define QC_ORT_API_VERSION 22
/* The OrtCustomOp layout below; ONNX Runtime reads only the members this version had. */
#define QC_ORT_CUSTOM_OP_VERSION 18

typedef struct OrtAllocator OrtAllocator;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtShapeInferContext OrtShapeInferContext;
typedef struct OrtStatus OrtStatus;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;
typedef struct OrtValue OrtValue;

typedef struct OrtApiBase {
    const void *(*GetApi)(uint32_t version);
    const char *(*GetVersionString)(void);
} OrtApiBase;

enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };                   /* OrtErrorCode */
enum { ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_INT8 = 3, ORT_FLOAT16 = 10, ORT_FLOAT8E4M3FN = 17,
       ORT_INT4 = 22 };                                            /* ONNXTensorElementDataType */
enum { ORT_INPUT_REQUIRED = 0 };                                   /* ...InputOutputCharacteristic */
enum { ORT_MEMORY_CPU_INPUT = -2, ORT_MEMORY_DEFAULT = 0 };        /* OrtMemType */

/* X(index in OrtApi, name, result, parameters...) */
#define QC_ORT_API(X)                                                                              \
    X(0, CreateStatus, OrtStatus *, int, const char *)                                             \
    X(2, GetErrorMessage, const char *, const OrtStatus *)                                         \
    X(26, CreateCustomOpDomain, OrtStatus *, const char *, OrtCustomOpDomain **)                   \
    X(27, CustomOpDomain_Add, OrtStatus *, OrtCustomOpDomain *, const OrtCustomOp *)               \
    X(28, AddCustomOpDomain, OrtStatus *, OrtSessionOptions *, OrtCustomOpDomain *)                \
    X(51, GetTensorMutableData, OrtStatus *, OrtValue *, void **)                                  \
    X(57, CreateTensorTypeAndShapeInfo, OrtStatus *, OrtTensorTypeAndShapeInfo **)                 \
    X(58, SetTensorElementType, OrtStatus *, OrtTensorTypeAndShapeInfo *, int)                     \
    X(59, SetDimensions, OrtStatus *, OrtTensorTypeAndShapeInfo *, const int64_t *, size_t)        \
    X(61, GetDimensionsCount, OrtStatus *, const OrtTensorTypeAndShapeInfo *, size_t *)            \
    X(62, GetDimensions, OrtStatus *, const OrtTensorTypeAndShapeInfo *, int64_t *, size_t)        \
    X(63, GetSymbolicDimensions, OrtStatus *, const OrtTensorTypeAndShapeInfo *, const char **,    \
      size_t)                                                                                      \
    X(65, GetTensorTypeAndShape, OrtStatus *, const OrtValue *, OrtTensorTypeAndShapeInfo **)      \
    X(72, MemoryInfoGetId, OrtStatus *, const OrtMemoryInfo *, int *)                              \
    X(75, AllocatorAlloc, OrtStatus *, OrtAllocator *, size_t, void **)                            \
    X(76, AllocatorFree, OrtStatus *, OrtAllocator *, void *)                                      \
    X(77, AllocatorGetInfo, OrtStatus *, const OrtAllocator *, const OrtMemoryInfo **)             \
    X(90, KernelContext_GetInput, OrtStatus *, const OrtKernelContext *, size_t,                   \
      const OrtValue **)                                                                           \
    X(91, KernelContext_GetOutput, OrtStatus *, OrtKernelContext *, size_t, const int64_t *,       \
      size_t, OrtValue **)                                                                         \
    X(93, ReleaseStatus, void, OrtStatus *)                                                        \
    X(99, ReleaseTensorTypeAndShapeInfo, void, OrtTensorTypeAndShapeInfo *)                        \
    X(125, GetAvailableProviders, OrtStatus *, char ***, int *)                                    \
    X(126, ReleaseAvailableProviders, OrtStatus *, char **, int)                                   \
    X(130, AddSessionConfigEntry, OrtStatus *, OrtSessionOptions *, const char *, const char *)    \
    X(132, ReleaseAllocator, void, OrtAllocator *)                                                 \
    X(193, KernelContext_GetGPUComputeStream, OrtStatus *, const OrtKernelContext *, void **)      \
    X(237, HasSessionConfigEntry, OrtStatus *, const OrtSessionOptions *, const char *, int *)     \
    X(238, GetSessionConfigEntry, OrtStatus *, const OrtSessionOptions *, const char *, char *,    \
      size_t *)                                                                                    \
    X(249, KernelInfoGetConstantInput_tensor, OrtStatus *, const OrtKernelInfo *, size_t, int *,   \
      const OrtValue **)                                                                           \
    X(268, ShapeInferContext_GetInputTypeShape, OrtStatus *, const OrtShapeInferContext *, size_t, \
      OrtTensorTypeAndShapeInfo **)                                                                \
    X(270, ShapeInferContext_SetOutputTypeShape, OrtStatus *, const OrtShapeInferContext *,        \
      size_t, const OrtTensorTypeAndShapeInfo *)                                                   \
    X(271, SetSymbolicDimensions, OrtStatus *, OrtTensorTypeAndShapeInfo *, const char **, size_t) \
    X(274, KernelContext_ParallelFor, OrtStatus *, const OrtKernelContext *,                       \
      void (*)(void *, size_t), size_t, size_t, void *)                                            \
    X(277, KernelContext_GetScratchBuffer, OrtStatus *, const OrtKernelContext *,                  \
      const OrtMemoryInfo *, size_t, void **)                                                      \
    X(278, KernelInfoGetAllocator, OrtStatus *, const OrtKernelInfo *, int, OrtAllocator **)       \
    X(318, GetTensorSizeInBytes, OrtStatus *, const OrtValue *, size_t *)

/* Since API 24; used where ONNX Runtime has it, because it allocates nothing. */
#define QC_ORT_API_24(X)                                                                           \
    X(414, GetTensorElementTypeAndShapeDataReference, OrtStatus *, const OrtValue *, int *,        \
      const int64_t **, size_t *)

typedef struct OrtCustomOp OrtCustomOp;
struct OrtCustomOp {
    uint32_t version;
    void *(*CreateKernel)(const OrtCustomOp *, const void *api, const OrtKernelInfo *);
    const char *(*GetName)(const OrtCustomOp *);
    const char *(*GetExecutionProviderType)(const OrtCustomOp *);
    int (*GetInputType)(const OrtCustomOp *, size_t);
    size_t (*GetInputTypeCount)(const OrtCustomOp *);
    int (*GetOutputType)(const OrtCustomOp *, size_t);
    size_t (*GetOutputTypeCount)(const OrtCustomOp *);
    void (*KernelCompute)(void *, OrtKernelContext *);
    void (*KernelDestroy)(void *);
    int (*GetInputCharacteristic)(const OrtCustomOp *, size_t);
    int (*GetOutputCharacteristic)(const OrtCustomOp *, size_t);
    int (*GetInputMemoryType)(const OrtCustomOp *, size_t);
    int (*GetVariadicInputMinArity)(const OrtCustomOp *);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp *);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp *);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *);
    OrtStatus *(*CreateKernelV2)(const OrtCustomOp *, const void *api, const OrtKernelInfo *,
                                 void **);
    OrtStatus *(*KernelComputeV2)(void *, OrtKernelContext *);
    OrtStatus *(*InferOutputShapeFn)(const OrtCustomOp *, OrtShapeInferContext *);
    int (*GetStartVersion)(const OrtCustomOp *);
    int (*GetEndVersion)(const OrtCustomOp *);
    size_t (*GetMayInplace)(int **, int **);
    void (*ReleaseMayInplace)(int *, int *);
    size_t (*GetAliasMap)(int **, int **);
    void (*ReleaseAliasMap)(int *, int *);
};

#endif
