#include "memory.h"

#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace cjepa {
namespace {

constexpr std::align_val_t kAlignment{64};
constexpr size_t kSmall = size_t{64} << 10;  // below this the C++ library's own cache serves

size_t mebibytes(const char* variable, double otherwise) {
  const char* value = std::getenv(variable);
  const double number = value == nullptr ? otherwise : std::atof(value);  // checked in Python
  return number > 0 ? static_cast<size_t>(number * (1 << 20)) : 0;
}

// Tests fill new memory with NaNs.
bool poisoned() {
  static const bool set = std::getenv("CJEPA_POISON_MEMORY") != nullptr;
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

// Blocks that are free, the one that was given back first in front. Whoever finds it locked does
// without: a fork may leave it locked for good in the child.
class Cache {
 public:
  Block take(size_t bytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return {nullptr, 0};
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
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock() || block.bytes > limit_) return release(block);
    free_.push_back(block);
    total_ += block.bytes;
    while (total_ > limit_) {
      total_ -= free_.front().bytes;
      release(free_.front());
      free_.pop_front();
    }
  }

 private:
  std::mutex mutex_;
  std::deque<Block> free_;
  size_t total_ = 0;
  const size_t limit_ = mebibytes("CJEPA_CACHE_MIB", 256);
};

Cache& cache() {
  static Cache* const instance = new Cache;  // never destroyed: tensors may outlive the module
  return *instance;
}

}  // namespace

void release(Block block) { ::operator delete(block.data, kAlignment); }

Block take_block(size_t bytes) {
  Block block{nullptr, 0};
  if (bytes >= kSmall) block = cache().take(bytes);
  if (block.data == nullptr) {
    block = {::operator new(std::max<size_t>(bytes, 1), kAlignment), bytes};
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

}  // namespace cjepa
