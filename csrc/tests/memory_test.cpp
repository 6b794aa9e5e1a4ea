// The cache of blocks, and tasks that threads share.
#include "../cpu/memory.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <iterator>
#include <set>
#include <thread>
#include <vector>

#include "check.h"
#include "threads.h"

namespace cjepa::test {
namespace {

constexpr size_t kMebibyte = size_t{1} << 20;
constexpr size_t kLimit = 8 * kMebibyte;
// Set before the first block is taken, because the limit is read only once.
[[maybe_unused]] const int limited = setenv("CJEPA_CACHE_MIB", "8", 1);

Block take(size_t bytes) {
  const Block block = take_block(bytes);
  CHECK(block.bytes >= bytes, "%zu of %zu bytes", block.bytes, bytes);
  CHECK(reinterpret_cast<uintptr_t>(block.data) % 64 == 0, "%p is not aligned", block.data);
  std::memset(block.data, 0x5a, bytes);
  return block;
}

// Leaves one block in the cache. It is too large for everything that the tests ask for, and the
// first block that is given back takes its place.
void empty_cache() { give_back(take(kLimit)); }

CJEPA_TEST(blocks_are_used_again) {
  empty_cache();
  const Block block = take(kMebibyte);
  give_back(block);
  const Block larger = take(kMebibyte + 1);
  CHECK(larger.data != block.data, "a block of 1 MiB for more than that");
  const Block smaller = take(kMebibyte / 2);
  CHECK(smaller.data != block.data, "twice what was asked for");
  const Block again = take(kMebibyte * 3 / 4);
  CHECK(again.data == block.data && again.bytes == kMebibyte, "a block that fits was not taken");
  for (const Block& b : {larger, smaller, again}) give_back(b);
}

CJEPA_TEST(the_best_fitting_block_is_taken) {
  empty_cache();
  const Block a = take(1200 << 10), b = take(1100 << 10), c = take(1400 << 10);
  for (const Block& block : {a, b, c}) give_back(block);
  CHECK(take(kMebibyte).data == b.data, "another block fits better");
  CHECK(take(kMebibyte).data == a.data, "another block fits better");
  give_back(a);
  give_back(b);
}

CJEPA_TEST(the_oldest_blocks_leave_first) {
  empty_cache();
  const Block a = take(3 * kMebibyte), b = take(3 * kMebibyte + 64), c = take(3 * kMebibyte + 128);
  for (const Block& block : {a, b, c})
    give_back(block);  // 9 MiB, so the first one leaves the cache
  const Block first = take_block(3 * kMebibyte), second = take_block(3 * kMebibyte);
  CHECK(first.data == b.data && second.data == c.data, "the last two of three should be left");
  give_back(first);
  give_back(second);
  give_back(take(kLimit + 1));  // never enters the cache
  CHECK(take_block(3 * kMebibyte).data == b.data, "a block above the limit displaced others");
  give_back(b);
}

CJEPA_TEST(empty_and_moved_buffers) {
  Buffer<double> none, some(3);
  some[2] = 1;
  double* const data = some.get();
  const Buffer<double> moved(std::move(some));
  CHECK(moved.get() == data && moved[2] == 1, "the buffer did not move");
  CHECK(some.get() == nullptr, "two buffers own one block");  // NOLINT: that is the question
}

// A thread finds in the blocks that it holds what it wrote there.
void use_blocks(uint8_t mark, int rounds) {
  Random random;
  for (int round = 0; round < rounds; ++round) {
    std::vector<Block> blocks;
    for (int k = 0; k < 3; ++k) {
      const size_t bytes = static_cast<size_t>(random.uniform(1, 200 << 10));
      blocks.push_back(take_block(bytes));
      std::memset(blocks.back().data, mark, blocks.back().bytes);
    }
    for (const Block& block : blocks) {
      const auto* bytes = static_cast<const uint8_t*>(block.data);
      CHECK(bytes[0] == mark && bytes[block.bytes - 1] == mark,
            "another thread wrote to a block of thread %d", mark);
      give_back(block);
    }
  }
}

CJEPA_TEST(several_threads) {
  std::vector<std::thread> threads;
  for (uint8_t mark = 0; mark < 4; ++mark) threads.emplace_back(use_blocks, mark, 2000);
  for (std::thread& thread : threads) thread.join();
}

// If a thread that finds the cache locked allocated a new block, the cache would hold one block
// more each time.
CJEPA_TEST(no_more_blocks_than_were_in_use) {
  empty_cache();
  constexpr size_t kSizes[] = {100 << 10, 200 << 10, 400 << 10};  // none fits another
  constexpr int kThreads = 4, kRounds = 20000;
  struct Use {
    std::atomic<int> now{0}, most{0};
    std::set<void*> addresses[kThreads];
  } uses[std::size(kSizes)];
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] {
      for (int round = 0; round < kRounds; ++round) {
        const size_t k = (round + thread) % std::size(kSizes);
        Use& use = uses[k];
        const int now = ++use.now;
        for (int most = use.most; most < now && !use.most.compare_exchange_weak(most, now);) {
        }
        const Block block = take_block(kSizes[k]);
        use.addresses[thread].insert(block.data);
        if (round % 7 == 0) std::this_thread::yield();
        give_back(block);
        --use.now;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (Use& use : uses) {
    std::set<void*> all;
    for (const std::set<void*>& some : use.addresses) all.insert(some.begin(), some.end());
    CHECK(static_cast<int>(all.size()) <= use.most, "%zu blocks where %d were in use at most",
          all.size(), use.most.load());
  }
}

// At a fork another thread may hold the lock of the cache, and the child does not have that thread.
CJEPA_TEST(fork_while_others_use_the_cache) {
  constexpr size_t kBytes = 100 << 10;
  std::atomic<bool> stop{false};
  std::vector<std::thread> others;
  for (int k = 0; k < 3; ++k) {
    others.emplace_back([&] {
      while (!stop) give_back(take_block(kBytes));
    });
  }
  bool ended = true;
  for (int k = 0; k < 100 && ended; ++k) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);  // ends a child that waits for the lock
      for (int round = 0; round < 3; ++round) {
        const Block block = take_block(kBytes);
        static_cast<char*>(block.data)[block.bytes - 1] = 1;
        give_back(block);
      }
      _exit(0);
    }
    int status = -1;
    waitpid(child, &status, 0);
    ended = WIFEXITED(status) && WEXITSTATUS(status) == 0;
    CHECK(ended, "child %d ended with status %d", k, status);
    give_back(take_block(kBytes));  // the parent's lock is free again
  }
  stop = true;
  for (std::thread& thread : others) thread.join();
}

