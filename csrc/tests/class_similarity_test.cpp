// The forward of class_similarity against a loop over pairs, on several numbers of threads.
#include "../cpu/class_similarity.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "tensors.h"

namespace cjepa::test {
namespace {

struct Sizes {
  int64_t batch, features, views, classes;
};

// Rows with random classes, as tensors and as the unit rows that the kernel multiplies.
struct Inputs {
  Given views[2];
  std::vector<int64_t> classes;  // (batch)
  std::vector<Exact> unit;       // (rows, features)
  Sizes sizes;
  ScalarType dtype;

  Inputs(const Sizes& s, ScalarType dtype_)
      : views{Given(dtype_, {s.batch, s.features}, {1, s.batch}),
              Given(dtype_, {s.batch, s.features}, {s.features, 1})},
        sizes(s),
        dtype(dtype_) {
    Random random;
    for (int64_t k = 0; k < s.batch; ++k)
      classes.push_back(static_cast<int64_t>(random.uniform(0, 1) * s.classes) * -1000003);
    for (int64_t a = 0; a < s.views * s.batch; ++a) {
      Exact square = 0;
      std::vector<double> row(s.features);
      for (int64_t d = 0; d < s.features; ++d) {
        row[d] = views[a / s.batch].set(a % s.batch, d, random.normal());
        square += Exact{row[d]} * row[d];
      }
      for (const double x : row) unit.push_back(x / std::sqrt(square));
    }
  }

  Results run() const {
    Tensor of = torch::stable::new_empty(views[0].tensor(), {sizes.batch}, ScalarType::Long);
    std::copy(classes.begin(), classes.end(), data_of<int64_t>(of));
    ClassSimilarityOptions options{.z_i = views[0].tensor(),
                                   .z_j = {},
                                   .classes = of,
                                   .use_cosine_similarity = true,
                                   .eps = 1e-8,
                                   .rounded = dtype};
    if (sizes.views == 2) options.z_j = views[1].tensor();
    const ClassSimilarityForward out = class_similarity_forward(options);
    return {numbers_of(out.within), numbers_of(out.across)};
  }

  void check(const Results& actual) const {
    const int64_t rows = sizes.views * sizes.batch, D = sizes.features;
    const double bound = 4 * (static_cast<double>(D) / 2 + 3) * roundoff_of(dtype);
    Exact across = 0, pairs = 0;
    for (int64_t a = 0; a < rows; ++a) {
      Exact within = 0, others = 0;
      for (int64_t b = 0; b < rows; ++b) {
        Exact s = 0;
        for (int64_t d = 0; d < D; ++d) s += unit[a * D + d] * unit[b * D + d];
        const bool same = classes[a % sizes.batch] == classes[b % sizes.batch];
        if (same && a != b) within += s, others += 1;
        if (!same) across += s, pairs += 1;
      }
      CHECK_NEAR(actual[0][a], others == 0 ? 0 : within / others, bound, "within of row %ld", a);
    }
    if (pairs == 0) {
      CHECK(std::isnan(actual[1][0]), "one class");
    } else {
      CHECK_NEAR(actual[1][0], across / pairs, bound, "across");
    }
  }
};

// The rows are cut into segments of at least 64 rows, and into at most 64.
CJEPA_TEST(class_similarity) {
  for (const Sizes& sizes :
       {Sizes{1, 3, 1, 1}, Sizes{1, 3, 2, 1}, Sizes{200, 9, 1, 1}, Sizes{130, 5, 2, 4},
        Sizes{333, 3, 1, 1000}, Sizes{300, 17, 1, 3}, Sizes{1100, 2, 1, 40}}) {
    for (const ScalarType dtype : {ScalarType::Float, ScalarType::Double}) {
      const Inputs inputs(sizes, dtype);
      inputs.check(run_on_threads("class_similarity", {1, 2, 3}, 2, [&] { return inputs.run(); }));
    }
  }
}

}  // namespace
}  // namespace cjepa::test
