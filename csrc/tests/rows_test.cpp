// The functions of the tile core for single rows, and the layout of rows as operands.
#include <algorithm>

#include "operands.h"

namespace cjepa::test {
namespace {

constexpr int64_t kLengths[] = {1, 2, 7, 16, 31, 64, 129, 768};

template <typename T>
void fill(Random& random, const Guarded<T>& x, double scale = 1) {
  for (int64_t d = 0; d < x.size(); ++d) x[d] = static_cast<T>(scale * random.normal());
}

// x . y with a bound for the error of `count` products and additions.
struct Dot {
  Exact value = 0, magnitude = 0, error = 0;
};
template <typename T, typename X, typename Y>
Dot dot(const X& x, const Y& y, int64_t count) {
  Dot d;
  for (int64_t k = 0; k < count; ++k) {
    const Exact term = Exact{x[k]} * y[k];
    d.value += term;
    d.magnitude += std::fabs(term);
  }
  d.error = (count + 1) * kRoundoff<T> * d.magnitude;
  return d;
}

template <typename T, typename P>
void check_row(const TileCore<T, P>& core, const char* kind, int64_t count) {
  Random random;
  const Guarded<T> x(count), y(count), sum(count), unit(count);
  fill(random, x);
  fill(random, y);
  fill(random, sum);
  const Dot product = dot<T>(x, y, count);
  CHECK_NEAR(core.dot(x.get(), y.get(), count), product.value, product.error, "%s: dot of %ld",
             kind, count);

  std::vector<T> before(sum.get(), sum.get() + count);
  core.add(x.get(), count, sum.get());
  for (int64_t d = 0; d < count; ++d)
    CHECK_NEAR(sum[d], before[d] + x[d], 0, "%s: sum of %ld", kind, count);

  for (const double eps : {1e-8, 1e4}) {
    const Exact norm = std::sqrt(dot<T>(x, x, count).value), divisor = std::max<Exact>(norm, eps);
    const T returned = core.normalize(x.get(), count, static_cast<T>(eps), unit.get());
    // A square root halves the relative error of the dot product. The root and the quotient round.
    const Exact relative = (count + 1) * kRoundoff<T> / 2 + 3 * kRoundoff<T>;
    CHECK_NEAR(returned, norm, norm * relative, "%s: norm of %ld", kind, count);
    for (int64_t d = 0; d < count; ++d)
      CHECK_NEAR(unit[d], x[d] / divisor, std::fabs(x[d] / divisor) * relative,
                 "%s: row of %ld normalised, eps %g", kind, count, eps);
  }
  core.normalize(x.get(), count, T{0}, x.get());  // in place, as the driver does
  const Exact length = std::sqrt(dot<T>(x, x, count).value);
  CHECK_NEAR(length, 1, (count + 4) * kRoundoff<T>, "%s: length of %ld", kind, count);
}

CJEPA_TEST(dot_add_and_normalize) {
  for_each_core([](const auto& core, const char* kind) {
    for (const int64_t count : kLengths) check_row(core, kind, count);
  });
}

template <typename T, typename P>
void check_finish(const TileCore<T, P>& core, const char* kind, int64_t count, bool cosine) {
  Random random;
  const Guarded<T> gradient(count), own(count), positive(count), unit(count);
  fill(random, gradient);
  fill(random, own);
  fill(random, positive);
  fill(random, unit);
  core.normalize(unit.get(), count, T{0}, unit.get());
  FinishRow<T> f{};
  f.gradient = gradient.get();
  f.own = own.get();
  f.positive = positive.get();
  f.unit = cosine ? unit.get() : nullptr;
  f.positive_weight = static_cast<T>(random.uniform(0, 2));
  f.factor = static_cast<T>(random.uniform(0.5, 2));
  f.norm = cosine ? static_cast<T>(random.uniform(0.5, 2)) : T{1};
  f.features = count;

  std::vector<Exact> g(count), error(count);
  for (int64_t d = 0; d < count; ++d) {
    const Exact weighted = Exact{f.positive_weight} * positive[d];
    g[d] = (gradient[d] - weighted) * f.factor;
    error[d] = 3 * kRoundoff<T> * (std::fabs(gradient[d]) + std::fabs(weighted)) * f.factor;
  }
  // A dot product with numbers that have an error of their own, `error`.
  const auto along = [&](const Guarded<T>& x) {
    Dot product = dot<T>(g, x, count);
    for (int64_t d = 0; d < count; ++d) product.error += error[d] * std::fabs(x[d]);
    return product;
  };
  const Dot expected = along(own), projection = along(unit);
  const T returned = core.finish(f);
  CHECK_NEAR(returned, expected.value, 1.01L * expected.error, "%s, D = %ld: along", kind, count);
  for (int64_t d = 0; d < count; ++d) {
    Exact value = g[d], bound = error[d];
    if (cosine) {
      const Exact part = projection.value * unit[d];
      value = (g[d] - part) / f.norm;
      bound += projection.error * std::fabs(unit[d]);
      bound = (bound + 4 * kRoundoff<T> * (std::fabs(g[d]) + std::fabs(part))) / f.norm;
    }
    CHECK_NEAR(gradient[d], value, 1.01L * bound, "%s, D = %ld%s: %ld", kind, count,
               cosine ? ", cosine" : "", d);
  }
}

CJEPA_TEST(finish) {
  for_each_core([](const auto& core, const char* kind) {
    for (const int64_t count : kLengths)
      for (const bool cosine : {false, true}) check_finish(core, kind, count, cosine);
  });
}

// Packing moves numbers, so every comparison is exact. Operands are padded with zeros.
template <typename T, typename P>
void check_packing(const TileCore<T, P>& core, const char* kind, int64_t features, int64_t count,
                   bool with_panel) {
  constexpr int64_t kPairs = kNumbers<T, P>;
  Random random;
  const int64_t panel = core.panel, depth = (features + kPairs - 1) / kPairs;
  const int64_t slice_rows = 3 * panel, panel_depth = panel + 4;
  const int64_t read = round_up(count, kPairs);  // rows
  const Matrix<T> z = random_rows<T, P>(random, read, features);
  const Guarded<T> rows(read * features);
  std::copy(z.numbers.begin(), z.numbers.end(), rows.get());
  const auto number = [&](int64_t r, int64_t k) { return k < features ? z[r][k] : T{0}; };

  const Guarded<P> panels(depth * panel), of_slices(depth * panel);
  // The last slice ends with the last row of a panel.
  const Guarded<P> slices(((depth - 1) / panel * slice_rows + panel) * panel);
  core.pack(rows.get(), count, features, with_panel ? panels.get() : nullptr, slices.get(),
            slice_rows);
  core.pack_panel(slices.get(), slice_rows, count, depth, of_slices.get());
  for (int64_t at = 0; at < slices.size(); ++at) {
    const int64_t slice = at / panel / slice_rows, r = at / panel % slice_rows;
    if (r >= count) {
      CHECK(slices.untouched(at), "%s, D = %ld: slice %ld, row %ld", kind, features, slice, r);
      continue;
    }
    for (int64_t n = 0; n < kPairs; ++n) {
      const int64_t k = (slice * panel + at % panel) * kPairs + n;
      CHECK_NEAR((unpack<T, P>(&slices[at], n)), number(r, k), 0, "%s, D = %ld: slice %ld, row %ld",
                 kind, features, slice, r);
    }
  }
  for (int64_t at = 0; at < panels.size(); ++at) {
    if (!with_panel)
      CHECK(panels.untouched(at), "%s, D = %ld: no panel was asked for", kind, features);
    for (int64_t n = 0; at % panel < count && n < kPairs; ++n) {
      const T expected = number(at % panel, at / panel * kPairs + n);
      if (with_panel)
        CHECK_NEAR((unpack<T, P>(&panels[at], n)), expected, 0, "%s, D = %ld: panel, row %ld", kind,
                   features, at % panel);
      CHECK_NEAR((unpack<T, P>(&of_slices[at], n)), expected, 0,
                 "%s, D = %ld: panel of slices, row %ld", kind, features, at % panel);
    }
  }

  const Guarded<P> products(((features - 1) / panel * panel_depth + panel / kPairs) * panel);
  core.pack_product(rows.get(), count, features, products.get(), panel_depth);
  for (int64_t at = 0; at < products.size(); ++at) {
    const int64_t r = at / panel % panel_depth;
    const int64_t k = at / panel / panel_depth * panel + at % panel;
    if (r >= read / kPairs) {
      CHECK(products.untouched(at), "%s, D = %ld: product, row %ld", kind, features, r);
      continue;
    }
    for (int64_t n = 0; n < kPairs; ++n)
      CHECK_NEAR((unpack<T, P>(&products[at], n)), number(r * kPairs + n, k), 0,
                 "%s, D = %ld: product, row %ld", kind, features, r);
  }
}

CJEPA_TEST(packing) {
  for_each_core([](const auto& core, const char* kind) {
    for (const int64_t features : kLengths)
      for (const int64_t count : {core.panel, int64_t{1}, core.panel - 3})
        for (const bool with_panel : {false, true})
          check_packing(core, kind, features, count, with_panel);
  });
}

}  // namespace
}  // namespace cjepa::test
