/* The CUDA driver is opened by name, so that a library with kernels for GPUs loads everywhere.
 *
 * Kernels are modules of a device's primary context, which is the one that ONNX Runtime uses; one
 * library holds cubins for several architectures, and each device gets those of its own. */
#include <dlfcn.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cuda_driver.h"

enum { MAJOR = 75, MINOR = 76, SHARED_BYTES = 97 }; /* CUdevice_attribute */
enum { NO_DEVICE = 100 };                           /* CUresult */
enum { OLDEST_MAJOR = 8 };

struct qc_driver qc_driver;

/* What was found; never changes once it is there, but in a child of a fork. */
static struct {
    int count;
    struct qc_device *devices;
    char problem[256]; /* why there is none; empty if there is */
} found;

struct qc_loaded {
    const struct qc_variant *variant;
    qc_module module;
    struct qc_loaded *next;
};

/* Guards what is made once: the process of which a thread holds it, or 0. (libpthread is no part of the
 * C library before glibc 2.34.) What a thread of its parent held when a child was forked, nobody gives
 * back there: the child takes it. */
static atomic_int holder;

static void lock(void) {
    const int process = getpid();
    int held = 0;
    while (!atomic_compare_exchange_weak(&holder, &held, process)) {
        if (held != process) continue;
        held = 0;
        sched_yield();
    }
}

static void unlock(void) { atomic_store(&holder, 0); }

/* --- finding it ------------------------------------------------------------------------------- */

static int fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
static int fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(found.problem, sizeof found.problem, format, arguments);
    va_end(arguments);
    return 0;
}

static const char *library_name(void) {
#ifdef QC_STAND_IN /* tests have a driver of their own */
    const char *stand_in = getenv("QC_STAND_IN");
    if (stand_in) return stand_in;
#endif
    return "libcuda.so.1";
}

