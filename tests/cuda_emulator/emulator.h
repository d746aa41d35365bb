// What a kernel's source is compiled against, to run it on the CPU: one block at a time, each CUDA
// thread a coroutine (`runtime.cpp`).
//
// It is stricter than a GPU where a GPU is only sometimes wrong:
//   - data asked for by cp.async arrives when its group is waited for, and not before; until then
//     its place holds garbage;
//   - a thread runs until it has to wait, so nothing is there that no barrier waits for, and warps
//     run in the order that is asked for;
//   - shared memory that instructions touch remembers who wrote and read it, and threads which of
//     the others' doings a barrier or an mbarrier told them of;
//   - arrays end where memory ends: the byte after the last one faults, and so does writing an input.
//
// All of that is compiled once, not with every kernel: here are declarations, and no C++ library.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)

typedef unsigned int uint;
typedef unsigned char uchar;
typedef unsigned short ushort;

namespace emulator {

// Which planted fault this run has: tests put `if (!FAULT(1))` and the like into the source.
extern const int fault;
#define FAULT(number) (emulator::fault == (number))

struct Index { int x, y, z; };

extern int current;  // thread
extern Index block;
extern uint8_t *shared_begin;

struct Kernel { const char *name; void (*run)(void **arguments); };

int main(int count, char **words, const Kernel *kernels, int kernel_count);

// --- numbers and words ---

float from_half(uint16_t bits);
uint16_t to_half(double value);
uint32_t subtract_halves(uint32_t a, uint32_t b);
uint32_t multiply_halves(uint32_t a, uint32_t b);
uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c);
uint16_t pair_to_e4m3(float high, float low);
uint32_t pair_from_e4m3(uint16_t pair);
uint32_t lookup3(uint32_t a, uint32_t b, uint32_t c, int table);
uint32_t permute(uint32_t a, uint32_t b, uint32_t selector);
int32_t add_products_of_bytes(uint32_t a, int32_t b, int32_t sum);

// --- memory ---

void copy_async(uint32_t target, const void *source, uint32_t size = 16);
void commit_group();
void wait_group(size_t pending);
void load_global_words(uint32_t *const *results, int count, const void *source);
void load_global_part(uint16_t *result, int size, const void *source);
void store_global_words(const void *target, const uint32_t *words, int count);
void load_shared_words(uint32_t *const *results, int count, uint32_t address);
void load_shared_pair(uint16_t *result, uint32_t address);
void load_matrices(uint32_t *const (&results)[4], uint32_t address);
void store_shared_words(uint32_t address, const uint32_t *words, int count);

template <int count> void load_global(uint32_t *const (&results)[count], const void *source) {
    load_global_words(results, count, source);
}
template <class Word> void load_narrow(uint16_t *result, const void *source) {
    load_global_part(result, sizeof(Word), source);
}
template <int count> void store_global(const void *target, const uint32_t (&words)[count]) {
    store_global_words(target, words, count);
}
template <int count> void load_shared(uint32_t *const (&results)[count], uint32_t address) {
    load_shared_words(results, count, address);
}
template <int count> void store_shared(uint32_t address, const uint32_t (&words)[count]) {
    store_shared_words(address, words, count);
}

// --- threads ---

void synchronize(int number, int count);
void synchronize_block();
void synchronize_warp(uint32_t lanes);
int shuffle_int(int value, int source);
float shuffle_float(float value, int source);
void begin_phases(uint32_t address, uint32_t count);
void arrive(uint32_t address, uint32_t count);
void wait_phase(uint32_t address, int parity);

// --- products ---

enum class Kind { half, int8, e4m3 };

void multiply_warp(Kind kind, void *const *results, const uint32_t *a, const uint32_t *b,
                   const void *c);
void begin_group_product(Kind kind, void *const *results, int count, const uint32_t *weights,
                         uint64_t descriptor, bool adds);
void fence_async();
void commit_products();
void wait_products(size_t pending);

template <Kind kind, class Sum>
void multiply(Sum *const (&results)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
              const Sum (&c)[4]) {
    multiply_warp(kind, (void *const *)results, a, b, c);
}

template <Kind kind, class Sum, int count>
void multiply_group(Sum *const (&results)[count], const uint32_t (&weights)[4], uint64_t descriptor,
                    bool adds) {
    begin_group_product(kind, (void *const *)results, count, weights, descriptor, adds);
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
inline int __float2int_rn(float x) { return x != x ? 0 : int(lrintf(x)); }
inline void __syncthreads() { emulator::synchronize_block(); }
inline int __shfl_sync(uint, int value, int source, int = 32) {
    return emulator::shuffle_int(value, source);
}
inline float __shfl_xor_sync(uint, float value, int distance, int = 32) {
    return emulator::shuffle_float(value, emulator::current % 32 ^ distance);
}
inline uint __cvta_generic_to_shared(void *pointer) {
    return uint((uint8_t *)pointer - emulator::shared_begin);
}
