/* Timed loops for limits.py and gemm.py: what the machine can do, and the kernels' own loops, on 1 or 2 threads.
 *
 * Every measurement starts its threads together from a spinning barrier, because waking a sleeping
 * thread takes longer than a small matrix multiplication. */
#include <immintrin.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define AVX2 __attribute__((target("avx2,fma")))

typedef void (*accumulate)(const uint8_t *, const int8_t *, const int32_t *, int32_t *, int32_t,
                           int32_t, int32_t);
/* Of rows that are split: counts, groups and values of what they lack follow `init`. */
typedef void (*accumulate_split)(const uint8_t *, const int8_t *, const int32_t *, const int32_t *,
                                 const int32_t *, const int32_t *, int32_t *, int32_t, int32_t,
                                 int32_t);

struct work {
    void (*run)(const struct work *, int thread, int threads);
    void *kernel;
    const uint8_t *q;
    const int8_t *weights; /* also the memory that `stream` reads */
    const int32_t *init;
    const int32_t *counts; /* all 0: nothing is lacking; NULL: rows are not split */
    int32_t *y;
    int32_t rows, panels;
    int64_t amount; /* peak: iterations; stream: bytes */
};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* 12 independent accumulators: products have a latency of 4 to 5 cycles and start twice in each. */
#define TWELVE                                                                                     \
    STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11)

AVX512 static void peak_avx512_vnni(const struct work *work, int thread, int threads) {
    (void)thread, (void)threads;
    __m512i sum[12], ones = _mm512_set1_epi8(1);
    for (int i = 0; i < 12; i++) sum[i] = _mm512_setzero_si512();
    for (int64_t n = 0; n < work->amount; n++) {
#define STEP(i) __asm__ volatile("vpdpbusd %1, %1, %0" : "+v"(sum[i]) : "v"(ones));
        TWELVE
#undef STEP
    }
}

AVX2 static void peak_avx_vnni(const struct work *work, int thread, int threads) {
    (void)thread, (void)threads;
    __m256i sum[12], ones = _mm256_set1_epi8(1);
    for (int i = 0; i < 12; i++) sum[i] = _mm256_setzero_si256();
    for (int64_t n = 0; n < work->amount; n++) {
#define STEP(i) __asm__ volatile("%{vex%} vpdpbusd %1, %1, %0" : "+x"(sum[i]) : "x"(ones));
        TWELVE
#undef STEP
    }
}

AVX2 static void peak_avx2(const struct work *work, int thread, int threads) {
    (void)thread, (void)threads;
    __m256i sum[12], product, ones = _mm256_set1_epi16(1);
    for (int i = 0; i < 12; i++) sum[i] = _mm256_setzero_si256();
    for (int64_t n = 0; n < work->amount; n++) {
#define STEP(i)                                                                                    \
    __asm__ volatile("vpmaddubsw %2, %2, %1\n\tvpmaddwd %2, %1, %1\n\tvpaddd %1, %0, %0"          \
                     : "+x"(sum[i]), "=&x"(product)                                                \
                     : "x"(ones));
        TWELVE
#undef STEP
    }
}

AVX512 static void float_peak_zmm(const struct work *work, int thread, int threads) {
    (void)thread, (void)threads;
    __m512 sum[12], ones = _mm512_set1_ps(1);
    for (int i = 0; i < 12; i++) sum[i] = _mm512_setzero_ps();
    for (int64_t n = 0; n < work->amount; n++) {
#define STEP(i) __asm__ volatile("vfmadd231ps %1, %1, %0" : "+v"(sum[i]) : "v"(ones));
        TWELVE
#undef STEP
    }
}

AVX2 static void float_peak_ymm(const struct work *work, int thread, int threads) {
    (void)thread, (void)threads;
    __m256 sum[12], ones = _mm256_set1_ps(1);
    for (int i = 0; i < 12; i++) sum[i] = _mm256_setzero_ps();
    for (int64_t n = 0; n < work->amount; n++) {
#define STEP(i) __asm__ volatile("vfmadd231ps %1, %1, %0" : "+x"(sum[i]) : "x"(ones));
        TWELVE
#undef STEP
    }
}

/* Reads the thread's share once, as two streams. */
AVX2 static void stream(const struct work *work, int thread, int threads) {
    const int64_t half = work->amount / threads / 2;
    const int8_t *a = work->weights + 2 * half * thread, *b = a + half;
    __m256i sum = _mm256_setzero_si256(), other = sum;
    for (int64_t i = 0; i < half; i += 32) {
        sum = _mm256_xor_si256(sum, _mm256_loadu_si256((const __m256i *)(a + i)));
        other = _mm256_xor_si256(other, _mm256_loadu_si256((const __m256i *)(b + i)));
    }
    __asm__ volatile("" : : "x"(sum), "x"(other));
}

static void loop(const struct work *work, int thread, int threads) {
    const int32_t begin = work->panels * thread / threads;
    const int32_t end = work->panels * (thread + 1) / threads, *none = work->counts;
    if (none)
        ((accumulate_split)work->kernel)(work->q, work->weights, work->init, none, none, none,
                                         work->y, work->rows, begin, end);
    else
        ((accumulate)work->kernel)(work->q, work->weights, work->init, work->y, work->rows, begin,
                                   end);
}

struct crew {
    const struct work *work;
    int threads, repeats;
    atomic_int round, finished;
};

static void *helper(void *argument) {
    struct crew *crew = argument;
    for (int round = 1; round <= crew->repeats; round++) {
        while (atomic_load(&crew->round) < round) _mm_pause();
        crew->work->run(crew->work, 1, crew->threads);
        atomic_fetch_add(&crew->finished, 1);
    }
    return NULL;
}

/* Runs `work` `repeats` times and notes the seconds of each. */
static void measure(const struct work *work, int threads, int repeats, double *seconds) {
    struct crew crew = {.work = work, .threads = threads, .repeats = repeats};
    pthread_t other;
    if (threads == 2 && pthread_create(&other, NULL, helper, &crew)) return;
    for (int round = 1; round <= repeats; round++) {
        double start = now();
        atomic_store(&crew.round, round);
        work->run(work, 0, threads);
        while (atomic_load(&crew.finished) < (threads - 1) * round) _mm_pause();
        seconds[round - 1] = now() - start;
    }
    if (threads == 2) pthread_join(other, NULL);
}

#define MEASURE_PEAK(peak)                                                                         \
    __attribute__((visibility("default"))) void measure_##peak(int64_t iterations, int threads,    \
                                                               int repeats, double *seconds) {     \
        measure(&(struct work){.run = peak, .amount = iterations}, threads, repeats, seconds);     \
    }
MEASURE_PEAK(peak_avx512_vnni)
MEASURE_PEAK(peak_avx_vnni)
MEASURE_PEAK(peak_avx2)
MEASURE_PEAK(float_peak_zmm)
MEASURE_PEAK(float_peak_ymm)

__attribute__((visibility("default"))) void measure_stream(const int8_t *memory, int64_t bytes,
                                                           int threads, int repeats,
                                                           double *seconds) {
    struct work work = {.run = stream, .weights = memory, .amount = bytes};
    measure(&work, threads, repeats, seconds);
}

__attribute__((visibility("default"))) void measure_loop(
    void *kernel, const uint8_t *q, const int8_t *weights, const int32_t *init,
    const int32_t *counts, int32_t *y, int32_t rows, int32_t panels, int threads, int repeats,
    double *seconds) {
    struct work work = {loop, kernel, q, weights, init, counts, y, rows, panels, 0};
    measure(&work, threads, repeats, seconds);
}
