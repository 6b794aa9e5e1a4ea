// Both directions of cross_logsumexp, called from several threads at once that each use another
// number of threads, against plain loops.
#include "../cpu/cross_logsumexp.h"

#include <algorithm>
#include <limits>

#include "check.h"
#include "cross_logsumexp_loop.h"
#include "tensors.h"

namespace cjepa::test {
namespace {

// Which outputs have an upstream gradient.
enum Upstream { kBoth, kRows, kColumns, kNone };

struct Problem {
  const char* name;
  struct {
    int64_t rows, columns, features;
  } size;
  ScalarType dtype;
  double tau;
  bool cosine = true, tensor_temperature = false, strided = false, zero_rows = false;
  Upstream upstream = kBoth;
  double raised_shift =
      0;  // added to the shifts for the backward, as if they were those of a larger S
  std::optional<ScalarType> product_dtype{};
  double length = 1;  // of the rows, for the dot product
  bool positives = false, save = false;

  int64_t count(int side) const { return side == 0 ? size.rows : size.columns; }
  ScalarType rounded_dtype() const { return product_dtype.value_or(dtype); }
  ScalarType sum_dtype() const {
    return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }
};

// The tensors of a problem.
struct Inputs {
  Problem problem;
  Given sides[2], temperature, grads[2];
  CrossInput numbers;
  Given grad_positive;

  explicit Inputs(const Problem& p)
      : problem(p),
        sides{Given(p.dtype, {p.size.rows, p.size.features}, strides()),
              Given(p.dtype, {p.size.columns, p.size.features}, {p.size.features, 1})},
        temperature(p.sum_dtype(), {1, 1}, {1, 1}),
        grads{Given(p.sum_dtype(), {p.size.rows, 1}, {p.strided ? 2 : 1, 1}),
              Given(p.sum_dtype(), {p.size.columns, 1}, {1, 1})},
        numbers{p.size.features,
                {},
                p.tau,
                1e-8,
                p.cosine,
                rounding_to(p.rounded_dtype(), p.sum_dtype()),
                {}},
        grad_positive(p.sum_dtype(), {p.size.rows, 1}, {p.strided ? 2 : 1, 1}) {
    Random random;
    CrossInput& in = numbers;
    std::vector<double> raw(p.size.features);
    for (int side = 0; side < 2; ++side) {
      for (int64_t a = 0; a < p.count(side); ++a) {
        double square = 0;
        for (int64_t d = 0; d < p.size.features; ++d) {  // rows of Y resemble some of X
          raw[d] = random.normal() +
                   (side == 0 ? 0 : 2 * in.z[0][a % p.size.rows * p.size.features + d]);
          square += raw[d] * raw[d];
        }
        double length = p.cosine ? random.uniform(0.3, 3) : p.length;
        if (p.zero_rows && a == p.count(side) / 2) length = 0;
        for (int64_t d = 0; d < p.size.features; ++d)
          in.z[side].push_back(sides[side].set(a, d, length * raw[d] / std::sqrt(square)));
        const bool none = p.upstream == kNone || p.upstream == (side == 0 ? kColumns : kRows);
        in.grad[side].push_back(grads[side].set(a, 0, none ? 0 : random.normal()));
      }
    }
    const double rounded = temperature.set(0, 0, p.tau);
    if (p.tensor_temperature) in.tau = rounded;
    if (!p.positives) return;
    for (int64_t a = 0; a < p.size.rows; ++a) {  // some columns twice, some rows without one
      in.positives.push_back(a % 7 == 3 ? -1 : a * a % p.size.columns);
      const double grad = p.upstream == kNone ? 0 : random.normal() / p.tau;
      in.grad_positive.push_back(grad_positive.set(a, 0, grad));
    }
  }

  Tensor positives() const {
    Tensor t = torch::stable::new_empty(sides[0].tensor(), {problem.size.rows}, ScalarType::Long);
    std::copy(numbers.positives.begin(), numbers.positives.end(), data_of<int64_t>(t));
    return t;
  }

