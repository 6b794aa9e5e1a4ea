// Both directions of self_logsumexp, called from several threads at once that each use another
// number of threads, against the loop of the rectangle with both sides alike.
#include "../cpu/self_logsumexp.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "check.h"
#include "cross_logsumexp_loop.h"
#include "tensors.h"

namespace cjepa::test {
namespace {

struct Problem {
  const char* name;
  struct {
    int64_t batch, features;
  } size;
  ScalarType dtype;
  double tau;
  int64_t views = 1;
  int64_t classes = 0;     // how many; 0: none are given
  bool positives = false;  // of some rows of one view
  bool attract = false;    // whether rows of one class attract each other, apart from positives
  bool cosine = true, tensor_temperature = false, strided = false, zero_rows = false, save = false;
  double raised_shift = 0;  // added to the shifts for the backward, as if of a larger S
  std::optional<ScalarType> product_dtype{};
  double length = 1;  // of the rows, for the dot product

  int64_t rows() const { return views * size.batch; }
  ScalarType rounded_dtype() const { return product_dtype.value_or(dtype); }
  ScalarType sum_dtype() const {
    return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }
};

// The tensors of a problem, and the same numbers for the loop.
struct Inputs {
  Problem problem;
  Given views[2], temperature, grad_lse, grad_positive, class_means, class_weights;
  std::vector<int64_t> classes;  // (batch)
  CrossInput numbers;

  explicit Inputs(const Problem& p)
      : problem(p),
        views{Given(p.dtype, {p.size.batch, p.size.features}, strides()),
              Given(p.dtype, {p.size.batch, p.size.features}, {p.size.features, 1})},
        temperature(p.sum_dtype(), {1, 1}, {1, 1}),
        grad_lse(p.sum_dtype(), {p.rows(), 1}, {p.strided ? 2 : 1, 1}),
        grad_positive(p.sum_dtype(), {p.rows(), 1}, {p.strided ? 2 : 1, 1}),
        class_means(p.sum_dtype(), {p.rows(), 1}, {p.strided ? 2 : 1, 1}),
        class_weights(p.sum_dtype(), {p.rows(), 1}, {1, 1}),
        numbers{p.size.features,
                {},
                p.tau,
                1e-8,
                p.cosine,
                rounding_to(p.rounded_dtype(), p.sum_dtype()),
                {}} {
    Random random;
    CrossInput& in = numbers;
    const int64_t rows = p.rows(), batch = p.size.batch, D = p.size.features;
    std::vector<double> raw(D);
    for (int64_t a = 0; a < rows; ++a) {
      double square = 0;
      for (int64_t d = 0; d < D; ++d) {  // a row resembles one of those before
        raw[d] = random.normal() + (a < 2 ? 0 : 2 * in.z[0][a / 2 * D + d]);
        square += raw[d] * raw[d];
      }
      double length = p.cosine ? random.uniform(0.3, 3) : p.length;
      if (p.zero_rows && a == rows / 2) length = 0;
      for (int64_t d = 0; d < D; ++d)
        in.z[0].push_back(views[a / batch].set(a % batch, d, length * raw[d] / std::sqrt(square)));
      in.grad[0].push_back(grad_lse.set(a, 0, random.normal()));
      in.grad[1].push_back(0);
    }
    in.z[1] = in.z[0];
    const double rounded = temperature.set(0, 0, p.tau);
    if (p.tensor_temperature) in.tau = rounded;
    for (int64_t k = 0; k < (p.classes > 0 ? batch : 0); ++k)
      classes.push_back(static_cast<int64_t>(random.uniform(0, 1) * p.classes) * 1000003 - 5);
    in.excluded = [this, batch](int64_t a, int64_t b) {
      const bool classed = !classes.empty() && !problem.attract;
      return a == b || (classed && classes[a % batch] == classes[b % batch]);
    };
    if (has_positives()) add_positives(random);
    if (p.attract) add_attraction();
  }
  Inputs(const Inputs&) = delete;
  Inputs& operator=(const Inputs&) = delete;

  void add_positives(Random& random) {
    const Problem& p = problem;
    CrossInput& in = numbers;
    const int64_t rows = p.rows(), batch = p.size.batch;
    in.positives.assign(rows, -1);
    for (int64_t a = 0; a < rows; ++a) {
      const int64_t step = p.views == 2 ? batch : 3;  // rows 0 and 3, 1 and 4, 2 and 5, 7 and 10...
      if (p.views == 1 && (a % 7 > 2 || a + step >= rows)) continue;
      if (a + step < rows) in.positives[a] = a + step, in.positives[a + step] = a;
    }
    for (int64_t a = 0; a < rows; ++a)
      in.grad_positive.push_back(grad_positive.set(a, 0, random.normal() / p.tau));
    for (int64_t a = 0; a < rows; ++a)
      if (in.positives[a] < 0) in.grad_positive[a] = 0;
  }

