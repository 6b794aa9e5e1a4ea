// Checks, random numbers and guarded memory for the C++ tests. They use no framework, so that all
// code under a sanitizer is compiled with it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <string>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(begin, bytes) (static_cast<void>(begin), static_cast<void>(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(begin, bytes) \
  (static_cast<void>(begin), static_cast<void>(bytes))
#endif

namespace cjepa::test {

// The type in which expected values are computed. Their own rounding must not count against the
// kernel's.
using Exact = long double;

// Unit roundoff: the largest relative error of one operation.
template <typename T>
inline constexpr T kRoundoff = std::numeric_limits<T>::epsilon() / 2;
inline constexpr double kBf16Roundoff = 1.0 / 256;
inline constexpr double kHalfRoundoff = 1.0 / 2048;

// A test is a function that calls CHECK. main() runs all tests, each with a seed of its own.
struct Test {
  Test(const char* name, void (*run)());
};
#define CJEPA_TEST(name)                                         \
  static void name();                                            \
  static const ::cjepa::test::Test test_of_##name(#name, &name); \
  static void name()

// A failed check is counted, and the test goes on. The arguments after the condition are those of
// printf and say which case failed.
[[gnu::format(printf, 5, 6)]] void check(bool condition, const char* expression, const char* file,
                                         int line, const char* format, ...);
[[gnu::format(printf, 6, 7)]] void check_near(Exact actual, Exact expected, Exact bound,
                                              const char* file, int line, const char* format, ...);
#define CHECK(condition, ...) \
  ::cjepa::test::check(static_cast<bool>(condition), #condition, __FILE__, __LINE__, __VA_ARGS__)
#define CHECK_NEAR(actual, expected, bound, ...) \
  ::cjepa::test::check_near(actual, expected, bound, __FILE__, __LINE__, __VA_ARGS__)

class Random {
 public:
  Random();  // its seed follows from that of the running test and differs each time
  double normal() { return normal_(engine_); }
  double uniform(double low, double high) {
    return std::uniform_real_distribution<double>(low, high)(engine_);
  }
  bool chance(double probability) { return uniform(0, 1) < probability; }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<double> normal_;
};

// `count` numbers, NaN at first, between guards that nobody may write to. An address sanitizer also
// refuses to read the guards. Without one, a number that is read there is NaN and shows in the
// results.
template <typename T>
class Guarded {
 public:
  explicit Guarded(int64_t count)
      : count_(count), memory_(static_cast<char*>(::operator new(bytes(), kAlignment))) {
    std::memset(memory_, kFill, bytes());
    ASAN_POISON_MEMORY_REGION(memory_, kGuard);
    ASAN_POISON_MEMORY_REGION(memory_ + kGuard + sizeof(T) * count_, kGuard);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() {
    ASAN_UNPOISON_MEMORY_REGION(memory_, bytes());
    for (size_t i = 0; i < kGuard; ++i) {
      CHECK(byte(i) == kFill, "written %zu bytes before the beginning", kGuard - i);
      CHECK(byte(bytes() - kGuard + i) == kFill, "written %zu bytes after the end", i);
    }
    ::operator delete(memory_, kAlignment);
  }

  T* get() const { return reinterpret_cast<T*>(memory_ + kGuard); }
  T& operator[](int64_t i) const { return get()[i]; }
  int64_t size() const { return count_; }
  bool untouched(int64_t i) const {
    for (size_t b = 0; b < sizeof(T); ++b)
      if (byte(kGuard + i * sizeof(T) + b) != kFill) return false;
    return true;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  static constexpr size_t kGuard = 1024;
  static constexpr int kFill = 0xff;

  size_t bytes() const { return sizeof(T) * count_ + 2 * kGuard; }
  int byte(size_t i) const { return static_cast<unsigned char>(memory_[i]); }

  int64_t count_;
  char* memory_;
};

}  // namespace cjepa::test
