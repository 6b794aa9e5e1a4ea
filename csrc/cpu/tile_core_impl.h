// The tile core in GNU vector extensions; included once per instruction set with
//   CJEPA_VECTOR_BYTES  width of a vector register
//   CJEPA_MICRO_ROWS    rows of the register tile; it is two vectors wide
// Everything is in an unnamed namespace: see tile_core.h.
#include "tile_core.h"

namespace cjepa {
namespace {

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

#define CJEPA_INLINE inline __attribute__((always_inline))

template <typename T>
struct Core {
  using V = typename VectorOf<T>::type;
  using I = typename VectorOf<T>::bits;
  static constexpr int L = CJEPA_VECTOR_BYTES / sizeof(T);
  static constexpr int MR = CJEPA_MICRO_ROWS;
  static constexpr int NV = 2;
  static constexpr int NR = NV * L;
  static constexpr T kLowest = -__builtin_huge_val();

  static CJEPA_INLINE V load(const T* p) { return *reinterpret_cast<const V*>(p); }
  static CJEPA_INLINE void store(T* p, V x) { *reinterpret_cast<V*>(p) = x; }
  static CJEPA_INLINE V all(T x) { return x - V{}; }
  static CJEPA_INLINE V larger(V a, V b) { return a > b ? a : b; }

  // 2^(d (scale + rest) - shift), 0 far below: the exponent is split into an integer and a fraction
  // in [-1/2, 1/2], whose power is a polynomial (minimax in fp32: relative error 8e-8, mean 3e-10),
  // and the integer is added to the exponent's bits.
  static CJEPA_INLINE V exp2(V d, V scale, V rest, V shift) {
    const V x = d * scale - shift;
    if constexpr (sizeof(T) == 4) {
      const V bounded = larger(x, all(-126.0f));
      const V magic = all(12582912.0f);
      const V t = bounded + magic;
      const I n = (I)t - (I)magic;
      const V f = (bounded - (t - magic)) + d * rest;
      V p = all(1.534581188998e-4f);
      p = p * f + all(1.339993121813e-3f);
      p = p * f + all(9.618488957526e-3f);
      p = p * f + all(5.550328776968e-2f);
      p = p * f + all(2.402264689063e-1f);
      p = p * f + all(6.931472057373e-1f);
      p = p * f + all(1.0f);
      const I r = (I)p + (n << 23);
      return (V)r;
    } else {
      const V bounded = larger(x, all(-1022.0));
      const V magic = all(6755399441055744.0);
      const V t = bounded + magic;
      const I n = (I)t - (I)magic;
      const V f = (bounded - (t - magic) + d * rest) * all(0.693147180559945309417232121458);
      // exp(f) on |f| <= 0.347 by its Taylor series: the last term is below 2e-17
      V p = all(1.0 / 6227020800.0);
      constexpr double kFactorials[] = {479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0,
                                        5040.0,      720.0,      120.0,     24.0,     6.0,
                                        2.0,         1.0,        1.0};
#pragma GCC unroll 16
      for (int k = 0; k < 13; ++k) p = p * f + all(1.0 / kFactorials[k]);
      const I r = (I)p + (n << 52);
      return (V)r;
    }
  }

  // acc[m][v] += sum_k a[m * a_row + k * a_column] * panel[k * NR + v * L ...]
  static CJEPA_INLINE void multiply(V (&acc)[MR][NV], const T* a, int64_t a_row, int64_t a_column,
                                    const T* panel, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k) {
      const V b0 = load(panel + k * NR);
      const V b1 = load(panel + k * NR + L);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        const V x = all(a[m * a_row + k * a_column]);
        acc[m][0] += x * b0;
        acc[m][1] += x * b1;
      }
    }
  }

  static bool excluded(const Exclusion& e, int64_t a, int64_t b) {
    if (a >= e.rows || b >= e.rows) return true;
    const int64_t k = a >> 1, l = b >> 1;
    return k == l || (e.mask != nullptr && e.mask[k * e.batch + l]);
  }

  // All ones where the entry stays, for L entries from (a, b).
  static I keep_mask(const Exclusion& e, int64_t a, int64_t b) {
    I keep{};
    for (int l = 0; l < L; ++l) keep[l] = excluded(e, a, b + l) ? 0 : -1;
    return keep;
  }

  static int64_t scratch_size(int64_t height, int64_t width) {
    return height * 2 * L + height * width;
  }

