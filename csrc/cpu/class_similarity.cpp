// Mean similarities within and across classes. No similarity is computed on its own. With C_k the
// sum of the n_k rows of class k, T the sum of all rows and k the class of row a,
//
//   within_a = z_a . (C_k - z_a) / (n_k - 1)
//   across   = (T . T - sum_k C_k . C_k) / (M^2 - sum_k n_k^2)
//
// Sums are in fp64, because both differences cancel: that of T where one class has most rows. The
// rows are sorted by class and cut into segments, whose number does not depend on the threads. A
// segment finishes the classes that lie inside it. Of a class that reaches beyond it, it leaves the
// sum of its part, and a second pass over the segments finishes such classes.
#include "class_similarity.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "constants.h"
#include "memory.h"
#include "packing.h"
#include "row_order.h"
#include "selected_core.h"
#include "tensors.h"

namespace cjepa {
namespace {

constexpr int64_t kMostSegments = 64;
constexpr int64_t kSegmentRows = 64;  // a segment has at least so many, if there are

template <typename T>
class ClassSums {
 public:
  explicit ClassSums(const ClassSimilarityOptions& o)
      : views_{View(o.z_i), View(o.z_j.has_value() ? *o.z_j : o.z_i)},
        order_(o.z_i.size(0), o.z_j.has_value() ? 2 : 1, o.classes),
        rows_(order_.rows()),
        features_(o.z_i.size(1)),
        rounding_{
            .cosine = o.use_cosine_similarity, .eps = static_cast<T>(o.eps), .dtype = o.rounded},
        segments_(std::clamp<int64_t>(rows_ / kSegmentRows, 1, kMostSegments)),
        totals_(segments_ * features_),
        parts_(2 * segments_ * features_),
        squares_(segments_),
        within_(new_tensor(o.z_i, {rows_}, dtype_of<T>())) {
    begins_.resize(rows_);
    for (int64_t a = 0; a < rows_; ++a) {
      const bool same = a > 0 && order_.class_ends[a - 1] == order_.class_ends[a];
      begins_[a] = same ? begins_[a - 1] : a;
    }
  }

  ClassSimilarityForward run() {
    over_segments([&](int64_t s, Rows& rows) { sum_segment(s, rows); });
    double squares = 0, pairs = static_cast<double>(rows_) * static_cast<double>(rows_);
    for (int64_t s = 0; s < segments_; ++s) squares += squares_[s];
    for (int64_t a = 0; a < rows_; a = order_.class_ends[a]) {
      const double size = static_cast<double>(order_.class_ends[a] - a);
      pairs -= size * size;
    }
    squares += join_parts();
    over_segments([&](int64_t s, Rows& rows) { finish_segment(s, rows); });
    std::vector<double> total(features_);
    for (int64_t s = 0; s < segments_; ++s) add(totals_.data() + s * features_, total.data());
    const double across = (dot(total.data(), total.data()) - squares) / pairs;
    return {.within = order_.template to_caller<T>(within_),
            .across = scalar<T>(within_, pairs > 0 ? across : kNaN)};
  }

 private:
  static constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

  // Room of one thread.
  struct Rows {
    Buffer<T> raw, row;
    std::vector<double> sum;
    explicit Rows(int64_t features) : raw(features), row(features), sum(features) {}
  };

  template <typename Run>
  void over_segments(const Run& run) {
    const double work = 20.0 * static_cast<double>(rows_) * static_cast<double>(features_);
    parallel_tasks(segments_, work, [&](const auto& take) {
      Rows rows(features_);
      for (int64_t s; (s = take()) < segments_;) run(s, rows);
    });
  }

  int64_t first_of(int64_t segment) const { return rows_ * segment / segments_; }

  // Row `a` as an operand. One with a number that is not finite becomes NaN.
  const T* operand(int64_t a, Rows& rows) const {
    const Source source{views_, order_.views, order_.order()};
    T* row = rows.row.get();
    rounding_.apply(tile_core<T, T>(), source.row(a, rows.raw.get()), features_, row, row);
    const bool finite = std::all_of(row, row + features_, [](T x) { return std::isfinite(x); });
    if (!finite) std::fill(row, row + features_, static_cast<T>(kNaN));
    return row;
  }

  void add(const double* x, double* sum) const {
    for (int64_t d = 0; d < features_; ++d) sum[d] += x[d];
  }
  double dot(const double* x, const double* y) const {
    double sum = 0;
    for (int64_t d = 0; d < features_; ++d) sum += x[d] * y[d];
    return sum;
  }

  // The part of a class that reaches beyond the segment: 0 if the class begins before it, else 1.
  double* part(int64_t segment, int64_t which) {
    return parts_.data() + (2 * segment + which) * features_;
  }

