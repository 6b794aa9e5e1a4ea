// Both directions of the prediction loss, called from several threads at once that each use another
// number of threads, against plain loops.
#include "../cpu/prediction_loss.h"

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <limits>

#include "check.h"
#include "prediction_loss_loop.h"
#include "tensors.h"

namespace cjepa::test {
namespace {

constexpr ScalarType kFloat = ScalarType::Float, kDouble = ScalarType::Double;
constexpr ScalarType kBf16 = ScalarType::BFloat16, kHalf = ScalarType::Half;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

enum class Layout {
  kContiguous,
  kPatches,  // all but the first patch of a larger tensor
  kApart,    // every other number of a larger tensor, from an odd address on
  kTransposed,
  kRepeated,  // one image for the whole batch
};
enum class Mask { kNone, kSome, kIncludesAll, kDropsAll };

struct Shape {
  int64_t batch, patches, features;  // without patches: 2-D
  ScalarType dtypes[2] = {kFloat, kFloat};
  Layout layouts[2] = {Layout::kContiguous, Layout::kContiguous};
  Mask mask = Mask::kNone;
  bool mask_apart = false;

  int64_t images() const { return std::max<int64_t>(patches, 1); }
  int64_t rows() const { return batch * images(); }
  bool repeated() const { return layouts[0] == Layout::kRepeated; }
};

struct Problem {
  const char* name;
  std::vector<Shape> levels;
  bool zero_rows = false;
};

// Which outputs have an upstream gradient: one bit for each.
enum Upstream { kOfLoss = 1, kOfUnweighted = 2, kOfLevels = 4 };

struct Variant {
  Normalization normalization;
  LossType type;
  Reduction reduction;
  int upstream;
  bool with_targets;
};

// Every choice of normalisation, penalty and reduction. Each comes with another choice of upstream
// gradients, which goes on from problem to problem.
std::vector<Variant> variants() {
  static int choice = 7;
  std::vector<Variant> all;
  for (const auto n : {Normalization::kL2, Normalization::kLayer, Normalization::kNone})
    for (const auto type : {LossType::kSmoothL1, LossType::kSquare, LossType::kHuber})
      for (const auto reduction : {Reduction::kMean, Reduction::kNone, Reduction::kSum})
        all.push_back({n, type, reduction, choice % 8, choice++ / 8 % 2 == 0});
  return all;
}

// A tensor (B, N, features) or (B, N) on guarded memory; N = 1 without patches.
class Strided {
 public:
  Strided(ScalarType dtype, const Shape& shape, int64_t features, Layout layout)
      : Strided(dtype, shape, place(shape.batch, shape.images(), features, layout)) {
    sizes_ = {shape.batch};
    if (shape.patches > 0) sizes_.push_back(shape.patches);
    if (dtype != ScalarType::Bool) sizes_.push_back(features);
    strides_ = {place_.batch};
    if (shape.patches > 0) strides_.push_back(place_.patch);
    if (dtype != ScalarType::Bool) strides_.push_back(place_.feature);
  }
  // Writes the value rounded to the dtype, and returns it.
  double set(int64_t row, int64_t feature, double value) const {
    const int64_t at = index(row) + feature * place_.feature;
    if (dtype_ != ScalarType::Bool) return memory_.set(at, 0, value);
    memory_.bytes()[at] = value != 0;
    return value;
  }
  Tensor tensor() const {
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    const int64_t bytes =
        dtype_ == ScalarType::Bool ? 1 : with_number(dtype_, [](auto x) { return sizeof x; });
    return torch::stable::from_blob(memory_.bytes() + place_.first * bytes, sizes_, strides_, cpu,
                                    dtype_);
  }

 private:
  struct Place {
    int64_t first, batch, patch, feature, last;
  };
  Strided(ScalarType dtype, const Shape& shape, Place place)
      : dtype_(dtype),
        images_(shape.images()),
        place_(place),
        memory_(dtype, {place.last + 1, 1}, {1, 1}) {}

