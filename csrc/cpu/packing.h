// The kernel's own copy of a batch: rows normalised, interleaved by view, padded, and in panels.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "tile_core.h"

namespace cjepa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Memory that is not cleared; 64 bytes aligned, as vector loads of packed rows want it.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0)
      : data_(static_cast<T*>(
            ::operator new[](sizeof(T) * std::max<int64_t>(count, 1), std::align_val_t{64}))) {}
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Free> data_;
};

template <typename T>
struct View {  // a (B, D) tensor of any strides and any floating dtype
  const void* data;
  ScalarType dtype;
  int64_t row_stride, column_stride;

  explicit View(const Tensor& z)
      : data(z.const_data_ptr()),
        dtype(z.scalar_type()),
        row_stride(z.stride(0)),
        column_stride(z.stride(1)) {}

  void read(int64_t row, int64_t features, T* out) const {
    switch (dtype) {
      case ScalarType::Double:
        return copy<double>(row, features, out);
      case ScalarType::Half:
        return copy<torch::headeronly::Half>(row, features, out);
      case ScalarType::BFloat16:
        return copy<torch::headeronly::BFloat16>(row, features, out);
      default:
        return copy<float>(row, features, out);
    }
  }

 private:
  template <typename S>
  void copy(int64_t row, int64_t features, T* out) const {
    const S* from = static_cast<const S*>(data) + row * row_stride;
    if (column_stride == 1) {
      for (int64_t d = 0; d < features; ++d) out[d] = static_cast<T>(from[d]);
    } else {
      for (int64_t d = 0; d < features; ++d) out[d] = static_cast<T>(from[d * column_stride]);
    }
  }
};

template <typename T>
void round_to(std::optional<ScalarType> dtype, int64_t count, T* x) {
  if (dtype == ScalarType::BFloat16) {
    for (int64_t i = 0; i < count; ++i)
      x[i] = static_cast<float>(torch::headeronly::BFloat16(static_cast<float>(x[i])));
  } else if (dtype == ScalarType::Half) {
    for (int64_t i = 0; i < count; ++i)
      x[i] = static_cast<float>(torch::headeronly::Half(static_cast<float>(x[i])));
  } else if (dtype == ScalarType::Float) {
    for (int64_t i = 0; i < count; ++i) x[i] = static_cast<float>(x[i]);
  }
}

// Sum of squares in 16 lanes, so that it vectorises and its order is fixed.
template <typename T>
T sum_of_products(const T* x, const T* y, int64_t count) {
  T lanes[16] = {};
  int64_t d = 0;
  for (; d + 16 <= count; d += 16)
    for (int l = 0; l < 16; ++l) lanes[l] += x[d + l] * y[d + l];
  for (; d < count; ++d) lanes[d & 15] += x[d] * y[d];
  T total = 0;
  for (T lane : lanes) total += lane;
  return total;
}

inline int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// How a batch is cut into blocks. Blocks depend on M alone, never on the number of threads.
struct Layout {
  int64_t batch, rows, features;
  int64_t block, blocks, padded_rows;

  Layout(int64_t batch_, int64_t features_) : batch(batch_), rows(2 * batch_), features(features_) {
    block = rows >= 1536 ? 192 : 96;
    blocks = (rows + block - 1) / block;
    padded_rows = blocks * block;
  }
  int64_t valid(int64_t b) const { return std::min(block, rows - b * block); }
  // Position in the caller's order (view i, then view j) of an interleaved row.
  int64_t original(int64_t row) const { return (row & 1) * batch + (row >> 1); }
};

template <typename T>
struct PackedBatch {
  Layout layout;
  int64_t panel;
  Buffer<T> rows;    // (padded_rows, D)
  Buffer<T> panels;  // [padded_rows / panel][D][panel]
  bool finite = true;

  PackedBatch(const Tensor& z_i, const Tensor& z_j, bool cosine, T eps,
              std::optional<ScalarType> product_dtype, int64_t panel_width)
      : layout(z_i.size(0), z_i.size(1)),
        panel(panel_width),
        rows(layout.padded_rows * layout.features),
        panels(layout.padded_rows * layout.features) {
    const View<T> views[2] = {View<T>(z_i), View<T>(z_j)};
    const ScalarType rounded = product_dtype.value_or(z_i.scalar_type());
    const int64_t features = layout.features;
    std::vector<uint8_t> block_finite(layout.blocks, 1);
    torch::stable::parallel_for(0, layout.blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        for (int64_t a = b * layout.block; a < (b + 1) * layout.block; ++a) {
          T* row = rows.get() + a * features;
          if (a >= layout.rows) {
            std::fill(row, row + features, T{0});
            continue;
          }
          views[a & 1].read(a >> 1, features, row);
          T zero = 0;
          for (int64_t d = 0; d < features; ++d) zero += row[d] * T{0};
          if (!(zero == 0)) block_finite[b] = 0;
          if (cosine) {
            const T divisor = std::max(std::sqrt(sum_of_products(row, row, features)), eps);
            for (int64_t d = 0; d < features; ++d) row[d] /= divisor;
          }
          if (sizeof(T) == 8 || rounded != ScalarType::Float) round_to(rounded, features, row);
        }
        for (int64_t p = b * layout.block; p < (b + 1) * layout.block; p += panel) {
          const T* from = rows.get() + p * features;
          T* to = panels.get() + p * features;
          for (int64_t d = 0; d < features; ++d)
            for (int64_t l = 0; l < panel; ++l) to[d * panel + l] = from[l * features + d];
        }
      }
    });
    for (uint8_t f : block_finite) finite = finite && f != 0;
  }
};

}  // namespace cjepa
