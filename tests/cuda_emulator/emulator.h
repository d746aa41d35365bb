// Runs the CUDA C that TVM generates on the CPU, one block at a time, each CUDA thread a coroutine.
//
// It is stricter than a GPU where a GPU is only sometimes wrong:
//   - data asked for by cp.async arrives when its group is waited for, and not before; until then
//     its place holds garbage;
//   - a thread runs until it has to wait, so nothing is there that no barrier waits for, and warps
//     run in the order that is asked for;
//   - shared memory that instructions touch remembers who wrote and read it, and threads which of
//     the others' doings a barrier or an mbarrier told them of;
//   - arrays end where memory ends: the byte after the last one faults, and so does writing an input.
#pragma once

#include <cstdlib>

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)

typedef unsigned int uint;
typedef unsigned char uchar;
typedef unsigned short ushort;

namespace emulator {
inline const int fault = std::getenv("FAULT") ? std::atoi(std::getenv("FAULT")) : 0;
}  // namespace emulator

// Which planted fault this run has: tests put `if (!FAULT(1))` and the like into the source.
#define FAULT(number) (emulator::fault == (number))

#include "host.h"
#include "memory.h"
#include "numbers.h"
#include "phases.h"
#include "products.h"
#include "words.h"
