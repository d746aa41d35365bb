/* x86 instruction sets and the layouts that their kernels read. */
#include <immintrin.h>
#include <string.h>

#include "qcompiler.h"

#define AVX2 __attribute__((target("avx2")))

/* Rows of 16 columns: `rows` of them exist, and `columns` of each; the others are zeros. */
struct source {
    const int8_t *w;
    int64_t n, rows, columns;
};

AVX2 static __m128i load_row(const struct source *source, int64_t row) {
    int8_t part[16] = {0};
    if (row >= source->rows || source->columns <= 0) return _mm_setzero_si128();
    const int8_t *values = source->w + row * source->n;
    if (source->columns >= 16) return _mm_loadu_si128((const __m128i *)values);
    memcpy(part, values, (size_t)source->columns);
    return _mm_loadu_si128((const __m128i *)part);
}

/* Rows `row` and `row + 1`, column by column; adds both to the int16 sums of their columns. */
AVX2 static __m256i load_pair(const struct source *source, int64_t row, __m256i *sums) {
    __m128i first = load_row(source, row), second = load_row(source, row + 1);
    __m256i pair = _mm256_set_m128i(_mm_unpackhi_epi8(first, second),
                                    _mm_unpacklo_epi8(first, second));
    *sums = _mm256_add_epi16(*sums, _mm256_maddubs_epi16(_mm256_set1_epi8(1), pair));
    return pair;
}

/* Rows `row` to `row + 3`, so that each 32-bit lane of a product has those of its column. */
AVX2 static void pack_quad(const struct source *source, int64_t row, int8_t *target, __m256i *sums) {
    __m256i *vectors = (__m256i *)target;
    __m256i low = load_pair(source, row, sums), high = load_pair(source, row + 2, sums);
    __m256i even = _mm256_unpacklo_epi16(low, high), odd = _mm256_unpackhi_epi16(low, high);
    _mm256_storeu_si256(vectors, _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256(vectors + 1, _mm256_permute2x128_si256(even, odd, 0x31));
}

/* init -= 128 sums */
AVX2 static void subtract(int32_t *init, __m256i sums) {
    __m128i halves[] = {_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1)};
    for (int i = 0; i < 2; i++) {
        __m256i *target = (__m256i *)init + i;
        __m256i wide = _mm256_slli_epi32(_mm256_cvtepi16_epi32(halves[i]), 7);
        _mm256_storeu_si256(target, _mm256_sub_epi32(_mm256_loadu_si256(target), wide));
    }
}

/* To [panel][ceil(k / 4)][vectors * 64], in blocks of 64 rows: within one, each panel is written in
 * pieces next to each other, no more than 64 pages of w are open, and int16 holds the sums. */
AVX2 static void pack(const int8_t *w, int64_t k, int64_t n, int vectors, int8_t *packed,
                      int32_t *init) {
    enum { BLOCK_ROWS = 64, QUAD = 4 };
    const int64_t groups = (k + QUAD - 1) / QUAD, all_vectors = (n + 15) / 16;
    const int64_t panels = (all_vectors + vectors - 1) / vectors, bytes = 16 * QUAD;
    memset(init, 0, (size_t)(panels * vectors) * 64);
    for (int64_t first = 0; first < k; first += BLOCK_ROWS) {
        int64_t last = first + BLOCK_ROWS < k ? first + BLOCK_ROWS : k;
        for (int64_t vector = 0; vector < panels * vectors; vector++) {
            int64_t panel = vector / vectors, left = n - vector * 16;
            const struct source source = {left > 0 ? w + vector * 16 : w, n, k, left};
            int8_t *target = packed + (panel * groups * vectors + vector % vectors) * bytes;
            __m256i sums = _mm256_setzero_si256();
            for (int64_t row = first; row < last; row += QUAD)
                pack_quad(&source, row, target + row / QUAD * vectors * bytes, &sums);
            subtract(init + vector * 16, sums);
        }
    }
}

AVX2 static int64_t sum_row(const uint8_t *q, int64_t k) {
    __m256i sums = _mm256_setzero_si256(), zero = _mm256_setzero_si256();
    int64_t i = 0, parts[4], sum = 0;
    for (; i + 32 <= k; i += 32) {
        __m256i bytes = _mm256_loadu_si256((const __m256i *)(q + i));
        sums = _mm256_add_epi64(sums, _mm256_sad_epu8(bytes, zero));
    }
    _mm256_storeu_si256((__m256i *)parts, sums);
    for (int part = 0; part < 4; part++) sum += parts[part];
    for (; i < k; i++) sum += q[i];
    return sum;
}

void qc_sum_rows(const uint8_t *q, int64_t rows, int64_t k, uint8_t z, int32_t *sums) {
    for (int64_t row = 0; row < rows; row++)
        sums[row] = (int32_t)(sum_row(q + row * k, k) - k * z);
}

/* w + 128 as uint8, and the sums of its columns, as kernels that read split rows want them. */
static void pack_shifted(const int8_t *w, int64_t k, int64_t n, int vectors, int8_t *packed,
                         int32_t *init) {
    const int64_t columns = (n + 16 * vectors - 1) / (16 * vectors) * 16 * vectors;
    const int64_t bytes = (k + 3) / 4 * 4 * columns;
    pack(w, k, n, vectors, packed, init);
    for (int64_t i = 0; i < bytes; i++) packed[i] = (int8_t)(packed[i] ^ 0x80);
    for (int64_t i = 0; i < columns; i++) init[i] = -(init[i] >> 7);
}

const struct qc_isa qc_avx2 = {
    .name = "avx2",
    .is_available = qc_has_avx2,
    .pack_w8 = pack_shifted,
};
const struct qc_isa qc_avx_vnni = {
    .name = "avx-vnni",
    .is_available = qc_has_avx_vnni,
    .includes = &qc_avx2,
    .pack_w8 = pack,
};
const struct qc_isa qc_avx512_vnni = {
    .name = "avx512-vnni",
    .is_available = qc_has_avx512_vnni,
    .includes = &qc_avx2,
    .pack_w8 = pack,
};
const struct qc_isa qc_avx512_bf16 = {
    .name = "avx512-bf16",
    .is_available = qc_has_avx512_bf16,
    .includes = &qc_avx512_vnni,
    .pack_w8 = pack,
};

const struct qc_isa *const qc_all_isa[] = {&qc_avx512_bf16, &qc_avx512_vnni, &qc_avx_vnni, &qc_avx2,
                                           NULL};

void qc_tell_missing(size_t missing, size_t all, int device) {
    (void)missing, (void)all, (void)device; /* every CPU has ops that ONNX Runtime runs from their bodies */
}