  static Place place(int64_t batch, int64_t patches, int64_t features, Layout layout) {
    const int64_t image = patches * features;
    Place p{0, image, features, 1, 0};
    if (layout == Layout::kPatches) p = {features, image + features, features, 1, 0};
    if (layout == Layout::kApart) p = {1, 2 * image + 1, 2 * features, 2, 0};
    if (layout == Layout::kTransposed) p = {0, patches, 1, batch * patches, 0};
    if (layout == Layout::kRepeated) p.batch = 0;
    p.last = p.first + (batch - 1) * p.batch + (patches - 1) * p.patch + (features - 1) * p.feature;
    return p;
  }
  int64_t index(int64_t row) const {
    return place_.first + row / images_ * place_.batch + row % images_ * place_.patch;
  }

  ScalarType dtype_;
  int64_t images_;
  Place place_;
  Given memory_;
  std::vector<int64_t> sizes_, strides_;
};

constexpr double kEps = 1e-8, kWeights[] = {0.7, 1.6, 0.3};

// The tensors of a problem. Rows that a mask excludes are NaN, unless other rows share their
// memory.
struct Inputs {
  struct Level {
    Shape shape;
    Strided sides[2], mask;
    PredictionInput::Level numbers;

    explicit Level(const Shape& s)
        : shape(s),
          sides{Strided(s.dtypes[0], s, s.features, s.layouts[0]),
                Strided(s.dtypes[1], s, s.features, s.layouts[1])},
          mask(ScalarType::Bool, s, 1, s.mask_apart ? Layout::kApart : Layout::kContiguous) {}
  };
  Problem problem;
  ScalarType dtype;  // of sums
  int64_t elements = 0;
  std::deque<Level> levels;
  std::optional<Given> of_loss, of_unweighted, of_levels, of_each;
  double grad_loss, grad_unweighted;

  explicit Inputs(const Problem& p)
      : problem(p), dtype(p.levels[0].dtypes[0] == kDouble ? kDouble : kFloat) {
    Random random;
    for (const Shape& shape : p.levels) {
      fill(levels.emplace_back(shape), random);
      elements += shape.rows() * shape.features;
    }
    const int64_t count = static_cast<int64_t>(levels.size());
    of_loss.emplace(dtype, std::vector<int64_t>{1, 1}, std::vector<int64_t>{1, 1});
    of_unweighted.emplace(dtype, std::vector<int64_t>{1, 1}, std::vector<int64_t>{1, 1});
    of_levels.emplace(dtype, std::vector<int64_t>{count, 1}, std::vector<int64_t>{1, 1});
    of_each.emplace(dtype, std::vector<int64_t>{elements, 1}, std::vector<int64_t>{1, 1});
    grad_loss = of_loss->set(0, 0, random.uniform(0.5, 2));
    grad_unweighted = of_unweighted->set(0, 0, random.normal());
    int64_t first = 0;
    for (int64_t l = 0; l < count; ++l) {
      PredictionInput::Level& numbers = levels[l].numbers;
      numbers.of_level = of_levels->set(l, 0, random.normal());
      const int64_t given = static_cast<int64_t>(numbers.sides[0].size());
      for (int64_t k = 0; k < numbers.rows * numbers.features; ++k) {
        if (k < given) numbers.of_each.push_back(random.normal());
        const double value = of_each->set(first + k, 0, numbers.of_each[k % given]);
        if (k < given) numbers.of_each[k] = value;
      }
      first += numbers.rows * numbers.features;
    }
  }

  void fill(Level& level, Random& random) const {
    const Shape& s = level.shape;
    PredictionInput::Level& numbers = level.numbers;
    numbers.rows = s.rows(), numbers.features = s.features;
    numbers.weight = kWeights[levels.size() - 1];
    for (int64_t r = 0; r < s.rows() && s.mask != Mask::kNone; ++r) {
      const bool included = s.mask == Mask::kSome && random.chance(0.6);
      level.mask.set(r, 0, included);
      numbers.mask.push_back(included);
    }
    if (s.mask == Mask::kIncludesAll) numbers.mask.clear();
    const double root = std::sqrt(static_cast<double>(s.features));
    std::vector<double> raw[2];
    for (int64_t r = 0; r < (s.repeated() ? s.images() : s.rows()); ++r) {
      raw[0].clear();
      for (int side = 0; side < 2; ++side) {  // targets resemble predictions
        raw[1].clear();
        double square = 0;
        for (int64_t d = 0; d < s.features; ++d) {
          raw[1].push_back(random.normal() + (side == 0 ? 0.3 : 2 * raw[0][d]));
          square += raw[1][d] * raw[1][d];
        }
        double length = random.uniform(0.3, 3) * root / std::sqrt(square);
        if (problem.zero_rows && r % 4 == side) length = r % 8 < 4 ? 0 : 1e-12;
        if (!s.repeated() && !numbers.includes(r)) length = kNaN;
        for (int64_t d = 0; d < s.features; ++d)
          numbers.sides[side].push_back(set(level.sides[side], r, d, length * raw[1][d]));
        raw[0].swap(raw[1]);
      }
    }
  }

