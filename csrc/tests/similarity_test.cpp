// Tiles of S = X Y^T with their sums and maxima, against a plain loop.
#include <algorithm>
#include <optional>

#include "../cpu/constants.h"
#include "operands.h"

namespace cjepa::test {
namespace {

constexpr int64_t kBlock = kSmallBlock;
constexpr Exact kInfinity = std::numeric_limits<Exact>::infinity();

// Where a tile lies in S.
struct Place {
  const char* name;
  int64_t rows, columns;  // of S
  bool self;
  int64_t row, first_column, column;  // the block begins at first_column, the tile at column
};

// Similarities of a tile, computed from the kernel's operands, and bounds for their errors.
template <typename T>
struct Expected {
  Matrix<Exact> s, error;
};

template <typename T>
Expected<T> expect(const Matrix<T>& x, const Matrix<T>& y, const Place& p, int64_t height,
                   int64_t width) {
  Expected<T> e{Matrix<Exact>(height, width), Matrix<Exact>(height, width)};
  for (int64_t i = 0; i < std::min(height, p.rows - p.row); ++i) {
    for (int64_t j = 0; j < std::min(width, p.columns - p.column); ++j) {
      Exact sum = 0, magnitude = 0;
      for (int64_t k = 0; k < x.columns; ++k) {
        const Exact term = Exact{x[p.row + i][k]} * y[p.column + j][k];
        sum += term;
        magnitude += std::fabs(term);
      }
      e.s[i][j] = sum;
      e.error[i][j] = (x.columns + 1) * kRoundoff<T> * magnitude;  // a sum of D products
    }
  }
  return e;
}

struct Mode {
  bool constant_shift, masked, sums, stored, past_caches, priors;
  double tau;
};

template <typename T, typename P>
class TileCheck {
 public:
  TileCheck(const TileCore<T, P>& core, const char* kind, const Place& place,
            const Operands<T, P>& x, const Operands<T, P>& y, const Expected<T>& expected,
            const Mode& mode, Random& random)
      : core_(core),
        place_(place),
        mode_(mode),
        expected_(expected),
        height_(expected.s.rows),
        width_(expected.s.columns),
        exponent_(make_exponent<T>(mode.tau, mode.constant_shift)),
        stride_(kBlock + (mode.past_caches ? 0 : 1)),
        out_(kBlock * stride_),
        row_sum_(height_),
        row_max_(height_),
        column_sum_(width_),
        column_max_(width_),
        positive_(height_),
        scratch_(core.scratch_size(height_)),
        row_sum_before_(height_),
        row_max_before_(height_),
        column_sum_before_(width_),
        column_max_before_(width_) {
    name_ = std::string(kind) + ", " + place.name + ", D = " + std::to_string(x.depth) +
            (mode.masked ? ", mask" : "") + (mode.sums ? "" : ", no sums") +
            (mode.constant_shift ? "" : ", running maxima") + (mode.stored ? "" : ", not stored") +
            (mode.past_caches ? ", past caches" : "") + (mode.priors ? ", priors" : "");
    if (mode.masked) make_mask(random);
    set_priors(random, row_sum_, row_max_, row_sum_before_, row_max_before_);
    set_priors(random, column_sum_, column_max_, column_sum_before_, column_max_before_);
    run(x, y);
    check_stored();
    if (mode.sums) {
      check_sums();
      check_positives();
    }
  }

 private:
  void make_mask(Random& random) {
    const int64_t batch = place_.rows / 2, stride = mask_stride();
    mask_.emplace(batch * stride);
    std::fill(mask_->get(), mask_->get() + batch * stride, uint8_t{0});
    for (int64_t k = 0; k < batch; ++k) {
      for (int64_t l = 0; l <= k; ++l) {
        const bool all = k == batch / 2 || l == batch / 2;  // every negative of one sample
        if (!all && !random.chance(0.2)) continue;
        (*mask_)[k * stride + l / 8] |= 1 << l % 8;
        (*mask_)[l * stride + k / 8] |= 1 << k % 8;
      }
    }
  }

