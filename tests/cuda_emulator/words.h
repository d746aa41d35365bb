// Instructions on words.
#pragma once

#include "numbers.h"
#include "threads.h"

namespace emulator {

// Bit i of the table is the result where the bits of a, b, c are the number i.
uint32_t lookup3(uint32_t a, uint32_t b, uint32_t c, int table) {
    uint32_t result = 0;
    for (int i = 0; i < 8; ++i)
        if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return result;
}

uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
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
int32_t add_products_of_bytes(uint32_t a, int32_t b, int32_t sum) {
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

int shuffle_int(int value, int source) { return shuffle(value, source); }
float shuffle_float(float value, int source) { return shuffle(value, source); }

}  // namespace emulator
