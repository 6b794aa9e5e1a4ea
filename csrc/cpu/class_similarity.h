// Mean similarities within and across classes on the CPU.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>

#include "tensors.h"

namespace cjepa {

struct ClassSimilarityOptions {
  Tensor z_i;                 // (B, D)
  std::optional<Tensor> z_j;  // (B, D); the M rows are those of z_i, then those of z_j
  Tensor classes;             // (B,) int64; rows k and B + k have the same class
  bool use_cosine_similarity;
  double eps;
  ScalarType rounded;  // what the rows are rounded to
};

struct ClassSimilarityForward {
  Tensor within;  // (M,) mean similarity of a row and the rest of its class, 0 without any
  Tensor across;  // () mean similarity of two rows of different classes, NaN without any
};

ClassSimilarityForward class_similarity_forward(const ClassSimilarityOptions& options);

// Registers the forward of the operator class_similarity. Losses take no gradient through it.
void implement_class_similarity(torch::stable::detail::StableLibrary& library);

}  // namespace cjepa
