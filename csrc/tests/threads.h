// Threads of the kernel's parallel loops, in the tests.
#pragma once

#include <cstdint>

namespace cjepa::test {

// Sets how many threads torch::stable::parallel_for uses from now on. threads.cpp provides them in
// place of PyTorch.
void use_threads(uint32_t count);

}  // namespace cjepa::test
