/* An application in C, without Python: runs a model through a custom-op library.
 *
 * host libonnxruntime.so library.so model.onnx M K N  <x.f32  >y.f32 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#include "ort_abi.h"

typedef struct OrtEnv OrtEnv;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtRunOptions OrtRunOptions;
typedef struct OrtSession OrtSession;

/* Entries of OrtApi that only an application needs. */
enum {
    GET_ERROR_MESSAGE = 2,
    CREATE_ENV = 3,
    CREATE_SESSION = 7,
    RUN = 9,
    CREATE_SESSION_OPTIONS = 10,
    CREATE_TENSOR = 49,
    GET_TENSOR_DATA = 51,
    CREATE_CPU_MEMORY_INFO = 69,
    RELEASE_ENV = 92,
    RELEASE_SESSION = 95,
    REGISTER_LIBRARY = 228,
};

static void *const *api;

static void check(OrtStatus *status) {
    if (!status) return;
    fprintf(stderr, "%s\n", ((const char *(*)(OrtStatus *))api[GET_ERROR_MESSAGE])(status));
    exit(1);
}

/* Calls entry `index` with parameters of the types in parentheses. */
#define CALL(index, types, ...) check(((OrtStatus * (*)types) api[index])(__VA_ARGS__))

static OrtSession *open_session(OrtEnv *env, const char *library, const char *model) {
    OrtSessionOptions *options;
    OrtSession *session;
    CALL(CREATE_SESSION_OPTIONS, (OrtSessionOptions **), &options);
    CALL(REGISTER_LIBRARY, (OrtSessionOptions *, const char *), options, library);
    CALL(CREATE_SESSION, (OrtEnv *, const char *, OrtSessionOptions *, OrtSession **), env, model,
         options, &session);
    return session;
}

static float *run(OrtSession *session, float *x, int64_t m, int64_t k) {
    const char *input = "x", *output = "y";
    const int64_t shape[] = {m, k};
    OrtMemoryInfo *memory;
    OrtValue *tensor, *result = NULL;
    void *data;
    CALL(CREATE_CPU_MEMORY_INFO, (int, int, OrtMemoryInfo **), 0, 0, &memory);
    CALL(CREATE_TENSOR,
         (OrtMemoryInfo *, void *, size_t, const int64_t *, size_t, int, OrtValue **), memory, x,
         (size_t)(m * k) * sizeof *x, shape, 2, ORT_FLOAT, &tensor);
    CALL(RUN,
         (OrtSession *, OrtRunOptions *, const char **, OrtValue **, size_t, const char **, size_t,
          OrtValue **),
         session, NULL, &input, &tensor, 1, &output, 1, &result);
    CALL(GET_TENSOR_DATA, (OrtValue *, void **), result, &data);
    return data;
}

int main(int count, char **arguments) {
    if (count != 7) return 2;
    void *runtime = dlopen(arguments[1], RTLD_NOW);
    if (!runtime) return fprintf(stderr, "%s\n", dlerror()), 1;
    OrtApiBase *(*get_base)(void) = (OrtApiBase * (*)(void)) dlsym(runtime, "OrtGetApiBase");
    api = get_base()->GetApi(QC_ORT_API_VERSION);
    const int64_t m = atoll(arguments[4]), k = atoll(arguments[5]), n = atoll(arguments[6]);
    float *x = malloc((size_t)(m * k) * sizeof *x);
    if (!x || fread(x, sizeof *x, (size_t)(m * k), stdin) != (size_t)(m * k)) return 1;

    OrtEnv *env;
    CALL(CREATE_ENV, (int, const char *, OrtEnv **), 3, "host", &env);
    OrtSession *session = open_session(env, arguments[2], arguments[3]);
    const float *y = run(session, x, m, k);
    fwrite(y, sizeof *y, (size_t)(m * n), stdout);
    ((void (*)(OrtSession *))api[RELEASE_SESSION])(session);
    ((void (*)(OrtEnv *))api[RELEASE_ENV])(env);
    return 0;
}
