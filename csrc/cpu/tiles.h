// Tiles of S = X Y^T and the sums over them, which NT-Xent (X = Y, tiles on and above the diagonal)
// and the rectangle of cross_logsumexp share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "constants.h"
#include "core/tile_core.h"
#include "memory.h"
#include "packing.h"
#include "selected_core.h"
#include "tensors.h"

namespace cjepa {

inline constexpr double kLog2E = 1.4426950408889634;
inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Calls run(T(), P()) with the types of sums and of operands.
template <typename Run>
auto with_types(ScalarType input, ScalarType rounded, const Run& run) {
  if (input == ScalarType::Double) return run(double(), double());
  if (rounded == ScalarType::BFloat16 && has_bf16_core()) return run(float(), Bf16Pair());
  return run(float(), float());
}

// The dtype of the backward's operands. dL/dtau is a sum of z . dL/dz whose terms cancel, and
// coefficients rounded to bf16 would leave it wrong by percents. So with a temperature tensor the
// backward takes its operands, which are rounded all the same, as fp32.
inline ScalarType backward_operands(ScalarType rounded, const std::optional<Tensor>& temperature) {
  return temperature.has_value() ? ScalarType::Float : rounded;
}

// The temperature, or, if it is out of range, NaN, which makes the results NaN. It is compared in
// fp32, so that a bound which was rounded to fp32 still counts as inside.
inline double read_temperature(const std::optional<Tensor>& tensor, double number) {
  const double t = tensor.has_value() ? read_scalar(*tensor) : number;
  const float rounded = static_cast<float>(t);
  constexpr float kSmallest = static_cast<float>(kSmallestTemperature);
  constexpr float kLargest = static_cast<float>(kLargestTemperature);
  return rounded >= kSmallest && rounded <= kLargest ? t : kNaN;
}

// The shift that the exponents take. It is the constant 1 / tau where no exponent leaves the range
// of the dtype with it, else the largest similarity of each row.
template <typename T>
struct Shift {
  double tau;
  Exponent<T> exponent;
  double error;  // log of the factor by which rounding the shift to T changes every exponential

  Shift(double tau_, bool bounded) : tau(tau_) {
    const double largest = std::is_same_v<T, float> ? kLargestExponent32 : kLargestExponent64;
    exponent.constant_shift = bounded && kLargestLogits * kLog2E / tau < largest;
    exponent.scale = static_cast<T>(kLog2E / tau);
    exponent.scale_rest = static_cast<T>(kLog2E / tau - exponent.scale);
    exponent.shift = exponent.constant_shift ? exponent.scale : T{0};
    error = exponent.constant_shift ? (kLog2E / tau - exponent.shift) / kLog2E : 0;
  }
};

// If the exponentials take more bytes than this, they are written around the caches: whoever reads
// them later would not find them there any more.
inline constexpr size_t kStreamedBytes = size_t{4} << 20;

// The number of tile (i, j), j >= i, if the tiles on and above the diagonal are counted row by row.
inline int64_t tile_number(int64_t i, int64_t j, int64_t blocks) {
  return i * blocks - i * (i - 1) / 2 + j - i;
}

// S with its exponents. If exclusion.self is set, x and y are the same batch and S is symmetric.
template <typename T, typename P>
struct Logits {
  const TileCore<T, P>& core;
  const PackedBatch<T, P>&x, &y;
  Exclusion exclusion;
  Exponent<T> exponent;

  bool self() const { return exclusion.self; }

  // The number of tile (i, j) among those that count, row by row.
  int64_t tile_number(int64_t i, int64_t j) const {
    return self() ? cjepa::tile_number(i, j, y.layout.blocks) : i * y.layout.blocks + j;
  }

