// PyTorch's parallel loop, made of std::thread. It has PyTorch's own names, and the symbols of a
// program come before those of its shared libraries, so it takes the place of PyTorch's. A thread
// sanitizer knows std::thread and reports every race. It does not see where a loop begins or ends
// in an OpenMP run-time that was built without the sanitizer, and would report every access.
#include "threads.h"

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace {
std::atomic<uint32_t> thread_count{1};
thread_local bool inside =
    false;  // whether this thread runs a loop; loops inside of it use no other threads
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
