// Work on tiles of S = X Y^T that NT-Xent (X = Y, on and above the diagonal) and the rectangle
// share: partial sums of a forward; exponentials, products and the last step of a backward.
#pragma once

#include <limits>
#include <utility>

#include "packing.h"
#include "tile_cores.h"

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

// NaN, which the result then is, unless positive.
inline double read_temperature(const std::optional<Tensor>& tensor, double number) {
  const double t = tensor.has_value() ? read_scalar(*tensor) : number;
  return t > 0 ? t : kNaN;
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
  std::vector<int64_t> negative_count;
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
                      std::vector<double>(chunks),
                      std::vector<int64_t>(chunks)};
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
        t.negative_count = t.exclusion.mask == nullptr ? nullptr : &sums.negative_count[c];
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

// Exponentials (or similarities) of the tiles (i, j) for blocks i in [first, last) and j in
// [column_first, column_last).
template <typename T>
struct KeptTiles {
  T* data;
  int64_t block, blocks;
  bool triangle;  // every tile on and above the diagonal, as a forward keeps them
  int64_t first, last, column_first, column_last;

  T* tile(int64_t i, int64_t j) const {
    const int64_t number = triangle ? tile_number(i, j, blocks)
                                    : (i - first) * (column_last - column_first) + j - column_first;
    return data + number * block * block;
  }
};

template <typename T, typename P>
void fill_tiles(const Logits<T, P>& logits, const KeptTiles<T>& kept) {
  const int64_t block = kept.block, columns = kept.column_last - kept.column_first;
  const int64_t tiles = (kept.last - kept.first) * columns;
  // A thread takes whole tiles if there are many: their rows stay in its cache.
  const int64_t width = tiles >= 64 ? block : logits.core.panel, parts = block / width;
  const double work = 1.0 * tiles * block * block * logits.x.depth;
  deal(tiles * parts, work, [&](const auto& take) {
    for (int64_t k; (k = take()) < tiles * parts;) {
      const int64_t i = kept.first + k / parts / columns;
      const int64_t j = kept.column_first + k / parts % columns;
      const int64_t begin = k % parts * width;
      if ((logits.self() && i > j) || begin >= logits.y.layout.valid(j)) continue;
      SimilarityTile<T, P> t = logits.tile(i, j, begin, begin + width);
      if (width == block && j + 1 < kept.column_last) t.next_panels = logits.y.panels_of(j + 1);
      t.out = kept.tile(i, j) + begin;
      t.out_stride = block;
      t.past_caches = tiles * block * block * sizeof(T) > kPastCaches;
      logits.core.similarity(t);
    }
  });
}

// Per row or column, padded with zeros: what multiplies its exponentials, and their shift.
template <typename T>
struct Weights {
  Buffer<T> weight, shift;
};

// Where sums of gradients are kept: rows alternate between two bases.
template <typename T>
struct Rows {
  T* base[2];
  int64_t stride;

  static Rows contiguous(T* data, int64_t length) { return {{data, data + length}, 2 * length}; }
  T* row(int64_t a) const { return base[a & 1] + (a >> 1) * stride; }
  Rows from(int64_t a) const { return {{row(a), row(a + 1)}, stride}; }  // a is even
};

// Some rows of a block of X that a thread works on, or with `of_y` of Y.
struct Unit {
  bool of_y;
  int64_t block, begin, end;  // rows [begin, end) of the block
};