  template <bool MASKED>
  static void forward_constant(const ForwardTile<T>& f) {
    const Tile<T>& t = f.tile;
    T* row_sum = t.scratch;
    T* row_max = t.scratch + t.height * L;
    for (int64_t i = 0; i < t.height; ++i) {
      store(row_sum + i * L, V{});
      store(row_max + i * L, all(kLowest));
    }
    const V scale = all(t.scale), rest = all(t.scale_rest), shift = all(f.shift);
    for (int64_t j = 0; j < t.width; j += NR) {
      V column_sum[NV] = {}, column_max[NV];
      for (int v = 0; v < NV; ++v) column_max[v] = all(kLowest);
      for (int64_t i = 0; i < t.height; i += MR) {
        V acc[MR][NV] = {};
        multiply(acc, t.z + i * t.features, t.features, 1, t.panels + j * t.features, t.features);
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
          V sum = load(row_sum + (i + m) * L), maximum = load(row_max + (i + m) * L);
#pragma GCC unroll 2
          for (int v = 0; v < NV; ++v) {
            V s = acc[m][v];
            V e = exp2(s, scale, rest, shift);
            if constexpr (MASKED) {
              const int64_t a = t.row + i + m, b = t.column + j + v * L;
              const I keep = keep_mask(f.exclusion, a, b);
              if (f.positive != nullptr) read_positive(f, s, a, b);
              if (f.kept_sum != nullptr) count_kept(f, s, keep);
              s = keep != 0 ? s : all(kLowest);
              e = keep != 0 ? e : V{};
            }
            sum += e;
            column_sum[v] += e;
            maximum = larger(maximum, s);
            column_max[v] = larger(column_max[v], s);
          }
          store(row_sum + (i + m) * L, sum);
          store(row_max + (i + m) * L, maximum);
        }
      }
      if (f.column_sum != nullptr) {
        for (int v = 0; v < NV; ++v) {
          T* to_sum = f.column_sum + j + v * L;
          T* to_max = f.column_max + j + v * L;
          store(to_sum, load(to_sum) + column_sum[v]);
          store(to_max, larger(load(to_max), column_max[v]));
        }
      }
    }
    for (int64_t i = 0; i < t.height; ++i) {
      T sum = 0, maximum = f.row_max[i];
      for (int l = 0; l < L; ++l) {
        sum += row_sum[i * L + l];
        const T other = row_max[i * L + l];
        maximum = other > maximum ? other : maximum;
      }
      f.row_sum[i] += sum;
      f.row_max[i] = maximum;
    }
  }

  static void read_positive(const ForwardTile<T>& f, V s, int64_t a, int64_t b) {
    const int64_t lane = (a ^ 1) - b;
    if (lane >= 0 && lane < L && a < f.exclusion.rows) f.positive[a - f.tile.row] = s[lane];
  }

  static void count_kept(const ForwardTile<T>& f, V s, I keep) {
    for (int l = 0; l < L; ++l) {
      if (!keep[l]) continue;
      // Above the diagonal an entry stands for both orders of its pair.
      const int times = f.column_sum == nullptr ? 1 : 2;
      *f.kept_sum += times * static_cast<double>(s[l]);
      *f.kept_count += times;
    }
  }

  // Running maxima as shifts: the tile of s goes to scratch first, then rows, then columns.
  static void forward_running(const ForwardTile<T>& f) {
    const Tile<T>& t = f.tile;
    T* s = t.scratch;
    for (int64_t j = 0; j < t.width; j += NR) {
      for (int64_t i = 0; i < t.height; i += MR) {
        V acc[MR][NV] = {};
        multiply(acc, t.z + i * t.features, t.features, 1, t.panels + j * t.features, t.features);
        for (int m = 0; m < MR; ++m) {
          for (int v = 0; v < NV; ++v) {
            V x = acc[m][v];
            if (t.masked) {
              const int64_t a = t.row + i + m, b = t.column + j + v * L;
              const I keep = keep_mask(f.exclusion, a, b);
              if (f.positive != nullptr) read_positive(f, x, a, b);
              if (f.kept_sum != nullptr) count_kept(f, x, keep);
              x = keep != 0 ? x : all(kLowest);
            }
            store(s + (i + m) * t.width + j + v * L, x);
          }
        }
      }
    }
    const V scale = all(t.scale), rest = all(t.scale_rest);
    for (int64_t i = 0; i < t.height; ++i) {
      V highest = all(f.row_max[i]);
      for (int64_t j = 0; j < t.width; j += L) highest = larger(highest, load(s + i * t.width + j));
      T maximum = highest[0];
      for (int l = 1; l < L; ++l) maximum = highest[l] > maximum ? highest[l] : maximum;
      if (maximum == kLowest) continue;
      V sum = {};
      const V top = all(maximum);
      for (int64_t j = 0; j < t.width; j += L) {
        const V x = load(s + i * t.width + j);
        sum += x > all(kLowest) ? exp2(x - top, scale, rest, V{}) : V{};
      }
      const V before = exp2(all(f.row_max[i]) - top, scale, rest, V{});
      T total = f.row_max[i] == kLowest ? 0 : f.row_sum[i] * before[0];
      for (int l = 0; l < L; ++l) total += sum[l];
      f.row_sum[i] = total;
      f.row_max[i] = maximum;
    }
    if (f.column_sum == nullptr) return;
    for (int64_t j = 0; j < t.width; j += L) {
      const V previous = load(f.column_max + j);
      V top = previous;
      for (int64_t i = 0; i < t.height; ++i) top = larger(top, load(s + i * t.width + j));
      const V shift = top > all(kLowest) ? top : V{};
      V sum = {};
      for (int64_t i = 0; i < t.height; ++i) {
        const V x = load(s + i * t.width + j);
        sum += x > all(kLowest) ? exp2(x - shift, scale, rest, V{}) : V{};
      }
      const V before = previous > all(kLowest) ? exp2(previous - shift, scale, rest, V{}) : V{};
      store(f.column_sum + j, load(f.column_sum + j) * before + sum);
      store(f.column_max + j, top);
    }
  }

  static void forward(const ForwardTile<T>& f) {
    if (!f.constant_shift) return forward_running(f);
    return f.tile.masked ? forward_constant<true>(f) : forward_constant<false>(f);
  }

  template <bool MASKED, bool CONSTANT>
  static void backward_tile(const BackwardTile<T>& g) {
    const Tile<T>& t = g.tile;
    const V scale = all(t.scale), rest = all(t.scale_rest), shift = all(g.shift);
    for (int64_t j = 0; j < t.width; j += NR) {
      V weight[NV], column_shift[NV];
      for (int v = 0; v < NV; ++v) {
        weight[v] = load(g.column_weight + j + v * L);
        column_shift[v] = CONSTANT ? V{} : load(g.column_shift + j + v * L);
      }
      for (int64_t i = 0; i < t.height; i += MR) {
        V acc[MR][NV] = {};
        multiply(acc, t.z + i * t.features, t.features, 1, t.panels + j * t.features, t.features);
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
          const V own = all(g.row_weight[i + m]);
#pragma GCC unroll 2
          for (int v = 0; v < NV; ++v) {
            const V s = acc[m][v];
            V x;
            if constexpr (CONSTANT) {
              x = exp2(s, scale, rest, shift) * (own + weight[v]);
            } else {
              x = exp2(s - all(g.row_shift[i + m]), scale, rest, V{}) * own +
                  exp2(s - column_shift[v], scale, rest, V{}) * weight[v];
            }
            if constexpr (MASKED) {
              const int64_t a = t.row + i + m, b = t.column + j + v * L;
              x = keep_mask(g.exclusion, a, b) != 0 ? x : V{};
              const int64_t lane = (a ^ 1) - b;
              if (lane >= 0 && lane < L && a < g.exclusion.rows) {
                x[lane] = -(g.row_pull[i + m] + g.column_pull[j + v * L + lane]);
              }
            }
            store(g.out + (i + m) * g.stride + j + v * L, x);
          }
        }
      }
    }
  }

  static void backward(const BackwardTile<T>& g) {
    if (g.constant_shift) {
      g.tile.masked ? backward_tile<true, true>(g) : backward_tile<false, true>(g);
    } else {
      g.tile.masked ? backward_tile<true, false>(g) : backward_tile<false, false>(g);
    }
  }

  static void product(const Product<T>& p) {
    for (int64_t d = 0; d < p.features; d += NR) {
      const T* panel = p.panels + d * p.panel_rows;
      for (int64_t i = 0; i < p.height; i += MR) {
        T* out = p.out + i * p.out_stride + d;
        // From zero, not from `out`: small terms added to a large sum one by one would each be
        // rounded at its scale (20 times the error at M = 8200).
        V acc[MR][NV] = {};
        // The common strides as constants, for addressing without multiplications.
        if (p.a_column == 1) {
          multiply(acc, p.a + i * p.a_row, p.a_row, 1, panel, p.depth);
        } else {
          multiply(acc, p.a + i, 1, p.a_column, panel, p.depth);
        }
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
          T* to = out + m * p.out_stride;
          store(to, load(to) + acc[m][0]);
          store(to + L, load(to + L) + acc[m][1]);
        }
      }
    }
  }

  static TileCore<T> table() { return {MR, NR, &scratch_size, &forward, &backward, &product}; }
};

}  // namespace
}  // namespace cjepa