  void set_priors(Random& random, const Guarded<T>& sum, const Guarded<T>& maximum,
                  std::vector<T>& sum_before, std::vector<T>& maximum_before) {
    for (int64_t i = 0; i < sum.size(); ++i) {
      const bool fresh = !mode_.priors || random.chance(0.3);
      sum[i] = sum_before[i] = fresh ? T{0} : static_cast<T>(random.uniform(0, 5));
      maximum[i] = maximum_before[i] =
          fresh ? -std::numeric_limits<T>::infinity() : static_cast<T>(random.uniform(-1, 1));
    }
  }

  void run(const Operands<T, P>& x, const Operands<T, P>& y) {
    SimilarityTile<T, P> t{};
    const int64_t begin = place_.column - place_.first_column;
    t.rows = x.slices.get();
    t.slice_rows = x.block;
    t.panels = y.panels.get() + begin * y.depth;
    t.next_panels = mode_.priors ? y.panels.get() : nullptr;
    t.depth = x.depth;
    t.row = place_.row;
    t.column = place_.column;
    t.height = height_;
    t.width = width_;
    t.exclusion = {.rows = place_.rows,
                   .columns = place_.columns,
                   .self = place_.self,
                   .pairs = place_.self,
                   .mask = mask_ ? mask_->get() : nullptr,
                   .mask_stride = mask_stride(),
                   .positives = nullptr,
                   .class_ends = nullptr};
    t.exponent = exponent_;
    t.out = mode_.stored ? out_.get() + begin : nullptr;
    t.out_stride = stride_;
    t.past_caches = mode_.past_caches;
    if (mode_.sums) {
      t.row_sum = row_sum_.get();
      t.row_max = row_max_.get();
      t.column_sum = column_sum_.get();
      t.column_max = column_max_.get();
      t.positive = on_diagonal() ? positive_.get() : nullptr;
      t.negative_sum = mode_.masked ? &negative_sum_ : nullptr;
    }
    t.scratch = scratch_.get();
    core_.similarity(t);
  }

  bool on_diagonal() const { return place_.self && place_.row == place_.first_column; }

  // Whether entry (i, j) of the tile is a pair of negatives above the diagonal.
  bool counts(int64_t i, int64_t j) const {
    const int64_t a = place_.row + i, b = place_.column + j;
    if (a >= place_.rows || b >= place_.columns) return false;
    if (!place_.self) return true;
    return b > (a | 1) && !(mask_ && (*mask_)[a / 2 * mask_stride() + b / 16] >> b / 2 % 8 & 1);
  }

  int64_t mask_stride() const { return (place_.rows / 2 + 7) / 8; }

  Exact exponential(int64_t i, int64_t j, Exact shift) const {
    const Exact scale = Exact{exponent_.scale} + exponent_.scale_rest;
    return std::exp2(expected_.s[i][j] * scale - shift);
  }

  // The kernel writes the tile. Of one on the diagonal it writes the part above and its mirror
  // image.
  void check_stored() const {
    const int64_t begin = place_.column - place_.first_column;
    for (int64_t i = 0; i < kBlock; ++i) {
      for (int64_t c = 0; c < stride_; ++c) {
        const int64_t at = i * stride_ + c;
        const int64_t upper = on_diagonal() ? std::min(i, c) : i;
        const int64_t j = (on_diagonal() ? std::max(i, c) : c) - begin;
        if (!mode_.stored || i >= height_ || j < 0 || j >= width_) {
          CHECK(out_.untouched(at), "%s: (%ld, %ld)", name_.c_str(), i, c);
        } else if (!counts(upper, j)) {
          const Exact excluded = mode_.constant_shift ? 0 : -kInfinity;
          CHECK_NEAR(out_[at], excluded, 0, "%s: excluded (%ld, %ld)", name_.c_str(), i, c);
        } else if (mode_.constant_shift) {
          const Exact e = exponential(upper, j, exponent_.shift);
          const Exact error =
              exp2_error(expected_.s[upper][j], expected_.error[upper][j], exponent_);
          CHECK_NEAR(out_[at], e, e * error, "%s: (%ld, %ld)", name_.c_str(), i, c);
        } else {
          CHECK_NEAR(out_[at], expected_.s[upper][j], expected_.error[upper][j], "%s: (%ld, %ld)",
                     name_.c_str(), i, c);
        }
      }
    }
  }

