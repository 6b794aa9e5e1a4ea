// The instruction sets that the CPU offers and the one in use.
#pragma once

#include <string>
#include <vector>

namespace cjepa {

// The instruction sets that are compiled in and that the CPU has, the weakest first.
std::vector<std::string> available_instruction_sets();

// The strongest one, or the one that CJEPA_INSTRUCTION_SET names. The variable is read once. Throws
// std::runtime_error if the CPU lacks what it names.
const std::string& selected_instruction_set();

}  // namespace cjepa
