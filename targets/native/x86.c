/* x86 instruction sets: what this CPU and operating system can run, and the layouts they read. */
#include <cpuid.h>
#include <immintrin.h>
#include <string.h>

#include "qcompiler.h"

/* The kernels are compiled for "cascadelake": AVX-512 F, CD, BW, DQ, VL and VNNI, FMA and BMI. */
static int avx512_vnni_is_available(void) {
    const unsigned fma = 1u << 12, osxsave = 1u << 27;
    const unsigned leaf7_b = 1u << 3 | 1u << 5 | 1u << 8 | /* BMI1, AVX2, BMI2 */
                             1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31;
    const unsigned vnni = 1u << 11;
    const unsigned zmm_state = 0xe6; /* the operating system saves xmm, ymm, zmm and masks */
    unsigned a, b, c, d, saved, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & (fma | osxsave)) != (fma | osxsave)) return 0;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if ((saved & zmm_state) != zmm_state) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    return (b & leaf7_b) == leaf7_b && (c & vnni);
}

/* And those compiled for "cooperlake", for the ops that have one: AVX512-BF16 too. */
static int avx512_bf16_is_available(void) {
    unsigned a, b, c, d;
    return avx512_vnni_is_available() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5);
}

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))

/* Rows k .. k + 3 of 16 columns, so that each 32-bit lane has the four values of its column. */
AVX512 static __m512i load_quad(const int8_t *w, int64_t n, int64_t rows, __mmask16 columns) {
    __m128i row[4];
    for (int i = 0; i < 4; i++)
        row[i] = i < rows ? _mm_maskz_loadu_epi8(columns, w + i * n) : _mm_setzero_si128();
    __m128i low01 = _mm_unpacklo_epi8(row[0], row[1]), high01 = _mm_unpackhi_epi8(row[0], row[1]);
    __m128i low23 = _mm_unpacklo_epi8(row[2], row[3]), high23 = _mm_unpackhi_epi8(row[2], row[3]);
    __m512i quad = _mm512_castsi128_si512(_mm_unpacklo_epi16(low01, low23));
    quad = _mm512_inserti32x4(quad, _mm_unpackhi_epi16(low01, low23), 1);
    quad = _mm512_inserti32x4(quad, _mm_unpacklo_epi16(high01, high23), 2);
    return _mm512_inserti32x4(quad, _mm_unpackhi_epi16(high01, high23), 3);
}

/* To [panel][ceil(k / 4)][vectors * 64], in blocks of 64 rows: within one, each panel is written in
 * 64-byte pieces next to each other and no more than 64 pages of w are open. */
AVX512 static void pack_w8(const int8_t *w, int64_t k, int64_t n, int vectors, int8_t *packed,
                           int32_t *init) {
    enum { BLOCK_QUADS = 16 };
    const __m512i zero_point = _mm512_set1_epi8((char)128);
    const int64_t quads = (k + 3) / 4, all_vectors = (n + 15) / 16;
    const int64_t panels = (all_vectors + vectors - 1) / vectors;
    memset(init, 0, (size_t)(panels * vectors) * 64);
    for (int64_t first = 0; first < quads; first += BLOCK_QUADS) {
        int64_t last = first + BLOCK_QUADS < quads ? first + BLOCK_QUADS : quads;
        for (int64_t vector = 0; vector < panels * vectors; vector++) {
            int64_t left = n - vector * 16, panel = vector / vectors;
            __mmask16 columns = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1 << left) - 1);
            int8_t *target = packed + (panel * quads * vectors + vector % vectors) * 64;
            __m512i sum = _mm512_setzero_si512();
            for (int64_t quad = first; quad < last; quad++) {
                const int8_t *source = w + quad * 4 * n + (left > 0 ? vector * 16 : 0);
                __m512i values = load_quad(source, n, k - quad * 4, columns);
                _mm512_store_si512(target + quad * vectors * 64, values);
                sum = _mm512_dpbusd_epi32(sum, zero_point, values);
            }
            __m512i before = _mm512_loadu_si512(init + vector * 16);
            _mm512_storeu_si512(init + vector * 16, _mm512_sub_epi32(before, sum));
        }
    }
}

const struct qc_isa qc_avx512_vnni = {"avx512-vnni", avx512_vnni_is_available, pack_w8};
const struct qc_isa qc_avx512_bf16 = {"avx512-bf16", avx512_bf16_is_available, pack_w8};
