// Numbers of 8 and 16 bits, and arithmetic of pairs of them.
#pragma once

#include <cmath>
#include <cstdint>

namespace emulator {

float from_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    float value = exponent == 0 ? std::ldexp(float(mantissa), -24)
                : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                 : std::ldexp(float(mantissa + 1024), exponent - 25);
    return bits & 0x8000 ? -value : value;
}

uint16_t to_half(double value) {  // to nearest, ties to even
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const double magnitude = std::fabs(value);
    if (std::isnan(value)) return sign | 0x7e00;
    if (magnitude >= 65520.0) return sign | 0x7c00;
    if (magnitude == 0.0) return sign;
    const int exponent = std::max(std::ilogb(magnitude), -14);
    const long steps = std::lrint(std::ldexp(magnitude, 10 - exponent));
    return sign | uint16_t(((exponent + 14) << 10) + steps);
}

inline float from_e4m3(uint8_t bits) {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    float value = (bits & 127) == 127 ? NAN
                : exponent == 0 ? std::ldexp(float(mantissa), -9)
                                : std::ldexp(float(mantissa + 8), exponent - 10);
    return bits & 0x80 ? -value : value;
}

inline uint8_t to_e4m3(float value) {  // saturating at 448
    const uint8_t sign = std::signbit(value) ? 0x80 : 0;
    const double magnitude = std::fmin(std::fabs(value), 448.0);
    if (std::isnan(value)) return sign | 127;
    if (magnitude == 0.0) return sign;
    const int exponent = std::max(std::ilogb(magnitude), -6);
    const long steps = std::lrint(std::ldexp(magnitude, 3 - exponent));
    return sign | uint8_t(((exponent + 6) << 3) + steps);
}

template <class Function> uint32_t of_halves(Function function) {
    return to_half(function(0)) | uint32_t(to_half(function(16))) << 16;
}

uint32_t subtract_halves(uint32_t a, uint32_t b) {
    return of_halves([=](int s) { return double(from_half(a >> s)) - from_half(b >> s); });
}

uint32_t multiply_halves(uint32_t a, uint32_t b) {
    return of_halves([=](int s) { return double(from_half(a >> s)) * from_half(b >> s); });
}

uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c) {
    return of_halves(
        [=](int s) { return double(from_half(a >> s)) * from_half(b >> s) + from_half(c >> s); });
}

uint16_t pair_to_e4m3(float high, float low) {
    return uint16_t(to_e4m3(high) << 8 | to_e4m3(low));
}

uint32_t pair_from_e4m3(uint16_t pair) {
    return to_half(from_e4m3(uint8_t(pair))) | uint32_t(to_half(from_e4m3(uint8_t(pair >> 8)))) << 16;
}

}  // namespace emulator