static int open_driver(void) {
    void *library = dlopen(library_name(), RTLD_NOW | RTLD_LOCAL);
    if (!library) return fail("there is no NVIDIA driver (libcuda.so.1 cannot be loaded)");
#define FIND(name, symbol, ...)                                                                    \
    *(void **)&qc_driver.name = dlsym(library, #symbol);                                           \
    if (!qc_driver.name)                                                                           \
        return fail("the NVIDIA driver is too old (it has no " #symbol "): update it");
    QC_CUDA_DRIVER(FIND)
    return 1;
}

static int check_driver(void) {
    int result = qc_driver.init(0), version = 0;
    const char *name = NULL;
    if (result == NO_DEVICE) return fail("there is no NVIDIA GPU");
    if (result) {
        qc_driver.error_name(result, &name);
        return fail("the NVIDIA driver does not work (cuInit: %s)", name ? name : "unknown error");
    }
    qc_driver.version(&version);
    /* Within one major version, older drivers run cubins of newer compilers. */
    if (version / 1000 < qc_cuda_version / 1000)
        return fail("the NVIDIA driver is too old (for CUDA %d.%d, the kernels were compiled with "
                    "%d.%d): update it",
                    version / 1000, version % 1000 / 10, qc_cuda_version / 1000,
                    qc_cuda_version % 1000 / 10);
    return 1;
}

static int list_devices(void) {
    int count = 0;
    if (qc_driver.device_count(&count) || count == 0) return fail("there is no NVIDIA GPU");
    found.devices = calloc((size_t)count, sizeof *found.devices);
    if (!found.devices) return fail("there is no memory for a list of GPUs");
    for (int i = 0; i < count; i++) {
        struct qc_device *device = &found.devices[i];
        int handle = 0;
        device->ordinal = i;
        if (qc_driver.device(&handle, i)) continue; /* of capability 0.0 nothing runs */
        qc_driver.device_name(device->name, sizeof device->name, handle);
        qc_driver.device_attribute(&device->major, MAJOR, handle);
        qc_driver.device_attribute(&device->minor, MINOR, handle);
        qc_driver.device_attribute(&device->shared_bytes, SHARED_BYTES, handle);
    }
    found.count = count;
    return 1;
}

/* An op for a provider that ONNX Runtime does not have would only hide its body. */
static int has_provider(const char *provider) {
    char **names = NULL;
    int count = 0, has = 0;
#ifdef QC_STAND_IN
    return 1;
#endif
    if (QC_ORT(GetAvailableProviders)(&names, &count)) return 1;
    for (int i = 0; i < count; i++) has |= strcmp(names[i], provider) == 0;
    (void)!QC_ORT(ReleaseAvailableProviders)(names, count);
    if (has) return 1;
    return fail("this ONNX Runtime has no %s: pip uninstall onnxruntime, then pip install "
                "'onnxruntime-gpu[cuda,cudnn]'",
                provider);
}

/* What a process opened, a child that is forked from it cannot use. */
static pid_t opener; /* 0: none yet */
static const char FORKED[] =
    "this process was forked from one that had opened the GPUs, which CUDA does not survive: start it by "
    "multiprocessing.get_context('spawn'), or fork before a session is made";

static int is_forked(void) { return opener && opener != getpid(); }

static void find_devices(void) {
    lock();
    if (!opener) {
        opener = getpid();
        if (has_provider(qc_specs[0].anchor->provider) && open_driver() && check_driver())
            list_devices();
    } else if (is_forked() && found.count) {
        found.count = 0;
        fail("%s", FORKED);
    }
    unlock();
}

struct qc_device *qc_find_device(int ordinal) {
    find_devices();
    return ordinal >= 0 && ordinal < found.count ? &found.devices[ordinal] : NULL;
}

const char *qc_device_problem(void) { return found.problem; }

/* --- what runs where -------------------------------------------------------------------------- */

/* Machine code for 8.x runs on 8.y with y >= x; that of "a" on exactly one. */
static int matches(const struct qc_device *device, const struct qc_isa *isa) {
    if (isa == &qc_sm_90a) return device->major == 9 && device->minor == 0;
    return device->major == 8 && (isa == &qc_sm_80 || device->minor >= 9);
}

static int fits_memory(const struct qc_device *device, const struct qc_variant *variant) {
    for (size_t i = 0; i < variant->cuda->launch_count; i++)
        if (variant->cuda->launches[i].shared_bytes > (unsigned)device->shared_bytes) return 0;
    return 1;
}

int qc_device_runs(const struct qc_device *device, const struct qc_variant *variant) {
    return matches(device, variant->isa) && fits_memory(device, variant);
}

static int any_matches(const struct qc_isa *isa) {
    find_devices();
    for (int i = 0; i < found.count; i++)
        if (matches(&found.devices[i], isa)) return 1;
    return 0;
}

static int any_runs(const struct qc_variant *variant) {
    for (int i = 0; i < found.count; i++)
        if (qc_device_runs(&found.devices[i], variant)) return 1;
    return 0;
}

static int sm_90a_is_available(void) { return any_matches(&qc_sm_90a); }
static int sm_89_is_available(void) { return any_matches(&qc_sm_89); }
static int sm_80_is_available(void) { return any_matches(&qc_sm_80); }

const struct qc_isa qc_sm_80 = {
    .name = "sm_80",
    .is_available = sm_80_is_available,
    .fits = any_runs,
};
const struct qc_isa qc_sm_89 = {
    .name = "sm_89",
    .is_available = sm_89_is_available,
    .includes = &qc_sm_80,
    .fits = any_runs,
};
const struct qc_isa qc_sm_90a = {
    .name = "sm_90a",
    .is_available = sm_90a_is_available,
    .fits = any_runs,
};

const struct qc_isa *const qc_all_isa[] = {&qc_sm_90a, &qc_sm_89, &qc_sm_80, NULL};

/* Why the GPUs run nothing of this. */
static void explain_devices(char *text, size_t size) {
    const struct qc_device *device = &found.devices[0];
    char names[64] = "";
    for (size_t i = 0; qc_all_isa[i]; i++) {
        int has = 0;
        for (size_t j = 0; j < qc_spec_count; j++)
            for (size_t k = 0; k < qc_specs[j].variant_count; k++)
                has |= qc_specs[j].variants[k].isa == qc_all_isa[i];
        if (!has) continue;
        if (names[0]) strncat(names, ", ", sizeof names - strlen(names) - 1);
        strncat(names, qc_all_isa[i]->name, sizeof names - strlen(names) - 1);
    }
    if (device->major < OLDEST_MAJOR)
        snprintf(text, size, "%s has compute capability %d.%d, and kernels need 8.0", device->name,
                 device->major, device->minor);
    else
        snprintf(text, size, "%s has compute capability %d.%d and %d KiB of shared memory, and there "
                             "are kernels for %s",
                 device->name, device->major, device->minor, device->shared_bytes / 1024, names);
}

void qc_tell_missing(size_t missing, size_t all) {
    char reason[320];
    if (found.count) explain_devices(reason, sizeof reason);
    else snprintf(reason, sizeof reason, "%s", found.problem);
    fprintf(stderr, "%s: %zu of %zu ops run as their function bodies, without kernels: %s\n",
            qc_domain, missing, all, reason);
}

/* --- using it --------------------------------------------------------------------------------- */

OrtStatus *qc_cuda_check(const struct qc_op *op, int result, const char *format, ...) {
    if (result == 0) return NULL;
    const char *name = NULL, *text = NULL;
    char message[512];
    qc_driver.error_name(result, &name);
    qc_driver.error_text(result, &text);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    if (is_forked()) return qc_error(op, "%s: %s", message, FORKED);
    return qc_error(op, "%s: %s (%s)", message, name ? name : "unknown error", text ? text : "?");
}

static int retain(struct qc_device *device) {
    int handle = 0, result = 0;
    lock();
    if (!device->context) {
        result = qc_driver.device(&handle, device->ordinal);
        /* Kept for good: modules and weights live in it. */
        if (!result) result = qc_driver.retain_context(&device->context, handle);
    }
    unlock();
    return result;
}

OrtStatus *qc_enter(const struct qc_op *op, struct qc_device *device) {
    QC_TRY(qc_cuda_check(op, retain(device), "cannot use GPU %d", device->ordinal));
    return qc_cuda_check(op, qc_driver.push_context(device->context), "cannot use GPU %d",
                         device->ordinal);
}

void qc_leave(void) {
    qc_context context;
    qc_driver.pop_context(&context);
}

/* Shared by all nodes of equal ops, so that their instructions are cached once. */
static int load(struct qc_device *device, const struct qc_variant *variant, qc_module *module) {
    for (struct qc_loaded *loaded = device->loaded; loaded; loaded = loaded->next)
        if (loaded->variant == variant) {
            *module = loaded->module;
            return 0;
        }
    int result = qc_driver.load_module(module, variant->cuda->cubin);
    struct qc_loaded *loaded = result ? NULL : malloc(sizeof *loaded);
    if (loaded) {
        *loaded = (struct qc_loaded){variant, *module, device->loaded};
        device->loaded = loaded;
    }
    return result;
}

OrtStatus *qc_load(const struct qc_op *op, struct qc_device *device,
                   const struct qc_variant *variant, qc_module *module) {
    lock();
    int result = load(device, variant, module);
    unlock();
    return qc_cuda_check(op, result, "cannot load the %s kernels on GPU %d (%s)",
                         variant->isa->name, device->ordinal, device->name);
}
