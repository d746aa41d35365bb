/* Kernels are modules of a device's primary context, which is the one that ONNX Runtime uses; one
 * library holds cubins for several architectures, and each device gets those of its own. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_driver.h"

enum { OLDEST_MAJOR = 8 };

struct qc_loaded {
    const struct qc_variant *variant;
    qc_module module;
    struct qc_loaded *next;
};

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
    const struct qc_device *device;
    for (int i = 0; (device = qc_find_device(i)); i++)
        if (matches(device, isa)) return 1;
    return 0;
}

static int runs(const struct qc_variant *variant, int ordinal) {
    const struct qc_device *device;
    if (ordinal != QC_ANY_DEVICE)
        return (device = qc_find_device(ordinal)) && qc_device_runs(device, variant);
    for (int i = 0; (device = qc_find_device(i)); i++)
        if (qc_device_runs(device, variant)) return 1;
    return 0;
}

static int sm_90a_is_available(void) { return any_matches(&qc_sm_90a); }
static int sm_89_is_available(void) { return any_matches(&qc_sm_89); }
static int sm_80_is_available(void) { return any_matches(&qc_sm_80); }

const struct qc_isa qc_sm_80 = {
    .name = "sm_80",
    .is_available = sm_80_is_available,
    .fits = runs,
};
const struct qc_isa qc_sm_89 = {
    .name = "sm_89",
    .is_available = sm_89_is_available,
    .includes = &qc_sm_80,
    .fits = runs,
};
const struct qc_isa qc_sm_90a = {
    .name = "sm_90a",
    .is_available = sm_90a_is_available,
    .fits = runs,
};

const struct qc_isa *const qc_all_isa[] = {&qc_sm_90a, &qc_sm_89, &qc_sm_80, NULL};

/* Why a GPU runs nothing of this, or not all. */
void qc_explain(const struct qc_device *device, char *text, size_t size) {
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
        snprintf(text, size, "%s has compute capability %d.%d, and kernels need 8.0 or newer", device->name,
                 device->major, device->minor);
    else
        snprintf(text, size, "%s has compute capability %d.%d and %d KiB of shared memory, and there "
                             "are kernels for %s",
                 device->name, device->major, device->minor, device->shared_bytes / 1024, names);
}

void qc_tell_missing(size_t missing, size_t all, int ordinal) {
    const struct qc_device *device = qc_find_device(ordinal == QC_ANY_DEVICE ? 0 : ordinal);
    char reason[320], on[32] = "";
    if (device) qc_explain(device, reason, sizeof reason);
    else if (*qc_device_problem()) snprintf(reason, sizeof reason, "%s", qc_device_problem());
    else snprintf(reason, sizeof reason, "there is no such GPU");
    if (ordinal > 0) snprintf(on, sizeof on, " on GPU %d", ordinal);
    fprintf(stderr, "%s: %zu of %zu ops run as their function bodies%s, without kernels: %s\n",
            qc_domain, missing, all, on, reason);
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
    if (qc_fork_problem()) return qc_error(op, "%s: %s", message, qc_fork_problem());
    return qc_error(op, "%s: %s (%s)", message, name ? name : "unknown error", text ? text : "?");
}

static int retain(struct qc_device *device) {
    int handle = 0, result = 0;
    qc_lock();
    if (!device->context) {
        result = qc_driver.device(&handle, device->ordinal);
        /* Kept for good: modules and weights live in it. */
        if (!result) result = qc_driver.retain_context(&device->context, handle);
    }
    qc_unlock();
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
    qc_lock();
    int result = load(device, variant, module);
    qc_unlock();
    return qc_cuda_check(op, result, "cannot load the %s kernels on GPU %d (%s)",
                         variant->isa->name, device->ordinal, device->name);
}
