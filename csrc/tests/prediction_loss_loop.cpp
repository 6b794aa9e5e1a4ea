// u and v are the normalised prediction and target, h is the derivative of the penalty at u - v,
// and g is h times the upstream gradient. The gradients follow by the chain rule:
//   L2          dL/dp = (g - (g . u) u) / |p|, dL/dt = -(g - (g . v) v) / |t|
//   LayerNorm   dL/dt = -(g - mean(g) - mean(g v) v) / deviation
#include "prediction_loss_loop.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

namespace cjepa::test {
namespace {

// A number and a bound for the error of the same number computed in T: the errors of the operands
// and one roundoff for each operation.
template <typename T>
struct Number {
  using X = std::conditional_t<std::is_same_v<T, float>, double, long double>;
  static constexpr X kRoundoff = std::numeric_limits<T>::epsilon() / 2;
  X x = 0, error = 0;

  static Number rounded(X x, X error = 0) { return {x, error + kRoundoff * std::fabs(x)}; }
  friend Number operator-(Number a) { return {-a.x, a.error}; }
  friend Number operator+(Number a, Number b) { return rounded(a.x + b.x, a.error + b.error); }
  friend Number operator-(Number a, Number b) { return a + -b; }
  friend Number operator*(Number a, Number b) {
    return rounded(a.x * b.x,
                   std::fabs(a.x) * b.error + std::fabs(b.x) * a.error + a.error * b.error);
  }
  friend Number operator/(Number a, int64_t count) { return rounded(a.x / count, a.error / count); }
  Number inverse() const { return rounded(1 / x, error / (x * x)); }
  Number root() const {
    const X of_x = std::sqrt(x);
    return rounded(of_x, x > 0 ? error / (2 * of_x) : 0);
  }
  Bounded bounded() const {  // 1 % more for the products of errors
    constexpr double kOwn = std::numeric_limits<double>::epsilon() / 2;
    return {static_cast<double>(x),
            static_cast<double>(1.01 * error) + kOwn * static_cast<double>(std::fabs(x))};
  }
};

// The bound holds for any order of the additions in vectors of 16 to 64 bytes. There are as many
// accumulators as a vector has numbers, which are added in pairs, and one more for the fewer than
// 16 numbers that fill no vector.
template <typename T>
struct Sum {
  using X = typename Number<T>::X;
  X x = 0, size = 0, error = 0;
  int64_t count = 0;

  void add(Number<T> number) {
    x += number.x;
    size += std::fabs(number.x);
    error += number.error;
    ++count;
  }
  Number<T> value() const {
    constexpr int64_t kNarrowest = 16 / sizeof(T);
    const int64_t chain = std::min(count - 1, count / kNarrowest + 20);
    return {x, error + static_cast<X>(chain) * Number<T>::kRoundoff * size};
  }
};

template <typename T>
struct Row {
  using N = Number<T>;
  using X = typename N::X;
  struct Side {
    std::vector<N> values;
    N statistic{}, scale{1};
    bool constant = false;
  };
  const PredictionInput& in;
  int64_t features;
  Side sides[2];

  Row(const PredictionInput& input, const PredictionInput::Level& level, int64_t row)
      : in(input), features(level.features) {
    for (int s = 0; s < 2; ++s) {
      const double* const first = level.sides[s].data() + row * features;
      for (int64_t d = 0; d < features; ++d) sides[s].values.push_back({first[d]});
      if (in.normalization == Normalization::kL2) divide_by_norm(sides[s]);
    }
    if (in.normalization == Normalization::kLayer) standardize(sides[1]);
  }

  template <typename Term>
  N sum(const Term& term) const {
    Sum<T> sum;
    for (int64_t d = 0; d < features; ++d) sum.add(term(d));
    return sum.value();
  }

  void divide_by_norm(Side& side) const {
    side.statistic = sum([&](int64_t d) { return side.values[d] * side.values[d]; }).root();
    side.constant = !(side.statistic.x > in.eps);
    side.scale = (side.constant ? N::rounded(in.eps) : side.statistic).inverse();
    for (N& x : side.values) x = x * side.scale;
  }

  void standardize(Side& target) {
    const N mean = sum([&](int64_t d) { return target.values[d]; }) / features;
    for (N& x : target.values) x = x - mean;
    const N variance =
        sum([&](int64_t d) { return target.values[d] * target.values[d]; }) / features;
    sides[0].statistic = mean;
    target.statistic = target.scale = (variance + N::rounded(1e-5L)).root().inverse();
    for (N& x : target.values) x = x * target.scale;
  }

  N difference(int64_t d) const { return sides[0].values[d] - sides[1].values[d]; }