  // The part of tile (i, j) in columns [begin, end) of block j, whose panels are `panels`. The
  // caller sets the sums and `out`.
  SimilarityTile<T, P> tile(int64_t i, int64_t j, int64_t begin, int64_t end,
                            const P* panels) const {
    SimilarityTile<T, P> t{};
    t.rows = x.slices_of(i);
    t.slice_rows = x.layout.block;
    t.panels = panels + begin * y.depth;
    t.depth = x.depth;
    t.row = i * x.layout.block;
    t.column = j * y.layout.block + begin;
    t.height = round_up(x.layout.valid(i), core.micro_rows);
    t.width = round_up(std::min(end, y.layout.valid(j)) - begin, core.panel);
    t.exclusion = exclusion;
    t.exponent = exponent;
    return t;
  }
};

// Sums of exponentials and largest similarities of all rows (or columns), in several parts that are
// still to be added up: each (chunks, rows).
template <typename T>
struct ChunkSums {
  const T* sums;
  const T* maxima;
  int64_t chunks, rows;  // rows: padded
};

// Sums over tiles. The panels of all tiles, row by row, are cut into a fixed number of chunks. Each
// chunk has sums of its own, which are added up in order later: so they have the same bits on any
// number of threads.
template <typename T>
struct PartialSums {
  int64_t chunks, rows, columns;  // rows and columns: padded
  // Sums and maxima of rows, (chunks, rows) each, then those of columns, (chunks, columns) each.
  // With `self` there are none of columns, because S is symmetric and the sums of a tile's columns
  // are added to those of rows. All lie in one buffer, so that those of many rows are too large for
  // the cache, where the backward's memory would come on top of theirs.
  Buffer<T> numbers;
  Buffer<T> positive;                // (rows) with `pairs` or `positives`, else empty
  std::vector<double> negative_sum;  // (chunks) sums of the negatives' similarities, with a mask

  T* row_sum() const { return numbers.get(); }
  T* row_max() const { return row_sum() + chunks * rows; }
  T* column_sum() const { return row_max() + chunks * rows; }
  T* column_max() const { return column_sum() + chunks * columns; }
  ChunkSums<T> of_rows() const { return {row_sum(), row_max(), chunks, rows}; }
  ChunkSums<T> of_columns() const { return {column_sum(), column_max(), chunks, columns}; }
};

// Sums over all tiles. Unless it is null, the exponentials of all tiles are written to `saved`.
template <typename T, typename P>
PartialSums<T> sum_tiles(const Logits<T, P>& logits, T* saved) {
  const Layout &x = logits.x.layout, &y = logits.y.layout;
  const bool self = logits.self();
  const bool pairs = logits.exclusion.pairs;
  const bool positives = pairs || logits.exclusion.positives != nullptr;
  const int64_t block = x.block, area = block * block, panels = block / logits.core.panel;
  const int64_t tiles = self ? x.blocks * (x.blocks + 1) / 2 : x.blocks * y.blocks;
  const int64_t most_chunks = block == kLargeBlock ? 64 : 16;
  const int64_t chunks = std::min(tiles * panels, most_chunks);
  const int64_t rows = x.padded_rows(), columns = y.padded_rows();
  PartialSums<T> sums{.chunks = chunks,
                      .rows = rows,
                      .columns = columns,
                      .numbers = Buffer<T>(2 * chunks * (self ? rows : rows + columns)),
                      .positive = Buffer<T>(positives ? rows : 0),
                      .negative_sum = std::vector<double>(chunks)};
  // The tiles write nothing for a row without a positive.
  if (positives) std::fill(sums.positive.get(), sums.positive.get() + rows, T{0});
  const double work = 1.0 * tiles * area * (logits.x.depth + 20);
  parallel_tasks(chunks, work, [&](const auto& take) {
    Buffer<T> scratch(logits.core.scratch_size(block)), space(saved == nullptr ? area : 0);
    for (int64_t c; (c = take()) < chunks;) {
      T *row_sum = sums.row_sum() + c * rows, *row_max = sums.row_max() + c * rows;
      std::fill(row_sum, row_sum + rows, T{0});
      std::fill(row_max, row_max + rows, -std::numeric_limits<T>::infinity());
      T *column_sum = row_sum, *column_max = row_max;
      if (!self) {
        column_sum = sums.column_sum() + c * columns;
        column_max = sums.column_max() + c * columns;
        std::fill(column_sum, column_sum + columns, T{0});
        std::fill(column_max, column_max + columns, -std::numeric_limits<T>::infinity());
      }
      int64_t p = tiles * panels * c / chunks;
      const int64_t last = tiles * panels * (c + 1) / chunks;
      const auto start = [&](int64_t i) { return self ? i : 0; };  // first tile of tile row i
      int64_t i = 0,
              first = 0;  // the tile row that holds panel p, and the number of its first tile
      while (p / panels >= first + y.blocks - start(i)) first += y.blocks - start(i++);
      for (int64_t j = start(i) + p / panels - first; p < last; ++j) {
        if (j == y.blocks) j = start(++i);
        const int64_t begin = p % panels * logits.core.panel;
        const int64_t end = std::min(block, begin + (last - p) * logits.core.panel);
        p += (end - begin) / logits.core.panel;
        if (begin >= y.valid(j)) continue;
        SimilarityTile<T, P> t = logits.tile(i, j, begin, end, logits.y.panels_of(j));
        if (p < last) t.next_panels = logits.y.panels_of(j + 1 < y.blocks ? j + 1 : start(i + 1));
        if (saved != nullptr) {
          t.out = saved + logits.tile_number(i, j) * area + begin;
        } else if (!t.exponent.constant_shift) {
          t.out = space.get() + begin;
        }
        t.out_stride = block;
        t.past_caches = tiles * area * sizeof(T) > kStreamedBytes;
        t.row_sum = row_sum + t.row;
        t.row_max = row_max + t.row;
        t.column_sum = column_sum + t.column;
        t.column_max = column_max + t.column;
        t.positive = positives && (!pairs || i == j) ? sums.positive.get() + t.row : nullptr;
        t.negative_sum = t.exclusion.mask == nullptr ? nullptr : &sums.negative_sum[c];
        t.scratch = scratch.get();
        logits.core.similarity(t);
      }
    }
  });
  return sums;
}

inline constexpr int64_t kReducedRows = 256;  // rows that a task of the reduction adds up

// The sums and maxima of at most kReducedRows rows over all chunks.
template <typename T>
struct ReducedRows {
  T largest[kReducedRows];     // similarity
  double total[kReducedRows];  // of exponentials, relative to the shift of the row

