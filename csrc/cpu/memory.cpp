#include "memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <locale>
#include <mutex>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "constants.h"

namespace cjepa {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kSmall = size_t{64} << 10;  // the C++ library caches smaller blocks itself

// Reads a variable by the rules of cjepa_kernels/environment.py, which has read it already unless
// it was set later. The stream is told not to expect the decimal comma of the process's locale.
size_t read_mebibytes(const char* variable, double otherwise) {
  constexpr double kMost = double{1 << 30} * (1 << 10);  // MiB: in bytes a size_t holds it
  const char* const value = std::getenv(variable);
  std::istringstream text(value == nullptr ? "" : value);
  text.imbue(std::locale::classic());
  double number = otherwise;
  if (!(text >> std::ws).eof()) {
    text >> number;
    const bool whole = !text.fail() && (text >> std::ws).eof();
    if (!whole || !(number >= 0 && number <= kMost)) {
      throw std::runtime_error(std::string(variable) +
                               " must be a number of MiB from 0 to 2**40, got '" + value + "'");
    }
  }
  return static_cast<size_t>(number * (1 << 20));
}

// Whether new memory is filled with NaNs, as the tests ask for.
bool poisoned() {
  static const bool set = [] {
    const char* const value = std::getenv("CJEPA_POISON_MEMORY");
    return value != nullptr && *value != '\0' && std::string_view(value) != "0";
  }();
  return set;
}

// Asks for 2 MB pages where the system gives them on request.
void advise_huge_pages(void* data, size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHuge - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// Free blocks, in the order in which they were given back.
class Cache {
 public:
  Block take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = free_.end();
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      if (it->bytes < bytes || it->bytes > bytes + bytes / 2) continue;
      if (best == free_.end() || it->bytes < best->bytes) best = it;
    }
    if (best == free_.end()) return {nullptr, 0};
    const Block block = *best;
    free_.erase(best);
    total_ -= block.bytes;
    return block;
  }

  void give(Block block) {
    if (block.bytes > limit_) return release(block);
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(block);
    total_ += block.bytes;
    while (total_ > limit_) {
      total_ -= free_.front().bytes;
      release(free_.front());
      free_.pop_front();
    }
  }

  // A fork takes the lock first, because no thread of the child would ever release it.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  std::mutex mutex_;
  std::deque<Block> free_;
  size_t total_ = 0;
  const size_t limit_ = read_mebibytes("CJEPA_CACHE_MIB", kDefaultMebibytes);
};

Cache& cache() {
  static Cache* const instance = [] {
#if defined(__unix__) || defined(__APPLE__)
    const auto lock = [] { cache().lock(); };
    const auto unlock = [] { cache().unlock(); };
    pthread_atfork(lock, unlock, unlock);
#endif
    return new Cache;  // It is never destroyed, because tensors may outlive the module.
  }();
  return *instance;
}

// Memory that is aligned by hand. The C library's own aligned allocation leaves pieces behind that
// it does not use again (glibc bug 14581), 0.8 MiB with every backward over 8192 rows. The address
// that malloc returned lies in front of the data.
void* allocate(size_t bytes) {
  void* const given = std::malloc(bytes + kAlignment);
  if (given == nullptr) throw std::bad_alloc();
  const uintptr_t data = (reinterpret_cast<uintptr_t>(given) / kAlignment + 1) * kAlignment;
  reinterpret_cast<void**>(data)[-1] = given;
  return reinterpret_cast<void*>(data);
}

}  // namespace

void release(Block block) {
  if (block.data != nullptr) std::free(static_cast<void**>(block.data)[-1]);
}

Block take_block(size_t bytes) {
  Block block{nullptr, 0};
  if (bytes >= kSmall) block = cache().take(bytes);
  if (block.data == nullptr) {
    block = {allocate(bytes), bytes};
    advise_huge_pages(block.data, bytes);
  }
  if (poisoned()) std::memset(block.data, 0xff, bytes);
  return block;
}

void give_back(Block block) {
  if (block.data == nullptr) return;
  if (block.bytes >= kSmall) return cache().give(block);
  release(block);
}

namespace {

// A contiguous CPU tensor around `data`. `give` is called with the data when the tensor ends.
template <typename Give>
torch::stable::Tensor wrap(void* data, const std::vector<int64_t>& shape,
                           torch::headeronly::ScalarType dtype, Give give) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  std::vector<int64_t> strides(shape.size());
  int64_t count = 1;
  for (size_t i = shape.size(); i-- > 0; count *= shape[i]) strides[i] = count;
  try {
    return torch::stable::from_blob(data, shape, strides, cpu, dtype, give);
  } catch (...) {
    give(data);
    throw;
  }
}

size_t bytes_of(const std::vector<int64_t>& shape, torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  size_t bytes = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  for (const int64_t size : shape) bytes *= size;
  return bytes;
}

}  // namespace

torch::stable::Tensor cached_tensor(const std::vector<int64_t>& shape,
                                    torch::headeronly::ScalarType dtype) {
  const Block block = take_block(bytes_of(shape, dtype));
  return wrap(block.data, shape, dtype, [block](void*) { give_back(block); });
}

torch::stable::Tensor zero_tensor(const std::vector<int64_t>& shape,
                                  torch::headeronly::ScalarType dtype) {
  void* const data = std::calloc(std::max<size_t>(bytes_of(shape, dtype), 1), 1);
  if (data == nullptr) throw std::bad_alloc();
  return wrap(data, shape, dtype, [](void* given) { std::free(given); });
}

}  // namespace cjepa
