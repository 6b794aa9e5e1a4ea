// Log-sum-exp of each row of Z Z^T / tau over the entries that count, on the CPU, both directions
// of the operator.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>

#include "tensors.h"

namespace cjepa {

// Arguments of both directions. The M rows are those of z_i, then those of z_j.
struct SelfLogSumExpOptions {
  Tensor z_i;                       // (B, D)
  std::optional<Tensor> z_j;        // (B, D); row k and row B + k are each other's positive
  std::optional<Tensor> positives;  // (M,) int64 without z_j: the row's positive, or -1
  // (B,) int64: rows of one class do not count for each other. If they attract each other, they do
  // count.
  std::optional<Tensor> classes;
  bool attract;
  std::optional<Tensor> temperature_tensor;  // one number, which takes the place of `temperature`
  double temperature;
  bool use_cosine_similarity;
  double eps;
  std::optional<ScalarType> product_dtype;

  ScalarType rounded_dtype() const { return product_dtype.value_or(z_i.scalar_type()); }
  int64_t views() const { return z_j.has_value() ? 2 : 1; }
  int64_t rows() const { return views() * z_i.size(0); }
};

// Results of the forward, in the order of the schema: (M,). A log-sum-exp is shift / tau + log_sum.
struct SelfLogSumExpForward {
  Tensor
      lse;  // if rows attract each other, minus the mean logit of the row with those of its class
  Tensor largest;  // similarity; like lse it is -inf for a row of which no entry counts
  Tensor shift, log_sum;
  Tensor positive;            // similarity of the positive, 0 without one; (0,) if no row has one
  Tensor saved_exponentials;  // empty unless the forward was asked to save them
};

// What the backward takes of the forward.
struct SelfLogSumExpSaved {
  Tensor shift, log_sum, saved_exponentials;
};

struct SelfLogSumExpUpstream {
  Tensor grad_lse;                      // (M,)
  std::optional<Tensor> grad_positive;  // (M,), with positives
  // (M,) if rows attract each other: 1 / (number of the others of the row's class), or 0.
  std::optional<Tensor> class_weights;
};

struct SelfLogSumExpBackward {
  Tensor grad_z_i, grad_z_j;  // grad_z_j is (0, D) without z_j
  Tensor grad_temperature;
};

// `class_means`: (M,) if rows attract each other: the mean similarity of each row with the others
// of its class, or 0.
SelfLogSumExpForward self_logsumexp_forward(const SelfLogSumExpOptions& options,
                                            const std::optional<Tensor>& class_means,
                                            bool save_exponentials);

SelfLogSumExpBackward self_logsumexp_backward(const SelfLogSumExpOptions& options,
                                              const SelfLogSumExpUpstream& upstream,
                                              const SelfLogSumExpSaved& saved);

// Registers the operators self_logsumexp and self_logsumexp_backward.
void implement_self_logsumexp(torch::stable::detail::StableLibrary& library);

}  // namespace cjepa
