// A libcuda and libtorch_cuda without a GPU, which plan_test.cpp opens in their place. A function
// handle is a FakeKernel, which runs on the host's memory when it is launched.
#include "fake_cuda.h"

#include <cstring>

namespace {

thread_local std::vector<void*> contexts;
bool launches_fail = false;

}  // namespace

using cjepa::test::FakeKernel;
using cjepa::test::FakeLaunch;

extern "C" {

[[gnu::visibility("default")]] FakeLaunch fake_last_launch{};

[[gnu::visibility("default")]] void fake_set_context(void* context) {
  contexts.clear();
  if (context != nullptr) contexts.push_back(context);
}

// A kernel for callers that know no C++. It is never released.
[[gnu::visibility("default")]] void* fake_new_kernel(int (*run)(void** parameters),
                                                     const size_t* parameter_sizes, size_t count) {
  return new FakeKernel{run, {parameter_sizes, parameter_sizes + count}};
}

[[gnu::visibility("default")]] void fake_fail_launches(int fail) { launches_fail = fail != 0; }

[[gnu::visibility("default")]] int cuLaunchKernel(void* function, unsigned x, unsigned y,
                                                  unsigned z, unsigned threads, unsigned, unsigned,
                                                  unsigned shared, void* stream, void** parameters,
                                                  void**) {
  if (contexts.empty() || launches_fail) return cjepa::test::kFakeNoContext;
  fake_last_launch = {{x, y, z}, threads, shared, stream, contexts.back()};
  return static_cast<FakeKernel*>(function)->run(parameters);
}

[[gnu::visibility("default")]] int cuTensorMapEncodeTiled(void* map, int dtype, unsigned rank,
                                                          void* address, const uint64_t* sizes,
                                                          const uint64_t* strides,
                                                          const uint32_t* box,
                                                          const uint32_t* element_strides, int,
                                                          int swizzle, int, int) {
  // What the real one checks as well.
  const bool aligned = reinterpret_cast<uintptr_t>(map) % 64 == 0 &&
                       reinterpret_cast<uintptr_t>(address) % 16 == 0 && strides[0] % 16 == 0;
  if (!aligned || rank != 2 || element_strides[0] != 1 || element_strides[1] != 1) return 1;
  const uint64_t words[8] = {reinterpret_cast<uint64_t>(address),
                             sizes[0],
                             sizes[1],
                             strides[0],
                             box[0],
                             box[1],
                             static_cast<uint64_t>(dtype),
                             static_cast<uint64_t>(swizzle)};
  std::memcpy(map, words, sizeof words);
  return 0;
}

[[gnu::visibility("default")]] int cuMemsetD8Async(uint64_t address, unsigned char value,
                                                   size_t bytes, void*) {
  if (contexts.empty()) return cjepa::test::kFakeNoContext;
  std::memset(reinterpret_cast<void*>(address), value, bytes);
  return 0;
}

[[gnu::visibility("default")]] int cuCtxGetCurrent(void** context) {
  *context = contexts.empty() ? nullptr : contexts.back();
  return 0;
}

[[gnu::visibility("default")]] int cuCtxPushCurrent_v2(void* context) {
  contexts.push_back(context);
  return 0;
}

[[gnu::visibility("default")]] int cuCtxPopCurrent_v2(void** context) {
  *context = contexts.back();
  contexts.pop_back();
  return 0;
}

[[gnu::visibility("default")]] int cuFuncGetParamInfo(void* function, size_t index, size_t* offset,
                                                      size_t* size) {
  const auto& sizes = static_cast<FakeKernel*>(function)->parameter_sizes;
  if (index >= sizes.size()) return 1;
  *offset = 0;
  *size = sizes[index];
  return 0;
}

[[gnu::visibility("default")]] int cuGetErrorString(int code, const char** text) {
  *text = code == cjepa::test::kFakeNoContext ? "no context is current" : "invalid value";
  return 0;
}

[[gnu::visibility("default")]] int aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = cjepa::test::kFakeStream;
  return 0;
}
}
