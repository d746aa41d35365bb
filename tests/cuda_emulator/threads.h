// The threads of a block, coroutines that take turns, and how they wait for each other.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include <setjmp.h>
#include <ucontext.h>
#include <unistd.h>

namespace emulator {

constexpr int warp_size = 32;
constexpr size_t stack_bytes = 192 << 10;
constexpr uint8_t garbage = 0xEE;

struct Copy { uint32_t target; const void *source; uint32_t size; };

// A wgmma under way: one thread's share.  It is computed when it is waited for.
struct GroupProduct {
    Kind kind;
    int tokens;
    void *results[64];
    uint32_t weights[4], before[64];
    uint64_t descriptor;
};

// Of each thread, up to which of its moments another one knows what it did (a vector clock).
using Known = std::vector<uint32_t>;

struct Thread {
    ucontext_t context;   // where it begins
    jmp_buf point;        // where it goes on
    bool begun = false;
    void *stack = nullptr;
    bool done = false, moved = false;
    Known known;
    std::vector<std::vector<Copy>> groups;
    std::vector<std::vector<GroupProduct>> products;
    std::vector<uint32_t> unfenced;  // words it wrote that wgmma does not see yet
};

struct Meeting { int arrived = 0; long round = 0; void *slots[4 * warp_size] = {}; };

// A barrier of the block or of some of its threads.
struct Barrier { int arrived = 0; long round = 0; Known known, of_round; };

inline std::vector<Thread> threads;
inline std::vector<Meeting> warps, warpgroups;

inline jmp_buf scheduler;
inline Barrier barriers[16];
inline size_t shared_bytes;

int current;
Index block;
uint8_t *shared_begin;

[[noreturn]] inline void fail(const std::string &what) {
    std::fprintf(stderr, "block (%d, %d, %d), thread %d: %s\n", block.x, block.y, block.z, current,
                 what.c_str());
    std::fflush(stderr);
    _exit(3);
}

// Takes turns by setjmp: swapcontext would ask the system for the signals' mask each time.
inline void resume(Thread &thread) {
    if (_setjmp(scheduler)) return;
    if (thread.begun) _longjmp(thread.point, 1);
    thread.begun = true;
    setcontext(&thread.context);
}

inline void pause() {
    const int self = current;
    if (!_setjmp(threads[self].point)) _longjmp(scheduler, 1);
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

inline void learn(Known &known, const Known &more) {
    known.resize(threads.size());
    for (size_t i = 0; i < more.size(); ++i) known[i] = more[i] > known[i] ? more[i] : known[i];
}

// What the thread did up to here is in `known`; what it does from here on is not.
inline void tell(Known &known) {
    learn(known, threads[current].known);
    ++threads[current].known[current];
}

// Whether a thread knows what another did at a moment of its own.
inline bool knows(int thread, int other, uint32_t moment) {
    return thread == other || threads[thread].known[other] >= moment;
}

template <class Slot, class Work> void together(Slot &slot, Work work) {
    meet<warp_size>(warps, slot, work);
}

// Waits for `count` threads at one of the sixteen barriers; all then know what each did before.
void synchronize(int number, int count) {
    Barrier &barrier = barriers[number];
    const long round = barrier.round;
    moved();
    tell(barrier.known);
    if (++barrier.arrived == count) {
        barrier.arrived = 0;
        barrier.of_round.swap(barrier.known);
        barrier.known.clear();
        ++barrier.round;
    } else {
        while (barrier.round == round) pause();
    }
    learn(threads[current].known, barrier.of_round);
    moved();
}

void synchronize_block() { synchronize(0, int(threads.size())); }

void synchronize_warp(uint32_t) {
    Known mine;
    tell(mine);
    together(mine, [](Known **each) {
        for (int i = 1; i < warp_size; ++i) learn(*each[0], *each[i]);
        for (int i = 1; i < warp_size; ++i) *each[i] = *each[0];
    });
    learn(threads[current].known, mine);
}

}  // namespace emulator
