/* Timed loops for norm.py: the kernel, and moving the bytes it moves, on 1 or 2 threads. */
#include <immintrin.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx512f,avx512bw")))

typedef void (*norm)(const float *a, const float *b, const float *gamma, const float *beta,
                     float *y, uint8_t *q, float *s, int32_t rows);
typedef void (*smoothed_norm)(const float *a, const float *b, const float *gamma, const float *beta,
                              const float *smoothing, float *y, uint8_t *q, float *s, int32_t rows);

struct work {
    norm kernel; /* both NULL: only move bytes */
    smoothed_norm smoothed;
    const float *a, *b, *gamma, *beta, *smoothing;
    float *y;
    uint8_t *q;
    float *s;
    int64_t rows, k;
    int64_t wide; /* move bytes in vectors of 64 */
};

/* y = a + b and a quarter as many bytes to q: the least that a residual, y and q can cost. */
AVX512 static void stream_zmm(const struct work *work, int64_t begin, int64_t end) {
    const float *a = work->a, *b = work->b; /* once: what is stored might be *work */
    float *y = work->y;
    uint8_t *q = work->q;
    for (int64_t i = begin; i < end; i += 64) {
        __m512 sum[4];
        for (int j = 0; j < 4; j++) {
            sum[j] = _mm512_add_ps(_mm512_loadu_ps(a + i + 16 * j),
                                   _mm512_loadu_ps(b + i + 16 * j));
            _mm512_storeu_ps(y + i + 16 * j, sum[j]);
        }
        _mm512_storeu_si512(q + i, _mm512_castps_si512(sum[0]));
    }
}

AVX2 static void stream_ymm(const struct work *work, int64_t begin, int64_t end) {
    const float *a = work->a, *b = work->b;
    float *y = work->y;
    uint8_t *q = work->q;
    for (int64_t i = begin; i < end; i += 32) {
        __m256 sum[4];
        for (int j = 0; j < 4; j++) {
            sum[j] = _mm256_add_ps(_mm256_loadu_ps(a + i + 8 * j),
                                   _mm256_loadu_ps(b + i + 8 * j));
            _mm256_storeu_ps(y + i + 8 * j, sum[j]);
        }
        _mm256_storeu_si256((__m256i *)(q + i), _mm256_castps_si256(sum[0]));
    }
}

static void run(const struct work *w, int thread, int threads) {
    int64_t begin = w->rows * thread / threads, end = w->rows * (thread + 1) / threads;
    const float *a = w->a + begin * w->k, *b = w->b + begin * w->k;
    float *y = w->y + begin * w->k, *s = w->s + begin;
    uint8_t *q = w->q + begin * w->k;
    int32_t rows = (int32_t)(end - begin);
    if (w->kernel)
        w->kernel(a, b, w->gamma, w->beta, y, q, s, rows);
    else if (w->smoothed)
        w->smoothed(a, b, w->gamma, w->beta, w->smoothing, y, q, s, rows);
    else if (w->wide)
        stream_zmm(w, begin * w->k, end * w->k);
    else
        stream_ymm(w, begin * w->k, end * w->k);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

struct crew {
    const struct work *work;
    int repeats;
    atomic_int round, finished;
};

static void *helper(void *argument) {
    struct crew *crew = argument;
    for (int round = 1; round <= crew->repeats; round++) {
        while (atomic_load(&crew->round) < round) _mm_pause();
        run(crew->work, 1, 2);
        atomic_fetch_add(&crew->finished, 1);
    }
    return NULL;
}

/* Runs `work` `repeats` times, threads starting together from a barrier; the seconds of each. */
__attribute__((visibility("default"))) void measure(const struct work *work, int threads,
                                                    int repeats, double *seconds) {
    struct crew crew = {.work = work, .repeats = repeats};
    pthread_t other;
    if (threads == 2 && pthread_create(&other, NULL, helper, &crew)) return;
    for (int round = 1; round <= repeats; round++) {
        double start = now();
        atomic_store(&crew.round, round);
        run(work, 0, threads);
        while (atomic_load(&crew.finished) < (threads - 1) * round) _mm_pause();
        seconds[round - 1] = now() - start;
    }
    if (threads == 2) pthread_join(other, NULL);
}
