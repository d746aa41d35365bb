// The emulator itself: what the functions of `emulator.h` do.  Compiled once for all kernels.
#include "emulator.h"

#include <cstdlib>

namespace emulator {
const int fault = std::getenv("FAULT") ? std::atoi(std::getenv("FAULT")) : 0;
}  // namespace emulator

#include "host.h"
#include "memory.h"
#include "numbers.h"
#include "phases.h"
#include "products.h"
#include "words.h"
