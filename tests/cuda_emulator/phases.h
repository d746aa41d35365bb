// mbarriers: phases that end when as many threads as were said have arrived.
#pragma once

#include <map>

#include "memory.h"

namespace emulator {

struct Phases {
    int count = 0, missing = 0;
    long over = 0;  // phases
    Known known, of_last;
};

inline std::map<uint32_t, Phases> phases;

inline Phases &phases_at(uint32_t address) {
    at(address, 8, "an mbarrier");
    const auto found = phases.find(address);
    if (found == phases.end())
        fail("there is no mbarrier at shared byte " + std::to_string(address));
    return found->second;
}

void begin_phases(uint32_t address, uint32_t count) {
    at(address, 8, "an mbarrier");
    phases[address] = {int(count), int(count)};
    note_write(address, 8);
}

void arrive(uint32_t address, uint32_t count) {
    Phases &barrier = phases_at(address);
    note_read(current, address, 8);
    if (int(count) > barrier.missing) fail("more threads arrive at an mbarrier than it waits for");
    tell(barrier.known);
    barrier.missing -= int(count);
    if (barrier.missing == 0) {
        barrier.missing = barrier.count;
        barrier.of_last.swap(barrier.known);
        barrier.known.clear();
        ++barrier.over;
    }
    moved();
}

// Waits until the phase before the one that goes on has this parity.
void wait_phase(uint32_t address, int parity) {
    note_read(current, address, 8);
    Phases &barrier = phases_at(address);
    while ((barrier.over & 1) == parity) pause();
    learn(threads[current].known, barrier.of_last);
    moved();
}

}  // namespace emulator