  // Rows with a positive are classes of their own for this.
  void add_attraction() {
    const int64_t rows = problem.rows();
    if (has_positives())
      for (int64_t a = 0; a < rows; ++a)
        if (numbers.positives[a] >= 0) classes[a] = std::min(a, numbers.positives[a]) + 1;
    numbers.attracts = [this](int64_t a, int64_t b) {
      const bool positive = has_positives() && numbers.positives[a] >= 0;
      return a != b && classes[a] == classes[b] && !positive;
    };
    for (int64_t a = 0; a < rows; ++a) {
      int64_t others = 0;
      for (int64_t b = 0; b < rows; ++b) others += numbers.attracts(a, b);
      numbers.share.push_back(class_weights.set(a, 0, others == 0 ? 0 : 1.0 / others));
    }
    const CrossOutput output = cross_logsumexp_loop(numbers);
    for (int64_t a = 0; a < rows; ++a) class_means.set(a, 0, output.attraction[a]);
  }

  bool has_positives() const { return problem.positives || problem.views == 2; }
  Tensor to_tensor(const std::vector<int64_t>& from) const {
    const int64_t size = static_cast<int64_t>(from.size());
    Tensor t = torch::stable::new_empty(views[0].tensor(), {size}, ScalarType::Long);
    std::copy(from.begin(), from.end(), data_of<int64_t>(t));
    return t;
  }
  std::vector<int64_t> strides() const {
    return problem.strided ? std::vector<int64_t>{2, 2 * problem.size.batch + 1}
                           : std::vector<int64_t>{problem.size.features, 1};
  }
};

enum Result { kLse, kLargest, kShift, kLogSum, kPositive, kGradient, kTemperature = kGradient + 2 };

template <typename T>
Results run(const Inputs& in) {
  const Problem& p = in.problem;
  SelfLogSumExpOptions options{.z_i = in.views[0].tensor(),
                               .z_j = {},
                               .positives = {},
                               .classes = {},
                               .attract = p.attract,
                               .temperature_tensor = {},
                               .temperature = p.tau,
                               .use_cosine_similarity = p.cosine,
                               .eps = 1e-8,
                               .product_dtype = p.product_dtype};
  if (p.views == 2) options.z_j = in.views[1].tensor();
  if (p.positives) options.positives = in.to_tensor(in.numbers.positives);
  if (p.classes > 0) options.classes = in.to_tensor(in.classes);
  if (p.tensor_temperature) options.temperature_tensor = in.temperature.tensor();
  std::optional<Tensor> class_means, class_weights;
  if (p.attract) class_means = in.class_means.tensor(), class_weights = in.class_weights.tensor();
  SelfLogSumExpForward out = self_logsumexp_forward(options, class_means, p.save);
  Results results;
  for (const Tensor& t : {out.lse, out.largest, out.shift, out.log_sum, out.positive})
    results.push_back(numbers_of(t));
  if (p.raised_shift != 0) raise_shift<T>(out.shift, out.log_sum, p.raised_shift, in.numbers.tau);
  SelfLogSumExpUpstream upstream{
      .grad_lse = in.grad_lse.tensor(), .grad_positive = {}, .class_weights = class_weights};
  if (in.has_positives()) upstream.grad_positive = in.grad_positive.tensor();
  const auto [grad_z_i, grad_z_j, grad_temperature] = self_logsumexp_backward(
      options, upstream,
      {.shift = out.shift, .log_sum = out.log_sum, .saved_exponentials = out.saved_exponentials});
  for (const Tensor& t : {grad_z_i, grad_z_j, grad_temperature}) results.push_back(numbers_of(t));
  return results;
}

template <typename T>
void check_results(const Inputs& in, const Results& actual) {
  const Problem& p = in.problem;
  const CrossOutput output = cross_logsumexp_loop(in.numbers);
  const CrossOutput::Side &as_row = output.sides[0], &as_column = output.sides[1];
  const double u = kRoundoff<T>, tau = in.numbers.tau, D = static_cast<double>(p.size.features);
  const double narrow = p.rounded_dtype() == p.sum_dtype() ? 0 : roundoff_of(p.rounded_dtype());
  // As in nt_xent_test.cpp: of a row, of a similarity, and of the logarithm of a sum.
  const double size = p.cosine ? 1 : p.length * p.length;
  const double row_error = p.cosine ? (D / 2 + 3) * u + 2 * narrow : 0;
  const double s_error = size * (2 * row_error + (D + 1) * u);
  const double log_error = 2 * s_error / tau + (300 + 4 * (size + p.raised_shift) / tau) * u;
  const double relative = 3 * log_error + 300 * u + 2 * narrow + row_error;
  double temperature_error = 0;
  for (int64_t a = 0; a < p.rows(); ++a) {
    const double lse = as_row.lse[a];
    if (std::isinf(lse)) {  // nothing counts
      CHECK(actual[kLse][a] == lse && actual[kLargest][a] == lse, "%s: row %ld", p.name, a);
    } else {
      const double bound = log_error + 2 * u * std::fabs(lse);
      CHECK_NEAR(actual[kLse][a], lse, bound, "%s: lse of row %ld", p.name, a);
      CHECK_NEAR(actual[kShift][a] / tau + actual[kLogSum][a], lse + output.attraction[a] / tau,
                 bound + 4 * u * size / tau, "%s: shift and log sum of row %ld", p.name, a);
      CHECK_NEAR(actual[kLargest][a], as_row.largest[a], s_error, "%s: maximum of row %ld", p.name,
                 a);
    }
    if (in.has_positives())
      CHECK_NEAR(actual[kPositive][a], output.positive[a], s_error, "%s: positive of row %ld",
                 p.name, a);
    const double magnitude = as_row.magnitude[a] + as_column.magnitude[a];
    const double error = magnitude * relative * std::max(1.0, p.length);
    temperature_error += 2 * std::sqrt(D) * error * std::max(1.0, p.length);
    const bool constant = p.cosine && as_row.norm[a] <= 1e-8;
    const std::vector<double>& gradient = actual[kGradient + a / p.size.batch];
    for (int64_t d = 0; d < p.size.features; ++d) {
      const int64_t at = a * p.size.features + d;
      const double expected = as_row.gradient[at] + as_column.gradient[at];
      const double bound = (2 + std::sqrt(D)) * error / as_row.norm[a] +
                           2 * roundoff_of(p.dtype) * std::fabs(expected) +
                           (p.dtype == ScalarType::Half ? 6e-8 : 0);  // its smallest number
      CHECK_NEAR(gradient[a % p.size.batch * p.size.features + d], expected, constant ? 0 : bound,
                 "%s: gradient of row %ld, %ld", p.name, a, d);
    }
  }
  CHECK_NEAR(actual[kTemperature][0], output.grad_temperature,
             temperature_error / tau + 2 * u * std::fabs(output.grad_temperature),
             "%s: gradient of the temperature", p.name);
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
           Problem{.name = "one row", .size = {1, 3}, .dtype = kFloat, .tau = 0.1},
           Problem{.name = "one pair", .size = {1, 3}, .dtype = kFloat, .tau = 0.1, .views = 2},
           Problem{.name = "rows", .size = {97, 17}, .dtype = kFloat, .tau = 0.1, .strided = true},
           Problem{.name = "positives",
                   .size = {203, 21},
                   .dtype = kFloat,
                   .tau = 0.1,
                   .positives = true,
                   .tensor_temperature = true,
                   .strided = true,
                   .zero_rows = true},
           Problem{.name = "positives and classes, saved",
                   .size = {131, 12},
                   .dtype = kFloat,
                   .tau = 0.1,
                   .classes = 5,
                   .positives = true,
                   .save = true},
           Problem{.name = "views and classes",
                   .size = {101, 33},
                   .dtype = kFloat,
                   .tau = 0.1,
                   .views = 2,
                   .classes = 7,
                   .tensor_temperature = true,
                   .strided = true},
           Problem{.name = "views, low temperature, saved",
                   .size = {49, 20},
                   .dtype = kFloat,
                   .tau = 0.01,
                   .views = 2,
                   .save = true},
           Problem{.name = "classes, low temperature",
                   .size = {150, 9},
                   .dtype = kFloat,
                   .tau = 0.01,
                   .classes = 3,
                   .zero_rows = true},
           Problem{.name = "attraction",
                   .size = {203, 21},
                   .dtype = kFloat,
                   .tau = 0.1,
                   .classes = 5,
                   .positives = true,
                   .attract = true,
                   .tensor_temperature = true,
                   .strided = true},
           Problem{.name = "attraction, low temperature, saved",
                   .size = {149, 9},
                   .dtype = kFloat,
                   .tau = 0.01,
                   .classes = 3,
                   .attract = true,
                   .zero_rows = true,
                   .save = true},
           Problem{.name = "attraction in one class",
                   .size = {99, 9},
                   .dtype = kFloat,
                   .tau = 0.5,
                   .classes = 1,
                   .attract = true,
                   .cosine = false,
                   .length = 2},
           Problem{.name = "one class", .size = {99, 9}, .dtype = kFloat, .tau = 0.1, .classes = 1},
           Problem{.name = "mostly classes of one",
                   .size = {40, 9},
                   .dtype = kFloat,
                   .tau = 0.1,
                   .views = 2,
                   .classes = 1000},
           Problem{.name = "saved, shifts of a larger S",
                   .size = {131, 9},
                   .dtype = kFloat,
                   .tau = 0.1,
                   .classes = 4,
                   .save = true,
                   .raised_shift = 0.25},
           Problem{.name = "dot product",
                   .size = {103, 9},
                   .dtype = kFloat,
                   .tau = 0.5,
                   .classes = 6,
                   .positives = true,
                   .cosine = false,
                   .tensor_temperature = true,
                   .length = 3},
       })
    check_problem<float>(p);
}