  std::vector<int64_t> strides() const {
    return problem.strided ? std::vector<int64_t>{2, 2 * problem.size.rows + 1}
                           : std::vector<int64_t>{problem.size.features, 1};
  }
};

// Log-sum-exp, maxima, shifts and log sums, each of rows and of columns; similarities of positives
// and their mean with all others; gradients of X, of Y and of the temperature.
enum Result {
  kLse,
  kLargest = 2,
  kShift = 4,
  kLogSum = 6,
  kPositive = 8,
  kMean = 9,
  kGradient = 10,
  kTemperature = 12
};

template <typename T>
Results run(const Inputs& in) {
  const Problem& p = in.problem;
  const Tensor x = in.sides[0].tensor(), y = in.sides[1].tensor();
  CrossLogSumExpOptions options{.x = x,
                                .y = y,
                                .positives = {},
                                .temperature_tensor = {},
                                .temperature = p.tau,
                                .use_cosine_similarity = p.cosine,
                                .eps = 1e-8,
                                .product_dtype = p.product_dtype};
  if (p.tensor_temperature) options.temperature_tensor = in.temperature.tensor();
  if (p.positives) options.positives = in.positives();
  CrossLogSumExpForward out = cross_logsumexp_forward(options, p.save);
  Results results;
  for (const Tensor& t :
       {out.row_lse, out.column_lse, out.row_max, out.column_max, out.row_shift, out.column_shift,
        out.row_log_sum, out.column_log_sum, out.positive, out.mean_similarity})
    results.push_back(numbers_of(t));
  if (p.raised_shift != 0) {
    raise_shift<T>(out.row_shift, out.row_log_sum, p.raised_shift, in.numbers.tau);
    raise_shift<T>(out.column_shift, out.column_log_sum, p.raised_shift, in.numbers.tau);
  }
  CrossLogSumExpUpstream upstream{.grad_row = in.grads[0].tensor(),
                                  .grad_column = in.grads[1].tensor(),
                                  .grad_positive = {},
                                  .of_x = true,
                                  .of_y = true};
  const CrossLogSumExpSaved saved{.row_shift = out.row_shift,
                                  .row_log_sum = out.row_log_sum,
                                  .column_shift = out.column_shift,
                                  .column_log_sum = out.column_log_sum,
                                  .saved_exponentials = out.saved_exponentials};
  if (p.positives) upstream.grad_positive = in.grad_positive.tensor();
  const auto [grad_x, grad_y, grad_temperature] =
      cross_logsumexp_backward(options, upstream, saved);
  for (const Tensor& t : {grad_x, grad_y, grad_temperature}) results.push_back(numbers_of(t));
  for (const bool of_x : {false, true}) {  // one side alone, or neither
    for (const bool of_y : {false, true}) {
      upstream.of_x = of_x, upstream.of_y = of_y;
      const CrossLogSumExpBackward some = cross_logsumexp_backward(options, upstream, saved);
      const Tensor nothing = torch::stable::new_empty(x, {0, p.size.features}, x.scalar_type());
      CHECK(same_bits({numbers_of(of_x ? grad_x : nothing), numbers_of(of_y ? grad_y : nothing)},
                      {numbers_of(some.grad_x), numbers_of(some.grad_y)}),
            "%s: gradients of one side alone", p.name);
      results.push_back(numbers_of(some.grad_temperature));
    }
  }
  return results;
}

template <typename T>
void check_results(const Inputs& in, const Results& actual) {
  const Problem& p = in.problem;
  const CrossOutput expected = cross_logsumexp_loop(in.numbers);
  const char* name = p.name;
  const double u = kRoundoff<T>, tau = in.numbers.tau, D = static_cast<double>(p.size.features);
  const double narrow = p.rounded_dtype() == p.sum_dtype() ? 0 : roundoff_of(p.rounded_dtype());
  // As in nt_xent_test.cpp: of a row, of a similarity, and of the logarithm of a sum.
  const double size = p.cosine ? 1 : p.length * p.length;
  const double row_error = p.cosine ? (D / 2 + 3) * u + 2 * narrow : 0;
  const double s_error = size * (2 * row_error + (D + 1) * u);
  const double log_error = 2 * s_error / tau + (300 + 4 * (size + p.raised_shift) / tau) * u;
  const double relative = 3 * log_error + 300 * u + 2 * narrow + row_error;
  double temperature_error = 0;
  for (int64_t a = 0; p.positives && a < p.size.rows; ++a)
    CHECK_NEAR(actual[kPositive][a], expected.positive[a], s_error, "%s: positive of row %ld", name,
               a);
  if (p.positives)
    CHECK_NEAR(actual[kMean][0], expected.mean_similarity, s_error, "%s: mean similarity", name);
  for (int side = 0; side < 2; ++side) {
    const CrossOutput::Side& e = expected.sides[side];
    const char* of = side == 0 ? "row" : "column";
    for (int64_t a = 0; a < p.count(side); ++a) {
      const double lse = e.lse[a], bound = log_error + 2 * u * std::fabs(lse);
      CHECK_NEAR(actual[kLse + side][a], lse, bound, "%s: lse of %s %ld", name, of, a);
      CHECK_NEAR(actual[kShift + side][a] / tau + actual[kLogSum + side][a], lse,
                 bound + 2 * u * size / tau, "%s: shift and log sum of %s %ld", name, of, a);
      CHECK_NEAR(actual[kLargest + side][a], e.largest[a], s_error, "%s: maximum of %s %ld", name,
                 of, a);
    }
    for (int64_t a = 0; a < p.count(side); ++a) {
      const bool constant = p.cosine && e.norm[a] <= 1e-8;
      const double error = e.magnitude[a] * relative * std::max(1.0, p.length);
      temperature_error += 2 * std::sqrt(D) * error * std::max(1.0, p.length);
      for (int64_t d = 0; d < p.size.features; ++d) {
        const double gradient = e.gradient[a * p.size.features + d];
        const double bound = (2 + std::sqrt(D)) * error / e.norm[a] +
                             2 * roundoff_of(p.dtype) * std::fabs(gradient) +
                             (p.dtype == ScalarType::Half ? 6e-8 : 0);  // its smallest number
        CHECK_NEAR(actual[kGradient + side][a * p.size.features + d], gradient,
                   constant || p.upstream == kNone ? 0 : bound, "%s: gradient of %s %ld, %ld", name,
                   of, a, d);
      }
    }
  }
  for (size_t k = kTemperature; k < actual.size(); ++k)
    CHECK_NEAR(actual[k][0], expected.grad_temperature,
               temperature_error / tau + 2 * u * std::fabs(expected.grad_temperature),
               "%s: gradient of the temperature, %zu", name, k);
}

// T is the type of the sums.
template <typename T>
void check_problem(const Problem& problem,
                   const std::vector<uint32_t>& thread_counts = {1, 2, 3, 4}, int callers = 2) {
  const Inputs inputs(problem);
  check_results<T>(
      inputs, run_on_threads(problem.name, thread_counts, callers, [&] { return run<T>(inputs); }));
}

constexpr ScalarType kFloat = ScalarType::Float, kDouble = ScalarType::Double;
constexpr ScalarType kBf16 = ScalarType::BFloat16, kHalf = ScalarType::Half;

CJEPA_TEST(fp32) {
  for (const Problem& p : {
           Problem{.name = "a pair", .size = {1, 1, 3}, .dtype = kFloat, .tau = 0.1},
           Problem{.name = "one row", .size = {1, 201, 5}, .dtype = kFloat, .tau = 0.1},
           Problem{.name = "one column", .size = {201, 1, 5}, .dtype = kFloat, .tau = 0.01},
           Problem{.name = "a block", .size = {96, 96, 33}, .dtype = kFloat, .tau = 0.1},
           Problem{.name = "tall",
                   .size = {233, 71, 31},
                   .dtype = kFloat,
                   .tau = 0.1,
                   .tensor_temperature = true,
                   .strided = true},
           Problem{.name = "wide",
                   .size = {71, 233, 17},
                   .dtype = kFloat,
                   .tau = 0.1,
                   .strided = true,
                   .zero_rows = true},
           Problem{.name = "low temperature",
                   .size = {151, 97, 20},
                   .dtype = kFloat,
                   .tau = 0.01,
                   .zero_rows = true},
           Problem{.name = "shifts of a larger S",
                   .size = {97, 131, 9},
                   .dtype = kFloat,
                   .tau = 0.1,
                   .raised_shift = 0.25},
           Problem{.name = "dot product",
                   .size = {103, 55, 9},
                   .dtype = kFloat,
                   .tau = 0.5,
                   .cosine = false,
                   .tensor_temperature = true,
                   .strided = true,
                   .length = 3},
           Problem{.name = "positives",
                   .size = {133, 71, 21},
                   .dtype = kFloat,
                   .tau = 0.1,
                   .tensor_temperature = true,
                   .strided = true,
                   .positives = true},
           Problem{.name = "positives, saved",
                   .size = {71, 203, 21},
                   .dtype = kFloat,
                   .tau = 0.1,
                   .zero_rows = true,
                   .positives = true,
                   .save = true},
           Problem{.name = "positives, low temperature, saved",
                   .size = {101, 97, 12},
                   .dtype = kFloat,
                   .tau = 0.01,
                   .positives = true,
                   .save = true},
           Problem{.name = "saved, shifts of a larger S",
                   .size = {97, 131, 9},
                   .dtype = kFloat,
                   .tau = 0.1,
                   .raised_shift = 0.25,
                   .save = true},
           Problem{.name = "dot product of short rows",
                   .size = {55, 103, 9},
                   .dtype = kFloat,
                   .tau = 0.1,
                   .cosine = false,
                   .length = 0.9},
       })
    check_problem<float>(p);
}

CJEPA_TEST(fp64) {
  for (const Problem& p : {
           Problem{.name = "a pair", .size = {1, 1, 3}, .dtype = kDouble, .tau = 0.1},
           Problem{.name = "one row", .size = {1, 203, 5}, .dtype = kDouble, .tau = 0.1},
           Problem{.name = "tall",
                   .size = {143, 71, 31},
                   .dtype = kDouble,
                   .tau = 0.1,
                   .tensor_temperature = true,
                   .strided = true},
           Problem{.name = "low temperature",
                   .size = {61, 125, 17},
                   .dtype = kDouble,
                   .tau = 0.002,
                   .zero_rows = true},
           Problem{.name = "dot product",
                   .size = {51, 99, 9},
                   .dtype = kDouble,
                   .tau = 0.5,
                   .cosine = false,
                   .length = 3},
           Problem{.name = "shifts of a larger S",
                   .size = {31, 45, 9},
                   .dtype = kDouble,
                   .tau = 0.1,
                   .raised_shift = 0.25},
           Problem{.name = "positives",
                   .size = {99, 143, 13},
                   .dtype = kDouble,
                   .tau = 0.1,
                   .positives = true,
                   .save = true},
           Problem{.name = "rounded to fp32",
                   .size = {41, 20, 9},
                   .dtype = kDouble,
                   .tau = 0.5,
                   .product_dtype = kFloat},
       })
    check_problem<double>(p);
}

void check_narrow(ScalarType dtype) {
  for (const Problem& p : {
           Problem{.name = "narrow, tall", .size = {143, 75, 31}, .dtype = dtype, .tau = 0.5},
           Problem{.name = "narrow, wide",
                   .size = {61, 193, 18},
                   .dtype = dtype,
                   .tau = 0.5,
                   .cosine = false,
                   .strided = true},
           Problem{.name = "narrow, positives",
                   .size = {131, 99, 22},
                   .dtype = dtype,
                   .tau = 0.5,
                   .positives = true},
           Problem{.name = "narrow, one row", .size = {1, 99, 7}, .dtype = dtype, .tau = 0.5},
           Problem{.name = "narrow, low temperature",
                   .size = {99, 47, 12},
                   .dtype = dtype,
                   .tau = 0.02,
                   .cosine = false},
           Problem{.name = "narrow product",
                   .size = {101, 111, 33},
                   .dtype = kFloat,
                   .tau = 0.5,
                   .tensor_temperature = true,
                   .product_dtype = dtype},
       })
    check_problem<float>(p);
}

CJEPA_TEST(fp16) { check_narrow(kHalf); }
CJEPA_TEST(bf16) { check_narrow(kBf16); }  // in pairs where the instruction set has them

CJEPA_TEST(gradient_of_one_output) {
  for (const Upstream upstream : {kRows, kColumns, kNone}) {
    for (const double tau : {0.1, 0.01}) {
      check_problem<float>({.name = "one output",
                            .size = {121, 57, 10},
                            .dtype = kFloat,
                            .tau = tau,
                            .upstream = upstream},
                           {1, 3}, 1);
    }
  }
}

// Blocks are larger from 1536 rows of either side on. The workspace of the backward holds 15 x 15
// of them in fp64 and 21 x 21 in fp32. With more rows of one side or of both, the backward works on
// squares of blocks, with sums in the gradients themselves (16 features) or in a buffer.
CJEPA_TEST(large_blocks) {
  for (const ScalarType dtype : {kFloat, kBf16}) {
    const double tau = dtype == kFloat ? 0.01 : 0.5;
    const std::vector<uint32_t> counts{1, 2, 3, 4};
    check_problem<float>(
        {.name = "large blocks, tall", .size = {1541, 97, 9}, .dtype = dtype, .tau = tau}, counts,
        1);
    check_problem<float>({.name = "large blocks, wide",
                          .size = {203, 1601, 9},
                          .dtype = dtype,
                          .tau = 0.5,
                          .positives = true,
                          .save = true},
                         counts, 1);
  }
}

CJEPA_TEST(squares_of_blocks) {
  const std::vector<uint32_t> counts{1, 3};
  for (const int64_t features : {5, 16}) {
    check_problem<double>(
        {.name = "squares, tall", .size = {2941, 211, features}, .dtype = kDouble, .tau = 0.1},
        counts, 1);
    check_problem<double>(
        {.name = "squares, wide", .size = {37, 2901, features}, .dtype = kDouble, .tau = 0.002},
        counts, 1);
  }
  for (const ScalarType dtype : {kFloat, kBf16})
    check_problem<float>(
        {.name = "squares, tall", .size = {4099, 65, 16}, .dtype = dtype, .tau = 0.5}, counts, 1);
  check_problem<double>({.name = "squares", .size = {2885, 2897, 5}, .dtype = kDouble, .tau = 0.1},
                        counts, 1);
}

// One number that is not finite makes all values and all gradients NaN. No row is skipped, and
// nothing is read or written outside of the tensors.
void check_non_finite(const Problem& p, int side, double poison) {
  const Inputs inputs(p);
  inputs.sides[side].set(100, 4, poison);
  const Results results = run_on_threads(p.name, {1, 4}, 1, [&] {
    return p.dtype == kDouble ? run<double>(inputs) : run<float>(inputs);
  });
  for (size_t k = 0; k < results.size(); ++k) {
    if (k == kShift || k == kShift + 1)
      continue;  // the shift does not matter beside a log sum of NaN
    if (k == kPositive || k == kMean) continue;  // there are no positives
    const std::vector<double>& numbers = results[k];
    const bool rows = k == kGradient || k == kGradient + 1;
    const auto width = static_cast<std::ptrdiff_t>(rows ? p.size.features : 1);
    for (auto row = numbers.begin(); row != numbers.end(); row += width)
      CHECK(std::any_of(row, row + width, [](double x) { return std::isnan(x); }),
            "%g on side %d, %s, result %zu: row %td", poison, side, p.name, k,
            (row - numbers.begin()) / width);
  }
}

CJEPA_TEST(non_finite_rows) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  for (const ScalarType dtype : {kFloat, kDouble, kBf16, kHalf}) {
    for (const double poison : {std::numeric_limits<double>::quiet_NaN(), kInf, -kInf}) {
      Problem p{.name = "constant shift", .size = {131, 75, 9}, .dtype = dtype, .tau = 0.1};
      check_non_finite(p, 0, poison);
      p.name = "dot product";
      p.cosine = false;
      check_non_finite(p, 0, poison);
      std::swap(p.size.rows, p.size.columns);
      check_non_finite(p, 1, poison);
      p.name = "low temperature";
      p.cosine = true;
      p.tau = 0.01;
      check_non_finite(p, 1, poison);
    }
  }
}

}  // namespace
}  // namespace cjepa::test
