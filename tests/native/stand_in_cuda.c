/* A CUDA driver without a GPU: memory is the host's, launches are noted, and a test may run a function
 * of its own in the place of a kernel.  tests/stand_in.py sets it up. */
#define _POSIX_C_SOURCE 200809L
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MAX_DEVICES = 4, MAX_LAUNCHES = 256, MAX_ARGUMENTS = 16, MAX_SYMBOLS = 256 };
enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100,
       INVALID_CONTEXT = 201, NO_BINARY = 209, INVALID_HANDLE = 400, NOT_FOUND = 500,
       CAPTURE_UNSUPPORTED = 900 };
enum { MAJOR = 75, MINOR = 76, SHARED_BYTES = 97, MAX_SHARED_ATTRIBUTE = 8 };

struct device {
    char name[64];
    int major, minor, shared_bytes;
};

struct symbol {
    char name[160];
    int arguments, numbers; /* how many it takes, and how many of them, the last, are int32 */
    void (*run)(void **arguments, const unsigned *grid); /* NULL: nothing happens */
};

struct record {
    char symbol[160];
    unsigned grid[3], threads, shared_bytes, shared_limit;
    void *stream, *context;
    uint64_t arguments[MAX_ARGUMENTS];
};

/* Set by tests. */
int stand_in_version = 13000, stand_in_device_count, stand_in_failing_code;
int stand_in_is_capturing; /* nothing may wait or allocate */
int stand_in_load_milliseconds;
char stand_in_failing[64]; /* the function that fails with that code */
size_t stand_in_memory = (size_t)1 << 40;
struct device stand_in_devices[MAX_DEVICES];
struct symbol stand_in_symbols[MAX_SYMBOLS];
int stand_in_symbol_count;

/* Read by tests. */
struct record stand_in_launches[MAX_LAUNCHES];
int stand_in_launch_count, stand_in_allocations, stand_in_pushes, stand_in_modules;
size_t stand_in_used;

static _Thread_local void *contexts[8];
static _Thread_local int depth;
static pid_t process; /* the one that initialized it; it is of no use to those forked from that */

static int fails(const char *function) {
    return strcmp(function, stand_in_failing) == 0 ? stand_in_failing_code : OK;
}

#define FAIL_IF_ASKED                                                                              \
    do {                                                                                           \
        int code_ = getpid() != process ? NOT_INITIALIZED : fails(__func__);                       \
        if (code_) return code_;                                                                   \
    } while (0)

#define FAIL_IN_A_CAPTURE                                                                          \
    do {                                                                                           \
        FAIL_IF_ASKED;                                                                             \
        if (stand_in_is_capturing) return CAPTURE_UNSUPPORTED;                                     \
    } while (0)

static void *current(void) { return depth ? contexts[depth - 1] : NULL; }

static void *context_of(int device) { return (void *)(uintptr_t)(0x1000 + device); }

int cuInit(unsigned flags) {
    (void)flags;
    if (!process) process = getpid();
    FAIL_IF_ASKED;
    return stand_in_device_count ? OK : NO_DEVICE;
}

int cuDriverGetVersion(int *version) {
    *version = stand_in_version;
    return OK;
}

int cuGetErrorName(int code, const char **name) {
    *name = code == INVALID_VALUE     ? "CUDA_ERROR_INVALID_VALUE"
            : code == OUT_OF_MEMORY   ? "CUDA_ERROR_OUT_OF_MEMORY"
            : code == INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT"
            : code == NO_BINARY       ? "CUDA_ERROR_NO_BINARY_FOR_GPU"
            : code == NOT_FOUND       ? "CUDA_ERROR_NOT_FOUND"
            : code == NOT_INITIALIZED ? "CUDA_ERROR_NOT_INITIALIZED"
            : code == INVALID_HANDLE  ? "CUDA_ERROR_INVALID_HANDLE"
            : code == CAPTURE_UNSUPPORTED ? "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
                                      : NULL;
    return *name ? OK : INVALID_VALUE;
}

int cuGetErrorString(int code, const char **text) {
    *text = code == OUT_OF_MEMORY ? "out of memory" : "what it means";
    return OK;
}

int cuDeviceGetCount(int *count) {
    *count = stand_in_device_count;
    return OK;
}

int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return OK;
}

