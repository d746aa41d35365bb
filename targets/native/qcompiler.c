/* RegisterCustomOps: offers ONNX Runtime every op of the generated table that this machine can run.
 *
 * An op that is not registered runs as its model-local function body instead. */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "qcompiler.h"

static const struct qc_op *as_op(const OrtCustomOp *base) { return (const struct qc_op *)base; }

/* --- what ONNX Runtime asks about an op ------------------------------------------------------ */

static const char *get_name(const OrtCustomOp *op) { return as_op(op)->spec->name; }

static const char *get_provider(const OrtCustomOp *op) { return as_op(op)->anchor->provider; }

static size_t get_input_count(const OrtCustomOp *op) {
    const struct qc_op_spec *spec = as_op(op)->spec;
    return spec->anchor->input_count + strlen(spec->extras);
}

static int get_input_type(const OrtCustomOp *op, size_t index) {
    const struct qc_anchor *anchor = as_op(op)->spec->anchor;
    if (index < anchor->input_count) return anchor->input_types[index];
    return anchor->extra_type ? anchor->extra_type : ORT_FLOAT;
}

static size_t get_output_count(const OrtCustomOp *op) { return strlen(as_op(op)->spec->outputs); }

static int get_output_type(const OrtCustomOp *op, size_t index) {
    return qc_output_type(as_op(op), index);
}

static int get_characteristic(const OrtCustomOp *op, size_t index) {
    (void)op, (void)index;
    return ORT_INPUT_REQUIRED;
}

static int get_memory_type(const OrtCustomOp *op, size_t index) {
    const struct qc_anchor *anchor = as_op(op)->anchor;
    int on_host = index < anchor->input_count && anchor->host_inputs >> index & 1;
    return on_host ? ORT_MEMORY_CPU_INPUT : ORT_MEMORY_DEFAULT;
}

static int get_one(const OrtCustomOp *op) {
    (void)op;
    return 1;
}

static OrtStatus *create_kernel(const OrtCustomOp *op, const void *api, const OrtKernelInfo *info,
                                void **kernel) {
    (void)api;
    return as_op(op)->anchor->create(as_op(op), info, kernel);
}

/* --- shape inference ------------------------------------------------------------------------- */

static OrtStatus *set_output(OrtShapeInferContext *context, size_t index, int type,
                             const struct qc_shape *shape, const char **symbols) {
    OrtTensorTypeAndShapeInfo *info;
    QC_TRY(QC_ORT(CreateTensorTypeAndShapeInfo)(&info));
    OrtStatus *status = QC_ORT(SetTensorElementType)(info, type);
    if (!status) status = QC_ORT(SetDimensions)(info, shape->dims, shape->rank);
    if (!status) status = QC_ORT(SetSymbolicDimensions)(info, symbols, shape->rank);
    if (!status) status = QC_ORT(ShapeInferContext_SetOutputTypeShape)(context, index, info);
    QC_ORT(ReleaseTensorTypeAndShapeInfo)(info);
    return status;
}

/* Every output has the leading dimensions of input 0.  Of an open dimension without a name nothing can
 * be said: ORT would write -1 as its size, and compute with it wherever a Shape reads the output. */
static OrtStatus *infer_shapes(const OrtCustomOp *base, OrtShapeInferContext *context) {
    const struct qc_op *op = as_op(base);
    const struct qc_anchor *anchor = op->spec->anchor;
    OrtTensorTypeAndShapeInfo *info; /* belongs to the context */
    struct qc_shape shape;
    const char *symbols[QC_MAX_RANK];
    if (!anchor->last_dimension) return NULL;
    QC_TRY(QC_ORT(ShapeInferContext_GetInputTypeShape)(context, 0, &info));
    QC_TRY(QC_ORT(GetDimensionsCount)(info, &shape.rank));
    if (shape.rank == 0 || shape.rank > QC_MAX_RANK) return NULL; /* not known yet */
    QC_TRY(QC_ORT(GetDimensions)(info, shape.dims, shape.rank));
    QC_TRY(QC_ORT(GetSymbolicDimensions)(info, symbols, shape.rank));
    for (size_t i = 0; i + 1 < shape.rank; i++)
        if (shape.dims[i] < 0 && !symbols[i][0]) return NULL;
    if (anchor->rows) {
        if (shape.rank < 2 || shape.dims[shape.rank - 2] < 0) return NULL;
        shape.dims[shape.rank - 2] = anchor->rows(op, shape.dims[shape.rank - 2]);
    }
    symbols[shape.rank - 1] = "";
    for (size_t i = 0; op->spec->outputs[i]; i++) {
        size_t output = qc_output_index(op, i);
        shape.dims[shape.rank - 1] = anchor->last_dimension(op, output);
        QC_TRY(set_output(context, i, qc_output_type(op, i), &shape, symbols));
    }
    return NULL;
}

