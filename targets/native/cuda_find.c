/* The CUDA driver is opened by name, so that a library with kernels for GPUs loads everywhere, and once
 * in a process: here is what was found, or why nothing was. */
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

struct qc_driver qc_driver;

/* What was found; never changes once it is there, but in a child of a fork. */
static struct {
    int count;
    struct qc_device *devices;
    char problem[256]; /* why there is none; empty if there is */
} found;

/* Guards what is made once: the process of which a thread holds it, or 0. (libpthread is no part of the
 * C library before glibc 2.34.) What a thread of its parent held when a child was forked, nobody gives
 * back there: the child takes it. */
static atomic_int holder;

void qc_lock(void) {
    const int process = getpid();
    int held = 0;
    while (!atomic_compare_exchange_weak(&holder, &held, process)) {
        if (held != process) continue;
        held = 0;
        sched_yield();
    }
}

void qc_unlock(void) { atomic_store(&holder, 0); }

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
    if (!library)
        return fail("there is no NVIDIA driver (libcuda.so.1 cannot be loaded): install it; a container "
                    "gets that of its host (docker run --gpus all)");
#define FIND(name, symbol, ...)                                                                    \
    *(void **)&qc_driver.name = dlsym(library, #symbol);                                           \
    if (!qc_driver.name)                                                                           \
        return fail("the NVIDIA driver is too old (it has no " #symbol "): update it");
    QC_CUDA_DRIVER(FIND)
    return 1;
}

static int fail_without_gpu(void) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    if (!visible) return fail("there is no NVIDIA GPU");
    return fail("there is no NVIDIA GPU under CUDA_VISIBLE_DEVICES=%.64s: without it there may be one",
                visible);
}

static int check_driver(void) {
    int result = qc_driver.init(0), version = 0;
    const char *name = NULL;
    if (result == NO_DEVICE) return fail_without_gpu();
    if (result) {
        qc_driver.error_name(result, &name);
        return fail("the NVIDIA driver does not work (cuInit: %s): nvidia-smi may say more",
                    name ? name : "unknown error");
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
    if (qc_driver.device_count(&count) || count == 0) return fail_without_gpu();
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
    qc_lock();
    if (!opener) {
        opener = getpid();
        if (has_provider(qc_specs[0].anchor->provider) && open_driver() && check_driver())
            list_devices();
    } else if (is_forked() && found.count) {
        found.count = 0;
        fail("%s", FORKED);
    }
    qc_unlock();
}

struct qc_device *qc_find_device(int ordinal) {
    find_devices();
    return ordinal >= 0 && ordinal < found.count ? &found.devices[ordinal] : NULL;
}

const char *qc_device_problem(void) { return found.problem; }

const char *qc_fork_problem(void) { return is_forked() ? FORKED : NULL; }
