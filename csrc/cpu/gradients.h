// Gradients of X and Y from weights of the exponentials of S = X Y^T, which the backward of NT-Xent
// and that of cross_logsumexp share.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "constants.h"
#include "core/tile_core.h"
#include "memory.h"
#include "packing.h"
#include "tensors.h"
#include "tiles.h"

namespace cjepa {

static_assert(kLargeBlock <= kCoefficientStride, "a row of coefficients holds a block's columns");

// Exponentials, or similarities, of the tiles (i, j) for blocks i in [first, last) and j in
// [column_first, column_last).
template <typename T>
struct StoredTiles {
  T* data;
  int64_t block, blocks;
  bool triangle;  // whether `data` holds every tile on and above the diagonal, as the forward of a
                  // symmetric S saves them
  int64_t first, last, column_first, column_last;

  T* tile(int64_t i, int64_t j) const {
    const int64_t number = triangle ? tile_number(i, j, blocks)
                                    : (i - first) * (column_last - column_first) + j - column_first;
    return data + number * block * block;
  }
};

// Computes the exponentials of the tiles that `stored` describes. `panels` is room for those of its
// blocks of columns. The panels of all blocks together would take as much memory as the input.
template <typename T, typename P>
void fill_tiles(const Logits<T, P>& logits, const StoredTiles<T>& stored, P* panels) {
  const int64_t block = stored.block, columns = stored.column_last - stored.column_first;
  const int64_t panels_size = logits.y.panels_size();
  parallel_tasks(columns, 2.0 * columns * panels_size, [&](const auto& take) {
    for (int64_t k; (k = take()) < columns;)
      logits.y.pack_panels(stored.column_first + k, panels + k * panels_size);
  });
  const int64_t tiles = (stored.last - stored.first) * columns;
  // If there are many tiles, a thread takes whole ones, whose rows then stay in its cache.
  const int64_t width = tiles >= 64 ? block : logits.core.panel, parts = block / width;
  const double work = 1.0 * tiles * block * block * logits.x.depth;
  parallel_tasks(tiles * parts, work, [&](const auto& take) {
    for (int64_t k; (k = take()) < tiles * parts;) {
      const int64_t i = stored.first + k / parts / columns;
      const int64_t j = stored.column_first + k / parts % columns;
      const int64_t begin = k % parts * width;
      if ((logits.self() && i > j) || begin >= logits.y.layout.valid(j)) continue;
      const P* own = panels + (j - stored.column_first) * panels_size;
      SimilarityTile<T, P> t = logits.tile(i, j, begin, begin + width, own);
      if (width == block && j + 1 < stored.column_last) t.next_panels = own + panels_size;
      t.out = stored.tile(i, j) + begin;
      t.out_stride = block;
      t.past_caches = tiles * block * block * sizeof(T) > kStreamedBytes;
      logits.core.similarity(t);
    }
  });
}

// For each row or column, padded with zeros: the factor of its exponentials, and their shift.
template <typename T>
struct Weights {
  Buffer<T> weight, shift;
};

// Where sums of gradients are stored: the rows alternate between two bases.
template <typename T>
struct GradientRows {
  T* base[2];
  int64_t stride;

  static GradientRows contiguous(T* data, int64_t length) {
    return {{data, data + length}, 2 * length};
  }
  T* row(int64_t a) const { return base[a & 1] + (a >> 1) * stride; }
  GradientRows from(int64_t a) const { return {{row(a), row(a + 1)}, stride}; }  // a is even
};

// Rows [begin, end) of a block of X, or with `of_y` of Y, whose gradients one thread computes.
struct Unit {
  bool of_y;
  int64_t block, begin, end;
};

// The rows of a batch, sorted by class, which attract each other within a class. Padded, as Weights
// are.
template <typename T>
struct Attraction {
  std::vector<int64_t> class_begins, class_ends;  // of each row
  Buffer<T> strength;                             // subtracted from the coefficients of the row

