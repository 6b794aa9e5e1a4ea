// Random rows, and the same rows as operands of the tile core.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "../cpu/core/tile_core.h"
#include "../cpu/selected_core.h"
#include "check.h"

namespace cjepa::test {

template <typename T, typename P>
inline constexpr int64_t kNumbers = std::is_same_v<T, P> ? 1 : 2;  // in a P

inline int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

inline float from_bf16(uint32_t bits) {
  bits <<= 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t to_bf16(float x) {  // to nearest, ties to even; no NaN
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Number `index` of packed words, each of which holds one number or two.
template <typename T, typename P>
T unpack(const P* words, int64_t index) {
  if constexpr (kNumbers<T, P> == 1) {
    return words[index];
  } else {
    return from_bf16(words[index / 2] >> (16 * (index % 2)) & 0xffff);
  }
}

template <typename T>
struct Matrix {
  int64_t rows, columns;
  std::vector<T> numbers;
  Matrix(int64_t rows_, int64_t columns_)
      : rows(rows_), columns(columns_), numbers(rows_ * columns_) {}
  T* operator[](int64_t i) { return numbers.data() + i * columns; }
  const T* operator[](int64_t i) const { return numbers.data() + i * columns; }
};

// Rows of about that length, whose numbers P can represent.
template <typename T, typename P>
Matrix<T> random_rows(Random& random, int64_t rows, int64_t features, double length = 1) {
  Matrix<T> z(rows, features);
  for (int64_t i = 0; i < rows; ++i) {
    std::vector<double> raw(features);
    double square = 0;
    for (double& x : raw) square += (x = random.normal(), x * x);
    for (int64_t k = 0; k < features; ++k) {
      const T x = static_cast<T>(length * raw[k] / std::sqrt(square));
      z[i][k] = kNumbers<T, P> == 1 ? x : static_cast<T>(from_bf16(to_bf16(static_cast<float>(x))));
    }
  }
  return z;
}

// One block of rows in all three layouts. The rows that pad it stay NaN, which must not show. But
// where the two numbers of a word come from two rows, a last row without a partner has zeros beside
// it.
template <typename T, typename P>
struct Operands {
  int64_t block, depth, padded_features, panel_depth;
  Guarded<P> slices, panels, products;

  Operands(const TileCore<T, P>& core, const Matrix<T>& z, int64_t first, int64_t block_)
      : block(block_),
        depth((z.columns + kNumbers<T, P> - 1) / kNumbers<T, P>),
        padded_features(round_up(z.columns, core.panel)),
        panel_depth(block / kNumbers<T, P>),
        slices(round_up(depth, core.panel) * block),
        panels(depth * block),
        products(panel_depth * padded_features) {
    if (block % core.panel != 0) throw std::logic_error("block must be a multiple of the panel");
    const int64_t valid = std::min(block, z.rows - first);
    Matrix<T> rows(valid + 1, z.columns);
    std::copy(z[first], z[first] + valid * z.columns, rows[0]);
    for (int64_t r = 0; r < valid; r += core.panel) {
      const int64_t count = std::min(core.panel, valid - r);
      core.pack(rows[r], count, z.columns, panels.get() + r * depth, slices.get() + r * core.panel,
                block);
      core.pack_product(rows[r], count, z.columns, products.get() + r / kNumbers<T, P> * core.panel,
                        panel_depth);
    }
  }
};

// Calls run(core) for every kind of numbers that the instruction set in use multiplies.
template <typename Run>
void for_each_core(const Run& run) {
  run(tile_core<float, float>(), "fp32");
  run(tile_core<double, double>(), "fp64");
  if (has_bf16_core()) run(tile_core<float, Bf16Pair>(), "bf16");
}

// log2(e) / tau in two numbers, and the constant shift 1 / tau. The first number has fewer digits
// than its type holds, so that a kernel which forgets the second one is wrong by far more than
// rounding.
template <typename T>
Exponent<T> make_exponent(double tau, bool constant_shift) {
  const Exact scale = std::log2(std::exp(Exact{1})) / tau;
  Exponent<T> e{};
  const Exact digits = std::is_same_v<T, float> ? 0x1p16L : 0x1p40L;
  e.scale = static_cast<T>(std::round(scale * digits / 256) * 256 / digits);
  e.scale_rest = static_cast<T>(scale - e.scale);
  e.constant_shift = constant_shift;
  e.shift = constant_shift ? e.scale : T{0};
  return e;
}

// Relative error of 2^(d scale - shift) in T for d known up to `error`: the exponent x is rounded
// once or twice, at the scale of d * scale and of x, and the polynomial with its Horner scheme
// stays below 8 roundings (fp32: 8e-8 of the minimax polynomial are 1.4 of them).
template <typename T>
Exact exp2_error(Exact d, Exact error, const Exponent<T>& e) {
  const Exact at = std::fabs(d * e.scale), x = std::fabs(d * e.scale - e.shift);
  const Exact exponent = error * e.scale + kRoundoff<T> * (2 * at + x + 1);
  return std::log(Exact{2}) * exponent + 8 * kRoundoff<T>;
}

// The largest result of an exponent below the range of the dtype where 0 is expected.
template <typename T>
inline constexpr Exact kTiny = 4 * Exact{std::numeric_limits<T>::min()};

}  // namespace cjepa::test
