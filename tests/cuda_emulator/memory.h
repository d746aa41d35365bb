// Loads, stores and copies, and who may have touched shared memory in the meantime.
#pragma once

#include <cstring>

#include "threads.h"

namespace emulator {

// Who wrote 4 bytes last, and of each warpgroup who read them last since; when, by their own clocks.
struct Use {
    int writer = -1, readers[4] = {-1, -1, -1, -1};
    uint32_t written = 0, read[4] = {};
    bool fenced = false;
};

inline std::vector<Use> uses;  // of each 4 bytes of shared memory

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
        for (int i = 0; i < 4; ++i) {
            const int reader = use.readers[i];
            if (reader >= 0 && reader / warp_size != current / warp_size &&
                !knows(current, reader, use.read[i]))
                fail("overwrites shared byte " + std::to_string(word * 4) + " that thread " +
                     std::to_string(reader) + " may still have to read: no barrier between");
        }
        use.writer = current;
        use.written = threads[current].known[current];
        use.fenced = false;
        threads[current].unfenced.push_back(word);
    }
}

inline void note_read(int reader, uint32_t address, uint32_t size) {
    for (uint32_t word = address / 4; word < (address + size) / 4; ++word) {
        Use &use = uses[word];
        if (use.writer >= 0 && !knows(reader, use.writer, use.written))
            fail("reads shared byte " + std::to_string(word * 4) + " that thread " +
                 std::to_string(use.writer) + " wrote: no barrier between");
        use.readers[reader / 128 % 4] = reader;
        use.read[reader / 128 % 4] = threads[reader].known[reader];
    }
}

void copy_async(uint32_t target, const void *source, uint32_t size) {
    std::memset(at(target, 16, "cp.async"), garbage, 16);
    note_write(target, 16);
    auto &groups = threads[current].groups;
    if (groups.empty()) groups.emplace_back();
    groups.back().push_back({target, source, size});
}

void commit_group() {
    auto &groups = threads[current].groups;
    if (groups.empty()) groups.emplace_back();
    groups.emplace_back();
}

void wait_group(size_t pending) {
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

void load_global_words(uint32_t *const *results, int count, const void *source) {
    if ((uintptr_t)source % (4 * count)) fail("a load from global memory is not aligned");
    uint32_t words[4];
    std::memcpy(words, source, 4 * count);
    for (int i = 0; i < count; ++i) *results[i] = words[i];
}

// 1 or 2 bytes; what is above them is 0.
void load_global_part(uint16_t *result, int size, const void *source) {
    if ((uintptr_t)source % size) fail("a load from global memory is not aligned");
    *result = 0;
    std::memcpy(result, source, size);
}

void store_global_words(const void *target, const uint32_t *words, int count) {
    if ((uintptr_t)target % (4 * count)) fail("a store to global memory is not aligned");
    std::memcpy((void *)target, words, 4 * count);
}

void load_shared_words(uint32_t *const *results, int count, uint32_t address) {
    const uint8_t *source = at(address, 4 * count, "ld.shared");
    note_read(current, address, 4 * count);
    for (int i = 0; i < count; ++i) std::memcpy(results[i], source + 4 * i, 4);
}

void load_shared_pair(uint16_t *result, uint32_t address) {
    std::memcpy(result, at(address, 2, "ld.shared"), 2);
    note_read(current, address / 4 * 4, 4);
}

void load_matrices(uint32_t *const (&results)[4], uint32_t address) {
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

void store_shared_words(uint32_t address, const uint32_t *words, int count) {
    std::memcpy(at(address, 4 * count, "st.shared"), words, 4 * count);
    note_write(address, 4 * count);
}

}  // namespace emulator