/* --- registration ---------------------------------------------------------------------------- */

static OrtCustomOp describe(const struct qc_anchor *anchor) {
    return (OrtCustomOp){
        .version = QC_ORT_CUSTOM_OP_VERSION,
        .GetName = get_name,
        .GetExecutionProviderType = get_provider,
        .GetInputType = get_input_type,
        .GetInputTypeCount = get_input_count,
        .GetOutputType = get_output_type,
        .GetOutputTypeCount = get_output_count,
        .KernelDestroy = anchor->destroy,
        .GetInputCharacteristic = get_characteristic,
        .GetOutputCharacteristic = get_characteristic,
        .GetInputMemoryType = get_memory_type,
        .GetVariadicInputMinArity = get_one,
        .GetVariadicInputHomogeneity = get_one,
        .GetVariadicOutputMinArity = get_one,
        .GetVariadicOutputHomogeneity = get_one,
        .CreateKernelV2 = create_kernel,
        .KernelComputeV2 = anchor->compute,
        .InferOutputShapeFn = infer_shapes,
        .GetStartVersion = get_one,
        .GetEndVersion = get_one,
    };
}

static const struct qc_isa *find_isa(const char *name) {
    for (size_t i = 0; qc_all_isa[i]; i++)
        if (strcmp(name, qc_all_isa[i]->name) == 0) return qc_all_isa[i];
    return NULL;
}

int qc_is_allowed(const struct qc_isa *isa, const char *only) {
    if (!*only) return isa->is_available();
    const struct qc_isa *named = find_isa(only);
    if (!named || !named->is_available()) return 0;
    while (named && named != isa) named = named->includes;
    return named != NULL;
}

static const struct qc_variant *choose_variant(const struct qc_op_spec *spec, const char *only,
                                               int device) {
    for (size_t i = 0; i < spec->variant_count; i++) {
        const struct qc_isa *isa = spec->variants[i].isa;
        if (!qc_is_allowed(isa, only)) continue;
        if (!isa->fits || isa->fits(&spec->variants[i], device)) return &spec->variants[i];
    }
    return NULL;
}

/* A misspelt QCOMPILER_ISA must not silently mean "slow". */
static OrtStatus *check_override(const char *only) {
    if (!*only || strcmp(only, "none") == 0 || find_isa(only)) return NULL;
    char known[256] = "none";
    for (size_t i = 0; qc_all_isa[i]; i++) {
        strncat(known, ", ", sizeof known - strlen(known) - 1);
        strncat(known, qc_all_isa[i]->name, sizeof known - strlen(known) - 1);
    }
    char message[512];
    snprintf(message, sizeof message, "QCOMPILER_ISA=%.64s is no instruction set of %s; it may be: %s",
             only, qc_domain, known);
    return QC_ORT(CreateStatus)(ORT_INVALID_ARGUMENT, message);
}

/* Which GPU sessions of these options run on, where their maker says so: a name that the GPU cannot run
 * is then not registered, though another GPU of this machine could. */
static OrtStatus *find_device(const OrtSessionOptions *options, int *device) {
    static const char key[] = "qcompiler.device_id";
    char value[16] = "", *end = value, message[128];
    size_t size = sizeof value;
    int is_there = 0;
    *device = QC_ANY_DEVICE;
    if (!qc_specs[0].anchor->provider) return NULL;
    QC_TRY(QC_ORT(HasSessionConfigEntry)(options, key, &is_there));
    if (!is_there) return NULL;
    OrtStatus *status = QC_ORT(GetSessionConfigEntry)(options, key, value, &size);
    if (status) QC_ORT(ReleaseStatus)(status); /* it is longer, which no number of a GPU is */
    const long number = strtol(value, &end, 10);
    if (end == value || *end || number < 0 || number > INT16_MAX) {
        snprintf(message, sizeof message, "session config entry %s=%s is no number of a GPU", key,
                 status ? "..." : value);
        return QC_ORT(CreateStatus)(ORT_INVALID_ARGUMENT, message);
    }
    *device = (int)number;
    return NULL;
}

/* The ops that can run, made once and shared by all sessions; never released, because sessions
 * may outlive the options they came with. */
struct registration {
    struct registration *next;
    char only[64]; /* QCOMPILER_ISA as it was */
    int device;
    pid_t process; /* after a fork the devices may be of no use */
    OrtCustomOpDomain *domain; /* NULL if no op can run */
    size_t count;
    struct qc_op ops[];
};

