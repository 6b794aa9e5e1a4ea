// With the upstream gradients g_a of the rows' and h_b of the columns' log-sum-exps,
//   c_ab = g_a exp(s_ab / tau - row_lse_a) + h_b exp(s_ab / tau - column_lse_b)
//   dL/dx_a = 1 / tau sum_b c_ab y_b, dL/dy_b = 1 / tau sum_a c_ab x_a
// which for the cosine are projected and divided by the norm; dL/dtau = -1 / tau^2 sum c_ab s_ab.
// A positive counts in none of these sums. Its similarity has an upstream gradient of its own. For
// an entry that attracts row a, c_ab is smaller by g_a times its share.
#include "cross_logsumexp_loop.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "exact_rows.h"

namespace cjepa::test {
namespace {

using Exact = long double;

struct Sums {
  std::vector<Exact> unit, own;       // (M, D): normalised, and rounded after that
  std::vector<Exact> sum, weight;     // (M): of exp(s / tau); gradient over that sum
  std::vector<Exact> gradient, size;  // (M, D); (M), of its terms
};

Sums prepare(const CrossInput& in, int which, CrossOutput::Side& out) {
  const int64_t rows = in.rows(which), D = in.features;
  const std::vector<double>& z = in.z[which];
  Sums s{std::vector<Exact>(rows * D), std::vector<Exact>(rows * D), std::vector<Exact>(rows),
         std::vector<Exact>(rows),     std::vector<Exact>(rows * D), std::vector<Exact>(rows)};
  out.norm.assign(rows, 1);
  out.largest.assign(rows, -std::numeric_limits<double>::infinity());
  for (int64_t a = 0; a < rows; ++a) {
    Exact square = 0;
    for (int64_t d = 0; d < D; ++d) square += Exact{z[a * D + d]} * z[a * D + d];
    if (in.cosine) out.norm[a] = static_cast<double>(std::sqrt(square));
    const Exact divisor = in.cosine ? std::max<Exact>(std::sqrt(square), in.eps) : 1;
    for (int64_t k = a * D; k < (a + 1) * D; ++k) {
      s.unit[k] = z[k] / divisor;
      s.own[k] = in.round == nullptr ? s.unit[k] : in.round(static_cast<double>(s.unit[k]));
    }
  }
  return s;
}

// Turns the gradients with respect to unit rows into those with respect to raw rows.
void finish(const CrossInput& in, Sums& s, CrossOutput::Side& out) {
  const int64_t rows = static_cast<int64_t>(s.sum.size()), D = in.features;
  for (int64_t a = 0; a < rows; ++a) {
    Exact* g = s.gradient.data() + a * D;
    const Exact* u = s.unit.data() + a * D;
    Exact projection = 0;
    for (int64_t d = 0; d < D; ++d) projection += g[d] * u[d];
    for (int64_t d = 0; d < D; ++d) {
      if (in.cosine) g[d] = out.norm[a] <= in.eps ? 0 : (g[d] - projection * u[d]) / out.norm[a];
      out.gradient.push_back(static_cast<double>(g[d]));
    }
    out.magnitude.push_back(static_cast<double>(s.size[a]));
  }
}

}  // namespace

CrossOutput cross_logsumexp_loop(const CrossInput& in) {
  const int64_t D = in.features;
  CrossOutput out;
  Sums x = prepare(in, 0, out.sides[0]), y = prepare(in, 1, out.sides[1]);
  const auto is_positive = [&](int64_t a, int64_t b) {
    return !in.positives.empty() && in.positives[a] == b;
  };
  const auto for_each_pair = [&](const auto& visit) {
    for (int64_t a = 0; a < in.rows(0); ++a) {
      for (int64_t b = 0; b < in.rows(1); ++b) {
        if (in.excluded && !is_positive(a, b) && in.excluded(a, b)) continue;
        visit(a, b, dot(&x.own[a * D], &y.own[b * D], D));
      }
    }
  };
  const auto raise = [](double& largest, Exact s) {
    largest = std::max(largest, static_cast<double>(s));
  };
  Exact total = 0;
  std::vector<Exact> exponentials;  // of s / tau: the range of long double has room for them
  exponentials.reserve(in.rows(0) * in.rows(1));
  std::vector<Exact> attraction(in.rows(0));
  if (!in.positives.empty()) out.positive.assign(in.rows(0), 0);
  for_each_pair([&](int64_t a, int64_t b, Exact s) {
    const Exact e = std::exp(s / in.tau);
    exponentials.push_back(e);
    total += s;
    if (in.attracts && in.attracts(a, b)) attraction[a] += s * in.share[a];
    if (is_positive(a, b)) {
      out.positive[a] = static_cast<double>(s);
      return;
    }
    x.sum[a] += e;
    y.sum[b] += e;
    raise(out.sides[0].largest[a], s);
    raise(out.sides[1].largest[b], s);
  });
  out.mean_similarity = static_cast<double>(total / (Exact{1} * in.rows(0) * in.rows(1)));
  for (int side = 0; side < 2; ++side) {
    Sums& s = side == 0 ? x : y;
    for (int64_t a = 0; a < in.rows(side); ++a) {
      const Exact subtracted = side == 0 ? attraction[a] / in.tau : 0;
      out.sides[side].lse.push_back(static_cast<double>(std::log(s.sum[a]) - subtracted));
      s.weight[a] = s.sum[a] == 0 ? 0 : in.grad[side][a] / s.sum[a];
    }
  }
  out.attraction.assign(attraction.begin(), attraction.end());
  Exact coefficients_dot_s = 0;
  auto next = exponentials.begin();
  for_each_pair([&](int64_t a, int64_t b, Exact s) {
    const Exact e = *next++;
    const bool positive = is_positive(a, b);
    Exact c = positive ? Exact{in.grad_positive[a]} : e * (x.weight[a] + y.weight[b]) / in.tau;
    const Exact size =
        positive ? std::fabs(c) : e * (std::fabs(x.weight[a]) + std::fabs(y.weight[b])) / in.tau;
    if (in.attracts && in.attracts(a, b)) c -= in.grad[0][a] * in.share[a] / in.tau;
    if (!positive) coefficients_dot_s += c * s;
    x.size[a] += size;
    y.size[b] += size;
    add_scaled(&x.gradient[a * D], c, &y.own[b * D], D);
    add_scaled(&y.gradient[b * D], c, &x.own[a * D], D);
  });
  out.grad_temperature = static_cast<double>(-coefficients_dot_s / in.tau);
  finish(in, x, out.sides[0]);
  finish(in, y, out.sides[1]);
  return out;
}

}  // namespace cjepa::test
