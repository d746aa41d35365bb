// Runs a kernel on arrays that are read from files, one block after the other.
#pragma once

#include <algorithm>
#include <csignal>
#include <string>
#include <vector>

#include <sys/mman.h>

#include "phases.h"

namespace emulator {

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
    _longjmp(scheduler, 1);
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
            resume(thread);
            again |= thread.moved;
        }
        any |= again;
    }
    return any;
}

inline void run_block(int thread_count, bool backwards) {
    for (int i = 0; i < thread_count; ++i) {
        Thread &thread = threads[i];
        thread.done = thread.begun = false;
        thread.known.assign(thread_count, 0);
        thread.known[i] = 1;
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
    for (Barrier &barrier : barriers) barrier = {};
    phases.clear();
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

// arguments: kernel gx gy gz threads shared backwards, then `#<name>:<number>` or `[=]<name>:<path>`
// of each parameter in order; with `=` the array is written back.
int main(int count, char **words, const Kernel *kernels, int kernel_count) {
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
    static int numbers[8], *number = numbers;
    for (int i = 8; i < count; ++i) {
        const std::string word = words[i];
        const size_t colon = word.find(':');
        if (word[0] == '#') {
            *number = std::atoi(word.c_str() + colon + 1);
            values.push_back(number++);
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
    for (const Kernel *kernel = kernels; kernel < kernels + kernel_count; ++kernel) {
        if (std::strcmp(kernel->name, words[1])) continue;
        const Index grid{std::atoi(words[2]), std::atoi(words[3]), std::atoi(words[4])};
        launch(kernel->run, values.data(), grid, std::atoi(words[5]), size_t(std::atol(words[6])),
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
