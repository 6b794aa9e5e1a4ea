// The prediction loss of several levels with its gradients as plain loops over rows. Every number
// comes with a bound for the error of the same number computed in T.
#pragma once

#include <cstdint>
#include <vector>

#include "../cpu/core/prediction_row.h"

namespace cjepa::test {

enum class LossType { kSquare, kSmoothL1, kHuber };

struct PredictionInput {
  // `sides` holds only the first rows of a level. The others repeat them in that order.
  struct Level {
    int64_t rows, features;
    double weight;
    std::vector<double> sides[2];  // predictions, targets: as they are in T
    std::vector<char> mask;        // of all rows; empty: all are included
    double of_level;               // upstream gradient of the level
    std::vector<double> of_each;   // upstream gradient of each error; empty: none

    int64_t given() const { return static_cast<int64_t>(sides[0].size()) / features; }
    bool includes(int64_t row) const { return mask.empty() || mask[row] != 0; }
  };
  std::vector<Level> levels;
  LossType type;
  double threshold, eps;
  Normalization normalization;
  bool mean;  // else the sum
  double of_loss, of_unweighted;
};

struct Bounded {
  double value = 0, bound = 0;
};

struct PredictionOutput {
  struct Level {
    Bounded loss, scale;
    // Of the rows that are given, as if they were included.
    std::vector<Bounded> statistics, errors, gradients[2];
  };
  std::vector<Level> levels;
  Bounded loss, unweighted;
};

template <typename T>
PredictionOutput prediction_loss_loop(const PredictionInput& input);

}  // namespace cjepa::test
