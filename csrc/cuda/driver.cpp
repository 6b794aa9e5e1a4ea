#include "driver.h"

#include <dlfcn.h>

#include <atomic>
#include <mutex>
#include <stdexcept>

namespace cjepa {
namespace {

std::mutex opening;
Driver opened;
std::atomic<bool> is_open{false};

void* open_library(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(std::string("cannot open ") + dlerror());
  return library;
}

template <typename Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) throw std::runtime_error(std::string("there is no function ") + name);
}

}  // namespace

void open_driver(const std::string& libcuda, const std::string& libtorch_cuda) {
  const std::lock_guard<std::mutex> lock(opening);
  if (is_open.load(std::memory_order_acquire)) return;
  void* const cuda = open_library(libcuda);
  void* const torch = open_library(libtorch_cuda);
  Driver found;
  find(cuda, "cuLaunchKernel", found.launch_kernel);
  find(cuda, "cuTensorMapEncodeTiled", found.encode_tensor_map);
  find(cuda, "cuMemsetD8Async", found.fill_bytes);
  find(cuda, "cuCtxGetCurrent", found.get_context);
  find(cuda, "cuCtxPushCurrent_v2", found.push_context);
  find(cuda, "cuCtxPopCurrent_v2", found.pop_context);
  find(cuda, "cuFuncGetParamInfo", found.get_parameter);
  find(cuda, "cuGetErrorString", found.get_error_string);
  find(torch, "aoti_torch_get_current_cuda_stream", found.get_stream);
  opened = found;
  is_open.store(true, std::memory_order_release);
}

const Driver& driver() {
  if (!is_open.load(std::memory_order_acquire))
    throw std::logic_error("open_driver was not called");
  return opened;
}

void check_driver(int code, const char* call) {
  if (code == 0) return;
  const char* text = nullptr;
  if (driver().get_error_string(code, &text) != 0 || text == nullptr) text = "unknown error";
  throw std::runtime_error(std::string(call) + ": " + text + " (CUDA error " +
                           std::to_string(code) + ")");
}

CurrentContext::CurrentContext(void* context) {
  void* current = nullptr;
  check_driver(driver().get_context(&current), "cuCtxGetCurrent");
  if (current == context) return;
  check_driver(driver().push_context(context), "cuCtxPushCurrent");
  pushed_ = true;
}

CurrentContext::~CurrentContext() {
  void* popped = nullptr;
  if (pushed_) driver().pop_context(&popped);
}

}  // namespace cjepa
