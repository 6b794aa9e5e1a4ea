#include "instruction_sets.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace cjepa {

std::vector<std::string> available_instruction_sets() {
  std::vector<std::string> sets{"baseline"};
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    sets.emplace_back("avx2");
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    sets.emplace_back("avx512");
    if (__builtin_cpu_supports("avx512bf16")) sets.emplace_back("avx512_bf16");
  }
#endif
  return sets;
}

const std::string& selected_instruction_set() {
  static const std::string selected = [] {
    const std::vector<std::string> sets = available_instruction_sets();
    const char* wanted = std::getenv("CJEPA_INSTRUCTION_SET");
    if (wanted == nullptr || *wanted == '\0') return sets.back();
    if (std::find(sets.begin(), sets.end(), wanted) == sets.end()) {
      std::string known;
      for (const std::string& set : sets) known += (known.empty() ? "" : ", ") + set;
      throw std::runtime_error("CJEPA_INSTRUCTION_SET must be one of " + known + ", got " + wanted);
    }
    return std::string(wanted);
  }();
  return selected;
}

}  // namespace cjepa
