// Both directions of nt_xent, called from several threads at once that each use another number of
// threads, against plain loops.
#include "../cpu/nt_xent.h"

#include <algorithm>

#include "../cpu/core/tile_core.h"
#include "../cpu/selected_core.h"
#include "check.h"
#include "nt_xent_loop.h"
#include "tensors.h"

namespace cjepa::test {
namespace {

struct Problem {
  const char* name;
  int64_t batch, features;
  ScalarType dtype;
  double tau;
  bool cosine = true, mask = false, tensor_temperature = false, strided = false, zero_row = false;
  Reduction reduction = Reduction::kMean;
  std::optional<ScalarType> product_dtype{};
  double length = 1;        // of the rows, for the dot product
  double raised_shift = 0;  // added to the shifts for the backward

  int64_t rows() const { return 2 * batch; }
  ScalarType rounded_dtype() const { return product_dtype.value_or(dtype); }
};

// The tensors of a problem and what the loops make of them.
struct Case {
  Problem problem;
  ScalarType sum_dtype;
  Given views[2], mask, temperature, grad_loss;
  LoopOutput expected;

  explicit Case(const Problem& p)
      : problem(p),
        sum_dtype(p.dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
        views{Given(p.dtype, {p.batch, p.features}, strides()),
              Given(p.dtype, {p.batch, p.features}, {p.features, 1})},
        mask(ScalarType::Bool, {p.batch, p.batch}, {1, p.batch + 1}),
        temperature(sum_dtype, {1, 1}, {1, 1}),
        grad_loss(sum_dtype, {per_row() ? p.rows() : 1, 1}, {per_row() ? 2 : 1, 1}) {
    Random random;
    LoopInput in{p.batch, p.features, {}, {}, p.tau, 1e-8, p.cosine, nullptr, {}};
    in.round = rounding_to(p.rounded_dtype(), sum_dtype);
    in.z.resize(p.rows() * p.features);
    std::vector<double> raw(p.features);
    for (int64_t a = 0; a < p.rows(); ++a) {
      double square = 0;
      for (int64_t d = 0; d < p.features; ++d) {  // the second view resembles the first
        raw[d] = random.normal() + (a < p.batch ? 0 : 2 * in.z[(a - p.batch) * p.features + d]);
        square += raw[d] * raw[d];
      }
      double length = p.cosine ? random.uniform(0.3, 3) : p.length;
      if (p.zero_row && a == p.batch / 2) length = 0;
      for (int64_t d = 0; d < p.features; ++d)
        in.z[a * p.features + d] =
            views[a / p.batch].set(a % p.batch, d, length * raw[d] / std::sqrt(square));
    }
    if (p.mask) {
      in.mask.resize(p.batch * p.batch);
      for (int64_t k = 0; k < p.batch; ++k)
        for (int64_t l = 0; l < p.batch; ++l)
          mask.bytes()[k + l * (p.batch + 1)] = in.mask[k * p.batch + l] =
              k == p.batch / 3 || random.chance(0.1);
    }
    in.tau = temperature.set(0, 0, p.tau);
    if (!p.tensor_temperature) in.tau = p.tau;
    double g = grad_loss.set(0, 0, random.uniform(0.5, 2));
    if (problem.reduction == Reduction::kMean) g /= static_cast<double>(p.rows());
    for (int64_t a = 0; a < p.rows(); ++a)
      in.grad_loss.push_back(per_row() ? grad_loss.set(a, 0, random.normal()) : g);
    expected = nt_xent_loop(in);
  }

  bool per_row() const { return problem.reduction == Reduction::kNone; }
  std::vector<int64_t> strides() const {
    return problem.strided ? std::vector<int64_t>{2, 2 * problem.batch + 1}
                           : std::vector<int64_t>{problem.features, 1};
  }
};

// Loss, accuracy, positive and negative similarity, lse, the gradients of both views and of the
// temperature, the largest negatives.
template <typename T, typename P>
Results run(const Case& c, bool save_exponentials) {
  const Problem& p = c.problem;
  NTXentOptions options{.z_i = c.views[0].tensor(),
                        .z_j = c.views[1].tensor(),
                        .mask = {},
                        .temperature_tensor = {},
                        .temperature = p.tau,
                        .use_cosine_similarity = p.cosine,
                        .eps = 1e-8,
                        .reduction = p.reduction,
                        .product_dtype = p.product_dtype};
  if (p.mask) options.mask = c.mask.tensor();
  if (p.tensor_temperature) options.temperature_tensor = c.temperature.tensor();
  NTXentForward out = nt_xent_forward<T, P>(options, save_exponentials);
  if (p.raised_shift != 0) raise_shift<T>(out.shift, out.log_sum, p.raised_shift, c.problem.tau);
  const NTXentBackward grads =
      nt_xent_backward<T, P>(options, c.grad_loss.tensor(),
                             {.shift = out.shift,
                              .log_sum = out.log_sum,
                              .positive = out.positive,
                              .saved_exponentials = out.saved_exponentials});
  Results results;
  for (const Tensor& t :
       {out.loss, out.accuracy, out.positive_similarity, out.negative_similarity, out.lse,
        grads.grad_z_i, grads.grad_z_j, grads.grad_temperature, out.largest_negative})
    results.push_back(numbers_of(t));
  return results;
}

template <typename T, typename P>
void check_results(const Case& c, const Results& actual) {
  const Problem& p = c.problem;
  const LoopOutput& e = c.expected;
  const double u = kRoundoff<T>, rows = static_cast<double>(p.rows());
  const double D = static_cast<double>(p.features);
  // The roundoff of the operands' dtype.
  const double narrow = p.rounded_dtype() == c.sum_dtype ? 0 : roundoff_of(p.rounded_dtype());
  // Normalised rows are known up to D / 2 + 3 roundings, so they may also be rounded to the narrow
  // dtype's next number: two roundoffs. Rows that are not normalised fit that dtype as they are.
  const double size = p.cosine ? 1 : p.length * p.length;
  const double row_error = p.cosine ? (D / 2 + 3) * u + 2 * narrow : 0;
  const double s_error = size * (2 * row_error + (D + 1) * u);
  // The relative error of an exponential or of a sum of them, which is the absolute error of its
  // logarithm. No sum adds more than 300 terms in T one after the other.
  const double log_error = 2 * s_error / p.tau + (300 + 4 * (size + p.raised_shift) / p.tau) * u;

  const auto mean = [&](const std::vector<double>& x) {
    Exact sum = 0;
    for (const double value : x) sum += value;
    return static_cast<double>(sum) / rows;
  };
  const char* name = p.name;
  const bool one = !c.per_row();
  for (int64_t a = 0; a < (one ? 1 : p.rows()); ++a) {
    const double scale = p.reduction == Reduction::kSum ? rows : 1;
    const double loss = one ? mean(e.loss) * scale : e.loss[a];
    CHECK_NEAR(actual[0][a], loss, scale * log_error + 4 * u * std::fabs(loss), "%s: loss %ld",
               name, a);
  }
  int64_t certain = 0, possible = 0;
  for (int64_t a = 0; a < p.rows(); ++a) {
    certain += e.positive[a] - e.largest_negative[a] > 2 * s_error;
    possible += e.positive[a] - e.largest_negative[a] >= -2 * s_error;
    CHECK_NEAR(actual[4][a], e.lse[a], log_error + 2 * u * std::fabs(e.lse[a]), "%s: lse %ld", name,
               a);
    if (std::isinf(e.largest_negative[a]))
      CHECK(actual[8][a] == e.largest_negative[a], "%s: largest negative of none, %ld", name, a);
    else
      CHECK_NEAR(actual[8][a], e.largest_negative[a], s_error, "%s: largest negative %ld", name, a);
  }
  const double hits = actual[1][0] * rows;
  CHECK(certain - 0.1 <= hits && hits <= possible + 0.1, "%s: accuracy %g of %g", name,
        actual[1][0], rows);
  CHECK_NEAR(actual[2][0], mean(e.positive), s_error + 4 * u * size, "%s: positive similarity",
             name);
  // Without a mask it is (|sum z|^2 - sum |z_a|^2 - sum s_pos) / (M (M - 2)), and |sum z|^2, whose
  // terms are as many, may be as large as M^2: the error of the mean stays that of one similarity.
  CHECK_NEAR(actual[3][0], e.mean_negative, 2 * s_error + (rows + 20) * u * size,
             "%s: negative similarity", name);

  // Three logarithms enter a coefficient, a narrow dtype rounds it, 300 terms at a time are added.
  // The projection brings in the errors of the whole row.
  const double relative = 3 * log_error + 300 * u + 2 * narrow + row_error;
  const double out = roundoff_of(p.dtype);
  double temperature_error = 0;
  for (int64_t a = 0; a < p.rows(); ++a) {
    const bool constant = p.cosine && e.norm[a] <= 1e-8;
    const double error = e.magnitude[a] * relative * std::max(1.0, p.length);
    temperature_error += 2 * std::sqrt(D) * error * std::max(1.0, p.length);
    for (int64_t d = 0; d < p.features; ++d) {
      const double expected = e.gradient[a * p.features + d];
      const double bound = (2 + std::sqrt(D)) * error / e.norm[a] + 2 * out * std::fabs(expected) +
                           (p.dtype == ScalarType::Half ? 6e-8 : 0);  // its smallest number
      CHECK_NEAR(actual[5 + a / p.batch][a % p.batch * p.features + d], expected,
                 constant ? 0 : bound, "%s: gradient of row %ld, %ld", name, a, d);
    }
  }
  CHECK_NEAR(actual[7][0], e.grad_temperature,
             temperature_error / p.tau + 2 * u * std::fabs(e.grad_temperature),
             "%s: gradient of the temperature", name);
}

template <typename T, typename P>
void check_problem(const Problem& problem, const std::vector<uint32_t>& thread_counts,
                   int callers) {
  const Case c(problem);
  for (const bool saved : {true, false}) {
    const std::string name = std::string(problem.name) + (saved ? ", saved exponentials" : "");
    check_results<T, P>(
        c, run_on_threads(name, thread_counts, callers, [&] { return run<T, P>(c, saved); }));
  }
}

constexpr ScalarType kFloat = ScalarType::Float, kDouble = ScalarType::Double;
constexpr ScalarType kBf16 = ScalarType::BFloat16, kHalf = ScalarType::Half;

CJEPA_TEST(fp32) {
  for (const Problem& p : {
           Problem{.name = "one pair", .batch = 1, .features = 3, .dtype = kFloat, .tau = 0.1},
           Problem{.name = "two pairs", .batch = 2, .features = 1, .dtype = kFloat, .tau = 0.1},
           Problem{.name = "a block", .batch = 48, .features = 33, .dtype = kFloat, .tau = 0.1},
           Problem{.name = "ragged",
                   .batch = 71,
                   .features = 31,
                   .dtype = kFloat,
                   .tau = 0.1,
                   .tensor_temperature = true,
                   .strided = true},
           Problem{.name = "mask",
                   .batch = 61,
                   .features = 17,
                   .dtype = kFloat,
                   .tau = 0.1,
                   .mask = true,
                   .reduction = Reduction::kNone},
           Problem{.name = "low temperature",
                   .batch = 75,
                   .features = 20,
                   .dtype = kFloat,
                   .tau = 0.01,
                   .mask = true,
                   .zero_row = true,
                   .reduction = Reduction::kSum},
           Problem{.name = "dot product",
                   .batch = 51,
                   .features = 9,
                   .dtype = kFloat,
                   .tau = 0.5,
                   .cosine = false,
                   .reduction = Reduction::kNone,
                   .length = 3},
           Problem{.name = "shifts of a larger S",
                   .batch = 67,
                   .features = 11,
                   .dtype = kFloat,
                   .tau = 0.1,
                   .mask = true,
                   .reduction = Reduction::kNone,
                   .raised_shift = 0.25},
           Problem{.name = "maxima of a larger S",
                   .batch = 49,
                   .features = 8,
                   .dtype = kFloat,
                   .tau = 0.02,
                   .raised_shift = 0.25},
       })
    check_problem<float, float>(p, {1, 2, 5}, 3);
}

CJEPA_TEST(fp64) {
  for (const Problem& p : {
           Problem{.name = "one pair", .batch = 1, .features = 3, .dtype = kDouble, .tau = 0.1},
           Problem{.name = "ragged",
                   .batch = 71,
                   .features = 31,
                   .dtype = kDouble,
                   .tau = 0.1,
                   .tensor_temperature = true,
                   .strided = true},
           Problem{.name = "mask",
                   .batch = 61,
                   .features = 17,
                   .dtype = kDouble,
                   .tau = 0.002,
                   .mask = true,
                   .reduction = Reduction::kNone},
           Problem{.name = "dot product",
                   .batch = 51,
                   .features = 9,
                   .dtype = kDouble,
                   .tau = 0.5,
                   .cosine = false,
                   .reduction = Reduction::kSum,
                   .length = 3},
           Problem{.name = "rounded to fp32",
                   .batch = 20,
                   .features = 9,
                   .dtype = kDouble,
                   .tau = 0.5,
                   .product_dtype = kFloat},
       })
    check_problem<double, double>(p, {1, 3}, 2);
}

template <typename P>
void check_narrow(ScalarType dtype) {
  for (const Problem& p : {
           Problem{.name = "narrow views", .batch = 71, .features = 31, .dtype = dtype, .tau = 0.5},
           Problem{.name = "narrow dot product",
                   .batch = 61,
                   .features = 18,
                   .dtype = dtype,
                   .tau = 0.5,
                   .cosine = false,
                   .mask = true,
                   .strided = true,
                   .reduction = Reduction::kNone},
           Problem{.name = "narrow product",
                   .batch = 50,
                   .features = 33,
                   .dtype = kFloat,
                   .tau = 0.5,
                   .tensor_temperature = true,
                   .product_dtype = dtype},
       })
    check_problem<float, P>(p, {1, 3}, 2);
}

CJEPA_TEST(fp16) { check_narrow<float>(kHalf); }
CJEPA_TEST(bf16_as_fp32) { check_narrow<float>(kBf16); }
CJEPA_TEST(bf16_in_pairs) {
  if (has_bf16_core()) check_narrow<Bf16Pair>(kBf16);
}

// Blocks are larger from 1536 rows on. The workspace of the backward holds 15 x 15 of them in fp64.
// With more rows the backward works on squares of blocks, with sums in the gradients themselves or
// in a buffer.
CJEPA_TEST(large_blocks) {
  check_problem<float, float>(
      {.name = "large blocks", .batch = 770, .features = 9, .dtype = kFloat, .tau = 0.1}, {1, 4},
      1);
}
// More than one band of samples and more than one square in a band, the last ones not full.
CJEPA_TEST(large_mask) {
  for (const int64_t batch : {128, 150})
    check_problem<float, float>({.name = "large mask",
                                 .batch = batch,
                                 .features = 5,
                                 .dtype = kFloat,
                                 .tau = 0.1,
                                 .mask = true},
                                {1, 4}, 1);
}
// Sums of more products than one accumulator adds up.
CJEPA_TEST(many_features) {
  for (const int64_t features : {512, 600})
    check_problem<float, float>(
        {.name = "many features", .batch = 20, .features = features, .dtype = kFloat, .tau = 0.1},
        {1}, 1);
}
CJEPA_TEST(squares_of_blocks) {
  for (const int64_t features : {5, 16})
    check_problem<double, double>(
        {.name = "squares", .batch = 1500, .features = features, .dtype = kDouble, .tau = 0.1},
        {1, 3}, 1);
}

}  // namespace
}  // namespace cjepa::test