static OrtStatus *add(struct registration *made, const struct qc_op_spec *spec,
                      const struct qc_variant *variant, const struct qc_anchor *anchor) {
    struct qc_op *op = &made->ops[made->count++];
    *op = (struct qc_op){describe(anchor), spec, variant, anchor, made->only};
    if (!made->domain) QC_TRY(QC_ORT(CreateCustomOpDomain)(qc_domain, &made->domain));
    return QC_ORT(CustomOpDomain_Add)(made->domain, &op->base);
}

static OrtStatus *build(const char *only, int device, struct registration **result) {
    struct registration *made = calloc(1, sizeof *made + 2 * qc_spec_count * sizeof *made->ops);
    size_t missing = 0;
    if (!made) return QC_ORT(CreateStatus)(ORT_FAIL, "out of memory for the op table");
    strncpy(made->only, only, sizeof made->only - 1);
    made->device = device;
    made->process = getpid();
    for (size_t i = 0; i < qc_spec_count; i++) {
        const struct qc_op_spec *spec = &qc_specs[i];
        const struct qc_variant *variant = choose_variant(spec, only, device);
        missing += !variant;
        if (!variant) continue;
        QC_TRY(add(made, spec, variant, spec->anchor));
        /* A name that is known has no body any more: a session on the CPU needs a kernel too. */
        if (spec->anchor->twin && spec->anchor->provider)
            QC_TRY(add(made, spec, variant, spec->anchor->twin));
    }
    if (missing && !*only) qc_tell_missing(missing, qc_spec_count, device);
    *result = made;
    return NULL;
}

/* Two threads that come first together may build twice; either result is good. */
static OrtStatus *find_or_build(const char *only, int device, struct registration **result) {
    static _Atomic(struct registration *) latest;
    const pid_t process = getpid();
    for (struct registration *made = atomic_load(&latest); made; made = made->next) {
        if (made->device != device || made->process != process || strcmp(made->only, only)) continue;
        *result = made;
        return NULL;
    }
    QC_TRY(build(only, device, result));
    (*result)->next = atomic_load(&latest);
    while (!atomic_compare_exchange_weak(&latest, &(*result)->next, *result)) {}
    return NULL;
}

/* Asking GetApi instead would make an older ONNX Runtime complain on stderr. */
static int has_api_24(const OrtApiBase *base) {
    const char *version = base->GetVersionString();
    return strncmp(version, "1.", 2) != 0 || atoi(version + 2) >= 24;
}

/* What ORT computes of a bundle without VNNI saturates otherwise: qcompiler/session_options.py. */
static OrtStatus *ask_for_exact_sums(OrtSessionOptions *options) {
    static const char option[] = "session.x64quantprecision";
    int is_there = 0;
    if (!qc_sums_saturate()) return NULL;
    QC_TRY(QC_ORT(HasSessionConfigEntry)(options, option, &is_there));
    return is_there ? NULL : QC_ORT(AddSessionConfigEntry)(options, option, "1");
}

/* Adds the domain, unless these options have it, from this library or another of the same content:
 * ONNX Runtime refuses to make a session of options with one domain twice. */
static OrtStatus *add_once(OrtSessionOptions *options, OrtCustomOpDomain *domain) {
    int is_there = 0;
    QC_TRY(QC_ORT(HasSessionConfigEntry)(options, qc_domain, &is_there));
    if (is_there) return NULL;
    QC_TRY(QC_ORT(AddCustomOpDomain)(options, domain));
    QC_TRY(ask_for_exact_sums(options));
    return QC_ORT(AddSessionConfigEntry)(options, qc_domain, "registered");
}

static OrtStatus *too_old(const OrtApiBase *base) {
    char message[256];
    snprintf(message, sizeof message,
             "%s needs ONNX Runtime 1.%d or newer, this is %s: pip install -U onnxruntime%s",
             qc_domain, QC_ORT_API_VERSION, base->GetVersionString(),
             qc_specs[0].anchor->provider ? "-gpu" : "");
    /* Version 1 is in every ONNX Runtime, and has CreateStatus. */
    void *const *oldest = base->GetApi(1);
    return ((qc_ort_CreateStatus)oldest[QC_ORT_INDEX_CreateStatus])(ORT_FAIL, message);
}

__attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtSessionOptions *options,
                                                                    const OrtApiBase *base) {
    void *const *api = base->GetApi(QC_ORT_API_VERSION);
    if (!api) return too_old(base);
    qc_api = api;
    qc_has_api_24 = has_api_24(base);
    const char *only = getenv("QCOMPILER_ISA");
    if (!only) only = "";
    struct registration *registration = NULL;
    int device;
    QC_TRY(check_override(only));
    QC_TRY(find_device(options, &device));
    QC_TRY(find_or_build(only, device, &registration));
    return registration->domain ? add_once(options, registration->domain) : NULL;
}