  // Checks the sum and the maximum of a row or column whose entry number k is entry(k).
  template <typename Entry>
  void check_line(const char* side, int64_t index, int64_t count, T sum, T maximum,
                  Exact sum_before, Exact maximum_before, const Entry& entry) const {
    Exact highest = maximum_before, highest_error = 0;
    int64_t terms = 0;
    for (int64_t k = 0; k < count; ++k) {
      const auto [i, j] = entry(k);
      if (!counts(i, j)) continue;
      ++terms;
      highest = std::max(highest, expected_.s[i][j]);
      highest_error = std::max(highest_error, expected_.error[i][j]);
    }
    CHECK_NEAR(maximum, highest, highest_error, "%s: maximum of %s %ld", name_.c_str(), side,
               index);
    const Exact scale = Exact{exponent_.scale} + exponent_.scale_rest;
    const Exact shift = mode_.constant_shift ? Exact{exponent_.shift} : highest * scale;
    Exact total = sum_before, error = 0;
    if (!mode_.constant_shift && sum_before > 0) {
      total *= std::exp2((maximum_before - highest) * scale);
      error = total * exp2_error(maximum_before - highest, highest_error, exponent_);
    }
    for (int64_t k = 0; k < count; ++k) {
      const auto [i, j] = entry(k);
      if (!counts(i, j)) continue;
      const Exact e = exponential(i, j, shift), s = expected_.s[i][j];
      total += e;
      error += mode_.constant_shift
                   ? e * exp2_error(s, expected_.error[i][j], exponent_)
                   : e * exp2_error(s - highest, 2 * highest_error, exponent_) + kTiny<T>;
    }
    // No term passes through more additions than there are terms and lanes, and one for the prior.
    error += (terms + 6) * kRoundoff<T> * total;
    CHECK_NEAR(sum, total, error, "%s: sum of %s %ld", name_.c_str(), side, index);
  }

  void check_sums() const {
    for (int64_t i = 0; i < height_; ++i)
      check_line("row", i, width_, row_sum_[i], row_max_[i], row_sum_before_[i], row_max_before_[i],
                 [&](int64_t k) { return std::pair(i, k); });
    for (int64_t j = 0; j < width_; ++j)
      check_line("column", j, height_, column_sum_[j], column_max_[j], column_sum_before_[j],
                 column_max_before_[j], [&](int64_t k) { return std::pair(k, j); });
    Exact sum = 0, magnitude = 0, error = 0;
    int64_t count = 0;
    for (int64_t i = 0; i < height_; ++i) {
      for (int64_t j = 0; j < width_; ++j) {
        if (!mode_.masked || !counts(i, j)) continue;
        count += 2;
        sum += 2 * expected_.s[i][j];
        magnitude += std::fabs(2 * expected_.s[i][j]);
        error += 2 * expected_.error[i][j];
      }
    }
    error += (count * kRoundoff<double> + 4 * kRoundoff<T>)*magnitude;  // 16 numbers in T by halves
    CHECK_NEAR(negative_sum_, sum, error, "%s: sum of negatives", name_.c_str());
  }

  void check_positives() const {
    for (int64_t i = 0; i < height_; ++i) {
      const int64_t a = place_.row + i, j = (a | 1) - place_.column;
      if (on_diagonal() && a < place_.rows && j >= 0 && j < width_) {
        CHECK_NEAR(positive_[i], expected_.s[i & ~int64_t{1}][j],
                   expected_.error[i & ~int64_t{1}][j], "%s: positive %ld", name_.c_str(), i);
      } else {
        CHECK(positive_.untouched(i), "%s: positive %ld", name_.c_str(), i);
      }
    }
  }

