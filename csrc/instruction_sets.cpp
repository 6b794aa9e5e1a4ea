#include "instruction_sets.h"

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
    if (__builtin_cpu_supports("avx512bf16")) {
      sets.emplace_back("avx512_bf16");
    }
  }
#elif defined(__aarch64__)
  sets.emplace_back("neon");  // part of the aarch64 baseline
#endif
  return sets;
}

}  // namespace cjepa