  N slope(int64_t d) const {
    const N x = difference(d);
    if (in.type == LossType::kSquare) return x + x;
    const X threshold = in.threshold, limit = in.type == LossType::kHuber ? threshold : 1;
    const N line = in.type == LossType::kHuber ? x * N{1} : x * N::rounded(1 / threshold);
    const N held = N::rounded(std::copysign(limit, x.x));
    if (std::fabs(line.x) - line.error > limit + held.error) return held;
    return {std::fabs(line.x) > limit ? held.x : line.x, line.error + held.error};
  }

  N error(int64_t d) const {
    const N x = difference(d);
    if (in.type == LossType::kSquare) return x * x;
    const X size = std::fabs(x.x), threshold = in.threshold;
    X value = size < threshold ? size * size / 2 : threshold * (size - threshold / 2);
    if (in.type == LossType::kSmoothL1) value /= threshold;
    const N c = slope(d), half = N::rounded(in.type == LossType::kHuber ? 0.5L : threshold / 2);
    return {value, (c * (x - c * half)).error};
  }

  void put_gradients(N factor, const double* of_each, std::vector<Bounded> (&out)[2]) const {
    std::vector<N> g;
    for (int64_t d = 0; d < features; ++d)
      g.push_back(slope(d) * (of_each == nullptr ? factor : N{of_each[d]} + factor));
    for (int s = 0; s < 2; ++s) {
      const std::vector<N>& w = sides[s].values;
      const bool layer = s == 1 && in.normalization == Normalization::kLayer;
      N w_dot_g{}, mean{};
      if (in.normalization == Normalization::kL2 || layer)
        w_dot_g = sum([&](int64_t d) { return g[d] * w[d]; });
      if (layer)
        w_dot_g = w_dot_g / features, mean = sum([&](int64_t d) { return g[d]; }) / features;
      for (int64_t d = 0; d < features; ++d) {
        N of_p = g[d];
        if (layer) of_p = (g[d] - mean - w[d] * w_dot_g) * sides[s].scale;
        if (in.normalization == Normalization::kL2) of_p = (g[d] - w[d] * w_dot_g) * sides[s].scale;
        out[s].push_back(sides[s].constant ? Bounded{} : (s == 0 ? of_p : -of_p).bounded());
      }
    }
  }
};

}  // namespace

template <typename T>
PredictionOutput prediction_loss_loop(const PredictionInput& in) {
  using N = Number<T>;
  using X = typename N::X;
  const int64_t count = static_cast<int64_t>(in.levels.size());
  PredictionOutput out;
  N loss{}, unweighted{};
  for (const PredictionInput::Level& level : in.levels) {
    PredictionOutput::Level& of = out.levels.emplace_back();
    int64_t included = 0;
    for (int64_t r = 0; r < level.rows; ++r) included += level.includes(r);
    const X elements = static_cast<X>(std::max<int64_t>(included * level.features, 1));
    const N scale = in.mean ? N::rounded(1 / elements) : N{1};
    of.scale = scale.bounded();
    const N factor =
        (N{level.weight} * N{in.of_loss} + N{in.of_unweighted} / count + N{level.of_level}) * scale;
    std::vector<N> errors;
    for (int64_t r = 0; r < level.given(); ++r) {
      const Row<T> row(in, level, r);
      for (const auto& side : row.sides) of.statistics.push_back(side.statistic.bounded());
      Sum<T> sum;
      for (int64_t d = 0; d < level.features; ++d) {
        const N error = row.error(d);
        of.errors.push_back(error.bounded());
        sum.add(error);
      }
      errors.push_back(sum.value());
      row.put_gradients(factor,
                        level.of_each.empty() ? nullptr : level.of_each.data() + r * level.features,
                        of.gradients);
    }
    N total{};
    for (int64_t r = 0; r < level.rows; ++r) {
      if (!level.includes(r)) continue;
      total.x += errors[r % level.given()].x;
      total.error += errors[r % level.given()].error;
    }
    // Rows are added in double.
    total.error += static_cast<X>(included) * std::numeric_limits<double>::epsilon() / 2 * total.x;
    const N level_loss = total * scale;
    of.loss = level_loss.bounded();
    loss = loss + N{level.weight} * level_loss;
    unweighted = unweighted + level_loss / count;
  }
  out.loss = loss.bounded();
  out.unweighted = unweighted.bounded();
  return out;
}

template PredictionOutput prediction_loss_loop<float>(const PredictionInput&);
template PredictionOutput prediction_loss_loop<double>(const PredictionInput&);

}  // namespace cjepa::test
