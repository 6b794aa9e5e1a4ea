// Log-sum-exp of rows and columns with gradients as plain loops over pairs, in long double.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace cjepa::test {

struct CrossInput {
  int64_t features;
  std::vector<double> z[2];  // (M, D), (N, D)
  double tau, eps;
  bool cosine;
  double (*round)(double);      // what the operands of the product are rounded to; null: are not
  std::vector<double> grad[2];  // (M), (N)
  std::vector<int64_t> positives{};     // (M): the column of each row's positive, or -1; or none
  std::vector<double> grad_positive{};  // (M), with positives
  // Whether entry (a, b) counts in no sum although it is no positive; or none.
  std::function<bool(int64_t, int64_t)> excluded{};
  // Whether entry (a, b) attracts row a, and (M) its share of that: 1 / (number of such entries).
  // The mean of their s / tau is subtracted from the row's log-sum-exp. Or none.
  std::function<bool(int64_t, int64_t)> attracts{};
  std::vector<double> share{};
  int64_t rows(int side) const { return static_cast<int64_t>(z[side].size()) / features; }
};

struct CrossOutput {
  struct Side {
    std::vector<double> lse, largest;  // (M)
    std::vector<double> gradient;      // (M, D)
    std::vector<double> magnitude;     // (M), of what the gradient's sums consist of
    std::vector<double> norm;          // (M), 1 for the dot product
  };
  Side sides[2];
  std::vector<double> positive;    // (M) similarities, with positives
  std::vector<double> attraction;  // (M) mean similarities of the entries that attract the row
  double mean_similarity = 0;
  double grad_temperature;
};

CrossOutput cross_logsumexp_loop(const CrossInput& input);

}  // namespace cjepa::test
