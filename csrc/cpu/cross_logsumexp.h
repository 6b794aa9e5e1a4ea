// Log-sum-exp of the rows and of the columns of X Y^T / tau on the CPU, both directions of the
// operator.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>

#include "tensors.h"

namespace cjepa {

// Arguments of both directions.
struct CrossLogSumExpOptions {
  Tensor x, y;                               // (M, D), (N, D)
  std::optional<Tensor> positives;           // (M,) int64: the column of each row's positive, or -1
  std::optional<Tensor> temperature_tensor;  // one number, which takes the place of `temperature`
  double temperature;
  bool use_cosine_similarity;
  double eps;
  std::optional<ScalarType> product_dtype;

  ScalarType rounded_dtype() const { return product_dtype.value_or(x.scalar_type()); }
};

// Results of the forward, in the order of the schema: (M,) of rows, (N,) of columns. A log-sum-exp
// is shift / tau + log_sum.
struct CrossLogSumExpForward {
  Tensor row_lse, column_lse;
  Tensor row_max, column_max;  // the largest similarity
  Tensor row_shift, row_log_sum;
  Tensor column_shift, column_log_sum;
  // With positives the similarity of each row's positive, (M,), and the mean of all similarities of
  // S, (); both (0,) without.
  Tensor positive, mean_similarity;
  Tensor saved_exponentials;  // empty unless the forward was asked to save them
};

// What the backward takes of the forward.
struct CrossLogSumExpSaved {
  Tensor row_shift, row_log_sum, column_shift, column_log_sum;
  Tensor saved_exponentials;
};

// The upstream gradients, and which gradients are wanted.
struct CrossLogSumExpUpstream {
  Tensor grad_row, grad_column;         // (M,), (N,)
  std::optional<Tensor> grad_positive;  // (M,), with positives
  bool of_x, of_y;
};

struct CrossLogSumExpBackward {
  Tensor grad_x, grad_y;  // empty unless wanted
  Tensor grad_temperature;
};

CrossLogSumExpForward cross_logsumexp_forward(const CrossLogSumExpOptions& options,
                                              bool save_exponentials);

CrossLogSumExpBackward cross_logsumexp_backward(const CrossLogSumExpOptions& options,
                                                const CrossLogSumExpUpstream& upstream,
                                                const CrossLogSumExpSaved& saved);

// Registers the operators cross_logsumexp and cross_logsumexp_backward.
void implement_cross_logsumexp(torch::stable::detail::StableLibrary& library);

}  // namespace cjepa
