// Runs the CUDA C that TVM generates on the CPU, one block at a time, each CUDA thread a coroutine.
//
// It is stricter than a GPU where a GPU is only sometimes wrong:
//   - data asked for by cp.async arrives when its group is waited for, and not before; until then
//     its place holds garbage;
//   - a thread runs until it has to wait, so nothing is there that no barrier waits for, and warps
//     run in the order that is asked for;
//   - shared memory that instructions touch remembers who wrote and read it since which barrier;
//   - arrays end where memory ends: the byte after the last one faults, and so does writing an input.
#pragma once

#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cmath>
#include <map>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)

typedef unsigned int uint;
typedef unsigned char uchar;
typedef unsigned short ushort;

// Which planted fault this run has: tests put `if (!FAULT(1))` and the like into the source.
#define FAULT(number) (emulator::fault == (number))

namespace emulator {

inline const int fault = std::getenv("FAULT") ? std::atoi(std::getenv("FAULT")) : 0;

// ---- numbers ----------------------------------------------------------------------------------

inline float from_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    float value = exponent == 0 ? std::ldexp(float(mantissa), -24)
                : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                 : std::ldexp(float(mantissa + 1024), exponent - 25);
    return bits & 0x8000 ? -value : value;
}

inline uint16_t to_half(double value) {  // to nearest, ties to even
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

// ---- threads ----------------------------------------------------------------------------------

constexpr int warp_size = 32;
constexpr size_t stack_bytes = 128 << 10;
constexpr uint8_t garbage = 0xEE;

struct Index { int x, y, z; };

struct Copy { uint32_t target; const void *source; uint32_t size; };

enum class Kind { half, int8, e4m3 };

// A wgmma under way: one thread's share.  It is computed when it is waited for.
struct GroupProduct {
    Kind kind;
    int tokens;
    void *results[64];
    uint32_t weights[4], before[64];
    uint64_t descriptor;
};

struct Thread {
    ucontext_t context;
    void *stack = nullptr;
    bool done = false, moved = false;
    long barriers = 0;
    std::vector<std::vector<Copy>> groups;
    std::vector<std::vector<GroupProduct>> products;
    std::vector<uint32_t> unfenced;  // words it wrote that wgmma does not see yet
};

struct Meeting { int arrived = 0; long round = 0; void *slots[4 * warp_size] = {}; };

struct Use { int writer = -1, reader = -1; long written = -1, read = -1; bool fenced = false; };

inline std::vector<Thread> threads;
inline std::vector<Meeting> warps, warpgroups;
inline std::vector<Use> uses;  // of each 4 bytes of shared memory
inline ucontext_t scheduler;
inline int current;
inline int at_barrier;
inline long barrier_round;
inline Index block;
inline uint8_t *shared_begin;
inline size_t shared_bytes;

[[noreturn]] inline void fail(const std::string &what) {
    std::fprintf(stderr, "block (%d, %d, %d), thread %d: %s\n", block.x, block.y, block.z, current,
                 what.c_str());
    std::fflush(stderr);
    _exit(3);
}

inline void pause() {
    const int self = current;
    swapcontext(&threads[self].context, &scheduler);
    current = self;
}

inline void moved() { threads[current].moved = true; }

// The last thread to come does the work of all.
template <int size, class Slot, class Work>
void meet(std::vector<Meeting> &meetings, Slot &slot, Work work) {
    Meeting &meeting = meetings[current / size];
    meeting.slots[current % size] = &slot;
    const long round = meeting.round;
    moved();
    if (++meeting.arrived == size) {
        Slot *slots[size];
        for (int i = 0; i < size; ++i) slots[i] = (Slot *)meeting.slots[i];
        work(slots);
        meeting.arrived = 0;
        ++meeting.round;
        return;
    }
    while (meeting.round == round) pause();
    moved();
}

template <class Slot, class Work> void together(Slot &slot, Work work) {
    meet<warp_size>(warps, slot, work);
}

inline void synchronize() {
    const long round = barrier_round;
    moved();
    if (++at_barrier == int(threads.size())) {
        at_barrier = 0;
        ++barrier_round;
    } else {
        while (barrier_round == round) pause();
    }
    moved();
    ++threads[current].barriers;
}

// ---- shared memory ----------------------------------------------------------------------------

inline uint8_t *at(uint32_t address, uint32_t size, const char *what) {
    if (address % size) fail(std::string(what) + " at shared byte " + std::to_string(address) +
                             ", not a multiple of " + std::to_string(size));
    if (address + size > shared_bytes)
        fail(std::string(what) + " at shared byte " + std::to_string(address) + " of " +
             std::to_string(shared_bytes));
    return shared_begin + address;
}

inline void note_write(uint32_t address, uint32_t size) {
    for (uint32_t word = address / 4; word < (address + size) / 4; ++word) {
        Use &use = uses[word];
        const long now = threads[current].barriers;
        if (use.reader >= 0 && use.reader / warp_size != current / warp_size && use.read == now)
            fail("overwrites shared byte " + std::to_string(word * 4) + " that thread " +
                 std::to_string(use.reader) + " may still have to read: no barrier between");
        use.writer = current;
        use.written = now;
        use.fenced = false;
        threads[current].unfenced.push_back(word);
    }
}

inline void note_read(int reader, uint32_t address, uint32_t size) {
    for (uint32_t word = address / 4; word < (address + size) / 4; ++word) {
        Use &use = uses[word];
        const long now = threads[reader].barriers;
        if (use.writer >= 0 && use.writer != reader && use.written == now)
            fail("reads shared byte " + std::to_string(word * 4) + " that thread " +
                 std::to_string(use.writer) + " wrote: no barrier between");
        use.reader = reader;
        use.read = now;
    }
}

// ---- instructions -----------------------------------------------------------------------------

inline void copy_async(uint32_t target, const void *source, uint32_t size = 16) {
    std::memset(at(target, 16, "cp.async"), garbage, 16);
    note_write(target, 16);
    auto &groups = threads[current].groups;
    if (groups.empty()) groups.emplace_back();
    groups.back().push_back({target, source, size});
}

inline void commit_group() {
    auto &groups = threads[current].groups;
    if (groups.empty()) groups.emplace_back();
    groups.emplace_back();
}

inline void wait_group(size_t pending) {
    auto &groups = threads[current].groups;
    while (groups.size() > pending + 1) {
        for (const Copy &copy : groups.front()) {
            std::memset(shared_begin + copy.target, 0, 16);
            std::memcpy(shared_begin + copy.target, copy.source, copy.size);
            note_write(copy.target, 16);
        }
        groups.erase(groups.begin());
    }
}

template <int count> void load_global(uint32_t *const (&results)[count], const void *source) {
    if ((uintptr_t)source % (4 * count)) fail("a load from global memory is not aligned");
    uint32_t words[count];
    std::memcpy(words, source, sizeof words);
    for (int i = 0; i < count; ++i) *results[i] = words[i];
}

template <int count> void store_global(const void *target, const uint32_t (&words)[count]) {
    if ((uintptr_t)target % (4 * count)) fail("a store to global memory is not aligned");
    std::memcpy((void *)target, words, sizeof words);
}

template <int count> void load_shared(uint32_t *const (&results)[count], uint32_t address) {
    const uint8_t *source = at(address, 4 * count, "ld.shared");
    note_read(current, address, 4 * count);
    for (int i = 0; i < count; ++i) std::memcpy(results[i], source + 4 * i, 4);
}

inline void load_matrices(uint32_t *const (&results)[4], uint32_t address) {
    struct Slot { uint32_t *results[4]; uint32_t address; };
    Slot slot{{results[0], results[1], results[2], results[3]}, address};
    at(address, 16, "ldmatrix");
    together(slot, [](Slot **slots) {
        for (int lane = 0; lane < warp_size; ++lane)
            for (int matrix = 0; matrix < 4; ++matrix) {
                const uint32_t row = slots[matrix * 8 + lane / 4]->address + lane % 4 * 4;
                note_read(current / warp_size * warp_size + lane, row, 4);
                std::memcpy(slots[lane]->results[matrix], shared_begin + row, 4);
            }
    });
}

template <int count> void store_shared(uint32_t address, const uint32_t (&words)[count]) {
    std::memcpy(at(address, 4 * count, "st.shared"), words, sizeof words);
    note_write(address, 4 * count);
}

template <Kind kind> float element(uint32_t word, int index) {
    if (kind == Kind::half) return from_half(uint16_t(word >> 16 * index));
    const uint8_t byte = uint8_t(word >> 8 * index);
    return kind == Kind::int8 ? float(int8_t(byte)) : from_e4m3(byte);
}

// m16n8k16 of float16 or m16n8k32 of bytes: the layouts are the same but for what a word holds.
template <Kind kind, class Sum>
void multiply(Sum *const (&results)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
              const Sum (&c)[4]) {
    struct Slot { Sum *results[4]; uint32_t a[4], b[2]; Sum c[4]; };
    Slot slot{{results[0], results[1], results[2], results[3]}, {a[0], a[1], a[2], a[3]},
              {b[0], b[1]}, {c[0], c[1], c[2], c[3]}};
    together(slot, [](Slot **slots) {
        constexpr int per_word = kind == Kind::half ? 2 : 4, depth = 8 * per_word;
        static float left[16][32], right[8][32];
        for (int lane = 0; lane < warp_size; ++lane)
            for (int word = 0; word < 4; ++word)
                for (int i = 0; i < per_word; ++i) {
                    const int k = lane % 4 * per_word + i;
                    left[lane / 4 + word % 2 * 8][k + word / 2 * depth / 2] =
                        element<kind>(slots[lane]->a[word], i);
                    if (word < 2)
                        right[lane / 4][k + word * depth / 2] =
                            element<kind>(slots[lane]->b[word], i);
                }
        for (int lane = 0; lane < warp_size; ++lane)
            for (int i = 0; i < 4; ++i) {
                const float *x = left[lane / 4 + i / 2 * 8], *y = right[lane % 4 * 2 + i % 2];
                double sum = 0;
                for (int k = 0; k < depth; ++k) sum += double(x[k]) * y[k];
                if (kind == Kind::int8)
                    *slots[lane]->results[i] = Sum(uint32_t(slots[lane]->c[i]) + uint32_t(int32_t(sum)));
                else
                    *slots[lane]->results[i] = Sum(slots[lane]->c[i] + sum);
            }
    });
}

inline void fence_async() {
    for (uint32_t word : threads[current].unfenced) uses[word].fenced = true;
    threads[current].unfenced.clear();
}

template <Kind kind, class Sum, int count>
void multiply_group(Sum *const (&results)[count], const uint32_t (&weights)[4], uint64_t descriptor,
                    bool adds) {
    GroupProduct product{kind, 2 * count};
    product.descriptor = descriptor;
    std::memcpy(product.weights, weights, sizeof weights);
    for (int i = 0; i < count; ++i) {
        const Sum before = adds ? *results[i] : Sum(0);
        std::memcpy(&product.before[i], &before, 4);
        product.results[i] = results[i];
        std::memset(results[i], garbage, 4);  // until it is waited for
    }
    auto &products = threads[current].products;
    if (products.empty()) products.emplace_back();
    products.back().push_back(product);
}

inline void commit_products() {
    auto &products = threads[current].products;
    if (products.empty()) products.emplace_back();
    products.emplace_back();
}

template <Kind kind> void read_tokens(const GroupProduct &product, float (*tokens)[32]) {
    constexpr int per_word = kind == Kind::half ? 2 : 4;
    const uint32_t start = uint32_t(product.descriptor & 0x3fff) << 4;
    if (product.descriptor >> 62 != 1 || (product.descriptor >> 32 & 0x3fff) != 64 ||
        (start & 1023) >= 128)
        fail("wgmma of shared memory that is not in rows of 128 bytes from a multiple of 1024");
    for (int row = 0; row < product.tokens; ++row)
        for (int word = 0; word < 8; ++word) {
            uint32_t address = start + row * 128 + word * 4, value;
            address ^= (address >> 7 & 7) << 4;
            std::memcpy(&value, at(address, 4, "wgmma"), 4);
            note_read(current, address, 4);
            if (!uses[address / 4].fenced)
                fail("wgmma reads shared byte " + std::to_string(address) +
                     ", which no fence.proxy.async lets it see");
            for (int i = 0; i < per_word; ++i)
                tokens[row][word * per_word + i] = element<kind>(value, i);
        }
}

template <Kind kind, class Sum> void finish_product(GroupProduct *const *shares) {
    constexpr int per_word = kind == Kind::half ? 2 : 4, depth = 8 * per_word;
    static float left[64][32], right[128][32];
    read_tokens<kind>(*shares[0], right);
    for (int thread = 0; thread < 128; ++thread)
        for (int word = 0; word < 4; ++word)
            for (int i = 0; i < per_word; ++i)
                left[thread / 32 * 16 + thread % 32 / 4 + word % 2 * 8]
                    [thread % 4 * per_word + i + word / 2 * depth / 2] =
                        element<kind>(shares[thread]->weights[word], i);
    for (int thread = 0; thread < 128; ++thread)
        for (int i = 0; i < shares[0]->tokens / 2; ++i) {
            const float *x = left[thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8];
            const float *y = right[i / 4 * 8 + thread % 4 * 2 + i % 2];
            double sum = 0;
            for (int k = 0; k < depth; ++k) sum += double(x[k]) * y[k];
            Sum before;
            std::memcpy(&before, &shares[thread]->before[i], 4);
            const Sum after = kind == Kind::int8 ? Sum(uint32_t(before) + uint32_t(int32_t(sum)))
                                                 : Sum(before + sum);
            std::memcpy(shares[thread]->results[i], &after, 4);
            // Products of one group that add to the same sums follow each other.
            for (auto &group : threads[current / 128 * 128 + thread].products)
                for (GroupProduct &later : group)
                    if (&later != shares[thread] && later.results[i] == shares[thread]->results[i])
                        std::memcpy(&later.before[i], &after, 4);
        }
}

inline void wait_products(size_t pending) {
    Thread &self = threads[current];
    meet<128>(warpgroups, self, [=](Thread **members) {
        while (members[0]->products.size() > pending + 1) {
            for (size_t i = 0; i < members[0]->products.front().size(); ++i) {
                GroupProduct *shares[128];
                for (int m = 0; m < 128; ++m) shares[m] = &members[m]->products.front()[i];
                if (shares[0]->kind == Kind::half) finish_product<Kind::half, float>(shares);
                else if (shares[0]->kind == Kind::int8) finish_product<Kind::int8, uint32_t>(shares);
                else finish_product<Kind::e4m3, float>(shares);
            }
            for (int m = 0; m < 128; ++m)
                members[m]->products.erase(members[m]->products.begin());
        }
    });
}

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

template <class Function> uint32_t of_halves(Function function) {
    return to_half(function(0)) | uint32_t(to_half(function(16))) << 16;
}

inline uint32_t subtract_halves(uint32_t a, uint32_t b) {
    return of_halves([=](int s) { return double(from_half(a >> s)) - from_half(b >> s); });
}

inline uint32_t multiply_halves(uint32_t a, uint32_t b) {
    return of_halves([=](int s) { return double(from_half(a >> s)) * from_half(b >> s); });
}

inline uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c) {
    return of_halves(
        [=](int s) { return double(from_half(a >> s)) * from_half(b >> s) + from_half(c >> s); });
}

