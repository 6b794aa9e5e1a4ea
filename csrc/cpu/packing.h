// The kernel's own copy of a batch: rows normalised, rounded, padded, and laid out as operands.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "constants.h"
#include "core/tile_core.h"
#include "memory.h"
#include "selected_core.h"
#include "tensors.h"

namespace cjepa {

// A (rows, D) tensor of any strides and any floating dtype.
struct View {
  const char* data;
  ScalarType dtype;
  int64_t rows, features, row_stride, column_stride;

  explicit View(const Tensor& z)
      : data(static_cast<const char*>(z.const_data_ptr())),
        dtype(z.scalar_type()),
        rows(z.size(0)),
        features(z.size(1)),
        row_stride(z.stride(0)),
        column_stride(z.stride(1)) {}

  // The row itself if it lies contiguous in memory as numbers T, else a copy of it in `space`.
  template <typename T>
  const T* row(int64_t index, T* space) const {
    return with_number(dtype, [&](auto zero) { return convert<decltype(zero)>(index, space); });
  }

 private:
  template <typename S, typename T>
  const T* convert(int64_t index, T* space) const {
    const S* from = reinterpret_cast<const S*>(data) + index * row_stride;
    if constexpr (std::is_same_v<S, T>) {
      if (column_stride == 1) return from;
    }
    if (column_stride == 1) {
      for (int64_t d = 0; d < features; ++d) space[d] = static_cast<T>(from[d]);
    } else {
      for (int64_t d = 0; d < features; ++d) space[d] = static_cast<T>(from[d * column_stride]);
    }
    return space;
  }
};

// Rounds numbers to a dtype, in place.
template <typename T>
void round_numbers(ScalarType dtype, int64_t count, T* x) {
  const auto through = [&](auto narrow) {
    using Narrow = decltype(narrow);
    for (int64_t i = 0; i < count; ++i)
      x[i] = static_cast<float>(static_cast<Narrow>(static_cast<float>(x[i])));
  };
  if (dtype == ScalarType::BFloat16) return through(torch::headeronly::BFloat16());
  if (dtype == ScalarType::Half) return through(torch::headeronly::Half());
  if (dtype == ScalarType::Float && sizeof(T) > sizeof(float)) return through(float());
}

// How rows become the operands of a product.
template <typename T>
struct Rounding {
  bool cosine;
  T eps;
  ScalarType dtype;

  // Writes one raw row twice: normalised to `unit`, and rounded after that to `rounded`. Returns
  // the norm of the raw row.
  template <typename Core>
  T apply(const Core& core, const T* raw, int64_t features, T* unit, T* rounded) const {
    T norm = 1;
    if (cosine) {
      norm = core.normalize(raw, features, eps, unit);
    } else {
      std::copy(raw, raw + features, unit);
    }
    if (rounded != unit) std::copy(unit, unit + features, rounded);
    round_numbers(dtype, features, rounded);
    return norm;
  }
};

inline int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// How rows are cut into blocks, which are the sides of the tiles.
struct Layout {
  int64_t rows, features, block, blocks;

  Layout(int64_t rows_, int64_t features_, int64_t block_)
      : rows(rows_), features(features_), block(block_) {
    blocks = (rows + block - 1) / block;
  }
  int64_t padded_rows() const { return blocks * block; }
  int64_t valid(int64_t b) const { return std::min(block, rows - b * block); }  // rows of block b
};

inline constexpr int64_t kPackedRows = 32;  // packed at a time; a multiple of every core's panel

// The rows of one tensor, or of two interleaved ones: row 2k is row k of the first tensor, and row
// 2k + 1 is row k of the second. If `order` is not null, row a of the source is row order[a] of
// that sequence.
struct Source {
  const View* views;
  int64_t count;
  const int64_t* order = nullptr;

  int64_t rows() const { return count * views->rows; }
  int64_t view_of(int64_t a) const { return in_order(a) % count; }
  int64_t row_of(int64_t a) const { return in_order(a) / count; }  // of that view

  // The row itself if it lies contiguous in memory as numbers T, else a copy of it in `space`.
  template <typename T>
  const T* row(int64_t a, T* space) const {
    return views[view_of(a)].row(row_of(a), space);
  }

 private:
  int64_t in_order(int64_t a) const { return order == nullptr ? a : order[a]; }
};

// The rows of a source as operands: P is the type of an operand, T that of the sums (see
// core/tile_core.h).
template <typename T, typename P>
struct PackedBatch {
  static constexpr int64_t kNumbers = std::is_same_v<T, P> ? 1 : 2;  // in a P

  const TileCore<T, P>& core;
  Layout layout;
  int64_t depth;            // of the product over features, in P
  int64_t padded_depth;     // depth of the slices, a multiple of the panel
  int64_t padded_features;  // of the operand of products, a multiple of the panel
  Buffer<P> slices;         // [block][padded_depth / panel][block rows][panel]
  Buffer<P> panels;         // [rows / panel][depth][panel]
  Buffer<P> products_own;   // [block][padded_features / panel][block rows / kNumbers][panel]
  bool finite = true;
  bool bounded = true;          // whether no row is longer than kLongestRow
  std::vector<T> sums;          // [group of rows][features], if wanted
  std::vector<double> squares;  // [group of rows] sum of the squares of all numbers, if wanted