CJEPA_TEST(work_is_dealt_once) {
  for (const uint32_t threads : {1, 2, 5}) {
    use_threads(threads);
    for (const int64_t count : {0, 1, 4, 20000}) {
      for (const double work : {0.0, 7.5e5, 1e9}) {
        std::vector<int> taken(count);  // not atomic, because no two threads may take the same task
        std::atomic<int> workers{0};
        parallel_tasks(count, work, [&](const auto& take) {
          ++workers;  // waits for the others, so that they really take tasks at the same time
          for (int k = 0; k < 1000 && workers < static_cast<int>(threads); ++k)
            std::this_thread::yield();
          for (int64_t k; (k = take()) < count;) ++taken[k];
          CHECK(take() == count, "%ld tasks: more after the last", count);
        });
        for (int64_t k = 0; k < count; ++k)
          CHECK(taken[k] == 1, "task %ld of %ld ran %d times", k, count, taken[k]);
        const int most = std::min({static_cast<int>(threads), std::max(static_cast<int>(count), 1),
                                   work < 5e5   ? 1
                                   : work < 1e6 ? 2
                                                : 5});
        CHECK(workers == most, "%ld tasks, work %g: %d threads, expected %d", count, work,
              workers.load(), most);
      }
    }
  }
}

}  // namespace
}  // namespace cjepa::test
