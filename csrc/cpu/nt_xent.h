// NT-Xent on the CPU: what its two directions share.
#pragma once

#include <string>
#include <tuple>

#include "sample_mask.h"

namespace cjepa {

// Arguments of both operators.
struct Options {
  Tensor z_i, z_j;
  std::optional<Tensor> mask, temperature_tensor;
  double temperature;
  bool cosine;
  double eps;
  std::string reduction;
  std::optional<ScalarType> product_dtype;

  ScalarType rounded_dtype() const { return product_dtype.value_or(z_i.scalar_type()); }
};

// Two views as one batch, row 2k being view i of sample k, so that an anchor and its positive
// (row ^ 1) lie side by side.
template <typename T, typename P>
struct Pairs {
  View views[2];
  Rounding<T> rounding;
  PackedBatch<T, P> z;
  Shift<T> shift;
  SampleMask mask;
  Logits<T, P> logits;

  Pairs(const Options& o, const TileCore<T, P>& core, typename PackedBatch<T, P>::Wanted wanted)
      : views{View(o.z_i), View(o.z_j)},
        rounding{o.cosine, static_cast<T>(o.eps), o.rounded_dtype()},
        z(source(), Layout::block_of(source().rows()), rounding, core, wanted),
        shift(read_temperature(o.temperature_tensor, o.temperature), z.bounded),
        mask(o.mask.has_value() && wanted.similarity ? SampleMask(*o.mask) : SampleMask()),
        logits{core,
               z,
               z,
               {z.layout.rows, z.layout.rows, true, mask.get(), mask.stride},
               shift.exponent} {}
  Pairs(const Pairs&) = delete;
  Pairs& operator=(const Pairs&) = delete;

  Source source() const { return {views, 2}; }
  // Position in the caller's order (view i, then view j) of a row.
  int64_t original(int64_t row) const { return (row & 1) * views[0].rows + (row >> 1); }
};

// Exponentials that the forward keeps for the backward: one tile after the other.
inline int64_t kept_size(int64_t rows) {
  const int64_t block = Layout::block_of(rows), blocks = (rows + block - 1) / block;
  return blocks * (blocks + 1) / 2 * block * block;
}

// loss, accuracy, positive and negative similarity, lse, hardest, shift, log_sum, positive, kept
using Outputs =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

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
