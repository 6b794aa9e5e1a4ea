// The tile core in GNU vector extensions; included once per instruction set with
//   CJEPA_VECTOR_BYTES  width of a vector register
//   CJEPA_MICRO_ROWS    rows of the register tile; it is two vectors wide
//   CJEPA_STREAM(p, x)  if there is such an instruction: store x at p around the caches
// Everything is in an unnamed namespace: see tile_core.h.
#include <utility>

#include "tile_core.h"

namespace cjepa {
namespace {

#define CJEPA_INLINE inline __attribute__((always_inline))
#define CJEPA_NOINLINE __attribute__((noinline))

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(CJEPA_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t bits __attribute__((vector_size(CJEPA_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(CJEPA_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t bits __attribute__((vector_size(CJEPA_VECTOR_BYTES)));
};

// How operands of type P are multiplied: one number by one number.
template <typename T>
struct PlainOperand {
  using P = T;
  using V = typename VectorOf<T>::type;
  using Packed = V;
  static constexpr int kNumbers = 1;
  static CJEPA_INLINE Packed load(const P* p) { return *reinterpret_cast<const V*>(p); }
  static CJEPA_INLINE Packed all(P x) { return x - V{}; }
  static CJEPA_INLINE V multiply_add(V sum, Packed a, Packed b) { return sum + a * b; }
  static CJEPA_INLINE P join(const T* row, int64_t k, int64_t) { return row[k]; }
  static CJEPA_INLINE P join_rows(const T* x, int64_t) { return *x; }
  static CJEPA_INLINE void store_along(P* out, V x) { *reinterpret_cast<V*>(out) = x; }
  static CJEPA_INLINE void store_across(P* out, const V (&x)[1]) { store_along(out, x[0]); }
};

// Coefficients of the exponentials' polynomial, the highest power first, then 1.5 2^mantissa bits.
// They are read through pointers that the compiler cannot follow, or it would keep them in
// registers over the loop of the product and spill accumulators for them (a third of the speed).
template <typename T>
struct Exp2Table;
constexpr double taylor(int n) {  // ln(2)^n / n!
  return n == 0 ? 1.0 : taylor(n - 1) * 0.693147180559945309417232121458 / n;
}
template <>
struct Exp2Table<float> {  // minimax on [-1/2, 1/2]: relative error 8e-8 in fp32, mean 3e-10
  static constexpr int kDegree = 6, kMantissa = 23;
  static constexpr float kLowestExponent = -126.0f;
  static constexpr float kValues[] = {1.534581188998e-4f,
                                      1.339993121813e-3f,
                                      9.618488957526e-3f,
                                      5.550328776968e-2f,
                                      2.402264689063e-1f,
                                      6.931472057373e-1f,
                                      1.0f,
                                      12582912.0f};
};
template <>
struct Exp2Table<double> {  // Taylor series: the last term is below 2e-17
  static constexpr int kDegree = 13, kMantissa = 52;
  static constexpr double kLowestExponent = -1022.0;
  static constexpr double kValues[] = {taylor(13), taylor(12), taylor(11), taylor(10),
                                       taylor(9),  taylor(8),  taylor(7),  //
                                       taylor(6),  taylor(5),  taylor(4),  taylor(3),
                                       taylor(2),  taylor(1),  taylor(0),  6755399441055744.0};
};

template <typename T, typename Operand = PlainOperand<T>>
struct Core {
  using V = typename VectorOf<T>::type;
  using I = typename VectorOf<T>::bits;
  using P = typename Operand::P;
  using Packed = typename Operand::Packed;
  using Table = Exp2Table<T>;
  using Similarity = SimilarityTile<T, P>;
  static constexpr int L = CJEPA_VECTOR_BYTES / sizeof(T);
  static constexpr int MR = CJEPA_MICRO_ROWS;
  static constexpr int NV = 2;
  static constexpr int NR = NV * L;
  static constexpr T kLowest = -__builtin_huge_val();

  static CJEPA_INLINE V load(const T* p) { return *reinterpret_cast<const V*>(p); }
  static CJEPA_INLINE void store(T* p, V x) { *reinterpret_cast<V*>(p) = x; }
  static CJEPA_INLINE void stream(T* p, V x) {
#ifdef CJEPA_STREAM
    CJEPA_STREAM(p, x);
#else
    store(p, x);
#endif
  }
  static CJEPA_INLINE V all(T x) { return x - V{}; }
  static CJEPA_INLINE V larger(V a, V b) { return a > b ? a : b; }
  static constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
  static constexpr int64_t round_up(int64_t x, int64_t m) { return (x + m - 1) / m * m; }

  // A pointer whose target the compiler knows nothing about.
  template <typename U>
  static CJEPA_INLINE const U* opaque(const U* p) {
    asm volatile("" : "+r"(p));
    return p;
  }

  static T total(V x) {
    T sum[L];
    store(sum, x);
    for (int half = L / 2; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) sum[l] += sum[l + half];
    return sum[0];
  }

  // 2^(d (scale + rest) - shift). The exponent is split into an integer and a fraction in
  // [-1/2, 1/2], whose power is a polynomial, and the integer is added to the exponent's bits.
  // Unbounded, the exponent must be within the dtype's range; bounded, it is raised into it.
  template <bool BOUNDED>
  static CJEPA_INLINE V exp2(V d, V scale, V rest, V shift, const T* table) {
    V x = d * scale - shift;
    if constexpr (BOUNDED) x = larger(x, all(Table::kLowestExponent));
    const V magic = all(table[Table::kDegree + 1]);
    const V t = x + magic;
    const I n = (I)t << Table::kMantissa;  // the bits of magic itself are shifted out
    const V f = (x - (t - magic)) + d * rest;
    V p = all(table[0]);
#pragma GCC unroll 16
    for (int k = 1; k <= Table::kDegree; ++k) p = p * f + all(table[k]);
    const I bits = (I)p + n;
    return (V)bits;
  }

  // What to bring into the cache while a micro-tile is computed, `step` bytes for each of the
  // product's depth: requests all at once would hold up the loads that the product waits for.
  struct Ahead {
    const char* at;
    int64_t step;

    // The share of the micro-tile in row i of `height` in `count` numbers from `next`.
    Ahead(const P* next, int64_t count, int64_t i, int64_t height, int64_t depth)
        : at(reinterpret_cast<const char*>(next)), step(0) {
      if (next == nullptr) return;
      const int64_t share = count * sizeof(P) * MR / height;
      at += i / MR * share;
      step = (share + depth - 1) / depth;
    }
  };

  // acc[m][v] += sum_k a[m * ROW + k * step] * panel[k * NR + v * L ...]
  template <int64_t ROW>
  static CJEPA_INLINE void multiply(V (&acc)[MR][NV], const P* a, int64_t step, const P* panel,
                                    int64_t depth, Ahead& ahead) {
    for (int64_t k = 0; k < depth; ++k) {
      __builtin_prefetch(ahead.at, 0, 2);
      ahead.at += ahead.step;
      const Packed b0 = Operand::load(panel), b1 = Operand::load(panel + L);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        const Packed x = Operand::all(a[m * ROW]);
        acc[m][0] = Operand::multiply_add(acc[m][0], x, b0);
        acc[m][1] = Operand::multiply_add(acc[m][1], x, b1);
      }
      a += step;
      panel += NR;
    }
  }

  static CJEPA_INLINE void similarities(V (&acc)[MR][NV], const Similarity& t, int64_t i,
                                        int64_t j) {
    const P* next = j + NR < t.width ? t.panels + (j + NR) * t.depth : t.next_panels;
    Ahead ahead(next, NR * t.depth, i, t.height, t.depth);
    const P* a = t.rows + i * NR;
    const P* panel = t.panels + j * t.depth;
    int64_t k = 0;
    for (; k + NR <= t.depth; k += NR) {
      multiply<NR>(acc, a, 1, panel + k * NR, NR, ahead);
      a += t.slice_rows * NR;
    }
    if (k < t.depth) multiply<NR>(acc, a, 1, panel + k * NR, t.depth - k, ahead);
  }

  static constexpr int kLanes[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

  // All ones where the entry stays, for L entries from (a, b).
  static I keep_mask(const Exclusion& e, int64_t a, int64_t b) {
    if (a >= e.rows) return I{};
    I lane;
    for (int l = 0; l < L; ++l) lane[l] = kLanes[l];
    // Columns in [first, columns); with `self` those right of the row and of its positive.
    const int64_t first = e.self ? (a | 1) + 1 - b : 0, last = e.columns - b;
    using Lane = decltype(lane[0] + 0);
    const auto bound = [](int64_t x) { return static_cast<Lane>(x < 0 ? 0 : least(x, L)); };
    I keep = (lane >= bound(first)) & (lane < bound(last));
    if (e.self && e.mask != nullptr) {
      const uint8_t* row = e.mask + (a >> 1) * e.batch;
      for (int l = 0; l < L; ++l)
        if (keep[l] && row[(b + l) >> 1]) keep[l] = 0;
    }
    return keep;
  }

  // Whether some entry of the micro-tile, or of the micro-tiles below it, is excluded.
  static bool needs_mask(const Exclusion& e, int64_t a, int64_t b) {
    return a + MR > e.rows || b + NR > e.columns || (e.self && (e.mask != nullptr || a + MR > b));
  }

  // First row of the tile, relative to it, from which all micro-tiles of the panel are masked.
  static int64_t first_masked(const Similarity& t, int64_t j) {
    int64_t i = 0;
    while (i < t.height && !needs_mask(t.exclusion, t.row + i, t.column + j)) i += MR;
    return i;
  }

  // Rows of the panel that are looked at: with `self`, down to the diagonal.
  static int64_t panel_height(const Similarity& t, int64_t j) {
    if (!t.exclusion.self) return t.height;
    return least(t.height, round_up(t.column + j + NR - t.row, MR));
  }

  static void read_positive(const Similarity& t, V s, int64_t a, int64_t b) {
    const int64_t lane = (a ^ 1) - b;
    if ((a & 1) || lane < 0 || lane >= L || a >= t.exclusion.rows) return;
    t.positive[a - t.row] = t.positive[a + 1 - t.row] = s[lane];
  }

  static void count_negatives(const Similarity& t, V s, I keep) {
    for (int l = 0; l < L; ++l) {
      if (!keep[l]) continue;
      *t.negative_sum += 2 * static_cast<double>(s[l]);  // an entry stands for both orders
      *t.negative_count += 2;
    }
  }

  // Side effects of a masked vector of entries; what is excluded becomes -inf.
  static V mask_entries(const Similarity& t, V s, int64_t a, int64_t b) {
    const I keep = keep_mask(t.exclusion, a, b);
    if (t.positive != nullptr) read_positive(t, s, a, b);
    if (t.negative_sum != nullptr) count_negatives(t, s, keep);
    return keep != 0 ? s : all(kLowest);
  }

  enum Keep { kForgotten, kStored, kStreamed };

  // Rows [begin, end) of the tile's panel j, with a constant shift.
  template <bool MASKED, Keep KEEP, bool SUMS>
  static CJEPA_NOINLINE void run_constant(const Similarity& t, int64_t j, int64_t begin,
                                          int64_t end) {
    T* lanes_sum = t.scratch;
    T* lanes_max = t.scratch + t.height * L;
    V column_sum[NV] = {}, column_max[NV];
    for (int v = 0; v < NV; ++v) column_max[v] = all(kLowest);
    for (int64_t i = begin; i < end; i += MR) {
      V acc[MR][NV] = {};
      similarities(acc, t, i, j);
      const Exponent<T>* e = opaque(&t.exponent);
      const T* table = opaque(Table::kValues);
      const V scale = all(e->scale), rest = all(e->scale_rest), shift = all(e->shift);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        V sum{}, maximum{};
        if constexpr (SUMS) {
          sum = load(lanes_sum + (i + m) * L);
          maximum = load(lanes_max + (i + m) * L);
        }
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) {
          V s = acc[m][v];
          V x = exp2<false>(s, scale, rest, shift, table);
          if constexpr (MASKED) {
            s = mask_entries(t, s, t.row + i + m, t.column + j + v * L);
            x = s > all(kLowest) ? x : V{};
          }
          if constexpr (SUMS) {
            sum += x;
            column_sum[v] += x;
            maximum = larger(maximum, s);
            column_max[v] = larger(column_max[v], s);
          }
          if constexpr (KEEP != kForgotten) {
            if (MASKED && !is_kept(t, i + m, j)) continue;
            T* to = t.out + (i + m) * t.out_stride + j + v * L;
            KEEP == kStreamed ? stream(to, x) : store(to, x);
          }
        }
        if constexpr (SUMS) {
          store(lanes_sum + (i + m) * L, sum);
          store(lanes_max + (i + m) * L, maximum);
        }
      }
    }
    if constexpr (SUMS) {
      for (int v = 0; v < NV; ++v) {
        T* to_sum = t.column_sum + j + v * L;
        T* to_max = t.column_max + j + v * L;
        store(to_sum, load(to_sum) + column_sum[v]);
        store(to_max, larger(load(to_max), column_max[v]));
      }
    }
  }

  // Below its diagonal a tile is filled by mirror(), perhaps in another thread.
  static bool is_kept(const Similarity& t, int64_t i, int64_t j) {
    return !t.exclusion.self || t.row + i < t.column + j + NR;
  }

#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
  // Of 2 S lanes, the first S of both arguments, or with HIGH the last S of both.
  template <int S, bool HIGH, int... LANE>
  static CJEPA_INLINE V interleave(V a, V b, std::integer_sequence<int, LANE...>) {
    return __builtin_shufflevector(
        a, b, (LANE & S ? L + LANE - (HIGH ? 0 : S) : LANE + (HIGH ? S : 0))...);
  }

  // Exchanges the off-diagonal S x S blocks of every 2 S x 2 S block, from S = L / 2 to 1.
  template <int S>
  static CJEPA_INLINE void transpose(V (&x)[L]) {
    constexpr auto kLanes = std::make_integer_sequence<int, L>();
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      if (i & S) continue;
      const V a = x[i], b = x[i + S];
      x[i] = interleave<S, false>(a, b, kLanes);
      x[i + S] = interleave<S, true>(a, b, kLanes);
    }
    if constexpr (S > 1) transpose<S / 2>(x);
  }
#else
  template <int S>
  static void transpose(V (&x)[L]) {
    for (int i = 0; i < L; ++i) {
      for (int l = 0; l < i; ++l) {
        const T t = x[i][l];
        x[i][l] = x[l][i];
        x[l][i] = t;
      }
    }
  }
#endif

  // Row sums and maxima from their lanes, L rows at a time.
  static void add_lanes(const Similarity& t) {
    const T *sums = t.scratch, *maxima = t.scratch + t.height * L;
    int64_t i = 0;
    for (; i + L <= t.height; i += L) {
      V sum[L], maximum[L];
      for (int l = 0; l < L; ++l) {
        sum[l] = load(sums + (i + l) * L);
        maximum[l] = load(maxima + (i + l) * L);
      }
      transpose<L / 2>(sum);
      transpose<L / 2>(maximum);
      for (int half = L / 2; half > 0; half /= 2) {
        for (int l = 0; l < half; ++l) {
          sum[l] += sum[l + half];
          maximum[l] = larger(maximum[l], maximum[l + half]);
        }
      }
      store(t.row_sum + i, load(t.row_sum + i) + sum[0]);
      store(t.row_max + i, larger(load(t.row_max + i), maximum[0]));
    }
    for (; i < t.height; ++i) {
      t.row_sum[i] += total(load(sums + i * L));
      for (int l = 0; l < L; ++l)
        t.row_max[i] = maxima[i * L + l] > t.row_max[i] ? maxima[i * L + l] : t.row_max[i];
    }
  }

  template <Keep KEEP, bool SUMS>
  static void tile_constant(const Similarity& t) {
    if constexpr (SUMS) {
      for (int64_t i = 0; i < t.height * L; i += L) {
        store(t.scratch + i, V{});
        store(t.scratch + t.height * L + i, all(kLowest));
      }
    }
    for (int64_t j = 0; j < t.width; j += NR) {
      const int64_t height = panel_height(t, j), plain = least(first_masked(t, j), height);
      if (plain > 0) run_constant<false, KEEP, SUMS>(t, j, 0, plain);
      if (plain < height) run_constant<true, KEEP, SUMS>(t, j, plain, height);
    }
    if constexpr (SUMS) {
      add_lanes(t);
    }
  }

  static void store_similarities(const Similarity& t) {
    for (int64_t j = 0; j < t.width; j += NR) {
      const int64_t height = panel_height(t, j), plain = least(first_masked(t, j), height);
      for (int64_t i = 0; i < height; i += MR) {
        V acc[MR][NV] = {};
        similarities(acc, t, i, j);
        for (int m = 0; m < MR; ++m) {
          for (int v = 0; v < NV; ++v) {
            V s = acc[m][v];
            if (i >= plain) s = mask_entries(t, s, t.row + i + m, t.column + j + v * L);
            if (is_kept(t, i + m, j)) store(t.out + (i + m) * t.out_stride + j + v * L, s);
          }
        }
      }
    }
  }

  // Sums relative to running maxima from the stored similarities, first rows, then columns.
  static void sum_running(const Similarity& t) {
    const V scale = all(t.exponent.scale), rest = all(t.exponent.scale_rest);
    const T* table = Table::kValues;
    const bool self = t.exclusion.self;
    for (int64_t i = 0; i < t.height; ++i) {
      const T* s = t.out + i * t.out_stride;
      const int64_t below = t.row + i - t.column;  // with `self`, columns up to here are excluded
      const int64_t first = self && below > 0 ? below / NR * NR : 0;
      V highest = all(t.row_max[i]);
      for (int64_t j = first; j < t.width; j += L) highest = larger(highest, load(s + j));
      T maximum = highest[0];
      for (int l = 1; l < L; ++l) maximum = highest[l] > maximum ? highest[l] : maximum;
      if (maximum == kLowest) continue;
      const V top = all(maximum);
      V sum = {};
      for (int64_t j = first; j < t.width; j += L) {
        const V x = load(s + j);
        sum += x > all(kLowest) ? exp2<true>(x - top, scale, rest, V{}, table) : V{};
      }
      const V before = exp2<true>(all(t.row_max[i]) - top, scale, rest, V{}, table);
      const T previous = t.row_max[i] == kLowest ? 0 : t.row_sum[i] * before[0];
      t.row_sum[i] = previous + total(sum);
      t.row_max[i] = maximum;
    }
    for (int64_t j = 0; j < t.width; j += L) {
      const int64_t height = self ? least(t.height, t.column + j / NR * NR + NR - t.row) : t.height;
      const V previous = load(t.column_max + j);
      V top = previous;
      for (int64_t i = 0; i < height; ++i) top = larger(top, load(t.out + i * t.out_stride + j));
      const V shift = top > all(kLowest) ? top : V{};
      V sum = {};
      for (int64_t i = 0; i < height; ++i) {
        const V x = load(t.out + i * t.out_stride + j);
        sum += x > all(kLowest) ? exp2<true>(x - shift, scale, rest, V{}, table) : V{};
      }
      const V before =
          previous > all(kLowest) ? exp2<true>(previous - shift, scale, rest, V{}, table) : V{};
      store(t.column_sum + j, load(t.column_sum + j) * before + sum);
      store(t.column_max + j, top);
    }
  }

  // A kept tile on the diagonal is symmetric: what is below it is copied from above.
  static void mirror(const Similarity& t) {
    const int64_t offset = t.column - t.row;
    if (!t.exclusion.self || offset >= t.height) return;
    T* tile = t.out - offset;
    const int64_t last = least(offset + t.width, t.height);
    for (int64_t c = offset; c < last; ++c)
      for (int64_t r = 0; r < c; ++r) tile[c * t.out_stride + r] = tile[r * t.out_stride + c];
  }

  static void similarity(const Similarity& t) {
    if (!t.exponent.constant_shift) {
      store_similarities(t);
      if (t.row_sum != nullptr) sum_running(t);
      mirror(t);
    } else if (t.out == nullptr) {
      tile_constant<kForgotten, true>(t);
    } else if (t.row_sum == nullptr) {
      t.past_caches ? tile_constant<kStreamed, false>(t) : tile_constant<kStored, false>(t);
      mirror(t);
    } else {
      t.past_caches ? tile_constant<kStreamed, true>(t) : tile_constant<kStored, true>(t);
      mirror(t);
    }
  }

  static int64_t scratch_size(int64_t height) { return 2 * height * L; }

  static CJEPA_INLINE V coefficient(const Coefficients<T, P>& c, V kept, int64_t i, V row_weight,
                                    int64_t j) {
    const V column_weight = load(c.column_weight + j);
    if (c.exponent.constant_shift) return kept * (row_weight + column_weight);
    const V scale = all(c.exponent.scale), rest = all(c.exponent.scale_rest);
    const V row = all(c.row_shift[i]), column = load(c.column_shift + j);
    const V x = exp2<true>(kept - row, scale, rest, V{}, Table::kValues) * row_weight +
                exp2<true>(kept - column, scale, rest, V{}, Table::kValues) * column_weight;
    return kept > all(kLowest) ? x : V{};
  }

  // Calls run(j) for vectors from column j that cover [0, width), the last one perhaps overlapping
  // the one before: nothing beyond `width` is read if it holds a vector.
  template <typename Run>
  static CJEPA_INLINE void for_each_vector(int64_t width, const Run& run) {
    int64_t j = 0;
    for (; j + L <= width; j += L) run(j);
    if (j < width) run(width < L ? 0 : width - L);
  }

  static void coefficients(const Coefficients<T, P>& c) {
    for (int64_t i = 0; i < c.height; ++i) {
      const T* kept = c.kept + i * c.kept_stride;
      P* out = c.out + i * c.out_stride;
      const V weight = all(c.row_weight[i]);
      // Pairs are whole: after an odd number of columns comes one of padding.
      for_each_vector(round_up(c.width, Operand::kNumbers), [&](int64_t j) {
        Operand::store_along(out + j / Operand::kNumbers,
                             coefficient(c, load(kept + j), i, weight, j));
      });
    }
  }

  static void coefficients_over_rows(const Coefficients<T, P>& c) {
    constexpr int N = Operand::kNumbers;
    for (int64_t i = 0; i < c.height; i += N) {
      P* out = c.out + i / N * c.out_stride;
      for_each_vector(c.width, [&](int64_t j) {
        V x[N];
        for (int n = 0; n < N; ++n) {
          const T* kept = c.kept + (i + n) * c.kept_stride + j;
          x[n] = coefficient(c, load(kept), i + n, all(c.row_weight[i + n]), j);
        }
        Operand::store_across(out + j, x);
      });
    }
  }

  template <bool WHOLE>
  static CJEPA_INLINE void add_micro_tile(const Product<T, P>& p, V (&acc)[MR][NV], int64_t i,
                                          int64_t d) {
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      if (!WHOLE && i + m >= p.height) return;
      T* to = p.out[m & 1] + ((i + m) >> 1) * p.stride + d;
      if (p.accumulate) {
        acc[m][0] += load(to);
        acc[m][1] += load(to + L);
      }
      store(to, acc[m][0]);
      store(to + L, acc[m][1]);
    }
  }

  // Walks through what a product is to bring into the cache, some lines at each micro-tile.
  struct Prefetcher {
    const char *row, *line, *end;
    int64_t stride, bytes, left, lines;

    explicit Prefetcher(const Product<T, P>& p)
        : row(p.prefetch),
          line(row),
          end(row + p.prefetch_bytes),
          stride(p.prefetch_stride),
          bytes(p.prefetch_bytes),
          left(p.prefetch_rows),
          lines(1 + p.prefetch_rows * round_up(p.prefetch_bytes, 64) / 64 /
                        (p.features / NR * (p.height + MR - 1) / MR)) {}

    void step() {
      for (int64_t k = 0; k < lines && left > 0; ++k) {
        __builtin_prefetch(line, 0, 2);
        line += 64;
        if (line >= end) {
          line = row += stride;
          end = row + bytes;
          --left;
        }
      }
    }
  };

  static void product(const Product<T, P>& p) {
    Prefetcher prefetcher(p);
    for (int64_t d = 0; d < p.features; d += NR) {
      const P* panel = p.panels + d * p.panel_depth;
      for (int64_t i = 0; i < p.height; i += MR) {
        prefetcher.step();
        Ahead ahead(d + NR < p.features ? panel + p.panel_depth * NR : p.next_panels, p.depth * NR,
                    i, p.height, p.depth);
        // From zero, not from `out`: small terms added to a large sum one by one would each be
        // rounded at its scale (20 times the error at M = 8200).
        V acc[MR][NV] = {};
        if (p.transposed) {
          multiply<1>(acc, p.a + i, p.a_stride, panel, p.depth, ahead);
        } else {
          multiply<kCoefficientStride>(acc, p.a + i * kCoefficientStride, 1, panel, p.depth, ahead);
        }
        if (i + MR <= p.height) {
          add_micro_tile<true>(p, acc, i, d);
        } else {
          add_micro_tile<false>(p, acc, i, d);
        }
      }
    }
  }

  // Four sums, so that the additions do not wait for one another.
  static T dot(const T* x, const T* y, int64_t count) {
    V sums[4] = {};
    int64_t d = 0;
    for (; d + 4 * L <= count; d += 4 * L)
      for (int k = 0; k < 4; ++k) sums[k] += load(x + d + k * L) * load(y + d + k * L);
    for (; d + L <= count; d += L) sums[0] += load(x + d) * load(y + d);
    T rest = 0;
    for (; d < count; ++d) rest += x[d] * y[d];
    return total((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
  }

  static void add(const T* __restrict x, int64_t count, T* __restrict sum) {
    for (int64_t d = 0; d < count; ++d) sum[d] += x[d];
  }

  static T normalize(const T* in, int64_t features, T eps, T* out) {
    const T norm = __builtin_sqrt(dot(in, in, features));
    const T divisor = norm > eps ? norm : eps;
    for (int64_t d = 0; d < features; ++d) out[d] = in[d] / divisor;
    return norm;
  }

  static void pack(const T* rows, int64_t valid, int64_t features, P* panel, P* slices,
                   int64_t slice_rows) {
    static_assert(sizeof(P) == sizeof(T));  // transposed as numbers, whatever they are
    constexpr int N = Operand::kNumbers;
    const int64_t depth = (features + N - 1) / N;
    for (int64_t k = 0; k < depth; k += NR) {
      const int64_t count = least(NR, depth - k);
      P* slice = slices + k * slice_rows;
      for (int64_t r = 0; r < valid; ++r) {
        const T* row = rows + r * features;
        if (N == 1 && count == NR) {
          for (int c = 0; c < NR; c += L)
            *reinterpret_cast<V*>(slice + r * NR + c) = load(row + k + c);
          continue;
        }
        for (int64_t c = 0; c < count; ++c) slice[r * NR + c] = Operand::join(row, k + c, features);
        for (int64_t c = count; c < NR; ++c) slice[r * NR + c] = P{};
      }
      if (panel == nullptr) continue;
      for (int64_t c = 0; c < count; c += L) {
        for (int64_t r = 0; r < valid; r += L) {
          V x[L];
          for (int l = 0; l < L; ++l) x[l] = *reinterpret_cast<V*>(slice + (r + l) * NR + c);
          transpose<L / 2>(x);
          for (int l = 0; l < least(L, count - c); ++l)
            *reinterpret_cast<V*>(panel + (k + c + l) * NR + r) = x[l];
        }
      }
    }
  }

  static void pack_product(const T* rows, int64_t valid, int64_t features, P* out,
                           int64_t panel_depth) {
    constexpr int N = Operand::kNumbers;
    for (int64_t k = 0; k < features; k += NR) {
      const int64_t count = least(NR, features - k);
      for (int64_t r = 0; r < (valid + N - 1) / N; ++r) {
        P* to = out + k * panel_depth + r * NR;
        const T* from = rows + r * N * features + k;
        for (int64_t c = 0; c < count; ++c) to[c] = Operand::join_rows(from + c, features);
        for (int64_t c = count; c < NR; ++c) to[c] = P{};
      }
    }
  }

  static T finish(const FinishRow<T>& f) {
    T* g = f.gradient;
    for (int64_t d = 0; d < f.features; ++d) g[d] = (g[d] - f.pull * f.positive[d]) * f.factor;
    const T along = dot(g, f.own, f.features);
    if (f.unit != nullptr) {
      const T projection = dot(g, f.unit, f.features);
      const T inverse = 1 / f.norm;
      for (int64_t d = 0; d < f.features; ++d) g[d] = (g[d] - projection * f.unit[d]) * inverse;
    }
    return along;
  }

  static TileCore<T, P> table() {
    return {MR,       NR,   &scratch_size, &similarity, &coefficients, &coefficients_over_rows,
            &product, &dot, &add,          &normalize,  &pack,         &pack_product,
            &finish};
  }
};

}  // namespace
}  // namespace cjepa
