// The inner loops of the expected values.
#pragma once

#include <cstdint>

namespace cjepa::test {

// They are not inlined: within a larger function GCC keeps the sum in memory, which doubles the
// time.
[[gnu::noinline]] inline long double dot(const long double* x, const long double* y,
                                         int64_t count) {
  long double sum = 0;
  for (int64_t d = 0; d < count; ++d) sum += x[d] * y[d];
  return sum;
}

[[gnu::noinline]] inline void add_scaled(long double* sum, long double factor, const long double* x,
                                         int64_t count) {
  for (int64_t d = 0; d < count; ++d) sum[d] += factor * x[d];
}

}  // namespace cjepa::test
