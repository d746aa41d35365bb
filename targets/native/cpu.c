/* What this CPU and its operating system can run. */
#include "qcompiler.h"

#if defined(__x86_64__)
#include <cpuid.h>

static int has(unsigned value, unsigned bits) { return (value & bits) == bits; }

/* Whether the operating system saves these registers; asked only where there is XGETBV. */
static int saves(unsigned state) {
    unsigned saved, high;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    return has(saved, state);
}

/* The kernels are compiled for "haswell": AVX2, FMA, F16C, BMI 1 and 2, MOVBE, POPCNT, LZCNT. */
int qc_has_avx2(void) {
    const unsigned fma = 1u << 12, movbe = 1u << 22, popcnt = 1u << 23, osxsave = 1u << 27;
    const unsigned avx = 1u << 28, f16c = 1u << 29, lzcnt = 1u << 5;
    const unsigned leaf7_b = 1u << 3 | 1u << 5 | 1u << 8; /* BMI1, AVX2, BMI2 */
    const unsigned xmm_ymm = 0x6;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    if (!has(c, fma | movbe | popcnt | osxsave | avx | f16c) || !saves(xmm_ymm)) return 0;
    if (!__get_cpuid(0x80000001, &a, &b, &c, &d) || !has(c, lzcnt)) return 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && has(b, leaf7_b);
}

int qc_has_avx_vnni(void) {
    unsigned a, b, c, d;
    return qc_has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && has(a, 1u << 4);
}

/* For "cascadelake": AVX-512 F, DQ, CD, BW, VL and VNNI too. */
int qc_has_avx512_vnni(void) {
    const unsigned leaf7_b = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31;
    const unsigned vnni = 1u << 11, xmm_ymm_zmm_masks = 0xe6;
    unsigned a, b, c, d;
    if (!qc_has_avx2() || !saves(xmm_ymm_zmm_masks)) return 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && has(b, leaf7_b) && has(c, vnni);
}

/* For "cooperlake", for the ops that have such kernels: AVX512-BF16 too. */
int qc_has_avx512_bf16(void) {
    unsigned a, b, c, d;
    return qc_has_avx512_vnni() && __get_cpuid_count(7, 1, &a, &b, &c, &d) &&
           has(a, 1u << 5);
}

int qc_sums_saturate(void) { return !qc_has_avx_vnni() && !qc_has_avx512_vnni(); }
#else
int qc_sums_saturate(void) { return 0; }
#endif
