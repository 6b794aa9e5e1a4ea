// What plan_test.cpp and the fake libcuda share.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace cjepa::test {

constexpr int kFakeNoContext = 201;
inline void* const kFakeStream = reinterpret_cast<void*>(0x99);

struct FakeKernel {
  std::function<int(void** parameters)> run;
  std::vector<size_t> parameter_sizes;
};

struct FakeLaunch {
  std::array<unsigned, 3> grid;
  unsigned threads;
  unsigned shared_bytes;
  void* stream;
  void* context;
};

}  // namespace cjepa::test
