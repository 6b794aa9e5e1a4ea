// NT-Xent on the CPU, both directions of the operator.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>

#include "arguments.h"
#include "tensors.h"

namespace cjepa {

// Arguments of both directions.
struct NTXentOptions {
  Tensor z_i, z_j;                           // (B, D)
  std::optional<Tensor> mask;                // (B, B) of bool
  std::optional<Tensor> temperature_tensor;  // one number, which takes the place of `temperature`
  double temperature;
  bool use_cosine_similarity;
  double eps;
  Reduction reduction;
  std::optional<ScalarType> product_dtype;

  ScalarType rounded_dtype() const { return product_dtype.value_or(z_i.scalar_type()); }
};

// Results of the forward, in the order of the schema. Rows are those of view i, then those of view
// j.
struct NTXentForward {
  Tensor loss;                                                // (), or (M,) without a reduction
  Tensor accuracy, positive_similarity, negative_similarity;  // ()
  Tensor lse;                                                 // (M,)
  Tensor largest_negative;                                    // (M,), -inf without negatives
  Tensor shift, log_sum;      // (M,), LSE- of a row is shift / tau + log_sum
  Tensor positive;            // (M,)
  Tensor saved_exponentials;  // saved_exponentials_size(M), or none
};

// What the backward takes of the forward.
struct NTXentSaved {
  Tensor shift, log_sum, positive, saved_exponentials;
};

struct NTXentBackward {
  Tensor grad_z_i, grad_z_j, grad_temperature;
};

template <typename T, typename P>
NTXentForward nt_xent_forward(const NTXentOptions& options, bool save_exponentials);

template <typename T, typename P>
NTXentBackward nt_xent_backward(const NTXentOptions& options, const Tensor& grad_loss,
                                const NTXentSaved& saved);

// Registers the operators nt_xent and nt_xent_backward.
void implement_nt_xent(torch::stable::detail::StableLibrary& library);

}  // namespace cjepa
