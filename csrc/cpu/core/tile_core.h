// The interface of a tile core, which computes tiles of S = X Y^T with the instructions of one
// instruction set: plain data and function pointers.
//
// A file that includes the implementation (tile_core_impl.h) is compiled with the flags of one
// instruction set. It must not share an inline function with any other file, because the linker
// keeps only one copy of such a function, perhaps the one with instructions that this CPU lacks. So
// this header has no code in it.
//
// T is the type of sums (float or double), and P is the type of packed operands: T itself, or two
// bf16 numbers in one 32-bit word, which a bf16 dot-product instruction multiplies at once. A
// product over D features is then one over D / 2 words.
#pragma once

#include <cstdint>

#include "prediction_row.h"

namespace cjepa {

using Bf16Pair = uint32_t;  // first number in the low half

// Which entries of S count.
//
// A row's positive does not count: `positives` has its column, or -1 for a row without one.
//
// With `self`, X and Y are one batch, and only entries above the diagonal count. `positives` then
// holds rows that are each other's positive. With `pairs` the rows are interleaved: row 2k is view
// i of sample k, row 2k + 1 is view j of it, and each is the other's positive (row ^ 1). A mask
// excludes more pairs of samples: bit l % 8 of byte l / 8 of row k is set if the pair (k, l) is
// excluded. It is symmetric. If rows are sorted by class and no two rows of one class count,
// `class_ends` has for each row the first row of the next class.
struct Exclusion {
  int64_t rows, columns;  // rows and columns beyond these are padding
  bool self;
  bool pairs;                 // only with `self`
  const uint8_t* mask;        // or null; only with `pairs`
  int64_t mask_stride;        // bytes of a row
  const int64_t* positives;   // (rows) or null; not with `pairs`
  const int64_t* class_ends;  // (rows) or null; only with `self`
};

// How a similarity s becomes an exponential e. Exponents have base 2: scale = log2(e) / tau. With a
// constant shift e = 2^(scale s - shift). Else every row and every column has a shift of its own,
// the largest s so far.
template <typename T>
struct Exponent {
  T scale;
  T scale_rest;  // log2(e) / tau minus scale, which is rounded to T
  bool constant_shift;
  T shift;
};

// A tile of similarities: `height` rows from `row` on and `width` columns from `column` on, which
// are multiples of the micro-tile. The core adds to the sums of exponentials and to the maxima of
// s. It writes e with a constant shift and s without one; excluded entries are 0 or -inf. The part
// below the diagonal takes no part in the sums.
template <typename T, typename P>
struct SimilarityTile {
  const P* rows;         // [depth / panel][slice_rows][panel], at the tile's first row
  int64_t slice_rows;    // rows of the block that the slices hold
  const P* panels;       // [width / panel][depth][panel]
  const P* next_panels;  // to bring into the cache, since they come next; or null
  int64_t depth;         // features / (numbers in a P)
  int64_t row, column, height, width;
  Exclusion exclusion;
  Exponent<T> exponent;
  T* out;  // (height, out_stride); may be null with a constant shift: nothing is written
  int64_t out_stride;
  bool past_caches;  // whether to write `out` around the caches
  // From the tile's first row or column on. Null: no sums and no maxima.
  T* row_sum;
  T* row_max;
  T* column_sum;
  T* column_max;
  T* positive;           // each row's s with its positive, if that is in the tile; or null
  double* negative_sum;  // with a mask: sum of the negatives' s, each pair twice; else null
  T* scratch;            // scratch_size() numbers
};

// Coefficients of a product from a part of a stored tile: e (w_row + w_column) with a constant
// shift, else 2^(scale (s - shift_row)) w_row + 2^(scale (s - shift_column)) w_column. Where a P
// holds two numbers, they come from two columns of a row, or from two rows if the product sums over
// rows. If rows and columns are those of one batch sorted by class and attract each other within a
// class, the attractions of row and column are subtracted from the entries of two rows of a class.
template <typename T, typename P>
struct Coefficients {
  const T* stored;  // (height, stored_stride)
  int64_t stored_stride;
  int64_t height, width;
  Exponent<T> exponent;
  const T* row_shift;
  const T* column_shift;
  const T* row_weight;
  const T* column_weight;
  P* out;
  int64_t out_stride;  // in P
  // Null: nothing attracts. Else for each row of the batch the first row of its class, the first
  // row after its class, and its attraction.
  const int64_t* class_begins;
  const int64_t* class_ends;
  const T* attraction;
  int64_t row, column;  // numbers of the first row and column in the batch
};

// out[i, :] += sum_k a(i, k) y[k, :], in which a(i, k) = a[i * kCoefficientStride + k], or with
// `transposed` a[k * a_stride + i]. The rows of `out` alternate between two bases and are `stride`
// numbers apart in each.
template <typename T, typename P>
struct Product {
  const P* a;
  bool transposed;
  int64_t a_stride;
  int64_t height, depth;
  const P* panels;       // [features / panel][panel_depth][panel], at the first of `depth`
  const P* next_panels;  // to bring into the cache, since they come next; or null
  int64_t panel_depth;
  int64_t features;  // multiple of the panel
  T* out[2];
  int64_t stride;
  bool accumulate;  // false: `out` is overwritten
  // What to bring into the cache meanwhile: `prefetch_rows` rows of `prefetch_bytes`.
  const char* prefetch;
  int64_t prefetch_rows, prefetch_bytes, prefetch_stride;
};

inline constexpr int64_t kCoefficientStride = 192;  // numbers P in a row of coefficients

// The last step of a row's gradient with respect to the raw embedding z = |z| unit:
//   g = factor (sum - positive_weight positive)
// which is then projected onto the complement of unit and divided by |z|.
template <typename T>
struct FinishRow {
  T* gradient;        // first the sum, then the gradient
  const T* own;       // the row as an operand: rounded
  const T* positive;  // its positive as an operand
  const T* unit;      // the row before rounding; null for the dot product: no projection
  T positive_weight, factor, norm;
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
  // Packs at most `panel` contiguous rows to the slices and, unless it is null, to a panel of the
  // transpose.
  void (*pack)(const T* rows, int64_t count, int64_t features, P* panel_out, P* slices,
               int64_t slice_rows);
  // Writes at most `panel` rows of slices to a panel of the transpose, as `pack` does.
  void (*pack_panel)(const P* slices, int64_t slice_rows, int64_t count, int64_t depth,
                     P* panel_out);
  // Packs the same rows as operand of a product over rows: [features / panel][panel_depth][panel].
  // If P holds two numbers and the count is odd, one more row is read.
  void (*pack_product)(const T* rows, int64_t count, int64_t features, P* out, int64_t panel_depth);
  T (*finish)(const FinishRow<T>&);  // returns gradient . own from before the projection
  PredictionFunctions<T> prediction;
};

}  // namespace cjepa
