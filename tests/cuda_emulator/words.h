// Instructions on words, and what CUDA's headers give the source.
#pragma once

#include "numbers.h"
#include "threads.h"

namespace emulator {

inline uint32_t lookup3(uint32_t a, uint32_t b, uint32_t c, int table) {
    uint32_t result = 0;
    for (int bit = 0; bit < 32; ++bit) {
        const int index = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1);
        result |= uint32_t(table >> index & 1) << bit;
    }
    return result;
}

inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        const int choice = selector >> 4 * i & 15;
        if (choice > 7) fail("prmt with a sign: not emulated");
        result |= uint32_t(bytes >> 8 * choice & 255) << 8 * i;
    }
    return result;
}

// Of unsigned by signed bytes.
inline int32_t add_products_of_bytes(uint32_t a, int32_t b, int32_t sum) {
    uint32_t total = uint32_t(sum);
    for (int i = 0; i < 4; ++i)
        total += uint32_t(int32_t(a >> 8 * i & 255) * int8_t(uint32_t(b) >> 8 * i));
    return int32_t(total);
}

template <class Value> Value shuffle(Value value, int source) {
    struct Slot { Value value, result; int source; };
    Slot slot{value, value, source};
    together(slot, [](Slot **slots) {
        for (int lane = 0; lane < warp_size; ++lane)
            slots[lane]->result = slots[slots[lane]->source % warp_size]->value;
    });
    return slot.result;
}

}  // namespace emulator

#define threadIdx (emulator::Index{emulator::current, 0, 0})
#define blockIdx (emulator::block)

struct half {
    uint16_t bits;
    half() = default;
    half(float value) : bits(emulator::to_half(value)) {}
    operator float() const { return emulator::from_half(bits); }
};
struct half4 { half x, y, z, w; };
struct float4 { float x, y, z, w; };
struct int4 { int x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline half4 make_half4(half x, half y, half z, half w) { return {x, y, z, w}; }

inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }
inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline int __float2int_rn(float x) { return std::isnan(x) ? 0 : int(lrintf(x)); }
inline void __syncthreads() { emulator::synchronize(0, int(emulator::threads.size())); }
inline int __shfl_sync(uint, int value, int source, int = 32) {
    return emulator::shuffle(value, source);
}
inline float __shfl_xor_sync(uint, float value, int distance, int = 32) {
    return emulator::shuffle(value, emulator::current % emulator::warp_size ^ distance);
}
inline uint __cvta_generic_to_shared(void *pointer) {
    return uint((uint8_t *)pointer - emulator::shared_begin);
}