CJEPA_TEST(fp64) {
  for (const Problem& p : {
           Problem{.name = "rows", .size = {53, 31}, .dtype = kDouble, .tau = 0.1},
           Problem{.name = "low temperature",
                   .size = {125, 17},
                   .dtype = kDouble,
                   .tau = 0.002,
                   .classes = 4,
                   .positives = true},
           Problem{.name = "attraction",
                   .size = {125, 17},
                   .dtype = kDouble,
                   .tau = 0.02,
                   .classes = 4,
                   .attract = true},
           Problem{.name = "views and classes",
                   .size = {71, 13},
                   .dtype = kDouble,
                   .tau = 0.1,
                   .views = 2,
                   .classes = 4,
                   .tensor_temperature = true,
                   .save = true},
       })
    check_problem<double>(p);
}

void check_narrow(ScalarType dtype) {
  for (const Problem& p : {
           Problem{.name = "narrow",
                   .size = {143, 31},
                   .dtype = dtype,
                   .tau = 0.5,
                   .classes = 4,
                   .positives = true,
                   .strided = true},
           Problem{.name = "narrow, attraction",
                   .size = {143, 31},
                   .dtype = dtype,
                   .tau = 0.5,
                   .classes = 6,
                   .attract = true},
           Problem{.name = "narrow, views",
                   .size = {61, 18},
                   .dtype = dtype,
                   .tau = 0.5,
                   .views = 2,
                   .classes = 4,
                   .cosine = false},
           Problem{.name = "narrow product",
                   .size = {101, 33},
                   .dtype = kFloat,
                   .tau = 0.5,
                   .tensor_temperature = true,
                   .product_dtype = dtype},
       })
    check_problem<float>(p);
}

