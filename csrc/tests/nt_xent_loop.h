// NT-Xent with its gradients as plain loops over pairs, in long double.
#pragma once

#include <cstdint>
#include <vector>

namespace cjepa::test {

// Rows are in the caller's order: view i, then view j.
struct LoopInput {
  int64_t batch, features;
  std::vector<double> z;      // (M, D)
  std::vector<uint8_t> mask;  // (B, B) or empty
  double tau, eps;
  bool cosine;
  double (*round)(double);        // what the operands of the product are rounded to; null: are not
  std::vector<double> grad_loss;  // (M)
  const double* row(int64_t a) const { return z.data() + a * features; }
};

struct LoopOutput {
  std::vector<double> loss, lse, positive;  // (M)
  std::vector<double> largest_negative;     // (M), the most similar negative or -inf
  double mean_negative;                     // NaN without negatives
  std::vector<double> gradient;             // (M, D)
  std::vector<double> magnitude;            // (M), of what the gradient's sums consist of
  std::vector<double> norm;                 // (M), 1 for the dot product
  double grad_temperature;
};

LoopOutput nt_xent_loop(const LoopInput& input);

}  // namespace cjepa::test
