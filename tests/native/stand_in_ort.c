/* ONNX Runtime as a library for GPUs meets it, on a machine without one: the CPU provider runs the ops
 * that are for the CUDA provider, on streams and devices that a test names.
 *
 * This is a custom-op library too.  It registers the one beside it, <path of this>.inner, which is as it
 * is shipped but for its driver, with a table of functions of which some are this file's. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "ort_abi.h"

#define DECLARE(index, name, result, ...)                                                          \
    typedef result (*name##_t)(__VA_ARGS__);                                                       \
    enum { name = index };
QC_ORT_API(DECLARE)
enum { ENTRIES = 415, ENTRIES_BEFORE_24 = 319, MAX_ALLOCATORS = 256 };
enum { AS_ORT, GIVES_NULL, FAILS }; /* what asking for a scratch buffer does */

/* Set by tests. */
int stand_in_device, stand_in_scratch;
static _Thread_local void *stream;
void stand_in_set_stream(void *given) { stream = given; }

/* Read by tests. */
atomic_int stand_in_buffers, stand_in_freed_nulls;

static void *const *real;
static void *table[ENTRIES];

/* Scratch buffers come from the allocator of the place that they are asked for. */
static struct {
    const OrtMemoryInfo *place;
    OrtAllocator *allocator;
} allocators[MAX_ALLOCATORS];
static atomic_int allocator_count;

static const char *cpu_provider(const OrtCustomOp *op) {
    (void)op;
    return NULL;
}

/* The CPU provider gets what is for GPUs in the place of its twin. */
static OrtStatus *add_op(OrtCustomOpDomain *domain, const OrtCustomOp *op) {
    OrtCustomOp *changed = (OrtCustomOp *)op;
    if (!op->GetExecutionProviderType(op)) return NULL;
    changed->GetExecutionProviderType = cpu_provider;
    return ((CustomOpDomain_Add_t)real[CustomOpDomain_Add])(domain, changed);
}

static OrtStatus *get_place(const OrtAllocator *allocator, const OrtMemoryInfo **place) {
    OrtStatus *status = ((AllocatorGetInfo_t)real[AllocatorGetInfo])(allocator, place);
    int i = atomic_fetch_add(&allocator_count, 1) % MAX_ALLOCATORS;
    allocators[i].place = *place;
    allocators[i].allocator = (OrtAllocator *)allocator;
    return status;
}

static OrtStatus *get_device(const OrtMemoryInfo *place, int *device) {
    (void)place;
    *device = stand_in_device;
    return NULL;
}

static OrtStatus *get_stream(const OrtKernelContext *context, void **given) {
    (void)context;
    *given = stream;
    return NULL;
}

static OrtStatus *get_scratch(const OrtKernelContext *context, const OrtMemoryInfo *place, size_t bytes,
                              void **memory) {
    (void)context;
    *memory = NULL;
    if (stand_in_scratch == GIVES_NULL) return NULL;
    if (stand_in_scratch == FAILS)
        return ((CreateStatus_t)real[CreateStatus])(ORT_FAIL, "the arena is full");
    /* The latest first: a session that is gone may have had its place where a new one's is. */
    const int count = atomic_load(&allocator_count);
    for (int age = 1; age <= count && age <= MAX_ALLOCATORS; age++) {
        const int i = (count - age) % MAX_ALLOCATORS;
        if (allocators[i].place != place) continue;
        OrtStatus *status =
            ((AllocatorAlloc_t)real[AllocatorAlloc])(allocators[i].allocator, bytes, memory);
        if (!status) atomic_fetch_add(&stand_in_buffers, 1);
        return status;
    }
    return ((CreateStatus_t)real[CreateStatus])(ORT_FAIL, "no allocator is known for this place");
}

static OrtStatus *free_scratch(OrtAllocator *allocator, void *memory) {
    if (!memory) atomic_fetch_add(&stand_in_freed_nulls, 1);
    else atomic_fetch_sub(&stand_in_buffers, 1);
    return ((AllocatorFree_t)real[AllocatorFree])(allocator, memory);
}

static const OrtApiBase *base;

static const void *get_api(uint32_t version) {
    int minor = 0;
    sscanf(base->GetVersionString(), "1.%d", &minor);
    real = base->GetApi(version);
    if (!real || version < QC_ORT_API_VERSION) return real;
    memcpy(table, real, (minor >= 24 ? ENTRIES : ENTRIES_BEFORE_24) * sizeof *table);
    table[CustomOpDomain_Add] = (void *)add_op;
    table[AllocatorGetInfo] = (void *)get_place;
    table[MemoryInfoGetId] = (void *)get_device;
    table[KernelContext_GetGPUComputeStream] = (void *)get_stream;
    table[KernelContext_GetScratchBuffer] = (void *)get_scratch;
    table[AllocatorFree] = (void *)free_scratch;
    return table;
}

static const char *get_version(void) { return base->GetVersionString(); }

OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *given) {
    static const OrtApiBase ours = {get_api, get_version};
    char path[4096];
    Dl_info here;
    base = given;
    dladdr((void *)get_api, &here);
    snprintf(path, sizeof path, "%s.inner", here.dli_fname);
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return ((CreateStatus_t)((void *const *)base->GetApi(1))[CreateStatus])(ORT_FAIL, dlerror());
    OrtStatus *(*inner)(OrtSessionOptions *, const OrtApiBase *) =
        (OrtStatus * (*)(OrtSessionOptions *, const OrtApiBase *)) dlsym(library, "RegisterCustomOps");
    return inner(options, &ours);
}
