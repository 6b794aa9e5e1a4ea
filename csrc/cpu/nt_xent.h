// NT-Xent on the CPU: what its two directions share.
#pragma once

#include <limits>
#include <string>
#include <tuple>

#include "packing.h"
#include "tile_core.h"
#include "tile_cores.h"

namespace cjepa {

inline constexpr double kLog2E = 1.4426950408889634;
inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

inline double read_scalar(const Tensor& t) {
  const void* data = t.const_data_ptr();
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return *static_cast<const double*>(data);
    case ScalarType::Half:
      return static_cast<float>(*static_cast<const torch::headeronly::Half*>(data));
    case ScalarType::BFloat16:
      return static_cast<float>(*static_cast<const torch::headeronly::BFloat16*>(data));
    default:
      return *static_cast<const float*>(data);
  }
}

// Arguments of both operators.
struct Options {
  Tensor z_i, z_j;
  std::optional<Tensor> mask, temperature_tensor;
  double temperature;
  bool cosine;
  double eps;
  std::string reduction;
  std::optional<ScalarType> product_dtype;

  double tau() const {
    const double t = temperature_tensor.has_value() ? read_scalar(*temperature_tensor) : temperature;
    return t > 0 ? t : kNaN;
  }
  ScalarType rounded_dtype() const { return product_dtype.value_or(z_i.scalar_type()); }
};

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

// Two views as one batch, row 2k being view i of sample k, so that an anchor and its positive
// (row ^ 1) lie side by side.
template <typename T, typename P>
struct Pairs {
  View views[2];
  Rounding<T> rounding;
  PackedBatch<T, P> z;
  Shift<T> shift;
  std::vector<uint8_t> excluded;  // the mask made symmetric
  Exclusion exclusion;

  Pairs(const Options& o, const TileCore<T, P>& core, typename PackedBatch<T, P>::Wanted wanted)
      : views{View(o.z_i), View(o.z_j)},
        rounding{o.cosine, static_cast<T>(o.eps), o.rounded_dtype()},
        z(Source{views, 2}, rounding, core, wanted),
        shift(o.tau(), z.bounded) {
    const int64_t batch = views[0].rows;
    if (o.mask.has_value()) {
      const auto* m = static_cast<const uint8_t*>(o.mask->const_data_ptr());
      const int64_t row = o.mask->stride(0), column = o.mask->stride(1);
      excluded.resize(batch * batch);
      for (int64_t k = 0; k < batch; ++k)
        for (int64_t l = 0; l < batch; ++l)
          excluded[k * batch + l] = m[k * row + l * column] | m[l * row + k * column];
    }
    const uint8_t* mask = o.mask.has_value() ? excluded.data() : nullptr;
    exclusion = {z.layout.rows, z.layout.rows, true, mask, batch};
  }

  // Position in the caller's order (view i, then view j) of a row.
  int64_t original(int64_t row) const { return (row & 1) * views[0].rows + (row >> 1); }
};

// The part of the tile of blocks (i, j) in columns [begin, end) of j; sums and `out` not set.
template <typename T, typename P>
SimilarityTile<T, P> make_tile(const TileCore<T, P>& core, const PackedBatch<T, P>& x,
                               const PackedBatch<T, P>& y, int64_t i, int64_t j, int64_t begin,
                               int64_t end) {
  SimilarityTile<T, P> t{};
  t.rows = x.slices_of(i);
  t.slice_rows = x.layout.block;
  t.panels = y.panels_of(j) + begin * y.depth;
  t.depth = x.depth;
  t.row = i * x.layout.block;
  t.column = j * y.layout.block + begin;
  t.height = round_up(x.layout.valid(i), core.micro_rows);
  t.width = round_up(std::min(end, y.layout.valid(j)) - begin, core.panel);
  return t;
}

// Number of the tile of blocks (i, j), j >= i, among those on and above the diagonal, row by row.
inline int64_t tile_number(int64_t i, int64_t j, int64_t blocks) {
  return i * blocks - i * (i - 1) / 2 + j - i;
}

// Exponentials that the forward keeps for the backward: one tile after the other.
inline int64_t kept_size(int64_t rows) {
  const int64_t block = Layout::block_of(rows), blocks = (rows + block - 1) / block;
  return blocks * (blocks + 1) / 2 * block * block;
}

inline Tensor make(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

template <typename T>
constexpr ScalarType dtype_of() {
  return std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double;
}

// loss, accuracy, positive and negative similarity, lse, shift, log_sum, positive, kept
using Outputs =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T, typename P>
Outputs nt_xent_forward(const Options& options, bool keep);

// What the forward saved.
struct Saved {
  Tensor shift, log_sum, positive, kept;
};

template <typename T, typename P>
std::tuple<Tensor, Tensor, Tensor> nt_xent_backward(const Options& options, const Tensor& grad_loss,
                                                    const Saved& saved);

}  // namespace cjepa
