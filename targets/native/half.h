/* float16 and float8 e4m3 in plain C: no compiler flag and no processor is needed for them. */
#ifndef HALF_H
#define HALF_H

#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float qc_float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t qc_bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float qc_from_half(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return qc_float_of_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    /* The exponent's bias goes from 15 to 127; a product, so that denormals come out right. */
    return qc_float_of_bits(sign | rest << 13) * 0x1p112f;
}

/* Rounds to nearest, ties to even; what is too large becomes infinite. */
static inline uint16_t qc_to_half(float value) {
    const uint16_t sign = (uint16_t)(qc_bits_of_float(value) >> 16 & 0x8000);
    const float magnitude = fabsf(value);
    if (isnan(value)) return sign | 0x7e00;
    if (magnitude >= 65520) return sign | 0x7c00;
    if (magnitude < 0x1p-14f) return sign | (uint16_t)lrintf(magnitude * 0x1p24f);
    uint32_t bits = qc_bits_of_float(magnitude);
    bits += 0xfff + (bits >> 13 & 1);
    return sign | (uint16_t)((bits >> 13) - (112 << 10));
}

static inline float qc_from_e4m3(uint8_t number) {
    const uint32_t sign = (uint32_t)(number & 0x80) << 24, rest = number & 0x7f;
    if (rest == 0x7f) return qc_float_of_bits(sign | 0x7fc00000);
    return qc_float_of_bits(sign | rest << 20) * 0x1p120f;
}

/* The same, but what is too large becomes 448, the largest. */
static inline uint8_t qc_to_e4m3(float value) {
    const uint8_t sign = (uint8_t)(qc_bits_of_float(value) >> 24 & 0x80);
    const float magnitude = fminf(fabsf(value), 448);
    if (isnan(value)) return sign | 0x7f;
    if (magnitude < 0x1p-6f) return sign | (uint8_t)lrintf(magnitude * 0x1p9f);
    uint32_t bits = qc_bits_of_float(magnitude);
    bits += 0x7ffff + (bits >> 20 & 1);
    return sign | (uint8_t)((bits >> 20) - (120 << 3));
}

/* What Quantize stores of x / s: rounded, with zero point 128, or e4m3.  A NaN is 0 there, as in
 * ONNX Runtime: its comparisons with the lowest integer fail. */
static inline uint8_t qc_quantized(float quotient, int is_fp8) {
    if (is_fp8) return qc_to_e4m3(quotient);
    return (uint8_t)fminf(fmaxf(rintf(quotient) + 128, 0), 255);
}

/* The scale of a token whose largest magnitude this is, of all that are numbers: NaN if none is. */
static inline float qc_token_scale(float largest, int is_fp8) {
    return (largest < 1e-20f ? 1e-20f : largest) / (is_fp8 ? 448.0f : 127.0f);
}

#endif