  const TileCore<T, P>& core_;
  const Place& place_;
  const Mode mode_;
  const Expected<T>& expected_;
  const int64_t height_, width_;
  const Exponent<T> exponent_;
  const int64_t stride_;
  const Guarded<T> out_, row_sum_, row_max_, column_sum_, column_max_, positive_, scratch_;
  std::vector<T> row_sum_before_, row_max_before_, column_sum_before_, column_max_before_;
  std::optional<Guarded<uint8_t>> mask_;
  double negative_sum_ = 0;
  std::string name_;
};

// Checks every mode of a tile of at most `width` columns (0: all).
template <typename T, typename P>
void check_place(const TileCore<T, P>& core, const char* kind, const Place& place, int64_t features,
                 int64_t width) {
  Random random;
  const Matrix<T> x = random_rows<T, P>(random, place.rows, features);
  const Matrix<T> y = place.self ? x : random_rows<T, P>(random, place.columns, features);
  const Operands<T, P> rows(core, x, place.row, kBlock);
  const Operands<T, P> columns(core, y, place.first_column, kBlock);
  const int64_t end = std::min(place.first_column + kBlock, place.columns);
  int64_t wide = round_up(end - place.column, core.panel);
  if (width > 0) wide = std::min(wide, width);
  const int64_t high = round_up(std::min(kBlock, place.rows - place.row), core.micro_rows);
  const Expected<T> expected = expect(x, y, place, high, wide);
  for (const bool masked : {false, true}) {
    if (masked && !place.self) continue;
    // constant_shift, masked, sums, stored, past_caches, priors, tau
    for (const Mode& mode : {Mode{true, masked, true, false, false, false, 0.1},
                             Mode{true, masked, true, true, false, true, 0.07},
                             Mode{true, masked, true, true, true, false, 0.5},
                             Mode{true, masked, false, true, false, false, 0.1},
                             Mode{false, masked, true, true, false, true, 0.01},
                             Mode{false, masked, true, true, false, false, 1.0},
                             Mode{false, masked, false, true, false, false, 0.01}})
      TileCheck<T, P>(core, kind, place, rows, columns, expected, mode, random);
  }
}

template <typename T, typename P>
void check_places(const TileCore<T, P>& core, const char* kind) {
  const int64_t panel = core.panel;
  for (const int64_t features : {int64_t{1}, panel, 2 * panel + 7}) {
    check_place(core, kind, {"diagonal", 150, 150, true, 0, 0, 0}, features, 0);
    check_place(core, kind, {"one panel of the diagonal", 150, 150, true, 0, 0, panel}, features,
                panel);
    check_place(core, kind, {"end of the diagonal", 150, 150, true, 0, 0, 96 - panel}, features, 0);
    check_place(core, kind, {"ragged diagonal", 150, 150, true, 96, 96, 96}, features, 0);
    check_place(core, kind, {"above the diagonal", 200, 200, true, 0, 96, 96}, features, 0);
    check_place(core, kind, {"ragged right edge", 150, 150, true, 0, 96, 96}, features, 0);
    check_place(core, kind, {"part of the right edge", 150, 150, true, 0, 96, 96 + panel}, features,
                0);
    check_place(core, kind, {"one pair", 2, 2, true, 0, 0, 0}, features, 0);
    check_place(core, kind, {"three pairs", 6, 6, true, 0, 0, 0}, features, 0);
    check_place(core, kind, {"whole rectangle", 96, 96, false, 0, 0, 0}, features, 0);
    check_place(core, kind, {"ragged rectangle", 71, 49, false, 0, 0, 0}, features, 0);
    check_place(core, kind, {"rectangle below the diagonal", 150, 107, false, 96, 0, 0}, features,
                0);
    check_place(core, kind, {"one entry", 1, 1, false, 0, 0, 0}, features, 0);
  }
}

CJEPA_TEST(similarity_tiles) {
  for_each_core([](const auto& core, const char* kind) { check_places(core, kind); });
}

}  // namespace
}  // namespace cjepa::test
