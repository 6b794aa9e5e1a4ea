// What a tile of S = X Y^T needs, per instruction set: plain data and function pointers.
//
// Files that include the implementation (tile_core_impl.h) are compiled with the flags of one
// instruction set. They share no inline function with the rest: the linker would keep one copy of
// it, perhaps the one with instructions that this CPU lacks. So this header has no code in it.
//
// T is the type of sums (float, double), P that of packed operands: T itself, or two bf16 numbers
// in one 32-bit word, which a bf16 dot-product instruction multiplies at once. A product over D
// features is then one over D / 2 words.
#pragma once

#include <cstdint>

#include "prediction_row.h"

namespace cjepa {

using Bf16Pair = uint32_t;  // first number in the low half

// Which entries of S count. With `self`, X and Y are one batch whose rows are interleaved (row 2k
// is view i of sample k, row 2k + 1 view j): only pairs above the diagonal are looked at, a row's
// positive (row ^ 1) is not a negative, and mask, if any, excludes more pairs of samples: bit l % 8
// of byte l / 8 of row k is set for the pair (k, l) and, as it is symmetric, for (l, k).
struct Exclusion {
  int64_t rows, columns;  // what lies beyond is padding
  bool self;
  const uint8_t* mask;  // or null
  int64_t mask_stride;  // bytes of a row
};

// Exponents are base 2: scale = log2(e) / tau. With a constant shift (|s| <= 1.02 and a range that
// fits), e = 2^(scale s - shift); else every row and column has its own, the largest s so far.
template <typename T>
struct Exponent {
  T scale;
  T scale_rest;  // what rounding to T took from scale
  bool constant_shift;
  T shift;
};

// A tile: `height` rows from `row`, `width` columns from `column`, multiples of the micro-tile. It
// adds to the sums of exponentials and to the maxima of s, and writes e (constant shift) or s, with
// excluded entries as 0 or -inf. Of a tile on the diagonal the part below it is left out.
template <typename T, typename P>
struct SimilarityTile {
  const P* rows;         // [depth / panel][slice_rows][panel], at the tile's first row
  int64_t slice_rows;    // rows of the block that the slices hold
  const P* panels;       // [width / panel][depth][panel]
  const P* next_panels;  // needed after these, or null
  int64_t depth;         // features / (numbers in a P)
  int64_t row, column, height, width;
  Exclusion exclusion;
  Exponent<T> exponent;
  T* out;  // (height, out_stride); null with a constant shift: not kept
  int64_t out_stride;
  bool past_caches;  // whether to write `out` around the caches
  T* row_sum;        // all at the tile's first row or column; null: no sums
  T* row_max;
  T* column_sum;
  T* column_max;
  T* positive;           // written where the tile meets the diagonal
  double* negative_sum;  // with a mask: of the s of the negatives, in both orders; else null
  T* scratch;            // scratch_size() numbers
};

// Coefficients of the products from a part of a kept tile: e (w_row + w_column) with a constant
// shift, else 2^(scale (s - shift_row)) w_row + 2^(scale (s - shift_column)) w_column. For P of two
// numbers they are paired along the columns, or along the rows if the product sums over rows.
template <typename T, typename P>
struct Coefficients {
  const T* kept;  // (height, kept_stride)
  int64_t kept_stride;
  int64_t height, width;
  Exponent<T> exponent;
  const T* row_shift;
  const T* column_shift;
  const T* row_weight;
  const T* column_weight;
  P* out;
  int64_t out_stride;  // in P
};

// out[i, :] += sum_k a(i, k) y[k, :], a(i, k) = a[i * kCoefficientStride + k], or with `transposed`
// a[k * a_stride + i]. Rows of `out` alternate between two bases, `stride` apart in each.
template <typename T, typename P>
struct Product {
  const P* a;
  bool transposed;
  int64_t a_stride;
  int64_t height, depth;
  const P* panels;       // [features / panel][panel_depth][panel], at the first of `depth`
  const P* next_panels;  // needed after these, or null
  int64_t panel_depth;
  int64_t features;  // multiple of the panel
  T* out[2];
  int64_t stride;
  bool accumulate;  // else out is written
  // What to bring into the cache meanwhile: `prefetch_rows` rows of `prefetch_bytes`.
  const char* prefetch;
  int64_t prefetch_rows, prefetch_bytes, prefetch_stride;
};

inline constexpr int64_t kCoefficientStride = 192;  // numbers P in a row of coefficients

// Last step of a row's gradient with respect to the raw embedding z = |z| unit:
//   g = factor (sum - pull positive), projected on unit's complement and divided by |z|
template <typename T>
struct FinishRow {
  T* gradient;   // in: the sum; out: the gradient
  const T* own;  // the rounded row that the products saw, and its positive's
  const T* positive;
  const T* unit;  // not rounded; null: the dot product, nothing to project
  T pull, factor, norm;
  int64_t features;
};

template <typename T, typename P>
struct TileCore {
  int64_t micro_rows;  // heights are multiples of it
  int64_t panel;       // widths are multiples of it
  int64_t (*scratch_size)(int64_t height);
  void (*similarity)(const SimilarityTile<T, P>&);
  void (*coefficients)(const Coefficients<T, P>&);
  void (*coefficients_over_rows)(const Coefficients<T, P>&);
  void (*product)(const Product<T, P>&);
  T (*dot)(const T* x, const T* y, int64_t count);
  void (*add)(const T* x, int64_t count, T* sum);  // sum += x
  // out = in / max(|in|, eps); returns |in|.
  T (*normalize)(const T* in, int64_t features, T eps, T* out);
  // At most `panel` contiguous rows to the slices and, unless null, to a panel of the transpose.
  void (*pack)(const T* rows, int64_t count, int64_t features, P* panel_out, P* slices,
               int64_t slice_rows);
  // The same rows as operand of a product over rows: [features / panel][panel_depth][panel]. Where
  // P holds two numbers and the count is odd, one more row is read.
  void (*pack_product)(const T* rows, int64_t count, int64_t features, P* out, int64_t panel_depth);
  T (*finish)(const FinishRow<T>&);  // returns gradient . own before the projection
  PredictionFunctions<T> prediction;
};

}  // namespace cjepa
