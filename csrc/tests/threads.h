// Threads of the kernel's parallel loops, in the tests.
#pragma once

#include <cstdint>

namespace cjepa::test {

// How many threads torch::stable::parallel_for uses from now on: those of threads.cpp, which takes
// the place of PyTorch's.
void use_threads(uint32_t count);

}  // namespace cjepa::test
