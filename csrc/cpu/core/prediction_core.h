// Rows of the prediction loss. Only tile_core_impl.h may include this file.
//
// All normalisations are one map, u = p scale_p and v = (t - shift) scale_t. A row is read from
// memory once and stays in the L1 cache from then on.
#pragma once

#include <cstdint>

#include "micro_tile.h"
#include "prediction_row.h"

namespace cjepa {
namespace {

#define CJEPA_INLINED __attribute__((always_inline))  // of a lambda

template <typename T>
struct PredictionCore : MicroTile<T, PlainOperand<T>> {
  using Tile = MicroTile<T, PlainOperand<T>>;
  using V = typename Tile::V;
  using Tile::all;
  using Tile::L;
  using Tile::load;
  using Tile::total;

  // Calls f(d, vector) for each vector of L numbers from d on and f(d, number) for the numbers
  // left.
  template <typename F>
  static CJEPA_INLINE void over(int64_t features, const F& f) {
    int64_t d = 0;
    for (; d + L <= features; d += L) f(d, V{});
    for (; d < features; ++d) f(d, T{});
  }
  static CJEPA_INLINE V read(const T* p, V) { return load(p); }
  static CJEPA_INLINE T read(const T* p, T) { return *p; }
  static CJEPA_INLINE V spread(T x, V) { return all(x); }
  static CJEPA_INLINE T spread(T x, T) { return x; }

  // Sums vectors and single numbers separately, so that additions do not wait for one another.
  struct Sum {
    V vectors = {};
    T numbers = 0;
    CJEPA_INLINE void add(V x) { vectors += x; }
    CJEPA_INLINE void add(T x) { numbers += x; }
    T value() const { return total(vectors) + numbers; }
  };

  template <typename X>
  static CJEPA_INLINE X clamp(X x, X limit) {  // NaN stays NaN
    x = x > limit ? limit : x;
    return x < -limit ? -limit : x;
  }
  template <bool SQUARE, typename X>
  static CJEPA_INLINE X slope(X d, const Penalty<T>& p) {
    if constexpr (SQUARE) return d + d;
    return clamp<X>(d * p.slope, spread(p.limit, X{}));
  }
  template <bool SQUARE, typename X>
  static CJEPA_INLINE X value(X d, const Penalty<T>& p) {
    if constexpr (SQUARE) return d * d;
    const X c = slope<false>(d, p);
    return c * (d - c * p.half_width);
  }

  struct Map {
    T scale_p = 1, shift = 0, scale_t = 1;
    // Whether the norm is above eps. A shorter row is divided by the constant eps instead, and its
    // gradient is 0.
    bool regular_p = true, regular_t = true;

    template <typename X>
    CJEPA_INLINE X prediction(const T* p, X like) const {
      return read(p, like) * scale_p;
    }
    template <typename X>
    CJEPA_INLINE X target(const T* t, X like) const {
      return (read(t, like) - shift) * scale_t;
    }
  };

  static Map map_of(const PredictionRow<T>& row, const RowStatistics<T>& s) {
    Map map;
    if (row.normalization == Normalization::kL2) {
      map.regular_p = s.first > row.eps, map.regular_t = s.second > row.eps;
      map.scale_p = 1 / (map.regular_p ? s.first : row.eps);
      map.scale_t = 1 / (map.regular_t ? s.second : row.eps);
    } else if (row.normalization == Normalization::kLayer) {
      map.shift = s.first, map.scale_t = s.second;
    }
    return map;
  }

  static T root(T x) { return static_cast<T>(__builtin_sqrt(x)); }

  static RowStatistics<T> statistics_of(const PredictionRow<T>& row) {
    const T *p = row.prediction, *t = row.target;
    if (row.normalization == Normalization::kL2) {
      Sum pp, tt;
      over(row.features, [&](int64_t d, auto like) CJEPA_INLINED {
        const auto x = read(p + d, like), y = read(t + d, like);
        pp.add(x * x), tt.add(y * y);
      });
      return {root(pp.value()), root(tt.value())};
    }
    if (row.normalization == Normalization::kLayer) {
      Sum sum, squares;
      over(row.features, [&](int64_t d, auto like) CJEPA_INLINED { sum.add(read(t + d, like)); });
      const T mean = sum.value() / row.features;
      over(row.features, [&](int64_t d, auto like) CJEPA_INLINED {
        const auto x = read(t + d, like) - mean;
        squares.add(x * x);
      });
      const T variance = squares.value() / row.features;
      if (!(variance <= kLargest)) return moments_of_large(t, row.features);
      return {mean, 1 / root(variance + T(kLayerEps))};
    }
    return {0, 0};
  }