CJEPA_TEST(fp16) { check_narrow(kHalf); }
CJEPA_TEST(bf16) { check_narrow(kBf16); }  // in pairs where the instruction set has them

CJEPA_TEST(large_blocks) {  // blocks are larger from 1536 rows on
  check_problem<float>(
      {.name = "large blocks", .size = {1541, 9}, .dtype = kFloat, .tau = 0.5, .classes = 9},
      {1, 3}, 1);
}

// The workspace of the backward holds 10 x 10 blocks in fp64. With more rows the sums lie in a
// buffer, or in the gradients themselves (16 features), where rows that were sorted by class then
// move to their places. The cores of all instruction sets see the same squares, so one is enough.
CJEPA_TEST(squares_of_blocks) {
  if (std::getenv("CJEPA_INSTRUCTION_SET") != nullptr) return;
  check_problem<double>({.name = "squares of blocks",
                         .size = {2941, 16},
                         .dtype = kDouble,
                         .tau = 0.1,
                         .classes = 9,
                         .positives = true},
                        {1, 3}, 1);
  check_problem<double>({.name = "squares of blocks, attraction",
                         .size = {2941, 16},
                         .dtype = kDouble,
                         .tau = 0.1,
                         .classes = 9,
                         .attract = true},
                        {2}, 1);
  for (const int64_t features : {5, 16}) {
    check_problem<double>({.name = "squares of blocks, views",
                           .size = {1471, features},
                           .dtype = kDouble,
                           .tau = 0.1,
                           .views = 2,
                           .classes = 9},
                          {3}, 1);
  }
}

}  // namespace
}  // namespace cjepa::test
