// Numbers on which several files, or C++ and Python, have to agree. C++ reads each from here; a
// test compares Python's copies. module.cpp, which must not see PyTorch's headers, hands these
// numbers to the test, so this header does not include PyTorch either.
#pragma once

#include <cstdint>

namespace cjepa {

// The side of the square tiles into which S is cut. It depends on the number of rows alone, never
// on the number of threads, so that the sums have the same bits on any number of threads.
inline constexpr int64_t kSmallBlock = 96;
inline constexpr int64_t kLargeBlock = 192;
inline constexpr int64_t kLargeBlockRows = 1536;  // blocks are large from this many rows on

constexpr int64_t block_size(int64_t rows) {
  return rows >= kLargeBlockRows ? kLargeBlock : kSmallBlock;
}

// How many numbers NT-Xent's forward saves for a backward over M rows: the exponentials of whole
// tiles on and above the diagonal of S.
constexpr int64_t saved_exponentials_size(int64_t rows) {
  const int64_t block = block_size(rows), blocks = (rows + block - 1) / block;
  return blocks * (blocks + 1) / 2 * block * block;
}

// The same of a rectangle of `rows` times `columns` similarities: the exponentials of all its
// tiles.
constexpr int64_t saved_rectangle_size(int64_t rows, int64_t columns) {
  const int64_t block = block_size(rows > columns ? rows : columns);
  return (rows + block - 1) / block * ((columns + block - 1) / block) * block * block;
}

// The range of temperatures: fp32 holds these numbers and their inverses.
inline constexpr double kSmallestTemperature = 1e-30;
inline constexpr double kLargestTemperature = 1e30;

// The constant shift 1 / tau is taken if no row is longer than kLongestRow, which leaves room for
// what rounding adds to a unit row, and if the largest exponent, kLargestLogits / tau in base e,
// stays inside the range of the dtype.
inline constexpr double kLongestRow = 1.02;
inline constexpr double kLargestLogits = 2.05;      // more than kLongestRow^2 + 1
inline constexpr double kLargestExponent32 = 124;   // base 2, in fp32
inline constexpr double kLargestExponent64 = 1000;  // base 2, in fp64

// The constant shift leaves an error of a few roundings of 1 / tau in every log-sum-exp. The
// log-sum-exp of a few similarities may be near 0, as that of a single one is, and the error would
// be large beside it. So a rectangle with at most this many rows or columns does not take that
// shift.
inline constexpr int64_t kFewRows = 8;

// The limit in MiB that an environment variable about memory gives if it is not set. The
// exponentials of 8192 x 8192 similarities in fp32 fit.
inline constexpr double kDefaultMebibytes = 288;

}  // namespace cjepa