  ReducedRows(const Shift<T>& shift, const ChunkSums<T>& of, int64_t begin, int64_t count) {
    constexpr T kLowest = -std::numeric_limits<T>::infinity();
    std::fill(largest, largest + count, kLowest);
    std::fill(total, total + count, 0.0);
    for (int64_t c = 0; c < of.chunks; ++c) {
      const T* maximum = of.maxima + c * of.rows + begin;
      for (int64_t a = 0; a < count; ++a)
        largest[a] = maximum[a] > largest[a] ? maximum[a] : largest[a];
    }
    for (int64_t c = 0; c < of.chunks; ++c) {
      const T *sum = of.sums + c * of.rows + begin, *maximum = of.maxima + c * of.rows + begin;
      if (shift.exponent.constant_shift) {
        for (int64_t a = 0; a < count; ++a) total[a] += sum[a];
        continue;
      }
      for (int64_t a = 0; a < count; ++a) {
        if (maximum[a] > kLowest)
          total[a] += sum[a] * std::exp((static_cast<double>(maximum[a]) - largest[a]) / shift.tau);
      }
    }
  }

  bool any(int64_t a) const { return largest[a] > -kInfinity; }  // whether the row has entries
  // The similarity to which the exponentials of row a are relative.
  double shift_of(const Shift<T>& shift, int64_t a) const {
    return !any(a) ? 0 : shift.exponent.constant_shift ? 1 : static_cast<double>(largest[a]);
  }
  double log_sum(const Shift<T>& shift, int64_t a) const {
    return any(a) ? std::log(total[a]) - shift.error : -kInfinity;
  }
};

}  // namespace cjepa
