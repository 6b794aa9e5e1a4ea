#include "check.h"

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <vector>

#include "../instruction_sets.h"

namespace cjepa::test {
namespace {

constexpr int kSkipped = 77;  // exit code that CTest knows

struct Entry {
  const char* name;
  void (*run)();
};
std::vector<Entry>& tests() {
  static std::vector<Entry> all;
  return all;
}

constexpr int64_t kPrinted = 20;  // failures
std::mutex mutex;                 // guards all variables below, which several threads may reach
int64_t checks = 0, failures = 0;
Exact largest_share = 0;  // largest error, as a share of its bound
std::atomic<uint64_t> next_seed{0};

void fail(const char* file, int line, const std::string& what, const char* format, va_list args) {
  if (++failures > kPrinted) return;
  std::fprintf(stderr, "%s:%d: %s: ", file, line, what.c_str());
  std::vfprintf(stderr, format, args);
  std::fputc('\n', stderr);
}

uint64_t first_seed() {
  const char* value = std::getenv("CJEPA_TEST_SEED");
  return value == nullptr ? std::random_device()() : std::strtoull(value, nullptr, 10);
}

}  // namespace

Test::Test(const char* name, void (*run)()) { tests().push_back({name, run}); }

void check(bool condition, const char* expression, const char* file, int line, const char* format,
           ...) {
  const std::lock_guard<std::mutex> lock(mutex);
  ++checks;
  if (condition) return;
  va_list args;
  va_start(args, format);
  fail(file, line, std::string(expression) + " does not hold", format, args);
  va_end(args);
}

void check_near(Exact actual, Exact expected, Exact bound, const char* file, int line,
                const char* format, ...) {
  const std::lock_guard<std::mutex> lock(mutex);
  ++checks;
  const bool same = actual == expected || (std::isnan(actual) && std::isnan(expected));
  const Exact error = same ? 0 : std::fabs(actual - expected);
  if (error <= bound) {
    if (bound > 0) largest_share = std::max(largest_share, error / bound);
    return;
  }
  char what[160];
  std::snprintf(what, sizeof what, "%.17Lg where %.17Lg was expected, error %.3Lg, bound %.3Lg",
                actual, expected, error, bound);
  va_list args;
  va_start(args, format);
  fail(file, line, what, format, args);
  va_end(args);
}

Random::Random() : engine_(next_seed++) {}

}  // namespace cjepa::test

int main() {
  using namespace cjepa::test;
  const char* set = std::getenv("CJEPA_INSTRUCTION_SET");
  const std::vector<std::string> sets = cjepa::available_instruction_sets();
  if (set != nullptr && std::find(sets.begin(), sets.end(), set) == sets.end()) {
    std::printf("skipped: this machine has no %s\n", set);
    return kSkipped;
  }
  const uint64_t seed = first_seed();
  std::printf("CJEPA_TEST_SEED=%llu\n", static_cast<unsigned long long>(seed));
  int64_t failed = 0;
  for (const Entry& test : tests()) {
    next_seed = seed;
    checks = failures = 0;
    largest_share = 0;
    try {
      test.run();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s: exception: %s\n", test.name, error.what());
      ++failures;
    }
    std::printf("%-45s %9lld checks, errors up to %3.0Lf %% of their bounds: %s\n", test.name,
                static_cast<long long>(checks), 100 * largest_share,
                failures == 0 ? "passed" : "FAILED");
    std::fflush(stdout);
    failed += failures;
  }
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
