// loss_a = softplus(LSE-_a - s_pos / tau). With g_a = dL/dloss_a, r_a = sigmoid of that argument
// and p_ab = exp(s_ab / tau - LSE-_a):
//   dL/dz_a = 1 / tau (sum_b (g_a r_a p_ab + g_b r_b p_ba) z_b - (g_a r_a + g_pos r_pos) z_pos)
// which for the cosine is projected and divided by the norm; dL/dtau = -1 / (2 tau) sum z . dL/dz.
#include "nt_xent_loop.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "exact_rows.h"

namespace cjepa::test {
namespace {
using Exact = long double;
}

LoopOutput nt_xent_loop(const LoopInput& in) {
  const int64_t batch = in.batch, rows = 2 * batch, features = in.features;
  LoopOutput out;
  out.norm.assign(rows, 1);
  std::vector<Exact> unit(rows * features), own(rows * features);
  for (int64_t a = 0; a < rows; ++a) {
    Exact square = 0;
    for (int64_t d = 0; d < features; ++d) square += Exact{in.row(a)[d]} * in.row(a)[d];
    if (in.cosine) out.norm[a] = static_cast<double>(std::sqrt(square));
    const Exact divisor = in.cosine ? std::max<Exact>(std::sqrt(square), in.eps) : 1;
    for (int64_t d = 0; d < features; ++d) {
      unit[a * features + d] = in.row(a)[d] / divisor;
      const Exact x = unit[a * features + d];
      own[a * features + d] = in.round == nullptr ? x : in.round(static_cast<double>(x));
    }
  }
  const auto similarity = [&](int64_t a, int64_t b) {
    return dot(&own[a * features], &own[b * features], features);
  };
  const auto negative = [&](int64_t a, int64_t b) {
    const int64_t k = a % batch, l = b % batch;
    return k != l && (in.mask.empty() || !(in.mask[k * batch + l] || in.mask[l * batch + k]));
  };
  // Calls visit(a, b) for the negative pairs a < b.
  const auto for_each_pair = [&](const auto& visit) {
    for (int64_t a = 0; a < rows; ++a)
      for (int64_t b = a + 1; b < rows; ++b)
        if (negative(a, b)) visit(a, b);
  };

  const double infinity = std::numeric_limits<double>::infinity();
  out.largest_negative.assign(rows, -infinity);
  Exact negatives = 0;
  std::vector<Exact> exponentials;  // of the negative pairs: computed once, because they take long
  exponentials.reserve(rows * (rows - 1) / 2);
  std::vector<Exact> sum(rows);  // of exp(s / tau): the range of long double has room for it
  for_each_pair([&](int64_t a, int64_t b) {
    const Exact s = similarity(a, b), e = std::exp(s / in.tau);
    exponentials.push_back(e);
    for (const int64_t row : {a, b}) {
      sum[row] += e;
      out.largest_negative[row] = std::max(out.largest_negative[row], static_cast<double>(s));
    }
    negatives += s;
  });
  out.mean_negative = static_cast<double>(negatives / static_cast<Exact>(exponentials.size()));

  std::vector<Exact> weight(rows);  // g_a r_a / S_a
  std::vector<Exact> gradient(rows * features), magnitude(rows);
  const auto add_gradient = [&](int64_t a, int64_t b, Exact coefficient) {
    add_scaled(&gradient[a * features], coefficient, &own[b * features], features);
  };
  for (int64_t a = 0; a < rows; ++a) {
    const int64_t other = (a + batch) % rows;
    const Exact positive = similarity(a, other), gap = std::log(sum[a]) - positive / in.tau;
    const Exact loss = std::max<Exact>(gap, 0) + std::log1p(std::exp(-std::fabs(gap)));
    out.positive.push_back(static_cast<double>(positive));
    out.loss.push_back(static_cast<double>(loss));
    out.lse.push_back(static_cast<double>(positive / in.tau + loss));
    const Exact r = in.grad_loss[a] / (1 + std::exp(-gap));
    weight[a] = sum[a] > 0 ? r / sum[a] : 0;
    add_gradient(a, other, -r / in.tau);
    add_gradient(other, a, -r / in.tau);
    magnitude[a] += std::fabs(r) / in.tau;
    magnitude[other] += std::fabs(r) / in.tau;
  }
  auto next = exponentials.begin();
  for_each_pair([&](int64_t a, int64_t b) {
    const Exact e = *next++, coefficient = e * (weight[a] + weight[b]) / in.tau;
    add_gradient(a, b, coefficient);
    add_gradient(b, a, coefficient);
    const Exact size = e * (std::fabs(weight[a]) + std::fabs(weight[b])) / in.tau;
    magnitude[a] += size;
    magnitude[b] += size;
  });

  Exact z_dot_gradient = 0;
  out.gradient.resize(rows * features);
  for (int64_t a = 0; a < rows; ++a) {
    Exact* g = gradient.data() + a * features;
    const Exact* u = unit.data() + a * features;
    Exact projection = 0;
    for (int64_t d = 0; d < features; ++d) {
      z_dot_gradient += g[d] * own[a * features + d];
      projection += g[d] * u[d];
    }
    for (int64_t d = 0; d < features; ++d) {
      if (in.cosine) g[d] = out.norm[a] <= in.eps ? 0 : (g[d] - projection * u[d]) / out.norm[a];
      out.gradient[a * features + d] = static_cast<double>(g[d]);
    }
    out.magnitude.push_back(static_cast<double>(magnitude[a]));
  }
  out.grad_temperature = static_cast<double>(-z_dot_gradient / (2 * in.tau));
  return out;
}

}  // namespace cjepa::test