  // Writes a value, and returns it as the operator reads it.
  double set(const Strided& to, int64_t row, int64_t feature, double value) const {
    const double rounded = to.set(row, feature, value);
    return dtype == kFloat ? static_cast<float>(rounded) : rounded;
  }

  double threshold(const Variant& v) const {
    if (v.normalization != Normalization::kL2) return 0.7;
    return 0.7 / std::sqrt(static_cast<double>(problem.levels[0].features));
  }

  PredictionLossOptions options(const Variant& v) const {
    const double t = threshold(v);
    PredictionLossOptions o{.predictions = {},
                            .targets = {},
                            .masks = {},
                            .weights = {},
                            .normalization = v.normalization,
                            .penalty = {.square = true, .slope = 0, .limit = 0, .half_width = 0},
                            .eps = kEps,
                            .reduction = v.reduction};
    if (v.type == LossType::kSmoothL1)
      o.penalty = {.square = false, .slope = 1 / t, .limit = 1, .half_width = t / 2};
    if (v.type == LossType::kHuber)
      o.penalty = {.square = false, .slope = 1, .limit = t, .half_width = 0.5};
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    const bool masked = std::any_of(levels.begin(), levels.end(),
                                    [](const Level& l) { return l.shape.mask != Mask::kNone; });
    for (const Level& level : levels) {
      o.predictions.push_back(level.sides[0].tensor());
      o.targets.push_back(level.sides[1].tensor());
      o.weights.push_back(level.numbers.weight);
      if (!masked) continue;
      const bool includes_all = level.numbers.mask.empty();
      o.masks.push_back(includes_all ? torch::stable::from_blob(level.sides[0].tensor().data_ptr(),
                                                                {0}, {1}, cpu, ScalarType::Bool)
                                     : level.mask.tensor());
    }
    return o;
  }

  PredictionLossUpstream upstream(const Variant& v) const {
    PredictionLossUpstream u;
    if (v.upstream & kOfLoss) u.loss = of_loss->tensor();
    if (v.upstream & kOfUnweighted) u.unweighted = of_unweighted->tensor();
    if (v.upstream & kOfLevels)
      u.levels = (v.reduction == Reduction::kNone ? of_each : of_levels)->tensor();
    return u;
  }

