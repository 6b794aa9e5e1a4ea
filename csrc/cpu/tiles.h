// Tiles of S = X Y^T and the sums over them: what NT-Xent (X = Y, on and above the diagonal) and
// the rectangle share.
#pragma once

#include <limits>

#include "packing.h"
#include "selected_core.h"

namespace cjepa {

inline constexpr double kLog2E = 1.4426950408889634;
inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <typename T>
constexpr ScalarType dtype_of() {
  return std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double;
}

inline Tensor make(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

template <typename T>
T* data_of(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <typename T>
const T* data_of(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

inline double read_scalar(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return *data_of<double>(t);
    case ScalarType::Half:
      return static_cast<float>(*data_of<torch::headeronly::Half>(t));
    case ScalarType::BFloat16:
      return static_cast<float>(*data_of<torch::headeronly::BFloat16>(t));
    default:
      return *data_of<float>(t);
  }
}

// Calls run(T(), P()) with the types of sums and of operands.
template <typename Run>
auto with_types(ScalarType input, ScalarType rounded, const Run& run) {
  if (input == ScalarType::Double) return run(double(), double());
  if (rounded == ScalarType::BFloat16 && has_bf16_core()) return run(float(), Bf16Pair());
  return run(float(), float());
}

// dL/dtau is a sum of z . dL/dz that cancels: coefficients rounded to bf16 leave percents of it
// wrong, so that a temperature tensor takes the operands, rounded all the same, as fp32.
inline ScalarType backward_operands(ScalarType rounded, const std::optional<Tensor>& temperature) {
  return temperature.has_value() ? ScalarType::Float : rounded;
}

// NaN, which the result then is, out of the range of reference.SMALLEST to LARGEST.
inline double read_temperature(const std::optional<Tensor>& tensor, double number) {
  const double t = tensor.has_value() ? read_scalar(*tensor) : number;
  const float rounded = static_cast<float>(t);  // a bound in fp32 lies within the range
  return rounded >= 1e-30f && rounded <= 1e30f ? t : kNaN;
}

// Which shift the exponents take: with the constant 1 / tau no exponent leaves the dtype's range
// while 2 / tau log2(e) stays inside it.
template <typename T>
struct Shift {
  double tau;
  Exponent<T> exponent;
  double error;  // log of what rounding the shift to T multiplies every exponential by

  Shift(double tau_, bool bounded) : tau(tau_) {
    const double range = std::is_same_v<T, float> ? 124 : 1000;
    exponent.constant_shift = bounded && 2.05 * kLog2E / tau < range;
    exponent.scale = static_cast<T>(kLog2E / tau);
    exponent.scale_rest = static_cast<T>(kLog2E / tau - exponent.scale);
    exponent.shift = exponent.constant_shift ? exponent.scale : T{0};
    error = exponent.constant_shift ? (kLog2E / tau - exponent.shift) / kLog2E : 0;
  }
};

// More exponentials than this are written around the caches: their reader would not find them
// there.
inline constexpr size_t kPastCaches = size_t{4} << 20;

// S with its exponents. With exclusion.self, x and y are the same batch, and S is symmetric.
template <typename T, typename P>
struct Logits {
  const TileCore<T, P>& core;
  const PackedBatch<T, P>&x, &y;
  Exclusion exclusion;
  Exponent<T> exponent;

  bool self() const { return exclusion.self; }

  // The part of the tile of blocks (i, j) in columns [begin, end) of j; sums and `out` not set.
  SimilarityTile<T, P> tile(int64_t i, int64_t j, int64_t begin, int64_t end) const {
    SimilarityTile<T, P> t{};
    t.rows = x.slices_of(i);
    t.slice_rows = x.layout.block;
    t.panels = y.panels_of(j) + begin * y.depth;
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

// Number of the tile of blocks (i, j), j >= i, among those on and above the diagonal, row by row.
inline int64_t tile_number(int64_t i, int64_t j, int64_t blocks) {
  return i * blocks - i * (i - 1) / 2 + j - i;
}

// Sums over tiles. The panels of all tiles, row by row, are dealt to a fixed number of chunks, each
// with sums of its own, which are added up in order: the same bits on any number of threads.
template <typename T>
struct PartialSums {
  int64_t chunks, rows, columns;     // padded
  Buffer<T> row_sum, row_max;        // (chunks, rows)
  Buffer<T> column_sum, column_max;  // (chunks, columns); with `self` those of rows serve for both
  Buffer<T> positive;                // (rows) with `self`
  std::vector<double> negative_sum;  // with a mask
};

template <typename T, typename P>
PartialSums<T> sum_tiles(const Logits<T, P>& logits, T* kept) {
  const Layout &x = logits.x.layout, &y = logits.y.layout;
  const bool self = logits.self();
  const int64_t block = x.block, area = block * block, panels = block / logits.core.panel;
  const int64_t tiles = self ? x.blocks * (x.blocks + 1) / 2 : x.blocks * y.blocks;
  const int64_t chunks =
      std::min<int64_t>(tiles * panels, std::max(x.rows, y.rows) >= 1536 ? 64 : 16);
  const int64_t rows = x.padded_rows(), columns = y.padded_rows();
  PartialSums<T> sums{chunks,
                      rows,
                      columns,
                      Buffer<T>(chunks * rows),
                      Buffer<T>(chunks * rows),
                      Buffer<T>(self ? 0 : chunks * columns),
                      Buffer<T>(self ? 0 : chunks * columns),
                      Buffer<T>(self ? rows : 0),
                      std::vector<double>(chunks)};
  const double work = 1.0 * tiles * area * (logits.x.depth + 20);
  deal(chunks, work, [&](const auto& take) {
    Buffer<T> scratch(logits.core.scratch_size(block)), space(kept == nullptr ? area : 0);
    for (int64_t c; (c = take()) < chunks;) {
      T *row_sum = sums.row_sum.get() + c * rows, *row_max = sums.row_max.get() + c * rows;
      std::fill(row_sum, row_sum + rows, T{0});
      std::fill(row_max, row_max + rows, -std::numeric_limits<T>::infinity());
      T *column_sum = row_sum, *column_max = row_max;
      if (!self) {
        column_sum = sums.column_sum.get() + c * columns;
        column_max = sums.column_max.get() + c * columns;
        std::fill(column_sum, column_sum + columns, T{0});
        std::fill(column_max, column_max + columns, -std::numeric_limits<T>::infinity());
      }
      int64_t p = tiles * panels * c / chunks;
      const int64_t last = tiles * panels * (c + 1) / chunks;
      const auto start = [&](int64_t i) { return self ? i : 0; };  // first tile of a row of tiles
      int64_t i = 0, first = 0;                                    // tile row of p, its first tile
      while (p / panels >= first + y.blocks - start(i)) first += y.blocks - start(i++);
      for (int64_t j = start(i) + p / panels - first; p < last; ++j) {
        if (j == y.blocks) j = start(++i);
        const int64_t begin = p % panels * logits.core.panel;
        const int64_t end = std::min(block, begin + (last - p) * logits.core.panel);
        p += (end - begin) / logits.core.panel;
        if (begin >= y.valid(j)) continue;
        SimilarityTile<T, P> t = logits.tile(i, j, begin, end);
        if (p < last) t.next_panels = logits.y.panels_of(j + 1 < y.blocks ? j + 1 : start(i + 1));
        if (kept != nullptr) {
          t.out = kept + tile_number(i, j, y.blocks) * area + begin;
        } else if (!t.exponent.constant_shift) {
          t.out = space.get() + begin;
        }
        t.out_stride = block;
        t.past_caches = tiles * area * sizeof(T) > kPastCaches;
        t.row_sum = row_sum + t.row;
        t.row_max = row_max + t.row;
        t.column_sum = column_sum + t.column;
        t.column_max = column_max + t.column;
        t.positive = self && i == j ? sums.positive.get() + t.row : nullptr;
        t.negative_sum = t.exclusion.mask == nullptr ? nullptr : &sums.negative_sum[c];
        t.scratch = scratch.get();
        logits.core.similarity(t);
      }
    }
  });
  return sums;
}

inline constexpr int64_t kReducedRows = 256;  // added up at a time

// Of kReducedRows rows from `begin`, at most: the largest s and the sum of exponentials, relative
// to that s or, with a constant shift, to it.
template <typename T>
struct ReducedRows {
  T hardest[kReducedRows];
  double total[kReducedRows];

  // sums and maxima: (chunks, rows).
  ReducedRows(const Shift<T>& shift, const T* sums, const T* maxima, int64_t chunks, int64_t rows,
              int64_t begin, int64_t count) {
    constexpr T kNone = -std::numeric_limits<T>::infinity();
    std::fill(hardest, hardest + count, kNone);
    std::fill(total, total + count, 0.0);
    for (int64_t c = 0; c < chunks; ++c) {
      const T* maximum = maxima + c * rows + begin;
      for (int64_t a = 0; a < count; ++a)
        hardest[a] = maximum[a] > hardest[a] ? maximum[a] : hardest[a];
    }
    for (int64_t c = 0; c < chunks; ++c) {
      const T *sum = sums + c * rows + begin, *maximum = maxima + c * rows + begin;
      if (shift.exponent.constant_shift) {
        for (int64_t a = 0; a < count; ++a) total[a] += sum[a];
        continue;
      }
      for (int64_t a = 0; a < count; ++a) {
        if (maximum[a] > kNone)
          total[a] += sum[a] * std::exp((static_cast<double>(maximum[a]) - hardest[a]) / shift.tau);
      }
    }
  }

  bool any(int64_t a) const { return hardest[a] > -kInfinity; }
  double top(const Shift<T>& shift, int64_t a) const {
    return !any(a) ? 0 : shift.exponent.constant_shift ? 1 : static_cast<double>(hardest[a]);
  }
  double log_sum(const Shift<T>& shift, int64_t a) const {
    return any(a) ? std::log(total[a]) - shift.error : -kInfinity;
  }
};

}  // namespace cjepa
