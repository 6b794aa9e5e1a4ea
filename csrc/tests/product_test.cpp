// Coefficients in both orientations, and the products that take them, against plain loops.
#include <algorithm>

#include "../cpu/constants.h"
#include "operands.h"

namespace cjepa::test {
namespace {

constexpr int64_t kBlock = kSmallBlock;

template <typename T, typename P>
void check_coefficients(const TileCore<T, P>& core, const char* kind, int64_t height, int64_t width,
                        bool constant_shift, bool over_rows) {
  constexpr int64_t kPairs = kNumbers<T, P>;
  Random random;
  const int64_t vector = core.panel / 2;
  // Nothing beyond `width` is touched if a vector fits into it, else one vector is. Pairs are
  // whole.
  const int64_t covered = round_up(std::max(width, vector), kPairs);
  const int64_t stored_stride = covered + 5;
  const Guarded<T> stored((height - 1) * stored_stride + covered);
  const Guarded<T> row_shift(height), row_weight(height);
  const Guarded<T> column_shift(covered), column_weight(covered);
  const int64_t last_row = (over_rows ? height / kPairs : height) - 1;
  const Guarded<P> out(last_row * kCoefficientStride + (over_rows ? covered : covered / kPairs));

  Coefficients<T, P> c{};
  c.stored = stored.get();
  c.stored_stride = stored_stride;
  c.height = height;
  c.width = width;
  c.exponent = make_exponent<T>(constant_shift ? 0.1 : 0.01, constant_shift);
  c.row_shift = row_shift.get();
  c.column_shift = column_shift.get();
  c.row_weight = row_weight.get();
  c.column_weight = column_weight.get();
  c.out = out.get();
  c.out_stride = kCoefficientStride;
  for (int64_t i = 0; i < height; ++i) {
    row_shift[i] = static_cast<T>(random.uniform(0.5, 1));
    row_weight[i] = static_cast<T>(random.normal());
  }
  for (int64_t j = 0; j < covered; ++j) {
    column_shift[j] = static_cast<T>(random.uniform(0.5, 1));
    column_weight[j] = static_cast<T>(random.normal());
  }
  for (int64_t i = 0; i < height; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      // The forward stores e or 0, or, without a constant shift, s below both shifts or -inf.
      const bool excluded = random.chance(0.1);
      const double s = std::min(row_shift[i], column_shift[j]) - random.uniform(0, 1.2);
      if (constant_shift) {
        stored[i * stored_stride + j] = static_cast<T>(excluded ? 0 : std::exp(10 * s - 10));
      } else {
        stored[i * stored_stride + j] =
            excluded ? -std::numeric_limits<T>::infinity() : static_cast<T>(s);
      }
    }
  }
  over_rows ? core.coefficients_over_rows(c) : core.coefficients(c);

  const Exact scale = Exact{c.exponent.scale} + c.exponent.scale_rest;
  Matrix<Exact> seen(height, covered);
  for (int64_t i = 0; i < height; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      const Exact x = stored[i * stored_stride + j];
      const Exact wa = row_weight[i], wb = column_weight[j];
      Exact expected = 0, error = 0;
      if (constant_shift) {
        expected = x * (wa + wb);
        error = 2 * kRoundoff<T> * x * (std::fabs(wa) + std::fabs(wb));
      } else if (std::isfinite(x)) {
        for (const auto& [shift, w] :
             {std::pair{Exact{row_shift[i]}, wa}, std::pair{Exact{column_shift[j]}, wb}}) {
          const Exact d = x - shift, e = std::exp2(d * scale);
          expected += e * w;
          // The difference d is rounded too.
          const Exact relative =
              exp2_error(d, kRoundoff<T> * std::fabs(d), c.exponent) + 2 * kRoundoff<T>;
          error += std::fabs(w) * (e * relative + kTiny<T>);
        }
      }
      // The conversion to bf16 rounds, and turns a denormal number into 0.
      if (kPairs == 2) error += (std::fabs(expected) + error) * kBf16Roundoff + kTiny<T>;
      const P* row = out.get() + (over_rows ? i / kPairs : i) * kCoefficientStride;
      const T actual = over_rows ? unpack<T, P>(row + j, i % kPairs) : unpack<T, P>(row, j);
      CHECK_NEAR(actual, expected, error, "%s, %ld x %ld, %s%s: (%ld, %ld)", kind, height, width,
                 constant_shift ? "constant shift" : "own shifts", over_rows ? ", over rows" : "",
                 i, j);
    }
  }
  const int64_t words = over_rows ? covered : covered / kPairs;
  for (int64_t at = 0; at < out.size(); ++at)
    if (at % kCoefficientStride >= words)
      CHECK(out.untouched(at), "%s, %ld x %ld: word %ld", kind, height, width, at);
}

CJEPA_TEST(coefficients) {
  for_each_core([](const auto& core, const char* kind) {
    const int64_t vector = core.panel / 2;
    for (const bool constant_shift : {true, false})
      for (const bool over_rows : {true, false})
        for (const int64_t height : {2, 14, 96})
          for (const int64_t width : {int64_t{2}, vector, vector + 1, 3 * vector - 2, kBlock})
            check_coefficients(core, kind, height, width, constant_shift, over_rows);
  });
}