  static constexpr T kLargest = sizeof(T) == 4 ? T(3.4028234663852886e38) : T(1.79e308);

  // The same numbers for a row whose squares overflow, which is scaled by a power of two. They are
  // NaN for a row with a NaN or an infinity, whose scale ends as 0.
  static RowStatistics<T> moments_of_large(const T* t, int64_t features) {
    T largest = 0, scale = 1, mean = 0, rest = 0, squares = 0;
    for (int64_t d = 0; d < features; ++d) {
      const T size = t[d] < 0 ? -t[d] : t[d];
      largest = size > largest ? size : largest;
    }
    while (largest * scale > T(1099511627776)) scale /= 256;  // 2^40
    for (int64_t d = 0; d < features; ++d) mean += t[d] * scale;
    mean /= features;
    for (int64_t d = 0; d < features; ++d) rest += t[d] * scale - mean;
    mean += rest / features;  // exact where all are equal
    for (int64_t d = 0; d < features; ++d) {
      const T x = t[d] * scale - mean;
      squares += x * x;
    }
    return {mean / scale, scale / root(squares / features + T(kLayerEps))};
  }

  template <bool SQUARE>
  static T forward_with(const PredictionRow<T>& row, const Map& map, T* errors) {
    Sum sum;
    if (errors == nullptr) {
      over(row.features, [&](int64_t d, auto like) CJEPA_INLINED {
        const auto x = map.prediction(row.prediction + d, like) - map.target(row.target + d, like);
        sum.add(value<SQUARE>(x, row.penalty));
      });
      return sum.value();
    }
    over(row.features, [&](int64_t d, auto like) CJEPA_INLINED {
      const auto x = map.prediction(row.prediction + d, like) - map.target(row.target + d, like);
      const auto error = value<SQUARE>(x, row.penalty);
      write<false>(errors + d, error);
      sum.add(error);
    });
    return sum.value();
  }

  static T forward(const PredictionRow<T>& row, RowStatistics<T>* statistics, T* errors) {
    *statistics = statistics_of(row);
    const Map map = map_of(row, *statistics);
    return row.penalty.square ? forward_with<true>(row, map, errors)
                              : forward_with<false>(row, map, errors);
  }

  template <bool STREAM>
  static CJEPA_INLINE void write(T* p, V x) {
    if constexpr (STREAM) {
      Tile::stream(p, x);
    } else {
      Tile::store(p, x);
    }
  }
  template <bool>
  static CJEPA_INLINE void write(T* p, T x) {
    *p = x;
  }

  // With g = dL/d(u - v):  dL/dp = (g - (g . u) u) scale_p                   L2, else g
  //   dL/dt = -(g - (g . v) v) scale_t                                       L2
  //   dL/dt = -(g - mean(g) - mean(g . v) v) scale_t                         LayerNorm, else -g
  template <bool SQUARE, Normalization N, bool UPSTREAM, bool TARGET, bool STREAM>
  static void gradient_with(const PredictionRow<T>& row, const PredictionGradient<T>& out) {
    const T *p = row.prediction, *t = row.target, *upstream = out.upstream;
    const Map map = map_of(row, out.statistics);
    const T factor = out.factor;
    const auto gradient_of = [&](int64_t d, auto u, auto v) CJEPA_INLINED {
      if constexpr (UPSTREAM)
        return (read(upstream + d, u) + factor) * slope<SQUARE>(u - v, row.penalty);
      else
        return slope<SQUARE>(u - v, row.penalty) * factor;
    };
    T u_dot_g = 0, v_dot_g = 0, mean = 0;
    constexpr bool kTarget = TARGET && N != Normalization::kNone;
    if constexpr (N == Normalization::kL2 || kTarget) {
      Sum sum_p, sum_t, sum;
      over(row.features, [&](int64_t d, auto like) CJEPA_INLINED {
        const auto u = map.prediction(p + d, like), v = map.target(t + d, like);
        const auto g = gradient_of(d, u, v);
        if constexpr (N == Normalization::kL2) sum_p.add(g * u);
        if constexpr (kTarget) sum_t.add(g * v);
        if constexpr (kTarget && N == Normalization::kLayer) sum.add(g);
      });
      u_dot_g = sum_p.value();
      v_dot_g = sum_t.value();
      if constexpr (N == Normalization::kLayer) {
        v_dot_g /= row.features;
        mean = sum.value() / row.features;
      }
    }
    over(row.features, [&](int64_t d, auto like) CJEPA_INLINED {
      const auto u = map.prediction(p + d, like), v = map.target(t + d, like);
      const auto g = gradient_of(d, u, v);
      if constexpr (N == Normalization::kL2) {
        write<STREAM>(out.prediction + d, (g - u * u_dot_g) * map.scale_p);
      } else {
        write<STREAM>(out.prediction + d, g);
      }
      if constexpr (kTarget) {
        write<STREAM>(out.target + d, (v * v_dot_g - (g - mean)) * map.scale_t);
      } else if constexpr (TARGET) {
        write<STREAM>(out.target + d, -g);
      }
    });
    if (!map.regular_p) short_row_gradient(out.statistics.first, row, out.prediction);
    if (TARGET && !map.regular_t) short_row_gradient(out.statistics.second, row, out.target);
  }