int cuDeviceGetName(char *name, int size, int device) {
    snprintf(name, (size_t)size, "%s", stand_in_devices[device].name);
    return OK;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    const struct device *found = &stand_in_devices[device];
    *value = attribute == MAJOR ? found->major : attribute == MINOR ? found->minor
             : attribute == SHARED_BYTES ? found->shared_bytes : -1;
    return *value < 0 ? INVALID_VALUE : OK;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    FAIL_IF_ASKED;
    *context = context_of(device);
    return OK;
}

#ifndef OLD_DRIVER
int cuCtxGetCurrent(void **context) {
    FAIL_IF_ASKED;
    *context = current();
    return OK;
}
#endif

int cuCtxPushCurrent_v2(void *context) {
    FAIL_IF_ASKED;
    stand_in_pushes++;
    contexts[depth++] = context;
    return OK;
}

int cuCtxPopCurrent_v2(void **context) {
    *context = contexts[--depth];
    return OK;
}

/* --- kernels ---------------------------------------------------------------------------------- */

struct module {
    const unsigned char *image;
    void *context;
};

struct function {
    char name[160];
    int shared_limit;
    void *context;
};

/* The end of what the section headers of an ELF file describe. */
static size_t size_of_elf(const unsigned char *image) {
    uint64_t offset, end;
    uint16_t count;
    memcpy(&offset, image + 40, 8);
    memcpy(&count, image + 60, 2);
    end = offset + 64u * count;
    for (int i = 0; i < count; i++) {
        const unsigned char *section = image + offset + 64u * (unsigned)i;
        uint64_t at, size;
        memcpy(&at, section + 24, 8);
        memcpy(&size, section + 32, 8);
        if (at + size > end) end = at + size;
    }
    return end;
}

static void sleep_for(int milliseconds) {
    nanosleep(&(struct timespec){milliseconds / 1000, milliseconds % 1000 * 1000000L}, NULL);
}

int cuModuleLoadData(void **module, const void *image) {
    FAIL_IN_A_CAPTURE;
    if (!depth) return INVALID_CONTEXT;
    if (memcmp(image, "\177ELF", 4)) return NO_BINARY;
    stand_in_modules++;
    sleep_for(stand_in_load_milliseconds);
    struct module *made = malloc(sizeof *made);
    *made = (struct module){image, current()};
    *module = made;
    return OK;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
    FAIL_IN_A_CAPTURE;
    const struct module *loaded = module;
    const unsigned char *image = loaded->image;
    if (loaded->context != current()) return INVALID_CONTEXT;
    const size_t length = strlen(name) + 1, size = size_of_elf(image);
    for (size_t i = 0; i + length <= size; i++)
        if (memcmp(image + i, name, length) == 0) {
            struct function *made = calloc(1, sizeof *made);
            snprintf(made->name, sizeof made->name, "%s", name);
            made->context = loaded->context;
            *function = made;
            return OK;
        }
    return NOT_FOUND;
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
    FAIL_IN_A_CAPTURE;
    if (attribute != MAX_SHARED_ATTRIBUTE) return INVALID_VALUE;
    ((struct function *)function)->shared_limit = value;
    return OK;
}

static const struct symbol *find_symbol(const char *name) {
    for (int i = 0; i < stand_in_symbol_count; i++)
        if (strcmp(stand_in_symbols[i].name, name) == 0) return &stand_in_symbols[i];
    return NULL;
}

int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads,
                   unsigned threads_y, unsigned threads_z, unsigned shared, void *stream,
                   void **arguments, void **extra) {
    FAIL_IF_ASKED;
    const struct function *kernel = function;
    const struct symbol *symbol = find_symbol(kernel->name);
    const unsigned grid[] = {x, y, z};
    if (!symbol || !depth) return symbol ? INVALID_CONTEXT : NOT_FOUND;
    if (kernel->context != current()) return INVALID_HANDLE;
    if (threads_y != 1 || threads_z != 1 || extra || threads > 1024 || y > 65535 || z > 65535 ||
        !x || !y || !z || (shared > 48 * 1024 && (int)shared > kernel->shared_limit))
        return INVALID_VALUE;
    struct record *record = &stand_in_launches[stand_in_launch_count++ % MAX_LAUNCHES];
    memset(record, 0, sizeof *record);
    snprintf(record->symbol, sizeof record->symbol, "%s", kernel->name);
    memcpy(record->grid, grid, sizeof grid);
    record->threads = threads;
    record->shared_bytes = shared;
    record->shared_limit = (unsigned)kernel->shared_limit;
    record->stream = stream;
    record->context = contexts[depth - 1];
    for (int i = 0; i < symbol->arguments; i++) {
        size_t size = i + symbol->numbers >= symbol->arguments ? 4 : 8;
        memcpy(&record->arguments[i], arguments[i], size);
    }
    if (symbol->run) symbol->run(arguments, grid);
    return OK;
}

