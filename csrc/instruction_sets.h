// Instruction sets: what this build holds, what the CPU offers, what is in use.
#pragma once

#include <string>
#include <vector>

namespace cjepa {

// Those that are compiled in and that the CPU has, weakest first.
std::vector<std::string> available_instruction_sets();

// The strongest one, or the one that CJEPA_INSTRUCTION_SET names; throws std::runtime_error if that
// is not available. Read once.
const std::string& selected_instruction_set();

}  // namespace cjepa