  // Operands from the first row of block b on.
  const P* slices_of(int64_t b) const { return slices.get() + b * layout.block * padded_depth; }
  const P* panels_of(int64_t b) const { return panels.get() + b * panels_size(); }
  int64_t panels_size() const { return layout.block * depth; }  // of one block
  const P* products_of(int64_t b) const {
    const Buffer<P>& operand = kNumbers == 1 ? slices : products_own;
    return operand.get() + b * layout.block / kNumbers * padded_features;
  }

  // (features) the sum of all rows, if sums were wanted.
  std::vector<double> sum_of_rows() const {
    std::vector<double> sum(layout.features);
    for (size_t at = 0; at < sums.size();)
      for (int64_t d = 0; d < layout.features; ++d) sum[d] += sums[at++];
    return sum;
  }

  // Which operands and sums the caller needs. Similarities need the slices of one side and the
  // panels of the other. Without `panels` the caller packs those of some blocks when it needs them.
  struct Wanted {
    bool similarity = false, panels = false, products = false, sums = false;
  };

  // Writes the panels of block b, as `panels` has them.
  void pack_panels(int64_t b, P* out) const {
    const int64_t valid = layout.valid(b);
    for (int64_t r = 0; r < valid; r += core.panel)
      core.pack_panel(slices_of(b) + r * core.panel, layout.block, std::min(core.panel, valid - r),
                      depth, out + r * depth);
  }

  PackedBatch(const Source& source, int64_t block, const Rounding<T>& rounding, Wanted wanted)
      : core(tile_core<T, P>()),
        layout(source.rows(), source.views->features, block),
        depth((layout.features + kNumbers - 1) / kNumbers),
        padded_depth(round_up(depth, core.panel)),
        padded_features(round_up(layout.features, core.panel)),
        // The last micro-tile reads beyond the last row where it is not full.
        slices((kNumbers == 1 || wanted.similarity)
                   ? layout.padded_rows() * padded_depth + core.micro_rows * core.panel
                   : 0),
        panels(wanted.panels ? layout.blocks * panels_size() : 0),
        products_own(kNumbers == 2 && wanted.products
                         ? layout.padded_rows() / kNumbers * padded_features
                         : 0) {
    const int64_t groups = (layout.rows + kPackedRows - 1) / kPackedRows;
    const int64_t features = layout.features;
    if (wanted.sums) {
      sums.resize(groups * features);
      squares.resize(groups);
    }
    constexpr T kLongestSquare = static_cast<T>(kLongestRow * kLongestRow);
    std::vector<uint8_t> group_finite(groups, 1), group_bounded(groups, 1);
    parallel_tasks(groups, 20.0 * layout.rows * features, [&](const auto& take) {
      Buffer<T> rows(kPackedRows * features), space(features);
      for (int64_t g; (g = take()) < groups;) {
        double group_squares = 0;
        const int64_t first = g * kPackedRows;
        const int64_t count = std::min(kPackedRows, layout.rows - first);
        for (int64_t r = 0; r < count; ++r) {
          const int64_t a = first + r;
          T* row = rows.get() + r * features;
          const T* raw = source.row(a, space.get());
          rounding.apply(core, raw, features, row, row);
          const T square = core.dot(row, row, features);
          group_squares += square;
          if (!(square <= kLongestSquare)) group_bounded[g] = 0;
          if (!std::isfinite(square) || square == 0) group_finite[g] &= all_finite(raw, features);
        }
        // S excludes what lies beyond the last row. But where an operand holds two rows, the
        // padding row that shares its operand with the last row is multiplied by 0, so it must not
        // be NaN.
        if (count < kPackedRows) std::fill_n(rows.get() + count * features, features, T{0});
        write(wanted, rows.get(), first, count);
        if (!wanted.sums) continue;
        squares[g] = group_squares;
        T* sum = sums.data() + g * features;
        for (int64_t r = 0; r < count; ++r) core.add(rows.get() + r * features, features, sum);
      }
    });
    for (int64_t g = 0; g < groups; ++g) {
      finite = finite && group_finite[g] != 0;
      bounded = bounded && group_bounded[g] != 0;
    }
  }

 private:
  static bool all_finite(const T* row, int64_t features) {
    return std::all_of(row, row + features, [](T x) { return std::isfinite(x); });
  }

  // Writes rows [first, first + count) to the operands.
  void write(Wanted wanted, const T* rows, int64_t first, int64_t count) const {
    const int64_t features = layout.features, b = first / layout.block;
    const int64_t row = first - b * layout.block;
    for (int64_t r = 0; r < count; r += core.panel) {
      const int64_t valid = std::min(core.panel, count - r);
      const T* from = rows + r * features;
      if (wanted.similarity || kNumbers == 1) {
        P* slice = slices.get() + b * layout.block * padded_depth + (row + r) * core.panel;
        P* panel = wanted.panels ? panels.get() + (first + r) * depth : nullptr;
        core.pack(from, valid, features, panel, slice, layout.block);
      }
      if (wanted.products && kNumbers == 2) {
        P* out = products_own.get() + b * layout.block / kNumbers * padded_features +
                 (row + r) / kNumbers * core.panel;
        core.pack_product(from, valid, features, out, layout.block / kNumbers);
      }
    }
  }
};

}  // namespace cjepa