inline uint16_t pair_to_e4m3(float high, float low) {
    return uint16_t(to_e4m3(high) << 8 | to_e4m3(low));
}

inline uint32_t pair_from_e4m3(uint16_t pair) {
    return to_half(from_e4m3(uint8_t(pair))) | uint32_t(to_half(from_e4m3(uint8_t(pair >> 8)))) << 16;
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

// ---- what CUDA's headers give the source --------------------------------------------------------

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
inline void __syncthreads() { emulator::synchronize(); }
inline int __shfl_sync(uint, int value, int source, int = 32) {
    return emulator::shuffle(value, source);
}
inline float __shfl_xor_sync(uint, float value, int distance, int = 32) {
    return emulator::shuffle(value, emulator::current % emulator::warp_size ^ distance);
}
inline uint __cvta_generic_to_shared(void *pointer) {
    return uint((uint8_t *)pointer - emulator::shared_begin);
}

// ---- the host -----------------------------------------------------------------------------------

namespace emulator {

struct Kernel { const char *name; void (*run)(void **arguments); };

// A copy of a file's bytes whose end is the end of memory.
struct Array {
    static inline std::vector<Array *> all;
    std::string name;
    size_t size, mapped;
    uint8_t *base, *begin;

    Array(std::string name, size_t size) : name(name), size(size) {
        const size_t page = size_t(sysconf(_SC_PAGESIZE)), rounded = (size + 15) / 16 * 16;
        mapped = (rounded + page - 1) / page * page + 2 * page;
        base = (uint8_t *)mmap(nullptr, mapped, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        mprotect(base, page, PROT_NONE);
        mprotect(base + mapped - page, page, PROT_NONE);
        begin = base + mapped - page - rounded;
        std::memset(begin, garbage, rounded);
        all.push_back(this);
    }
    void make_constant() {
        const size_t page = size_t(sysconf(_SC_PAGESIZE));
        mprotect(base + page, mapped - 2 * page, PROT_READ);
    }
    void check_end() const {
        for (size_t i = size; i < (size + 15) / 16 * 16; ++i)
            if (begin[i] != garbage) fail("wrote past the end of " + name);
    }
};

inline void on_fault(int, siginfo_t *info, void *) {
    auto *address = (uint8_t *)info->si_addr;
    for (const Array *array : Array::all)
        if (address >= array->base && address < array->base + array->mapped)
            fail("touches byte " + std::to_string(address - array->begin) + " of " + array->name +
                 ", which has " + std::to_string(array->size));
    fail("touches memory that is no array's");
}

inline void (*running)(void **);
inline void **running_arguments;

inline void start_thread() {
    const int self = current;
    running(running_arguments);
    current = self;
    threads[self].done = threads[self].moved = true;
    swapcontext(&threads[self].context, &scheduler);
}

// Lets the lanes of a warp run until none can go on.
inline bool run_warp(int warp, bool backwards) {
    bool any = false;
    for (bool again = true; again;) {
        again = false;
        for (int i = 0; i < warp_size; ++i) {
            current = warp * warp_size + (backwards ? warp_size - 1 - i : i);
            Thread &thread = threads[current];
            if (thread.done) continue;
            thread.moved = false;
            swapcontext(&scheduler, &thread.context);
            again |= thread.moved;
        }
        any |= again;
    }
    return any;
}

inline void run_block(int thread_count, bool backwards) {
    for (int i = 0; i < thread_count; ++i) {
        Thread &thread = threads[i];
        thread.done = false;
        thread.barriers = 0;
        thread.groups.clear();
        thread.products.clear();
        thread.unfenced.clear();
        getcontext(&thread.context);
        thread.context.uc_stack = {thread.stack, 0, stack_bytes};
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, start_thread, 0);
    }
    const int warp_count = thread_count / warp_size;
    warps.assign(warp_count, {});
    warpgroups.assign((warp_count + 3) / 4, {});
    uses.assign(shared_bytes / 4 + 1, {});
    at_barrier = 0;
    std::memset(shared_begin, garbage, shared_bytes);
    for (bool any = true; any;) {
        any = false;
        for (int i = 0; i < warp_count; ++i) any |= run_warp(backwards ? warp_count - 1 - i : i, backwards);
    }
    for (current = 0; current < thread_count; ++current)
        if (!threads[current].done) fail("waits forever: not all threads reach a barrier");
}

inline void launch(void (*kernel)(void **), void **arguments, Index grid, int thread_count,
                   size_t shared, bool backwards) {
    running = kernel;
    running_arguments = arguments;
    shared_bytes = shared;
    Array memory("shared memory", shared);
    shared_begin = memory.begin;
    threads = std::vector<Thread>(thread_count);
    for (Thread &thread : threads) thread.stack = std::malloc(stack_bytes);
    for (block.z = 0; block.z < grid.z; ++block.z)
        for (block.y = 0; block.y < grid.y; ++block.y)
            for (block.x = 0; block.x < grid.x; ++block.x) run_block(thread_count, backwards);
    for (Thread &thread : threads) std::free(thread.stack);
    memory.check_end();
    Array::all.pop_back();
}

// arguments: kernel gx gy gz threads shared backwards, then `rows=<n>` or `<name>[=]<path>` of each
// parameter in order; with `=` the array is written back.
inline int main(int count, char **words, const std::vector<Kernel> &kernels) {
    static uint8_t signal_stack[64 << 10];
    stack_t other{signal_stack, 0, sizeof signal_stack};
    sigaltstack(&other, nullptr);
    struct sigaction action {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS, &action, nullptr);

    std::vector<Array *> arrays;
    std::vector<std::string> paths;
    std::vector<void *> values;
    static int rows;
    for (int i = 8; i < count; ++i) {
        const std::string word = words[i];
        const size_t colon = word.find(':');
        if (word.rfind("rows:", 0) == 0) {
            rows = std::atoi(word.c_str() + colon + 1);
            values.push_back(&rows);
            continue;
        }
        const bool written = word[0] == '=';
        const std::string path = word.substr(colon + 1);
        std::FILE *file = std::fopen(path.c_str(), "rb");
        std::fseek(file, 0, SEEK_END);
        auto *array = new Array(word.substr(written, colon - written), size_t(std::ftell(file)));
        std::rewind(file);
        if (std::fread(array->begin, 1, array->size, file) != array->size) return 2;
        std::fclose(file);
        if (!written) array->make_constant();
        arrays.push_back(array);
        paths.push_back(written ? path : "");
        values.push_back(&array->begin);
    }
    for (const Kernel &kernel : kernels) {
        if (std::strcmp(kernel.name, words[1])) continue;
        const Index grid{std::atoi(words[2]), std::atoi(words[3]), std::atoi(words[4])};
        launch(kernel.run, values.data(), grid, std::atoi(words[5]), size_t(std::atol(words[6])),
               std::atoi(words[7]) != 0);
        for (size_t i = 0; i < arrays.size(); ++i) {
            if (paths[i].empty()) continue;
            arrays[i]->check_end();
            std::FILE *file = std::fopen(paths[i].c_str(), "wb");
            std::fwrite(arrays[i]->begin, 1, arrays[i]->size, file);
            std::fclose(file);
        }
        return 0;
    }
    std::fprintf(stderr, "no kernel %s\n", words[1]);
    return 2;
}

}  // namespace emulator
