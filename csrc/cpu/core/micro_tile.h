// Vectors, the exponential and the product of a micro-tile, which the parts of a tile core share.
// Only tile_core_impl.h may include this file, directly or not.
#pragma once

#include <cstdint>
#include <utility>

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

// How operands of type P are multiplied. Here each holds one number.
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
  static CJEPA_INLINE void store_in_row(P* out, V x) { *reinterpret_cast<V*>(out) = x; }
  static CJEPA_INLINE void store_across_rows(P* out, const V (&x)[1]) { store_in_row(out, x[0]); }
};

// Coefficients of the exponential's polynomial, the highest power first, then 1.5 * 2^mantissa
// bits. They are read through pointers that the compiler cannot follow. It would otherwise keep
// them in registers throughout the loop of the product and spill accumulators, which costs a third
// of the speed.
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

// A tile of MR rows by two vectors, whose sums stay in registers.
template <typename T, typename Operand>
struct MicroTile {
  using V = typename VectorOf<T>::type;
  using I = typename VectorOf<T>::bits;
  using P = typename Operand::P;
  using Packed = typename Operand::Packed;
  using Table = Exp2Table<T>;
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
  // To be called after stream(), before another thread may read.
  static CJEPA_INLINE void fence() {
#ifdef CJEPA_FENCE
    CJEPA_FENCE();
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
  // [-1/2, 1/2]. A polynomial gives the power of the fraction, and the integer is added to the bits
  // of its exponent. With BOUNDED, an exponent below the range of the dtype is raised into it.
  // Without, the exponent must lie in that range.
  template <bool BOUNDED>
  static CJEPA_INLINE V exp2(V d, V scale, V rest, V shift, const T* table) {
    V x = d * scale - shift, correction = d * rest;
    if constexpr (BOUNDED) {
      const I inside = x > all(Table::kLowestExponent);
      x = inside ? x : all(Table::kLowestExponent);
      correction = inside ? correction : V{};
    }
    const V magic = all(table[Table::kDegree + 1]);
    const V t = x + magic;
    const I n = (I)t << Table::kMantissa;  // the bits of magic itself are shifted out
    const V f = (x - (t - magic)) + correction;
    V p = all(table[0]);
#pragma GCC unroll 16
    for (int k = 1; k <= Table::kDegree; ++k) p = p * f + all(table[k]);
    const I bits = (I)p + n;
    return (V)bits;
  }

#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
  // Of every 2 S lanes: the first S of both arguments, or with HIGH the last S of both.
  template <int S, bool HIGH, int... LANE>
  static CJEPA_INLINE V interleave(V a, V b, std::integer_sequence<int, LANE...>) {
    return __builtin_shufflevector(
        a, b, (LANE & S ? L + LANE - (HIGH ? 0 : S) : LANE + (HIGH ? S : 0))...);
  }

  // Exchanges the off-diagonal S x S blocks of every 2 S x 2 S block, from S = L / 2 to 1.
  template <int S>
  static CJEPA_INLINE void transpose(V (&x)[L]) {
    constexpr auto kAll = std::make_integer_sequence<int, L>();
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      if (i & S) continue;
      const V a = x[i], b = x[i + S];
      x[i] = interleave<S, false>(a, b, kAll);
      x[i + S] = interleave<S, true>(a, b, kAll);
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

  static constexpr int kLanes[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

  // The number of each lane.
  static CJEPA_INLINE I lanes() {
    I lane;
    for (int l = 0; l < L; ++l) lane[l] = kLanes[l];
    return lane;
  }

  // What to bring into the cache while a micro-tile is computed: `step` bytes with each step of the
  // product.
  struct Ahead {
    const char* at;
    int64_t step;

    // The `count` numbers from `next` on are shared among the micro-tiles of `height` rows. This is
    // the share of the micro-tile in row i.
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
};

// Makes the names of MicroTile known in a struct that derives from it.
#define CJEPA_USING_MICRO_TILE(T, Operand)                                           \
  using Tile = MicroTile<T, Operand>;                                                \
  using V = typename Tile::V;                                                        \
  using I = typename Tile::I;                                                        \
  using P = typename Tile::P;                                                        \
  using Packed = typename Tile::Packed;                                              \
  using Table = typename Tile::Table;                                                \
  using Tile::L, Tile::MR, Tile::NV, Tile::NR, Tile::kLowest;                        \
  using Tile::load, Tile::store, Tile::stream, Tile::fence, Tile::all, Tile::larger; \
  using Tile::least, Tile::round_up, Tile::opaque, Tile::total, Tile::lanes;

}  // namespace
}  // namespace cjepa
