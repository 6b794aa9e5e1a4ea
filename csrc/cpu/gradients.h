// Gradients of X and Y from weights of the exponentials of S = X Y^T: what the backward of NT-Xent
// and that of the rectangle share.
#pragma once

#include "tiles.h"

namespace cjepa {

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

template <typename To, typename T>
To round_to(T x) {
  if constexpr (sizeof(To) == 2) return static_cast<To>(static_cast<float>(x));
  return static_cast<To>(x);
}

template <typename T>
void write_row(Tensor& out, int64_t row, int64_t features, const T* from) {
  const auto write = [&](auto zero) {
    auto* to = data_of<decltype(zero)>(out) + row * features;
    for (int64_t d = 0; d < features; ++d) to[d] = round_to<decltype(zero)>(from[d]);
  };
  switch (out.scalar_type()) {
    case ScalarType::Double:
      return write(double());
    case ScalarType::Half:
      return write(torch::headeronly::Half());
    case ScalarType::BFloat16:
      return write(torch::headeronly::BFloat16());
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
// With `self` there is one side only, `x`; a side that is null is not computed.
template <typename T, typename P>
void run_backward(const Logits<T, P>& logits, const Weights<T>& row_weights,
                  const Weights<T>& column_weights, const T* kept, int64_t side,
                  const Side<T, P>* x, const Side<T, P>* y) {
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
      const int64_t own = x == nullptr ? 0 : (last - first) * units;
      const bool only_own = self ? other == first : y == nullptr;
      const int64_t all = own + (only_own ? 0 : (other_last - other) * units);
      const double work = 1.0 * all * unit_height * (last - first) * block * rows.features;
      deal(all, work, [&](const auto& take) {
        Buffer<P> coefficients(block * kCoefficientStride);
        Buffer<T> space(single ? unit_height * padded : 0);
        for (int64_t k; (k = take()) < all;) {
          const bool second = k >= own, of_y = second && !self;
          const Side<T, P>& mine = of_y ? *y : *x;
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
  for (const Side<T, P>* mine : {x, y}) {
    if (mine == nullptr) continue;
    const int64_t total = mine->finisher.source.rows();
    const int64_t parts = (total + kPackedRows - 1) / kPackedRows;
    deal(parts, 20.0 * total * rows.features, [&](const auto& take) {
      for (int64_t k; (k = take()) < parts;) {
        const int64_t begin = k * kPackedRows, end = std::min(begin + kPackedRows, total);
        mine->finisher.run(begin, end, mine->sums.from(begin));
      }
    });
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
