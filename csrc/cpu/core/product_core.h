// Coefficients from stored tiles, and their products. See Coefficients and Product.
// Only for files that tile_core_impl.h includes.
#pragma once

#include <cstdint>

#include "micro_tile.h"
#include "tile_core.h"

namespace cjepa {
namespace {

template <typename T, typename Operand>
struct ProductCore : MicroTile<T, Operand> {
  CJEPA_USING_MICRO_TILE(T, Operand)

  // The attractions in row i of the entries from column j on: 0 where there is none.
  static CJEPA_INLINE V attraction(const Coefficients<T, P>& c, int64_t i, int64_t j) {
    const int64_t a = c.row + i, b = c.column + j;
    const I lane = lanes();
    using Lane = decltype(lane[0] + 0);
    const auto bound = [&](int64_t x) {
      x -= b;
      return static_cast<Lane>(x < 0 ? 0 : least(x, L));
    };
    I attracts = (lane >= bound(c.class_begins[a])) & (lane < bound(c.class_ends[a]));
    if (a >= b && a < b + L) attracts &= lane != static_cast<Lane>(a - b);
    return attracts != 0 ? all(c.attraction[a]) + load(c.attraction + b) : V{};
  }

  template <bool ATTRACTS>
  static CJEPA_INLINE V coefficient(const Coefficients<T, P>& c, V stored, int64_t i, V row_weight,
                                    int64_t j) {
    const V x = exponential(c, stored, i, row_weight, j);
    if constexpr (ATTRACTS) return x - attraction(c, i, j);
    return x;
  }

  static CJEPA_INLINE V exponential(const Coefficients<T, P>& c, V stored, int64_t i, V row_weight,
                                    int64_t j) {
    const V column_weight = load(c.column_weight + j);
    if (c.exponent.constant_shift) return stored * (row_weight + column_weight);
    const V scale = all(c.exponent.scale), rest = all(c.exponent.scale_rest);
    const V row = all(c.row_shift[i]), column = load(c.column_shift + j);
    const V x =
        Tile::template exp2<true>(stored - row, scale, rest, V{}, Table::kValues) * row_weight +
        Tile::template exp2<true>(stored - column, scale, rest, V{}, Table::kValues) *
            column_weight;
    return stored > all(kLowest) ? x : V{};
  }

  // Calls run(j) for vectors from column j on that together cover [0, width). The last one may
  // overlap the one before, so that nothing beyond `width` is read if a vector fits into it.
  template <typename Run>
  static CJEPA_INLINE void for_each_vector(int64_t width, const Run& run) {
    int64_t j = 0;
    for (; j + L <= width; j += L) run(j);
    if (j < width) run(width < L ? 0 : width - L);
  }

  static void coefficients(const Coefficients<T, P>& c) {
    c.attraction == nullptr ? over_columns<false>(c) : over_columns<true>(c);
  }

  static void coefficients_over_rows(const Coefficients<T, P>& c) {
    c.attraction == nullptr ? over_rows<false>(c) : over_rows<true>(c);
  }

  template <bool ATTRACTS>
  static void over_columns(const Coefficients<T, P>& c) {
    for (int64_t i = 0; i < c.height; ++i) {
      const T* stored = c.stored + i * c.stored_stride;
      P* out = c.out + i * c.out_stride;
      const V weight = all(c.row_weight[i]);
      // Pairs are whole: an odd number of columns is followed by one of padding.
      for_each_vector(round_up(c.width, Operand::kNumbers), [&](int64_t j) {
        Operand::store_in_row(out + j / Operand::kNumbers,
                              coefficient<ATTRACTS>(c, load(stored + j), i, weight, j));
      });
    }
  }

  template <bool ATTRACTS>
  static void over_rows(const Coefficients<T, P>& c) {
    constexpr int N = Operand::kNumbers;
    for (int64_t i = 0; i < c.height; i += N) {
      P* out = c.out + i / N * c.out_stride;
      for_each_vector(c.width, [&](int64_t j) {
        V x[N];
        for (int n = 0; n < N; ++n) {
          const T* stored = c.stored + (i + n) * c.stored_stride + j;
          x[n] = coefficient<ATTRACTS>(c, load(stored), i + n, all(c.row_weight[i + n]), j);
        }
        Operand::store_across_rows(out + j, x);
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

  // Brings what a product asks for into the cache, a few lines with each micro-tile.
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
        typename Tile::Ahead ahead(d + NR < p.features ? panel + p.panel_depth * NR : p.next_panels,
                                   p.depth * NR, i, p.height, p.depth);
        // The sum starts from zero, not from `out`. Small terms that are added to a large sum one
        // by one would each be rounded at its scale, which is 20 times the error at M = 8200.
        V acc[MR][NV] = {};
        if (p.transposed) {
          Tile::template multiply<1>(acc, p.a + i, p.a_stride, panel, p.depth, ahead);
        } else {
          Tile::template multiply<kCoefficientStride>(acc, p.a + i * kCoefficientStride, 1, panel,
                                                      p.depth, ahead);
        }
        if (i + MR <= p.height) {
          add_micro_tile<true>(p, acc, i, d);
        } else {
          add_micro_tile<false>(p, acc, i, d);
        }
      }
    }
  }
};

}  // namespace
}  // namespace cjepa