  PredictionInput loop_input(const Variant& v) const {
    PredictionInput in{{},
                       v.type,
                       threshold(v),
                       kEps,
                       v.normalization,
                       v.reduction != Reduction::kSum,
                       v.upstream & kOfLoss ? grad_loss : 0,
                       v.upstream & kOfUnweighted ? grad_unweighted : 0};
    const bool none = v.reduction == Reduction::kNone;
    for (const Level& level : levels) {
      in.levels.push_back(level.numbers);
      if (!(v.upstream & kOfLevels) || none) in.levels.back().of_level = 0;
      if (!(v.upstream & kOfLevels) || !none) in.levels.back().of_each.clear();
    }
    return in;
  }
};

// Loss, its unweighted mean, levels or errors, statistics and scales, then the gradients of all
// predictions and, if wanted, of all targets.
enum Result { kLoss, kUnweighted, kLevels, kStatistics, kScales, kGradients };

template <typename T>
Results run(const Inputs& in, const Variant& v) {
  const PredictionLossOptions options = in.options(v);
  const auto [loss, unweighted, levels, statistics, scales] = prediction_loss_forward<T>(options);
  const PredictionLossSaved saved{.statistics = statistics, .scales = scales};
  const auto [of_predictions, of_targets] =
      prediction_loss_backward<T>(options, in.upstream(v), saved, v.with_targets);
  CHECK(of_targets.size() == (v.with_targets ? of_predictions.size() : 0),
        "%s: %zu gradients of targets", in.problem.name, of_targets.size());
  Results results;
  for (const Tensor& t : {loss, unweighted, levels, statistics, scales})
    results.push_back(numbers_of(t));
  for (const auto* gradients : {&of_predictions, &of_targets}) {
    for (size_t l = 0; l < gradients->size(); ++l) {
      const Tensor& t = (*gradients)[l];
      const Shape& shape = in.levels[l].shape;
      CHECK(t.scalar_type() == shape.dtypes[gradients == &of_targets] && t.is_contiguous() &&
                t.dim() == (shape.patches > 0 ? 3 : 2) && t.size(0) == shape.batch &&
                t.size(t.dim() - 1) == shape.features,
            "%s: dtype and shape of gradient %zu", in.problem.name, l);
      results.push_back(numbers_of(t));
    }
  }
  return results;
}

// `actual` holds as many numbers for each row of a level as `expected` holds for each given row.
// Those of an excluded row are 0. `narrow` is the roundoff of the dtype, if that is not T, and
// `least` is half of its smallest number. Checks only the number whose error is the largest share
// of its bound.
void check_rows(const std::string& what, const double* actual, const PredictionInput::Level& level,
                const std::vector<Bounded>& expected, double narrow = 0, double least = 0) {
  const int64_t width = static_cast<int64_t>(expected.size()) / level.given();
  int64_t worst = 0;
  Bounded of_worst;
  double largest = -1;
  for (int64_t r = 0; r < level.rows && largest < 2; ++r) {
    const bool included = level.includes(r);
    const Bounded* const row = expected.data() + r % level.given() * width;
    for (int64_t k = 0; k < width; ++k) {
      Bounded e;
      if (included) e = row[k];
      if (included && narrow > 0) e.bound += narrow * (std::fabs(e.value) + e.bound) + least;
      const double error = std::fabs(actual[r * width + k] - e.value);
      const double share = error == 0 ? 0 : error / e.bound;
      if (share <= largest) continue;
      worst = r * width + k, of_worst = e;
      largest = std::isnan(share) ? std::numeric_limits<double>::infinity() : share;
    }
  }
  CHECK_NEAR(actual[worst], of_worst.value, of_worst.bound, "%s, row %ld, %ld", what.c_str(),
             worst / width, worst % width);
}

template <typename T>
void check_results(const std::string& name, const Inputs& in, const Variant& v,
                   const Results& actual) {
  const PredictionInput input = in.loop_input(v);
  const PredictionOutput expected = prediction_loss_loop<T>(input);
  const auto check = [&](Result result, size_t index, const Bounded& e, const char* what) {
    CHECK_NEAR(actual[result][index], e.value, e.bound, "%s: %s %zu", name.c_str(), what, index);
  };
  check(kLoss, 0, expected.loss, "loss");
  check(kUnweighted, 0, expected.unweighted, "unweighted loss");
  const size_t count = in.levels.size();
  int64_t row = 0, element = 0;
  for (size_t l = 0; l < count; ++l) {
    const PredictionInput::Level& level = input.levels[l];
    const PredictionOutput::Level& e = expected.levels[l];
    const std::string of_level = name + ", level " + std::to_string(l);
    check(kScales, l, e.scale, "scale");
    if (v.reduction == Reduction::kNone) {
      check_rows(of_level + ": errors", actual[kLevels].data() + element, level, e.errors);
    } else {
      check(kLevels, l, e.loss, "loss of level");
    }
    check_rows(of_level + ": statistics", actual[kStatistics].data() + 2 * row, level,
               e.statistics);
    for (int side = 0; side < (v.with_targets ? 2 : 1); ++side) {
      const ScalarType dtype = in.levels[l].shape.dtypes[side];
      check_rows(of_level + (side == 0 ? ": gradient" : ": gradient of the target"),
                 actual[kGradients + side * count + l].data(), level, e.gradients[side],
                 dtype == in.dtype ? 0 : roundoff_of(dtype), dtype == kHalf ? 3e-8 : 0);
    }
    row += level.rows;
    element += level.rows * level.features;
  }
}

std::string name_of(const Problem& p, const Variant& v) {
  const char *kNormalizations[] = {"none", "L2", "LayerNorm"}, *kTypes[] = {"mse", "sl1", "huber"},
             *kReductions[] = {"mean", "sum", "none"};
  return std::string(p.name) + ", " + kNormalizations[static_cast<int>(v.normalization)] + ", " +
         kTypes[static_cast<int>(v.type)] + ", " + kReductions[static_cast<int>(v.reduction)] +
         ", upstream " + std::to_string(v.upstream);
}

void check_variants(const Problem& problem, const std::vector<Variant>& all,
                    const std::vector<uint32_t>& thread_counts, int callers) {
  const Inputs inputs(problem);
  for (const Variant& v : all) {
    const auto check = [&](auto number) {
      using T = decltype(number);
      const std::string name = name_of(problem, v);
      const Results results =
          run_on_threads(name, thread_counts, callers, [&] { return run<T>(inputs, v); });
      check_results<T>(name, inputs, v, results);
    };
    inputs.dtype == kDouble ? check(double()) : check(float());
  }
}

// Problems that are too small for several threads.
void check_small(const Problem& problem) { check_variants(problem, variants(), {2}, 2); }

CJEPA_TEST(fp32) {
  for (const int64_t features : {1, 2, 3, 4, 7, 16, 33, 64, 129})
    check_small({.name = "fp32", .levels = {{3, 5, features}}});
  check_small({.name = "one number", .levels = {{1, 1, 1}}});
  check_small({.name = "2-D", .levels = {{17, 0, 24}}});
  check_small({.name = "one row", .levels = {{1, 0, 1000}}});
}

CJEPA_TEST(fp64) {
  for (const int64_t features : {1, 2, 5, 8, 17, 32, 99})
    check_small({.name = "fp64", .levels = {{2, 7, features, {kDouble, kDouble}}}});
  check_small({.name = "fp64, 2-D", .levels = {{9, 0, 40, {kDouble, kDouble}}}});
}

void check_narrow(ScalarType dtype) {
  for (const int64_t features : {1, 6, 32, 65})
    check_small({.name = "narrow", .levels = {{4, 3, features, {dtype, dtype}}}});
}

CJEPA_TEST(bf16) { check_narrow(kBf16); }
CJEPA_TEST(fp16) { check_narrow(kHalf); }

CJEPA_TEST(mixed_dtypes) {
  for (const ScalarType prediction : {kFloat, kBf16, kHalf, kDouble}) {
    for (const ScalarType target : {kFloat, kBf16, kHalf, kDouble}) {
      if (prediction == target) continue;
      check_small({.name = "mixed", .levels = {{3, 4, 21, {prediction, target}}}});
    }
  }
}

CJEPA_TEST(levels) {
  check_small({.name = "two levels", .levels = {{2, 9, 16}, {5, 0, 7}}});
  check_small({.name = "three levels",
               .levels = {{3, 4, 8, {kBf16, kFloat}}, {2, 1, 33}, {7, 0, 1, {kFloat, kHalf}}}});
  check_small({.name = "three levels of fp64",
               .levels = {{4, 0, 5, {kDouble, kDouble}},
                          {1, 6, 12, {kDouble, kFloat}},
                          {2, 3, 4, {kDouble, kBf16}}}});
}

CJEPA_TEST(strides) {
  constexpr Layout kPatches = Layout::kPatches, kApart = Layout::kApart;
  constexpr Layout kTransposed = Layout::kTransposed, kContiguous = Layout::kContiguous;
  const Layout layouts[][2] = {{kPatches, kContiguous},    {kContiguous, kPatches},
                               {kApart, kPatches},         {kPatches, kApart},
                               {kTransposed, kTransposed}, {Layout::kRepeated, Layout::kRepeated}};
  for (const auto& [p, t] : layouts) {
    check_small({.name = "strides", .levels = {{3, 5, 19, {kFloat, kFloat}, {p, t}}}});
    check_small({.name = "strides, narrow", .levels = {{3, 5, 19, {kBf16, kHalf}, {p, t}}}});
    check_small({.name = "strides, fp64", .levels = {{3, 5, 19, {kDouble, kDouble}, {p, t}}}});
    if (p == Layout::kRepeated) continue;
    check_small(
        {.name = "strides, 2-D",
         .levels = {{6, 0, 12, {kFloat, kBf16}, {p, t}}, {4, 3, 16, {kHalf, kFloat}, {t, p}}}});
  }
}

CJEPA_TEST(masks) {
  constexpr Layout kPatches = Layout::kPatches, kContiguous = Layout::kContiguous;
  for (const bool apart : {false, true}) {
    check_small({.name = "mask", .levels = {{4, 9, 13, {kFloat, kFloat}, {}, Mask::kSome, apart}}});
    check_small(
        {.name = "mask, 2-D", .levels = {{23, 0, 8, {kDouble, kDouble}, {}, Mask::kSome, apart}}});
    check_small(
        {.name = "masks",
         .levels = {{4, 9, 13, {kBf16, kFloat}, {kPatches, kContiguous}, Mask::kSome, apart},
                    {12, 0, 16, {kFloat, kFloat}, {}, Mask::kIncludesAll},
                    {2, 7, 5, {kFloat, kHalf}, {kContiguous, kPatches}, Mask::kSome, !apart}}});
    check_small({.name = "all dropped",
                 .levels = {{3, 4, 9, {kFloat, kBf16}, {}, Mask::kDropsAll, apart}}});
    check_small({.name = "a level dropped",
                 .levels = {{3, 4, 9, {kFloat, kFloat}, {}, Mask::kDropsAll, apart},
                            {5, 0, 16, {kFloat, kFloat}, {}, Mask::kSome}}});
  }
}

CJEPA_TEST(rows_of_zero_norm) {
  for (const int64_t features : {1, 16, 27}) {
    for (const ScalarType dtype : {kFloat, kDouble, kBf16, kHalf})
      check_small(
          {.name = "zero rows", .levels = {{4, 6, features, {dtype, dtype}}}, .zero_rows = true});
  }
  check_small({.name = "zero rows, mask",
               .levels = {{4, 6, 20, {kFloat, kFloat}, {}, Mask::kSome}, {16, 0, 20}},
               .zero_rows = true});
}

// Every normalisation and penalty once.
std::vector<Variant> some(Reduction reduction) {
  std::vector<Variant> all;
  for (const auto n : {Normalization::kL2, Normalization::kLayer, Normalization::kNone})
    for (const auto type : {LossType::kSmoothL1, LossType::kSquare})
      all.push_back({n, type, reduction, kOfLoss | kOfLevels, type == LossType::kSquare});
  return all;
}

// A block is one row or as many rows as have 32768 numbers. A thread of the forward takes at least
// 125000 numbers.
CJEPA_TEST(blocks_on_threads) {
  const std::vector<uint32_t> counts{1, 2, 3, 4};
  check_variants({.name = "rows of several blocks", .levels = {{1, 3, 40001}, {2, 0, 32768}}},
                 some(Reduction::kSum), {1, 2}, 2);
  check_variants({.name = "rows of one number", .levels = {{1, 40003, 1}, {70001, 0, 2}}},
                 some(Reduction::kMean), {1, 2}, 1);
  check_variants({.name = "blocks",
                  .levels = {{3, 411, 96, {kFloat, kFloat}, {}, Mask::kSome},
                             {2, 1031, 131, {kBf16, kFloat}, {}, Mask::kSome, true},
                             {57, 0, 777}}},
                 some(Reduction::kMean), counts, 2);
  check_variants({.name = "blocks of fp64",
                  .levels = {{3, 1501, 29, {kDouble, kHalf}}, {701, 0, 400, {kDouble, kDouble}}}},
                 some(Reduction::kNone), {1, 4}, 1);
}

// From 16 MiB of numbers T on, gradients of dtype T are written around the caches if their row is
// aligned. Here this is so for all rows, for one row in 16, and for no row of a narrower dtype.
CJEPA_TEST(past_the_caches) {
  constexpr Layout kRepeated[2] = {Layout::kRepeated, Layout::kRepeated};
  const std::vector<Variant> l2{
      {Normalization::kL2, LossType::kSmoothL1, Reduction::kMean, kOfLoss, true}};
  const std::vector<Variant> others{
      {Normalization::kLayer, LossType::kSquare, Reduction::kNone, kOfLevels, true},
      {Normalization::kNone, LossType::kHuber, Reduction::kSum, kOfLoss, false}};
  const auto shape = [&](int64_t batch, int64_t features, ScalarType p, ScalarType t, Mask mask) {
    return Shape{batch, 37, features, {p, t}, {kRepeated[0], kRepeated[1]}, mask};
  };
  check_variants({.name = "past the caches",
                  .levels = {shape(500, 128, kFloat, kFloat, Mask::kSome),
                             shape(500, 51, kFloat, kFloat, Mask::kIncludesAll),
                             shape(700, 40, kBf16, kFloat, Mask::kSome)},
                  .zero_rows = true},
                 l2, {1, 3}, 1);
  check_variants({.name = "past the caches, fp64",
                  .levels = {shape(800, 64, kDouble, kDouble, Mask::kNone),
                             shape(200, 33, kDouble, kDouble, Mask::kNone)}},
                 others, {1, 2}, 1);
}

// A NaN in row 7 of one side reaches the losses, the errors of that row and the other side's
// gradient there. All other rows stay as they were.
template <typename T>
void check_not_a_number(const Inputs& inputs, const Variant& v, int side) {
  constexpr int64_t kRow = 7, kLast = 36, kWidth = kLast + 1;
  const std::string name = name_of(inputs.problem, v) + (side == 0 ? ", prediction" : ", target");
  const Inputs::Level& level = inputs.levels[0];
  const Results before = run<T>(inputs, v);
  level.sides[side].set(kRow, kLast, kNaN);
  const Results after = run<T>(inputs, v);
  level.sides[side].set(kRow, kLast, level.numbers.sides[side][kRow * kWidth + kLast]);
  CHECK(std::isnan(after[kLoss][0]) && std::isnan(after[kUnweighted][0]), "%s: losses",
        name.c_str());
  const bool none = v.reduction == Reduction::kNone;
  for (size_t result = kLevels; result < after.size(); ++result) {
    if (result == kStatistics) continue;
    const bool of_rows =
        result == kLevels ? none : result == kGradients || result == kGradients + 2;
    const bool of_levels = result == kLevels && !none;
    const int64_t begin = of_rows ? kRow * kWidth : 0, end = of_rows ? begin + kWidth : of_levels;
    int64_t others = 0;
    for (int64_t k = 0; k < static_cast<int64_t>(after[result].size()); ++k)
      others += (k < begin || k >= end) && after[result][k] != before[result][k];
    CHECK(others == 0, "%s: result %zu, %ld numbers", name.c_str(), result, others);
  }
  CHECK(std::isnan(after[kLevels][none ? kRow * kWidth + kLast : 0]), "%s: error", name.c_str());
  CHECK(std::isnan(after[kGradients + 2 * (1 - side)][kRow * kWidth + kLast]),
        "%s: gradient of the other side", name.c_str());
}

CJEPA_TEST(not_a_number) {
  use_threads(2);
  for (const ScalarType dtype : {kFloat, kDouble, kBf16, kHalf}) {
    const ScalarType other = dtype == kDouble ? kDouble : kFloat;
    const Inputs inputs(
        {.name = "NaN", .levels = {{3, 4, 37, {dtype, dtype}}, {4, 0, 9, {other, other}}}});
    for (Variant v : variants()) {
      v.upstream = kOfLoss | kOfLevels, v.with_targets = true;
      for (const int side : {0, 1})
        dtype == kDouble ? check_not_a_number<double>(inputs, v, side)
                         : check_not_a_number<float>(inputs, v, side);
    }
  }
}

}  // namespace
}  // namespace cjepa::test
