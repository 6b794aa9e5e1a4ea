// Buffers of the kernel, and work dealt to threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace cjepa {

// A piece of memory, 64 bytes aligned, not cleared. What is given back may be kept for the next
// call, CJEPA_CACHE_MIB (256) in all: large memory that is new costs a page fault and a cleared
// page for each of its pages.
struct Block {
  void* data;
  size_t bytes;
};
Block take_block(size_t bytes);
void give_back(Block block);  // to the cache, if there is room
void release(Block block);    // to the system

// A contiguous CPU tensor of such memory, to which it returns with the tensor.
torch::stable::Tensor cached_tensor(const std::vector<int64_t>& shape,
                                    torch::headeronly::ScalarType dtype);

// A contiguous CPU tensor of zeros. Where it is large, the system gives its pages only when they
// are written, and one page of zeros for all that are read.
torch::stable::Tensor zero_tensor(const std::vector<int64_t>& shape,
                                  torch::headeronly::ScalarType dtype);

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
  static constexpr size_t kLargest = size_t{28} << 20;  // above this, what is new hardly matters
  Block block_;
};

// Runs worker(take) in every thread; take() returns the next of 0 … count - 1 until it returns
// `count`. Which thread takes what must not matter for the result. `work` counts operations: a
// small job is not worth waking threads for.
template <typename Worker>
void deal(int64_t count, double work, const Worker& worker) {
  std::atomic<int64_t> next{0};
  const auto take = [&] { return std::min(next.fetch_add(1, std::memory_order_relaxed), count); };
  constexpr double kWorkPerThread = 5e5;
  const int64_t threads = std::min({static_cast<int64_t>(torch::stable::get_num_threads()), count,
                                    1 + static_cast<int64_t>(work / kWorkPerThread)});
  torch::stable::parallel_for(0, std::max<int64_t>(threads, 1), 1,
                              [&](int64_t, int64_t) { worker(take); });
}

}  // namespace cjepa
