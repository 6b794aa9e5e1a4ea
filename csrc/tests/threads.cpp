// PyTorch's parallel loop out of std::thread, under PyTorch's own names: a program's symbols come
// before those of its shared libraries. A thread sanitizer knows std::thread, and reports every
// access that only luck keeps apart; in an OpenMP run-time that was built without it, it sees
// neither the beginning nor the end of a loop, and everything would have to be suppressed.
#include "threads.h"

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace {
std::atomic<uint32_t> thread_count{1};
thread_local bool inside = false;  // of a loop: those within it use no other threads
}  // namespace

void cjepa::test::use_threads(uint32_t count) { thread_count = count; }

AOTITorchError torch_get_num_threads(uint32_t* count) {
  *count = inside ? 1 : thread_count.load();
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size, ParallelFunc run,
                                  void* context) {
  if (begin >= end) return AOTI_TORCH_SUCCESS;
  uint32_t limit = 1;
  torch_get_num_threads(&limit);
  const int64_t grains = (end - begin + grain_size - 1) / std::max<int64_t>(grain_size, 1);
  const int64_t count = std::min<int64_t>(limit, grains), share = (end - begin + count - 1) / count;
  const auto run_share = [=](int64_t first) {
    const bool before = inside;
    inside = true;
    run(first, std::min(first + share, end), context);
    inside = before;
  };
  std::vector<std::thread> others;
  for (int64_t first = begin + share; first < end; first += share)
    others.emplace_back(run_share, first);
  run_share(begin);
  for (std::thread& thread : others) thread.join();
  return AOTI_TORCH_SUCCESS;
}