// Adds to `out`, whose row 0 is the unit's first row, the products with the blocks [first, last) of
// the other side. With `self` a tile below the diagonal is the one above it, taken by its columns.
template <typename T, typename P>
void add_products(const Logits<T, P>& logits, const Weights<T>& row_weights,
                  const Weights<T>& column_weights, const KeptTiles<T>& kept, const Unit& unit,
                  int64_t first, int64_t last, bool accumulate, const Rows<T>& out,
                  P* coefficients) {
  constexpr int64_t kNumbers = PackedBatch<T, P>::kNumbers;
  const PackedBatch<T, P>& other = unit.of_y ? logits.x : logits.y;
  const int64_t block = kept.block, i = unit.block, begin = unit.begin;
  const int64_t own_row = i * block + begin, height = unit.end - begin;
  const auto by_columns = [&](int64_t j) { return unit.of_y || (logits.self() && i > j); };
  const auto source = [&](int64_t j) {
    return by_columns(j) ? kept.tile(j, i) + begin : kept.tile(i, j) + begin * block;
  };
  for (int64_t j = first; j < last; ++j) {
    const bool transposed = by_columns(j);
    const int64_t depth = other.layout.valid(j), other_row = j * block;
    Coefficients<T, P> c{};
    c.kept = source(j);
    c.kept_stride = block;
    c.height = transposed ? depth : height;
    c.width = transposed ? height : depth;
    c.exponent = logits.exponent;
    const int64_t row = transposed ? other_row : own_row, column = transposed ? own_row : other_row;
    c.row_shift = row_weights.shift.get() + row;
    c.row_weight = row_weights.weight.get() + row;
    c.column_shift = column_weights.shift.get() + column;
    c.column_weight = column_weights.weight.get() + column;
    c.out = coefficients;
    c.out_stride = kCoefficientStride;
    transposed ? logits.core.coefficients_over_rows(c) : logits.core.coefficients(c);
    Product<T, P> p{};
    p.a = coefficients;
    p.transposed = transposed;
    p.a_stride = kCoefficientStride;
    p.height = height;
    p.depth = (depth + kNumbers - 1) / kNumbers;
    p.panels = other.products_of(j);
    p.panel_depth = block / kNumbers;
    p.features = other.padded_features;
    p.out[0] = out.base[0];
    p.out[1] = out.base[1];
    p.stride = out.stride;
    p.accumulate = accumulate || j > first;
    if (j + 1 < last) {
      const int64_t next_depth = other.layout.valid(j + 1);
      p.next_panels = other.products_of(j + 1);
      p.prefetch = reinterpret_cast<const char*>(source(j + 1));
      p.prefetch_rows = by_columns(j + 1) ? next_depth : height;
      p.prefetch_bytes = (by_columns(j + 1) ? height : next_depth) * sizeof(T);
      p.prefetch_stride = block * sizeof(T);
    }
    logits.core.product(p);
  }
}

template <typename T>
void write_row(Tensor& out, int64_t row, int64_t features, const T* from) {
  const auto write = [&](auto zero) {
    auto* to = data_of<decltype(zero)>(out) + row * features;
    for (int64_t d = 0; d < features; ++d) to[d] = static_cast<decltype(zero)>(from[d]);
  };
  switch (out.scalar_type()) {
    case ScalarType::Double:
      return write(double());
    case ScalarType::Half:
      if constexpr (sizeof(T) == 4) return write(torch::headeronly::Half());
      return;
    case ScalarType::BFloat16:
      if constexpr (sizeof(T) == 4) return write(torch::headeronly::BFloat16());
      return;
    default:
      return write(float());
  }
}

// Turns sums into gradients of the raw embeddings.
template <typename T, typename P>
struct Finisher {
  const TileCore<T, P>& core;
  Source source;
  Rounding<T> rounding;
  const T* pull;  // of the positives, or null
  T factor;
  Tensor* grads;  // of the source's views
  bool in_place;  // the sums lie in `grads`
  T* along;       // row . gradient of each row, for the temperature

  // Rows [begin, end), `begin` being even; sums.row(0) is row `begin`.
  void run(int64_t begin, int64_t end, const Rows<T>& sums) const {
    const int64_t features = source.views->features;
    Buffer<T> raw(features), unit(2 * features), rounded(2 * features);
    for (int64_t a = begin; a < end; a += 2) {
      const int64_t rows = std::min<int64_t>(2, end - a);
      T norm[2];
      for (int64_t v = 0; v < rows; ++v) {
        const View& view = source.views[(a + v) % source.count];
        const T* row = view.row((a + v) / source.count, raw.get());
        norm[v] = rounding.apply(core, row, features, unit.get() + v * features,
                                 rounded.get() + v * features);
      }
      for (int64_t v = 0; v < rows; ++v) {
        FinishRow<T> f{};
        f.gradient = sums.row(a + v - begin);
        f.own = rounded.get() + v * features;
        f.positive = pull == nullptr ? f.own : rounded.get() + (1 - v) * features;
        f.unit = rounding.cosine ? unit.get() + v * features : nullptr;
        f.pull = pull == nullptr ? T{0} : pull[a] + pull[a + 1];
        f.factor = factor;
        f.norm = norm[v];
        f.features = features;
        along[a + v] = core.finish(f);
        if (rounding.cosine && norm[v] <= rounding.eps)
          std::fill(f.gradient, f.gradient + features, T{0});
        if (!in_place)
          write_row(grads[(a + v) % source.count], (a + v) / source.count, features, f.gradient);
      }
    }
  }
};

// Sums of the gradients of one side's rows while they are not complete: in the gradients themselves
// where those are of type T and need no padding. Not needed if `single`.
template <typename T>
struct GradientSums {
  bool in_place;
  Buffer<T> buffer;
  Rows<T> rows;

  GradientSums(Tensor* grads, int64_t count, int64_t total_rows, int64_t padded_features,
               bool single)
      : in_place(!single && grads[0].scalar_type() == dtype_of<T>() &&
                 grads[0].size(1) == padded_features),
        buffer(single || in_place ? 0 : total_rows * padded_features),
        rows(Rows<T>::contiguous(in_place ? data_of<T>(grads[0]) : buffer.get(), padded_features)) {
    if (in_place && count == 2)
      rows = {{data_of<T>(grads[0]), data_of<T>(grads[1])}, padded_features};
  }
};

