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

// Which shift the exponents take. |s| <= 1.008 with rounded operands, so with the constant 1 / tau
// no exponent leaves the dtype's range while 2 / tau log2(e) stays inside it.
template <typename T>
struct Exponents {
  double tau;
  bool constant;
  T scale, scale_rest, shift;
  double shift_error;  // log of what rounding the shift to T multiplies every exponential by

  Exponents(const std::optional<Tensor>& tensor, double number, bool cosine)
      : tau(tensor.has_value() ? read_scalar(*tensor) : number) {
    if (!(tau > 0)) tau = kNaN;
    const double range = std::is_same_v<T, float> ? 124 : 1000;
    constant = cosine && 2.02 * kLog2E / tau < range;
    scale = static_cast<T>(kLog2E / tau);
    scale_rest = static_cast<T>(kLog2E / tau - scale);
    shift = constant ? scale : T{0};
    shift_error = constant ? (kLog2E / tau - shift) / kLog2E : 0;
  }
};

inline std::vector<uint8_t> symmetric_mask(const std::optional<Tensor>& mask, int64_t batch) {
  std::vector<uint8_t> out;
  if (!mask.has_value()) return out;
  const auto* m = static_cast<const uint8_t*>(mask->const_data_ptr());
  const int64_t row = mask->stride(0), column = mask->stride(1);
  out.resize(batch * batch);
  for (int64_t k = 0; k < batch; ++k)
    for (int64_t l = 0; l < batch; ++l)
      out[k * batch + l] = m[k * row + l * column] | m[l * row + k * column];
  return out;
}

template <typename T>
Tile<T> make_tile(const PackedBatch<T>& z, const TileCore<T>& core, const Exponents<T>& exponents,
                  bool masked, int64_t i, int64_t j, T* scratch) {
  const Layout& layout = z.layout;
  const int64_t row = i * layout.block, column = j * layout.block;
  Tile<T> t;
  t.z = z.rows.get() + row * layout.features;
  t.panels = z.panels.get() + column * layout.features;
  t.features = layout.features;
  t.row = row;
  t.column = column;
  t.height = round_up(layout.valid(i), core.micro_rows);
  t.width = round_up(layout.valid(j), core.panel);
  t.masked = masked || i == j || layout.valid(i) < layout.block || layout.valid(j) < layout.block;
  t.scale = exponents.scale;
  t.scale_rest = exponents.scale_rest;
  t.scratch = scratch;
  return t;
}

inline Tensor make(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Outputs nt_xent_forward(const Tensor& z_i, const Tensor& z_j, const std::optional<Tensor>& mask,
                        const Exponents<T>& exponents, bool cosine, double eps,
                        const std::string& reduction, std::optional<ScalarType> product_dtype);

template <typename T>
std::tuple<Tensor, Tensor, Tensor> nt_xent_backward(
    const Tensor& grad_loss, const Tensor& z_i, const Tensor& z_j,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& temperature_tensor,
    const Tensor& shifts, const Tensor& log_sums, const Tensor& positive,
    const Exponents<T>& exponents, bool cosine, double eps, const std::string& reduction,
    std::optional<ScalarType> product_dtype);

}  // namespace cjepa
