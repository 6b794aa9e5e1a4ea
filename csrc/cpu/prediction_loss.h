// The prediction loss of a JEPA on the CPU, both directions of the operator. All levels of a
// hierarchy are computed in one parallel region.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "arguments.h"
#include "core/prediction_row.h"
#include "tensors.h"

namespace cjepa {

using Tensors = std::vector<Tensor>;

// Arguments of both directions. L levels.
struct PredictionLossOptions {
  Tensors predictions, targets;  // L tensors (B, N, D) or (B, D)
  // None, or L tensors (B, N) or (B,) of bool. A mask without numbers includes all rows.
  Tensors masks;
  std::vector<double> weights;  // (L)
  Normalization normalization;
  Penalty<double> penalty;
  double eps;
  Reduction reduction;
};

// Results of the forward, in the order of the schema.
struct PredictionLossForward {
  Tensor loss, unweighted;  // ()
  Tensor levels;            // (L,), or without a reduction all errors of all levels
  Tensor statistics;        // (rows of all levels, 2)
  Tensor scales;            // (L,), the factor of each level's sum of errors
};

// Upstream gradients of the forward's results. An absent one is 0.
struct PredictionLossUpstream {
  std::optional<Tensor> loss, unweighted, levels;
};

// What the backward takes of the forward.
struct PredictionLossSaved {
  Tensor statistics, scales;
};

struct PredictionLossBackward {
  Tensors grad_predictions, grad_targets;  // the latter is empty unless wanted
};

template <typename T>
PredictionLossForward prediction_loss_forward(const PredictionLossOptions& options);

template <typename T>
PredictionLossBackward prediction_loss_backward(const PredictionLossOptions& options,
                                                const PredictionLossUpstream& upstream,
                                                const PredictionLossSaved& saved,
                                                bool with_targets);

// Registers the operators prediction_loss and prediction_loss_backward.
void implement_prediction_loss(torch::stable::detail::StableLibrary& library);

}  // namespace cjepa
