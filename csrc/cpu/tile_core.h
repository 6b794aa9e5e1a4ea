// What a tile of S = Z Z^T needs, per instruction set: plain data and function pointers.
//
// Files that include the implementation (tile_core_impl.h) are compiled with the flags of one
// instruction set. They share no inline function with the rest: the linker would keep one copy of
// it, perhaps the one with instructions that this CPU lacks. So this header has no code in it.
#pragma once

#include <cstdint>

namespace cjepa {

// Rows are interleaved: row 2k is view i of sample k, row 2k + 1 view j, so that an anchor and its
// positive (row ^ 1) lie in the same diagonal tile. In mask, True excludes a pair of samples.
struct Exclusion {
  int64_t rows;         // M; what lies beyond is padding
  const uint8_t* mask;  // (B, B), symmetric, or null
  int64_t batch;        // B
};

// A tile: `height` rows from `row`, `width` columns from `column`, multiples of the micro-tile.
template <typename T>
struct Tile {
  const T* z;       // row-major rows of the tile's rows, `features` apart
  const T* panels;  // panels of the tile's columns: [width / panel][features][panel]
  int64_t features;
  int64_t row, column, height, width;
  bool masked;   // whether some entry is excluded: diagonal, edge or mask
  T scale;       // log2(e) / tau: exponents are base 2
  T scale_rest;  // what rounding to T took from it
  T* scratch;    // scratch_size() numbers
};

// Sums of 2^(scale s - shift) and maxima of s over the tile, added to what is there.
template <typename T>
struct ForwardTile {
  Tile<T> tile;
  Exclusion exclusion;
  bool constant_shift;  // one shift for all; else running maxima are the shifts
  T shift;
  T* row_sum;  // pointers to the tile's first row or column
  T* row_max;
  T* column_sum;  // null on the diagonal, where rows and columns are the same
  T* column_max;
  T* positive;       // written on the diagonal
  double* kept_sum;  // with a mask: sum and number of the negatives, else null
  int64_t* kept_count;
};

// Coefficients of the products: 2^(scale s - shift) (w_row + w_column) with one shift, or
// 2^(scale (s - shift_row)) w_row + 2^(scale (s - shift_column)) w_column with one each.
template <typename T>
struct BackwardTile {
  Tile<T> tile;
  Exclusion exclusion;
  bool constant_shift;
  T shift;
  const T* row_shift;
  const T* column_shift;
  const T* row_weight;
  const T* column_weight;
  const T* row_pull;  // g r: the positive's coefficient is -(pull_row + pull_column)
  const T* column_pull;
  T* out;  // (height, stride)
  int64_t stride;
};

// out[i, :] += sum_k a(i, k) z[k, :], a(i, k) = a[i * a_row + k * a_column].
template <typename T>
struct Product {
  const T* a;
  int64_t a_row, a_column;
  int64_t height, depth;
  const T* panels;  // [features / panel][panel_rows][panel], at the first of `depth` rows
  int64_t panel_rows;
  int64_t features;  // padded to panels
  T* out;
  int64_t out_stride;
};

template <typename T>
struct TileCore {
  int64_t micro_rows;  // heights are multiples of it
  int64_t panel;       // widths are multiples of it
  int64_t (*scratch_size)(int64_t height, int64_t width);
  void (*forward)(const ForwardTile<T>&);
  void (*backward)(const BackwardTile<T>&);
  void (*product)(const Product<T>&);
};

}  // namespace cjepa
