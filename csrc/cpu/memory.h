// Memory of the kernels, and tasks that threads share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace cjepa {

// A piece of memory, aligned to 64 bytes and not cleared. The cache keeps blocks that are given
// back for the next call, up to CJEPA_CACHE_MIB (256) in all, because new memory costs a page fault
// and a cleared page for each of its pages.
struct Block {
  void* data;
  size_t bytes;
};
Block take_block(size_t bytes);
void give_back(Block block);  // to the cache if it has room, else to the system
void release(Block block);    // to the system

// A contiguous CPU tensor on such a block, which is given back when the tensor ends.
torch::stable::Tensor cached_tensor(const std::vector<int64_t>& shape,
                                    torch::headeronly::ScalarType dtype);

// A contiguous CPU tensor of zeros. The system provides the pages of a large one only when they are
// written. All pages that are only read are one and the same page of zeros.
torch::stable::Tensor zero_tensor(const std::vector<int64_t>& shape,
                                  torch::headeronly::ScalarType dtype);

// An array of numbers on such a block.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0) : block_(take_block(sizeof(T) * count)) {}
  Buffer(Buffer&& other) noexcept : block_(std::exchange(other.block_, {nullptr, 0})) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { block_.bytes > kLargest ? release(block_) : give_back(block_); }
  T* get() const { return static_cast<T*>(block_.data); }
  T& operator[](int64_t i) const { return get()[i]; }

 private:
  // Above this size the time for new pages hardly matters, and the cache is left to smaller blocks.
  static constexpr size_t kLargest = size_t{28} << 20;
  Block block_;
};

// Shares the tasks 0 … count - 1 among threads: runs worker(take) in every thread, in which take()
// returns the next task, and `count` once all are taken. The result must not depend on which thread
// takes which task. `work` is the number of operations of all tasks together, because it is not
// worth waking threads for few of them.
template <typename Worker>
void parallel_tasks(int64_t count, double work, const Worker& worker) {
  std::atomic<int64_t> next{0};
  const auto take = [&] { return std::min(next.fetch_add(1, std::memory_order_relaxed), count); };
  constexpr double kWorkPerThread = 5e5;
  const int64_t threads = std::min({static_cast<int64_t>(torch::stable::get_num_threads()), count,
                                    1 + static_cast<int64_t>(work / kWorkPerThread)});
  torch::stable::parallel_for(0, std::max<int64_t>(threads, 1), 1,
                              [&](int64_t, int64_t) { worker(take); });
}

}  // namespace cjepa