  void sum_segment(int64_t s, Rows& rows) {
    const int64_t begin = first_of(s), end = first_of(s + 1);
    double* total = totals_.data() + s * features_;
    for (int64_t a = begin; a < end;) {
      const int64_t class_begin = begins_[a], class_end = order_.class_ends[a];
      const int64_t last = std::min(class_end, end);
      std::fill(rows.sum.begin(), rows.sum.end(), 0.0);
      for (int64_t b = a; b < last; ++b) {
        const T* row = operand(b, rows);
        for (int64_t d = 0; d < features_; ++d) rows.sum[d] += row[d];
      }
      add(rows.sum.data(), total);
      if (class_begin >= begin && class_end <= end) {
        squares_[s] += dot(rows.sum.data(), rows.sum.data());
        finish(a, last, rows.sum.data(), rows);
      } else {
        std::copy(rows.sum.begin(), rows.sum.end(), part(s, class_begin < begin ? 0 : 1));
      }
      a = last;
    }
  }

  // Adds up the parts of each class that reaches beyond a segment, in place of all of them. Returns
  // the sum of the squares of these classes.
  double join_parts() {
    double squares = 0;
    for (int64_t s = 0; s + 1 < segments_; ++s) {
      const int64_t end = first_of(s + 1), class_end = order_.class_ends[end - 1];
      const bool begins_here = begins_[end - 1] >= first_of(s);
      if (class_end <= end || !begins_here) continue;
      double* sum = part(s, 1);
      int64_t last = s + 1;
      for (; last < segments_ && first_of(last) < class_end; ++last) add(part(last, 0), sum);
      for (int64_t k = s + 1; k < last; ++k) std::copy(sum, sum + features_, part(k, 0));
      squares += dot(sum, sum);
    }
    return squares;
  }

  void finish_segment(int64_t s, Rows& rows) {
    const int64_t begin = first_of(s), end = first_of(s + 1);
    if (begin == end) return;
    if (begins_[begin] < begin)
      finish(begin, std::min(order_.class_ends[begin], end), part(s, 0), rows);
    if (begins_[end - 1] >= begin && order_.class_ends[end - 1] > end)
      finish(begins_[end - 1], end, part(s, 1), rows);
  }

  // The means of rows [begin, end), of which all are of the class with this sum.
  void finish(int64_t begin, int64_t end, const double* sum, Rows& rows) {
    T* within = data_of<T>(within_);
    for (int64_t a = begin; a < end; ++a) {
      const int64_t others = order_.class_ends[a] - begins_[a] - 1;
      const T* row = operand(a, rows);
      double product = 0;
      for (int64_t d = 0; d < features_; ++d) product += (sum[d] - row[d]) * row[d];
      within[a] = static_cast<T>(others == 0 ? 0 : product / static_cast<double>(others));
    }
  }

  View views_[2];
  RowOrder order_;
  int64_t rows_, features_;
  Rounding<T> rounding_;
  int64_t segments_;
  std::vector<int64_t> begins_;  // of each row, the first one of its class
  std::vector<double> totals_;   // (segments, features) sums of all rows
  std::vector<double> parts_;    // (segments, 2, features), see part()
  std::vector<double> squares_;  // (segments) of the classes that were finished there
  Tensor within_;
};

auto call_forward(Tensor z_i, std::optional<Tensor> z_j, Tensor classes, bool use_cosine_similarity,
                  double eps, std::optional<ScalarType> product_dtype, bool tf32) {
  check_inputs(z_i, z_j.has_value() ? *z_j : z_i, {}, product_dtype);
  check(!z_j.has_value() || z_j->size(0) == z_i.size(0),
        "z_i and z_j must have the same number of rows");
  check(classes.scalar_type() == ScalarType::Long && classes.dim() == 1 &&
            classes.size(0) == z_i.size(0) && classes.is_contiguous() && classes.is_cpu(),
        "classes must be a contiguous (B,) tensor of int64");
  check(!tf32, "tf32 must be False: a CPU does not round to it");
  const ClassSimilarityOptions options{.z_i = z_i,
                                       .z_j = z_j,
                                       .classes = classes,
                                       .use_cosine_similarity = use_cosine_similarity,
                                       .eps = eps,
                                       .rounded = product_dtype.value_or(z_i.scalar_type())};
  const ClassSimilarityForward out = class_similarity_forward(options);
  return std::tuple(out.within, out.across);
}

}  // namespace

ClassSimilarityForward class_similarity_forward(const ClassSimilarityOptions& options) {
  if (options.z_i.scalar_type() == ScalarType::Double) return ClassSums<double>(options).run();
  return ClassSums<float>(options).run();
}

void implement_class_similarity(torch::stable::detail::StableLibrary& library) {
  library.impl("class_similarity", TORCH_BOX(&call_forward));
}

}  // namespace cjepa
