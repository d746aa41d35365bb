/* Compiles only where targets/native/ort_abi.h agrees with the official header. */
#include <onnxruntime_c_api.h>

/* Ours, under other names where a second definition would clash. */
#define OrtApiBase QcApiBase
#define OrtCustomOp QcCustomOp
#define ORT_FAIL QC_FAIL
#define ORT_INVALID_ARGUMENT QC_INVALID_ARGUMENT
#include "ort_abi.h"
#undef OrtApiBase
#undef OrtCustomOp
#undef ORT_FAIL
#undef ORT_INVALID_ARGUMENT

#define SAME_INDEX(index, name, ...)                                                               \
    _Static_assert(offsetof(OrtApi, name) == (index) * sizeof(void *), #name);
QC_ORT_API(SAME_INDEX)
#if ORT_API_VERSION >= 24
QC_ORT_API_24(SAME_INDEX)
#endif

#define SAME_MEMBER(name)                                                                          \
    _Static_assert(offsetof(OrtCustomOp, name) == offsetof(QcCustomOp, name), #name);
SAME_MEMBER(version)
SAME_MEMBER(GetName)
SAME_MEMBER(GetExecutionProviderType)
SAME_MEMBER(GetInputType)
SAME_MEMBER(GetInputTypeCount)
SAME_MEMBER(GetOutputType)
SAME_MEMBER(GetOutputTypeCount)
SAME_MEMBER(KernelDestroy)
SAME_MEMBER(GetInputCharacteristic)
SAME_MEMBER(GetOutputCharacteristic)
SAME_MEMBER(GetInputMemoryType)
SAME_MEMBER(GetVariadicInputMinArity)
SAME_MEMBER(GetVariadicOutputHomogeneity)
SAME_MEMBER(CreateKernelV2)
SAME_MEMBER(KernelComputeV2)
SAME_MEMBER(InferOutputShapeFn)
SAME_MEMBER(GetStartVersion)
SAME_MEMBER(GetEndVersion)
SAME_MEMBER(GetMayInplace)
SAME_MEMBER(ReleaseAliasMap)

_Static_assert((int)ORT_FAIL == (int)QC_FAIL, "");
_Static_assert((int)ORT_INVALID_ARGUMENT == (int)QC_INVALID_ARGUMENT, "");
_Static_assert((int)ORT_FLOAT == (int)ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, "");
_Static_assert((int)ORT_UINT8 == (int)ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, "");
_Static_assert((int)ORT_INT8 == (int)ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, "");
_Static_assert((int)ORT_FLOAT16 == (int)ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, "");
_Static_assert((int)ORT_FLOAT8E4M3FN == (int)ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN, "");
_Static_assert((int)ORT_INT4 == (int)ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4, "");
_Static_assert((int)ORT_MEMORY_CPU_INPUT == (int)OrtMemTypeCPUInput, "");
_Static_assert((int)ORT_INPUT_REQUIRED == (int)INPUT_OUTPUT_REQUIRED, "");
_Static_assert((int)ORT_MEMORY_DEFAULT == (int)OrtMemTypeDefault, "");
_Static_assert(QC_ORT_API_VERSION <= ORT_API_VERSION, "the header is older than what we need");