inline constexpr int64_t kWorkspaceBytes = int64_t{64} << 20;  // for exponentials computed again

// A backward that has to compute the exponentials again works on squares of that many blocks, whose
// exponentials fit the workspace.
template <typename T>
int64_t square_side(int64_t block) {
  return static_cast<int64_t>(std::sqrt(static_cast<double>(kWorkspaceBytes) /
                                        static_cast<double>(block * block * sizeof(T))));
}

// Rows of a unit: few enough that the threads end together.
inline int64_t unit_rows(int64_t rows) {
  const int64_t threads = torch::stable::get_num_threads();
  int64_t unit = 96;
  while (unit > 24 && rows < 4 * threads * unit) unit /= 2;
  return unit;
}

template <typename T, typename P>
struct Side {
  Finisher<T, P> finisher;
  Rows<T> sums;
};

// The gradients of X and Y from the kept exponentials or, where `kept` is null, with exponentials
// computed again, a square of blocks at a time. A unit's rows belong to one thread, so nothing is
// added by two. Where one square is all, sums are complete after a unit and finished there.
// With `self` there is one side only.
template <typename T, typename P>
void run_backward(const Logits<T, P>& logits, const Weights<T>& row_weights,
                  const Weights<T>& column_weights, const T* kept, int64_t side,
                  const Side<T, P>& x, const Side<T, P>& y) {
  const Layout &rows = logits.x.layout, &columns = logits.y.layout;
  const bool self = logits.self(), single = side >= std::max(rows.blocks, columns.blocks);
  const int64_t block = rows.block, padded = logits.x.padded_features;
  const int64_t unit_height = unit_rows(std::max(rows.rows, columns.rows));
  const int64_t units = block / unit_height;
  const int64_t tiles = std::min(side, rows.blocks) * std::min(side, columns.blocks);
  const Buffer<T> workspace(kept == nullptr ? tiles * block * block : 0);
  for (int64_t first = 0; first < rows.blocks; first += side) {
    const int64_t last = std::min(first + side, rows.blocks);
    for (int64_t other = self ? first : 0; other < columns.blocks; other += side) {
      const int64_t other_last = std::min(other + side, columns.blocks);
      KeptTiles<T> square{workspace.get(), block, columns.blocks, false,
                          first,           last,  other,          other_last};
      if (kept != nullptr) {
        square.data = const_cast<T*>(kept);
        square.triangle = true;
      } else {
        fill_tiles(logits, square);
      }
      // The rows of the square's one side, then of its other, unless they are the same.
      const int64_t own = (last - first) * units;
      const int64_t all = own + (self && other == first ? 0 : (other_last - other) * units);
      const double work = 1.0 * all * unit_height * (last - first) * block * rows.features;
      deal(all, work, [&](const auto& take) {
        Buffer<P> coefficients(block * kCoefficientStride);
        Buffer<T> space(single ? unit_height * padded : 0);
        for (int64_t k; (k = take()) < all;) {
          const bool second = k >= own, of_y = second && !self;
          const Side<T, P>& mine = of_y ? y : x;
          Unit unit{of_y, second ? other + (k - own) / units : first + k / units,
                    k % units * unit_height, 0};
          const int64_t valid = (of_y ? columns : rows).valid(unit.block);
          unit.end = std::min(unit.begin + unit_height, valid);
          if (unit.begin >= unit.end) continue;
          const int64_t row = unit.block * block + unit.begin;
          const Rows<T> out =
              single ? Rows<T>::contiguous(space.get(), padded) : mine.sums.from(row);
          add_products(logits, row_weights, column_weights, square, unit, second ? first : other,
                       second ? last : other_last, second ? first > 0 : other > 0, out,
                       coefficients.get());
          if (single) mine.finisher.run(row, row + unit.end - unit.begin, out);
        }
      });
    }
  }
  if (single) return;
  for (const Side<T, P>* mine : {&x, &y}) {
    const int64_t total = mine->finisher.source.rows();
    const int64_t parts = (total + kPackedRows - 1) / kPackedRows;
    deal(parts, 20.0 * total * rows.features, [&](const auto& take) {
      for (int64_t k; (k = take()) < parts;) {
        const int64_t begin = k * kPackedRows, end = std::min(begin + kPackedRows, total);
        mine->finisher.run(begin, end, mine->sums.from(begin));
      }
    });
    if (self) break;
  }
}

// The gradient of a temperature: `total` of the type of `like`, 0-dim.
template <typename T>
Tensor scalar_gradient(const Tensor& like, double value) {
  Tensor out = make(like, {1}, like.scalar_type());
  const T number = static_cast<T>(value);
  write_row(out, 0, 1, &number);
  return torch::stable::view(out, {});
}

}  // namespace cjepa
