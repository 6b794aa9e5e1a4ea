// A user's mask in the form that the tiles read.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "memory.h"
#include "tensors.h"

namespace cjepa {

// Which pairs of samples are excluded: a bit for each, eight to a byte. A mask excludes both orders
// of a pair.
struct SampleMask {
  int64_t batch = 0;
  int64_t stride = 0;  // bytes of a row
  int64_t pairs = 0;   // ordered pairs (k, l), k != l, that are excluded
  Buffer<uint8_t> bits;

  SampleMask() = default;

  // The mask is a (batch, batch) tensor of bool, in which every byte but 0 is true. Its diagonal is
  // ignored.
  explicit SampleMask(const Tensor& mask)
      : batch(mask.size(0)), stride((batch + 7) / 8), bits(batch * stride) {
    const auto* given = static_cast<const uint8_t*>(mask.const_data_ptr());
    const int64_t row = mask.stride(0), column = mask.stride(1);
    constexpr int64_t kSide = 64;  // a square and its mirror image both fit the L1 cache
    const int64_t bands = (batch + kSide - 1) / kSide;
    std::atomic<int64_t> excluded{0};
    parallel_tasks(bands, 4.0 * batch * batch, [&](const auto& take) {
      uint8_t mirrored[kSide][kSide];
      int64_t count = 0;
      for (int64_t band; (band = take()) < bands;) {
        const int64_t first = band * kSide, last = std::min(batch, first + kSide);
        for (int64_t left = 0; left < batch; left += kSide) {
          const int64_t right = std::min(batch, left + kSide);
          for (int64_t l = left; l < right; ++l)
            for (int64_t k = first; k < last; ++k)
              mirrored[k - first][l - left] = given[l * row + k * column] != 0;
          for (int64_t k = first; k < last; ++k) {
            const uint8_t* from = given + k * row + left * column;
            for (int64_t l = 0; l < right - left; l += 8) {
              unsigned byte = 0;
              for (int64_t bit = 0; bit < std::min<int64_t>(8, right - left - l); ++bit)
                byte |= unsigned((from[(l + bit) * column] != 0) | mirrored[k - first][l + bit])
                        << bit;
              bits[k * stride + (left + l) / 8] = static_cast<uint8_t>(byte);
              count += __builtin_popcount(byte);
            }
          }
        }
        for (int64_t k = first; k < last; ++k) count -= given[k * (row + column)] != 0;
      }
      excluded += count;
    });
    pairs = excluded;
  }

  const uint8_t* get() const { return batch == 0 ? nullptr : bits.get(); }
};

}  // namespace cjepa