  // The gradient of a row whose norm is not above eps: 0, or NaN if the norm is NaN.
  static void short_row_gradient(T norm, const PredictionRow<T>& row, T* out) {
    for (int64_t d = 0; d < row.features; ++d) out[d] = norm <= row.eps ? 0 : norm;
  }

  template <bool SQUARE, Normalization N, bool UPSTREAM, bool TARGET>
  static void choose_stores(const PredictionRow<T>& row, const PredictionGradient<T>& out) {
    const auto address = reinterpret_cast<uintptr_t>(out.prediction) |
                         (TARGET ? reinterpret_cast<uintptr_t>(out.target) : 0);
    if (out.past_caches && address % CJEPA_VECTOR_BYTES == 0)
      return gradient_with<SQUARE, N, UPSTREAM, TARGET, true>(row, out);
    gradient_with<SQUARE, N, UPSTREAM, TARGET, false>(row, out);
  }
  template <bool SQUARE, Normalization N>
  static void choose_sides(const PredictionRow<T>& row, const PredictionGradient<T>& out) {
    if (out.target != nullptr) {
      if (out.upstream != nullptr) return choose_stores<SQUARE, N, true, true>(row, out);
      return choose_stores<SQUARE, N, false, true>(row, out);
    }
    if (out.upstream != nullptr) return choose_stores<SQUARE, N, true, false>(row, out);
    choose_stores<SQUARE, N, false, false>(row, out);
  }
  template <bool SQUARE>
  static void choose(const PredictionRow<T>& row, const PredictionGradient<T>& out) {
    if (row.normalization == Normalization::kL2)
      return choose_sides<SQUARE, Normalization::kL2>(row, out);
    if (row.normalization == Normalization::kLayer)
      return choose_sides<SQUARE, Normalization::kLayer>(row, out);
    choose_sides<SQUARE, Normalization::kNone>(row, out);
  }
  static void gradient(const PredictionRow<T>& row, const PredictionGradient<T>& out) {
    row.penalty.square ? choose<true>(row, out) : choose<false>(row, out);
  }

  static void widen(const uint16_t* in, int64_t count, T* out) {
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = uint32_t{in[i]} << 16;
      float x;
      __builtin_memcpy(&x, &bits, sizeof(x));
      out[i] = x;
    }
  }
  static void narrow(const T* in, int64_t count, uint16_t* out) {  // to the nearest, ties to even
    for (int64_t i = 0; i < count; ++i) {
      const float x = static_cast<float>(in[i]);
      uint32_t bits;
      __builtin_memcpy(&bits, &x, sizeof(bits));
      const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
      out[i] = static_cast<uint16_t>(x == x ? rounded : 0x7fc0);
    }
  }

  static constexpr PredictionFunctions<T> table() {
    return {.forward = &forward,
            .gradient = &gradient,
            .fence = [] { Tile::fence(); },
            .widen = &widen,
            .narrow = &narrow};
  }
};

}  // namespace
}  // namespace cjepa
