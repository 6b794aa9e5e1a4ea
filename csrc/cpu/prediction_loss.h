// The prediction loss of a JEPA on the CPU: all levels of a hierarchy in one parallel region.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>
#include <vector>

#include "core/prediction_row.h"

namespace cjepa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

enum class Reduction { kMean, kSum, kNone };

// Arguments of both directions.
struct PredictionOptions {
  Tensors predictions, targets;  // (B, N, D) or (B, D)
  Tensors masks;                 // none, or (B, N) or (B,) of bool; without numbers: keeps all
  std::vector<double> weights;
  Normalization normalization;
  Penalty<double> penalty;
  double eps;
  Reduction reduction;
};

// What reaches the results from upstream: none stands for 0.
struct PredictionUpstream {
  std::optional<Tensor> loss, unweighted, levels;
};

// loss, unweighted, levels, statistics, scales
template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prediction_loss(const PredictionOptions&);

// Gradients of the predictions and, if wanted, of the targets.
template <typename T>
std::tuple<Tensors, Tensors> prediction_loss_backward(const PredictionOptions&,
                                                      const PredictionUpstream&,
                                                      const Tensor& statistics,
                                                      const Tensor& scales, bool targets_too);

}  // namespace cjepa
