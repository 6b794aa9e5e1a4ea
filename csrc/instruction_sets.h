// Instruction sets that the CPU at run time offers, strongest last.
#pragma once

#include <string>
#include <vector>

namespace cjepa {

std::vector<std::string> available_instruction_sets();

}  // namespace cjepa