template <typename T, typename P>
P random_coefficient(Random& random) {
  if constexpr (kNumbers<T, P> == 1) {
    return static_cast<T>(random.normal());
  } else {
    const uint32_t low = to_bf16(static_cast<float>(random.normal()));
    return low | to_bf16(static_cast<float>(random.normal())) << 16;
  }
}

template <typename T, typename P>
P nan_coefficient() {
  if constexpr (kNumbers<T, P> == 1) {
    return std::numeric_limits<T>::quiet_NaN();
  } else {
    return 0x7fc07fc0;
  }
}

template <typename T, typename P>
void check_product(const TileCore<T, P>& core, const char* kind, int64_t height, int64_t depth,
                   int64_t features, bool transposed, bool accumulate) {
  Random random;
  constexpr int64_t kPairs = kNumbers<T, P>;
  const Matrix<T> y = random_rows<T, P>(random, depth, features);
  const Operands<T, P> operands(core, y, 0, kBlock);
  // The rows that fill up the last micro-tile are read. They are NaN here, which must not show.
  const int64_t words = depth / kPairs, read = round_up(height, core.micro_rows);
  const int64_t a_stride = transposed ? kCoefficientStride - 5 : kCoefficientStride;
  const Guarded<P> a(transposed ? (words - 1) * a_stride + read
                                : (read - 1) * kCoefficientStride + words);
  const auto at = [&](int64_t i, int64_t k) {
    return transposed ? k * a_stride + i : i * kCoefficientStride + k;
  };
  // This NaN differs from that of memory which nobody wrote. A sum would carry it into its result.
  for (int64_t k = 0; k < a.size(); ++k) a[k] = nan_coefficient<T, P>();
  for (int64_t i = 0; i < height; ++i)
    for (int64_t k = 0; k < words; ++k) a[at(i, k)] = random_coefficient<T, P>(random);

  const int64_t stride = operands.padded_features + 7;
  const Guarded<T> even((height + 1) / 2 * stride), odd((height / 2 + 1) * stride);
  const auto out = [&](int64_t i, int64_t d) -> T& {
    return (i % 2 == 0 ? even : odd)[i / 2 * stride + d];
  };
  Matrix<T> before(height, operands.padded_features);
  for (int64_t i = 0; accumulate && i < height; ++i)
    for (int64_t d = 0; d < operands.padded_features; ++d)
      out(i, d) = before[i][d] = static_cast<T>(random.normal());

  Product<T, P> p{};
  p.a = a.get();
  p.transposed = transposed;
  p.a_stride = a_stride;
  p.height = height;
  p.depth = words;
  p.panels = operands.products.get();
  p.next_panels = accumulate ? operands.products.get() : nullptr;
  p.panel_depth = operands.panel_depth;
  p.features = operands.padded_features;
  p.out[0] = even.get();
  p.out[1] = odd.get();
  p.stride = stride;
  p.accumulate = accumulate;
  if (accumulate) {
    p.prefetch = reinterpret_cast<const char*>(a.get());
    p.prefetch_rows = 3;
    p.prefetch_bytes = 100;
    p.prefetch_stride = 200;
  }
  core.product(p);

  for (int64_t i = 0; i < height; ++i) {
    for (int64_t d = 0; d < operands.padded_features; ++d) {
      Exact expected = before[i][d], magnitude = std::fabs(expected);
      for (int64_t k = 0; k < depth && d < features; ++k) {
        const Exact term = Exact{unpack<T, P>(&a[at(i, k / kPairs)], k % kPairs)} * y[k][d];
        expected += term;
        magnitude += std::fabs(term);
      }
      // `depth` products and additions in a row, and one to `out`.
      CHECK_NEAR(out(i, d), expected, (depth + 2) * kRoundoff<T> * magnitude,
                 "%s, %ld x %ld x %ld%s%s: (%ld, %ld)", kind, height, depth, features,
                 transposed ? ", transposed" : "", accumulate ? ", accumulated" : "", i, d);
    }
  }
  for (int64_t k = 0; k < std::max(even.size(), odd.size()); ++k) {
    const int64_t row = k / stride;
    const bool padding = k % stride >= operands.padded_features;
    if (k < even.size() && (padding || 2 * row >= height))
      CHECK(even.untouched(k), "%s, height %ld: even row %ld", kind, height, row);
    if (k < odd.size() && (padding || 2 * row + 1 >= height))
      CHECK(odd.untouched(k), "%s, height %ld: odd row %ld", kind, height, row);
  }
}

CJEPA_TEST(products) {
  for_each_core([](const auto& core, const char* kind) {
    const int64_t tile = core.micro_rows, panel = core.panel;
    for (const bool transposed : {false, true})
      for (const bool accumulate : {false, true})
        for (const int64_t height : {int64_t{1}, int64_t{2}, tile - 1, tile, tile + 2, 4 * tile})
          for (const auto& [depth, features] :
               {std::pair{int64_t{2}, int64_t{1}}, std::pair{int64_t{46}, panel},
                std::pair{kBlock, 2 * panel + 3}})
            check_product(core, kind, height, depth, features, transposed, accumulate);
  });
}

}  // namespace
}  // namespace cjepa::test