  // Whether some row of [row, row + height) is of the class of one of [column, column + width).
  bool between(int64_t row, int64_t height, int64_t column, int64_t width) const {
    return class_begins[row] < column + width && class_ends[row + height - 1] > column;
  }
};

// What all units share: S, the weights of its exponentials, and tiles of these.
template <typename T, typename P>
struct WeightedTiles {
  const Logits<T, P>& logits;
  const Weights<T>& row_weights;
  const Weights<T>& column_weights;
  const StoredTiles<T>& stored;
  const Attraction<T>* attraction;  // or null
};

// The blocks [first, last) of the other side with which a unit is multiplied.
struct OtherBlocks {
  int64_t first, last;
  bool accumulate;  // whether other blocks were added before
};

// Adds the products of a unit with blocks of the other side to `out`, whose row 0 is the unit's
// first row. `coefficients` is room for block * kCoefficientStride numbers. With `self` the tiles
// below the diagonal are read from above it, by columns.
template <typename T, typename P>
void add_products(const WeightedTiles<T, P>& tiles, const Unit& unit, const OtherBlocks& others,
                  const GradientRows<T>& out, P* coefficients) {
  constexpr int64_t kNumbers = PackedBatch<T, P>::kNumbers;
  const Logits<T, P>& logits = tiles.logits;
  const StoredTiles<T>& stored = tiles.stored;
  const PackedBatch<T, P>& other = unit.of_y ? logits.x : logits.y;
  const int64_t block = stored.block, i = unit.block, begin = unit.begin;
  const int64_t own_row = i * block + begin, height = unit.end - begin;
  const auto by_columns = [&](int64_t j) { return unit.of_y || (logits.self() && i > j); };
  const auto source = [&](int64_t j) {
    return by_columns(j) ? stored.tile(j, i) + begin : stored.tile(i, j) + begin * block;
  };
  for (int64_t j = others.first; j < others.last; ++j) {
    const bool transposed = by_columns(j);
    const int64_t depth = other.layout.valid(j), other_row = j * block;
    Coefficients<T, P> c{};
    c.stored = source(j);
    c.stored_stride = block;
    c.height = transposed ? depth : height;
    c.width = transposed ? height : depth;
    c.exponent = logits.exponent;
    const int64_t row = transposed ? other_row : own_row, column = transposed ? own_row : other_row;
    c.row_shift = tiles.row_weights.shift.get() + row;
    c.row_weight = tiles.row_weights.weight.get() + row;
    c.column_shift = tiles.column_weights.shift.get() + column;
    c.column_weight = tiles.column_weights.weight.get() + column;
    c.out = coefficients;
    c.out_stride = kCoefficientStride;
    const Attraction<T>* attraction = tiles.attraction;
    if (attraction != nullptr && attraction->between(row, c.height, column, c.width)) {
      c.class_begins = attraction->class_begins.data();
      c.class_ends = attraction->class_ends.data();
      c.attraction = attraction->strength.get();
      c.row = row;
      c.column = column;
    }
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
    p.accumulate = others.accumulate || j > others.first;
    if (j + 1 < others.last) {
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

// Writes row `row` of a contiguous tensor of any floating dtype.
template <typename T>
void write_row(Tensor& out, int64_t row, int64_t features, const T* from) {
  with_number(out.scalar_type(), [&](auto zero) {
    using To = decltype(zero);
    To* to = data_of<To>(out) + row * features;
    for (int64_t d = 0; d < features; ++d) {
      if constexpr (sizeof(To) == 2) {
        to[d] = static_cast<To>(static_cast<float>(from[d]));
      } else {
        to[d] = static_cast<To>(from[d]);
      }
    }
  });
}

// For each row of one side, the rows of the other side that are its positives:
// rows[starts[a]], ..., rows[starts[a + 1] - 1]. A positive's weight is that of the rectangle's row
// that has it, so it is found by the row of X: by `a` itself, or with `of_y` by the positive.
template <typename T>
struct PositiveRows {
  Source other;
  bool of_y;
  std::vector<int64_t> starts, rows;
  const T* weight;  // of the rows of X
};

// Turns sums into gradients of the raw embeddings.
template <typename T, typename P>
struct Finisher {
  const TileCore<T, P>& core;
  Source source;
  Rounding<T> rounding;
  const T* positive_weight;  // of each row's positive, (rows), or null without positives
  T factor;
  Tensor* grads;  // gradients of the source's views
  bool in_place;  // whether the sums lie in `grads`
  // (rows) row . gradient, from which the temperature's gradient follows. The positives of
  // `positive_rows` have no part in it.
  T* row_dot_gradient;
  const PositiveRows<T>* positive_rows = nullptr;  // or null

  // Rows [begin, end), `begin` being even; sums.row(0) is row `begin`.
  void run(int64_t begin, int64_t end, const GradientRows<T>& sums) const {
    const int64_t features = source.views->features;
    Buffer<T> raw(features), unit(2 * features), rounded(2 * features);
    Buffer<T> other(positive_rows == nullptr ? 0 : 2 * features);
    for (int64_t a = begin; a < end; a += 2) {
      const int64_t rows = std::min<int64_t>(2, end - a);
      T norm[2];
      for (int64_t v = 0; v < rows; ++v) {
        const T* row = source.row(a + v, raw.get());
        norm[v] = rounding.apply(core, row, features, unit.get() + v * features,
                                 rounded.get() + v * features);
      }
      for (int64_t v = 0; v < rows; ++v) {
        FinishRow<T> f{};
        f.gradient = sums.row(a + v - begin);
        f.own = rounded.get() + v * features;
        f.positive = f.own;
        if (positive_weight != nullptr) {
          f.positive = rounded.get() + (1 - v) * features;
          f.positive_weight = positive_weight[a] + positive_weight[a + 1];
        }
        f.unit = rounding.cosine ? unit.get() + v * features : nullptr;
        f.factor = factor;
        f.norm = norm[v];
        f.features = features;
        T of_positives = 0;
        if (positive_rows != nullptr)
          of_positives = subtract_positives(a + v, f.own, f.gradient, raw.get(), other.get());
        row_dot_gradient[a + v] = core.finish(f) + factor * of_positives;
        if (rounding.cosine && norm[v] <= rounding.eps)
          std::fill(f.gradient, f.gradient + features, T{0});
        if (!in_place)
          write_row(grads[source.view_of(a + v)], source.row_of(a + v), features, f.gradient);
      }
    }
  }

 private:
  // Subtracts the weighted positives of row `a` from the sum of its gradient. Returns the product
  // of the row with what was subtracted. `space` is room for two rows.
  T subtract_positives(int64_t a, const T* own, T* sum, T* raw, T* space) const {
    const int64_t features = source.views->features;
    T *unit = space, *positive = space + features, product = 0;
    for (int64_t k = positive_rows->starts[a]; k < positive_rows->starts[a + 1]; ++k) {
      const int64_t b = positive_rows->rows[k];
      const T weight = positive_rows->weight[positive_rows->of_y ? b : a];
      rounding.apply(core, positive_rows->other.row(b, raw), features, unit, positive);
      for (int64_t d = 0; d < features; ++d) sum[d] -= weight * positive[d];
      product += weight * core.dot(own, positive, features);
    }
    return product;
  }
};

// Sums of the gradients of one side's rows while they are incomplete. They lie in the gradients
// themselves if those are of type T and need no padding, else in a buffer. If `needed` is false
// there are none.
template <typename T>
struct GradientSums {
  bool in_place;
  Buffer<T> buffer;
  GradientRows<T> rows;

  // `grads` are the gradients of the views of `source`.
  GradientSums(Tensor* grads, const Source& source, int64_t padded_features, bool needed)
      : in_place(needed && grads[0].scalar_type() == dtype_of<T>() &&
                 grads[0].size(1) == padded_features),
        buffer(needed && !in_place ? source.rows() * padded_features : 0),
        rows(GradientRows<T>::contiguous(in_place ? data_of<T>(grads[0]) : buffer.get(),
                                         padded_features)) {
    if (in_place && source.count == 2)
      rows = {{data_of<T>(grads[0]), data_of<T>(grads[1])}, padded_features};
  }
};

// Memory for exponentials that a backward computes again.
inline constexpr int64_t kWorkspaceBytes = int64_t{64} << 20;

// A backward that computes the exponentials again works on squares of tiles whose exponentials fit
// the workspace. This is the number of blocks along a side of such a square.
template <typename T>
int64_t blocks_of_square(int64_t block, int64_t workspace_bytes = kWorkspaceBytes) {
  return static_cast<int64_t>(std::sqrt(static_cast<double>(workspace_bytes) /
                                        static_cast<double>(block * block * sizeof(T))));
}

// Rows of a unit: few enough that all threads end at about the same time.
inline int64_t unit_rows(int64_t rows) {
  const int64_t threads = torch::stable::get_num_threads();
  int64_t unit = kSmallBlock;
  while (unit > 24 && rows < 4 * threads * unit) unit /= 2;
  return unit;
}

// The gradient of X or of Y.
template <typename T, typename P>
struct Side {
  Finisher<T, P> finisher;
  GradientRows<T> sums;
};

template <typename T, typename P>
struct BackwardInputs {
  const Logits<T, P>& logits;
  const Weights<T>& row_weights;
  const Weights<T>& column_weights;
  const T* saved_exponentials;  // of all tiles that count; null: they are computed again
  int64_t square_blocks;        // blocks along a side of the squares that are worked on
  const Side<T, P>* x;          // null: this gradient is not computed
  const Side<T, P>* y;          // the same; always null with `self`, which has one side only
  const Attraction<T>* attraction = nullptr;  // only with `self`
};

// Computes the gradients of X and Y, a square of blocks at a time. The rows of a unit belong to one
// thread, so no two threads add to the same sum. If one square covers S, the sums are complete
// after a unit, and the thread finishes them at once.
template <typename T, typename P>
void run_backward(const BackwardInputs<T, P>& in) {
  const Logits<T, P>& logits = in.logits;
  const Layout &rows = logits.x.layout, &columns = logits.y.layout;
  const int64_t side = in.square_blocks;
  const bool self = logits.self(), single = side >= std::max(rows.blocks, columns.blocks);
  const int64_t block = rows.block, padded = logits.x.padded_features;
  const int64_t unit_height = unit_rows(std::max(rows.rows, columns.rows));
  const int64_t units = block / unit_height;
  const int64_t tiles = std::min(side, rows.blocks) * std::min(side, columns.blocks);
  const bool saved = in.saved_exponentials != nullptr;
  const Buffer<T> workspace(saved ? 0 : tiles * block * block);
  const Buffer<P> panels(saved ? 0 : std::min(side, columns.blocks) * logits.y.panels_size());
  for (int64_t first = 0; first < rows.blocks; first += side) {
    const int64_t last = std::min(first + side, rows.blocks);
    for (int64_t other = self ? first : 0; other < columns.blocks; other += side) {
      const int64_t other_last = std::min(other + side, columns.blocks);
      const StoredTiles<T> square{
          .data = saved ? const_cast<T*>(in.saved_exponentials) : workspace.get(),
          .block = block,
          .blocks = columns.blocks,
          .triangle = saved && self,
          .first = first,
          .last = last,
          .column_first = other,
          .column_last = other_last};
      if (!saved) fill_tiles(logits, square, panels.get());
      const WeightedTiles<T, P> weighted{.logits = logits,
                                         .row_weights = in.row_weights,
                                         .column_weights = in.column_weights,
                                         .stored = square,
                                         .attraction = in.attraction};
      // First come the units of the square's rows, then those of its columns. A square on the
      // diagonal of a symmetric S has the same rows as columns.
      const int64_t row_units = in.x == nullptr ? 0 : (last - first) * units;
      const bool rows_only = self ? other == first : in.y == nullptr;
      const int64_t all_units = row_units + (rows_only ? 0 : (other_last - other) * units);
      const double work = 1.0 * all_units * unit_height * (last - first) * block * rows.features;
      parallel_tasks(all_units, work, [&](const auto& take) {
        Buffer<P> coefficients(block * kCoefficientStride);
        Buffer<T> space(single ? unit_height * padded : 0);
        for (int64_t k; (k = take()) < all_units;) {
          const bool of_columns = k >= row_units, of_y = of_columns && !self;
          const Side<T, P>& mine = of_y ? *in.y : *in.x;
          Unit unit{.of_y = of_y,
                    .block = of_columns ? other + (k - row_units) / units : first + k / units,
                    .begin = k % units * unit_height,
                    .end = 0};
          const int64_t valid = (of_y ? columns : rows).valid(unit.block);
          unit.end = std::min(unit.begin + unit_height, valid);
          if (unit.begin >= unit.end) continue;
          const OtherBlocks others{.first = of_columns ? first : other,
                                   .last = of_columns ? last : other_last,
                                   .accumulate = of_columns ? first > 0 : other > 0};
          const int64_t row = unit.block * block + unit.begin;
          const GradientRows<T> out =
              single ? GradientRows<T>::contiguous(space.get(), padded) : mine.sums.from(row);
          add_products(weighted, unit, others, out, coefficients.get());
          if (single) mine.finisher.run(row, row + unit.end - unit.begin, out);
        }
      });
    }
  }
  if (single) return;
  for (const Side<T, P>* mine : {in.x, in.y}) {
    if (mine == nullptr) continue;
    const int64_t total = mine->finisher.source.rows();
    const int64_t parts = (total + kPackedRows - 1) / kPackedRows;
    parallel_tasks(parts, 20.0 * total * rows.features, [&](const auto& take) {
      for (int64_t k; (k = take()) < parts;) {
        const int64_t begin = k * kPackedRows, end = std::min(begin + kPackedRows, total);
        mine->finisher.run(begin, end, mine->sums.from(begin));
      }
    });
  }
}

// The gradient of a temperature, 0-dim, in the dtype of `like`.
template <typename T>
Tensor scalar_gradient(const Tensor& like, double value) {
  Tensor out = new_tensor(like, {1}, like.scalar_type());
  const T number = static_cast<T>(value);
  write_row(out, 0, 1, &number);
  return torch::stable::view(out, {});
}

}  // namespace cjepa
