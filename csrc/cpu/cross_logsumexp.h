// Log-sum-exp of the rows and of the columns of X Y^T / tau.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

namespace cjepa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// row lse, column lse, row max, column max, row shift, row log_sum, column shift, column log_sum
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cross_logsumexp(
    Tensor x, Tensor y, std::optional<Tensor> temperature_tensor, double temperature, bool cosine,
    double eps, std::optional<ScalarType> product_dtype);

// Gradients of x, of y (both empty where not asked for) and of the temperature.
std::tuple<Tensor, Tensor, Tensor> cross_logsumexp_backward(
    Tensor grad_row, Tensor grad_column, Tensor x, Tensor y,
    std::optional<Tensor> temperature_tensor, Tensor row_shift, Tensor row_log_sum,
    Tensor column_shift, Tensor column_log_sum, double temperature, bool cosine, double eps,
    std::optional<ScalarType> product_dtype, bool of_x, bool of_y);

}  // namespace cjepa
