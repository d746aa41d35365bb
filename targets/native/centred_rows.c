/* Activations as kernels of int4 weights multiply them: int8, in whole chunks, with zeros at the end.
 *
 * Those weights are stored 8 more than they are, so that the sums of a chunk start at -8 times the sum
 * of its activations. */
#include <immintrin.h>
#include <string.h>

#include "qmatmul.h"

/* Bytes that a core centres in a nanosecond. */
static const double CENTRE_RATE = 16;
/* Bytes of a vector; chunks of as many come four at a time. */
enum { VECTOR = 32, EIGHT = 8, FOUR = 4 };

#define AVX2 __attribute__((target("avx2")))

/* Stores a vector of q less 128, and returns the sums of its eights as they were. */
AVX2 static inline __m256i centre_vector(const uint8_t *q, int8_t *centred) {
    const __m256i bytes = _mm256_loadu_si256((const __m256i *)q);
    const __m256i top = _mm256_set1_epi8((char)0x80);
    _mm256_storeu_si256((__m256i *)centred, _mm256_xor_si256(bytes, top));
    return _mm256_sad_epu8(bytes, _mm256_setzero_si256());
}

/* The same of eight. */
AVX2 static inline __m128i centre_eight(const uint8_t *q, int8_t *centred) {
    const __m128i bytes = _mm_loadl_epi64((const __m128i *)q);
    _mm_storel_epi64((__m128i *)centred, _mm_xor_si128(bytes, _mm_set1_epi8((char)0x80)));
    return _mm_sad_epu8(bytes, _mm_setzero_si128());
}

AVX2 static inline __m128i add_halves(__m256i sums) {
    return _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
}

/* Compilers vectorize a loop that does so only with some options. */
AVX2 static int32_t centre(const uint8_t *q, int64_t count, int8_t *centred) {
    __m256i vectors = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + VECTOR <= count; i += VECTOR)
        vectors = _mm256_add_epi64(vectors, centre_vector(q + i, centred + i));
    __m128i halves = add_halves(vectors);
    for (; i + EIGHT <= count; i += EIGHT)
        halves = _mm_add_epi64(halves, centre_eight(q + i, centred + i));
    int32_t sum = (int32_t)(_mm_cvtsi128_si64(halves) + _mm_extract_epi64(halves, 1));
    for (; i < count; i++) {
        centred[i] = (int8_t)(q[i] ^ 0x80);
        sum += q[i];
    }
    return sum - 128 * (int32_t)count;
}

/* Four chunks of a vector each: the sums of eights are less than 2^11, those of a chunk than 2^13. */
AVX2 static void centre_four(const uint8_t *q, int8_t *centred, int32_t *starts) {
    __m256i sums = centre_vector(q, centred);
    sums = _mm256_or_si256(
        sums, _mm256_slli_epi64(centre_vector(q + VECTOR, centred + VECTOR), 16));
    sums = _mm256_or_si256(
        sums, _mm256_slli_epi64(centre_vector(q + 2 * VECTOR, centred + 2 * VECTOR), 32));
    sums = _mm256_or_si256(
        sums, _mm256_slli_epi64(centre_vector(q + 3 * VECTOR, centred + 3 * VECTOR), 48));
    const __m128i halves = add_halves(sums);
    const __m128i of_chunks =
        _mm_cvtepu16_epi32(_mm_add_epi64(halves, _mm_unpackhi_epi64(halves, halves)));
    const __m128i less = _mm_sub_epi32(_mm_set1_epi32(128 * VECTOR), of_chunks);
    _mm_storeu_si128((__m128i *)starts, _mm_slli_epi32(less, 3));
}

static void centre_row(const struct centred_rows *rows, int64_t row) {
    const uint8_t *q = rows->q + row * rows->k;
    int8_t *target = rows->centred + row * rows->chunk * rows->chunks;
    int32_t *starts = rows->starts + row * rows->chunks;
    int64_t chunk = 0;
    if (rows->chunk == VECTOR)
        for (; (chunk + FOUR) * VECTOR <= rows->k; chunk += FOUR)
            centre_four(q + chunk * VECTOR, target + chunk * VECTOR, starts + chunk);
    for (; chunk < rows->chunks; chunk++) {
        const int64_t first = chunk * rows->chunk;
        const int64_t count = max(min(rows->chunk, rows->k - first), 0);
        starts[chunk] = -8 * centre(q + first, count, target + first);
        if (count < rows->chunk) memset(target + first + count, 0, (size_t)(rows->chunk - count));
    }
}

static size_t rounded(int64_t bytes) { return ((size_t)bytes + 63) / 64 * 64; }

size_t qc_plan_centred(const struct centred_rows *rows) {
    const int64_t chunks = rows->rows * rows->chunks;
    return rounded(chunks * rows->chunk) + rounded(chunks * (int64_t)sizeof(int32_t));
}

void qc_place_centred(struct centred_rows *rows, char *memory) {
    rows->centred = (int8_t *)memory;
    rows->starts = (int32_t *)(memory + rounded(rows->rows * rows->chunks * rows->chunk));
}

static void centre_task(void *argument, size_t index) {
    const struct centred_rows *rows = argument;
    const int64_t end = rows->rows * ((int64_t)index + 1) / rows->tasks;
    for (int64_t row = rows->rows * (int64_t)index / rows->tasks; row < end; row++)
        centre_row(rows, row);
}

OrtStatus *qc_centre(struct centred_rows *rows, OrtKernelContext *context) {
    rows->tasks = min(qc_task_count((double)rows->rows * (double)rows->k / CENTRE_RATE), rows->rows);
    return qc_parallel(context, centre_task, (size_t)rows->tasks, rows);
}

void qc_read_centred(const struct centred_rows *rows, int64_t row, struct qc_qmatmul_args *args) {
    args->q = (const uint8_t *)rows->centred + row * rows->chunk * rows->chunks;
    args->init = rows->starts + row * rows->chunks;
}