/* --- memory ----------------------------------------------------------------------------------- */

/* The size and the context lie before what is handed out. */
enum { HEADER = 256 };

struct block {
    size_t bytes;
    void *context;
};

int cuMemAlloc_v2(uint64_t *pointer, size_t bytes) {
    FAIL_IN_A_CAPTURE;
    if (!depth) return INVALID_CONTEXT;
    if (bytes == 0) return INVALID_VALUE;
    if (stand_in_used + bytes > stand_in_memory) return OUT_OF_MEMORY;
    struct block *memory = aligned_alloc(HEADER, HEADER + (bytes + HEADER - 1) / HEADER * HEADER);
    *memory = (struct block){bytes, current()};
    stand_in_used += bytes;
    stand_in_allocations++;
    *pointer = (uintptr_t)memory + HEADER;
    return OK;
}

int cuMemFree_v2(uint64_t pointer) {
    FAIL_IN_A_CAPTURE;
    struct block *memory = (void *)(uintptr_t)(pointer - HEADER);
    if (memory->context != current()) return INVALID_VALUE;
    stand_in_used -= memory->bytes;
    stand_in_allocations--;
    free(memory);
    return OK;
}

int cuMemcpyHtoD_v2(uint64_t target, const void *source, size_t bytes) {
    FAIL_IN_A_CAPTURE;
    if (!depth) return INVALID_CONTEXT;
    memcpy((void *)(uintptr_t)target, source, bytes);
    return OK;
}

int cuMemGetInfo_v2(size_t *free_bytes, size_t *all_bytes) {
    *free_bytes = stand_in_memory - stand_in_used;
    *all_bytes = stand_in_memory;
    return OK;
}

/* --- for programs that use a GPU by themselves ------------------------------------------------ */

int cuStreamCreate(void **stream, unsigned flags) {
    (void)flags;
    *stream = (void *)0x5000;
    return OK;
}

static int check_stream(void *stream) { return stream == (void *)0x5000 ? OK : INVALID_VALUE; }

/* The library waits for the default stream. */
int cuStreamSynchronize(void *stream) {
    FAIL_IN_A_CAPTURE;
    return stream ? check_stream(stream) : OK;
}

int cuMemcpyDtoH_v2(void *target, uint64_t source, size_t bytes) {
    memcpy(target, (void *)(uintptr_t)source, bytes);
    return OK;
}

int cuMemcpyDtoDAsync_v2(uint64_t target, uint64_t source, size_t bytes, void *stream) {
    memcpy((void *)(uintptr_t)target, (void *)(uintptr_t)source, bytes);
    return check_stream(stream);
}

/* Work is done where it is captured; a graph holds none. */
int cuStreamBeginCapture_v2(void *stream, int mode) {
    (void)mode;
    return check_stream(stream);
}

int cuStreamEndCapture(void *stream, void **graph) {
    *graph = (void *)0x6000;
    return check_stream(stream);
}

int cuGraphInstantiateWithFlags(void **ready, void *graph, unsigned long long flags) {
    *ready = (void *)0x7000;
    return graph == (void *)0x6000 && !flags ? OK : INVALID_VALUE;
}

int cuGraphLaunch(void *ready, void *stream) {
    return ready == (void *)0x7000 ? check_stream(stream) : INVALID_VALUE;
}

int cuEventCreate(void **event, unsigned flags) {
    (void)flags;
    *event = (void *)0x8000;
    return OK;
}

int cuEventRecord(void *event, void *stream) {
    return event == (void *)0x8000 ? check_stream(stream) : INVALID_VALUE;
}

int cuEventElapsedTime(float *milliseconds, void *begin, void *end) {
    *milliseconds = 1;
    return begin && end ? OK : INVALID_VALUE;
}
