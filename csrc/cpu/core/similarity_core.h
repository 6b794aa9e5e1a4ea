// Tiles of similarities: exponentials, sums and maxima (see SimilarityTile). Only tile_core_impl.h
// may include this file.
#pragma once

#include <cstdint>

#include "micro_tile.h"
#include "tile_core.h"

namespace cjepa {
namespace {

template <typename T, typename Operand>
struct SimilarityCore : MicroTile<T, Operand> {
  CJEPA_USING_MICRO_TILE(T, Operand)
  using Similarity = SimilarityTile<T, P>;

  static CJEPA_INLINE void similarities(V (&acc)[MR][NV], const Similarity& t, int64_t i,
                                        int64_t j) {
    const P* next = j + NR < t.width ? t.panels + (j + NR) * t.depth : t.next_panels;
    typename Tile::Ahead ahead(next, NR * t.depth, i, t.height, t.depth);
    const P* a = t.rows + i * NR;
    const P* panel = t.panels + j * t.depth;
    // A long sum in one accumulator loses digits. So parts of kLongest features are added up
    // separately, in memory because no registers are left.
    alignas(64) T sums[MR * NR];
    int64_t k = 0;
    for (int64_t part = 0; k + NR <= t.depth; k += NR) {
      if (part == kLongest) {
        add_parts(acc, sums, k == kLongest);
        part = 0;
      }
      Tile::template multiply<NR>(acc, a, 1, panel + k * NR, NR, ahead);
      a += t.slice_rows * NR;
      part += NR;
    }
    if (k < t.depth) Tile::template multiply<NR>(acc, a, 1, panel + k * NR, t.depth - k, ahead);
    if (k > kLongest) {
      const T* parts = opaque(sums);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) acc[m][v] += load(parts + m * NR + v * L);
    }
  }

  static constexpr int64_t kLongest = 256;

  static CJEPA_INLINE void add_parts(V (&acc)[MR][NV], T* sums, bool first) {
    sums = const_cast<T*>(opaque(sums));
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) {
        T* to = sums + m * NR + v * L;
        store(to, first ? acc[m][v] : load(to) + acc[m][v]);
        acc[m][v] = V{};
      }
    }
  }

  // For L entries from (a, b) on: all bits set if the entry is included.
  static I included_mask(const Exclusion& e, int64_t a, int64_t b) {
    if (a >= e.rows) return I{};
    const I lane = lanes();
    // Columns in [first, columns) are included; with `self` these are the ones to the right of the
    // row, of its pair and of its class.
    int64_t first = e.self ? (e.pairs ? a | 1 : a) + 1 - b : 0;
    if (e.class_ends != nullptr && e.class_ends[a] - b > first) first = e.class_ends[a] - b;
    const int64_t last = e.columns - b;
    using Lane = decltype(lane[0] + 0);
    const auto bound = [](int64_t x) { return static_cast<Lane>(x < 0 ? 0 : least(x, L)); };
    I included = (lane >= bound(first)) & (lane < bound(last));
    if (e.positives != nullptr) {
      const int64_t positive = e.positives[a] - b;
      if (positive >= 0 && positive < L) included &= lane != static_cast<Lane>(positive);
    }
    if (e.self && e.mask != nullptr) {
      if (b >= e.columns) return I{};
      const int64_t sample = b >> 1;  // the bits of L entries lie in one byte
      const auto excluded = e.mask[(a >> 1) * e.mask_stride + sample / 8] >> sample % 8;
      included &= ((I{} + static_cast<Lane>(excluded)) >> (lane >> 1) & 1) - 1;
    }
    return included;
  }

  // Whether some entry of the micro-tile is excluded.
  static bool needs_mask(const Exclusion& e, int64_t a, int64_t b) {
    if (a + MR > e.rows || b + NR > e.columns) return true;
    if (e.self && (e.mask != nullptr || a + MR > b)) return true;
    if (e.class_ends != nullptr && e.class_ends[a + MR - 1] > b) return true;
    if (e.positives == nullptr) return false;
    bool found = false;
    for (int m = 0; m < MR; ++m) {
      const int64_t column = e.positives[a + m] - b;
      found |= column >= 0 && column < NR;
    }
    return found;
  }

  // Rows of the panel from `begin` on, whole micro-tiles, which either all need a mask or do not.
  struct Run {
    int64_t begin, end;
    bool masked;
  };
  static Run next_run(const Similarity& t, int64_t j, int64_t begin, int64_t height) {
    Run run{begin, begin, needs_mask(t.exclusion, t.row + begin, t.column + j)};
    do run.end += MR;
    while (run.end < height &&
           needs_mask(t.exclusion, t.row + run.end, t.column + j) == run.masked);
    return run;
  }

  // Rows of the panel that are computed: with `self` those down to the diagonal.
  static int64_t panel_height(const Similarity& t, int64_t j) {
    if (!t.exclusion.self) return t.height;
    return least(t.height, round_up(t.column + j + NR - t.row, MR));
  }

  static void read_positive(const Similarity& t, V s, int64_t a, int64_t b) {
    const Exclusion& e = t.exclusion;
    if (a >= e.rows) return;
    const int64_t positive = e.pairs ? a ^ 1 : e.positives[a];
    const int64_t lane = positive - b;
    if (lane < 0 || lane >= L) return;
    if (!e.self) {
      t.positive[a - t.row] = s[lane];
    } else if (a < positive) {  // above the diagonal the entry stands for both rows
      t.positive[a - t.row] = t.positive[positive - t.row] = s[lane];
    }
  }

  // Excluded entries of a vector become -inf. On the way, positives and the sum of negatives are
  // written.
  static V mask_entries(const Similarity& t, V s, int64_t a, int64_t b) {
    const I included = included_mask(t.exclusion, a, b);
    if (t.positive != nullptr) read_positive(t, s, a, b);
    if (t.negative_sum != nullptr)  // an entry stands for both orders
      *t.negative_sum += 2 * static_cast<double>(total(included != 0 ? s : V{}));
    return included != 0 ? s : all(kLowest);
  }

  // What becomes of the exponentials; streamed ones are written around the caches.
  enum Store { kNotStored, kStored, kStreamed };

  // Rows [begin, end) of the tile's panel j, with a constant shift.
  template <bool MASKED, Store STORE, bool SUMS>
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
          V x = Tile::template exp2<false>(s, scale, rest, shift, table);
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
          if constexpr (STORE != kNotStored) {
            if (MASKED && !is_stored(t, i + m, j)) continue;
            T* to = t.out + (i + m) * t.out_stride + j + v * L;
            STORE == kStreamed ? stream(to, x) : store(to, x);
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

  // mirror() fills a tile below its diagonal, perhaps in another thread.
  static bool is_stored(const Similarity& t, int64_t i, int64_t j) {
    return !t.exclusion.self || t.row + i < t.column + j + NR;
  }

  // Adds the lanes of row sums and maxima, L rows at a time.
  static void add_lanes(const Similarity& t) {
    const T *sums = t.scratch, *maxima = t.scratch + t.height * L;
    int64_t i = 0;
    for (; i + L <= t.height; i += L) {
      V sum[L], maximum[L];
      for (int l = 0; l < L; ++l) {
        sum[l] = load(sums + (i + l) * L);
        maximum[l] = load(maxima + (i + l) * L);
      }
      Tile::template transpose<L / 2>(sum);
      Tile::template transpose<L / 2>(maximum);
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

  template <Store STORE, bool SUMS>
  static void tile_constant(const Similarity& t) {
    if constexpr (SUMS) {
      for (int64_t i = 0; i < t.height * L; i += L) {
        store(t.scratch + i, V{});
        store(t.scratch + t.height * L + i, all(kLowest));
      }
    }
    for (int64_t j = 0; j < t.width; j += NR) {
      const int64_t height = panel_height(t, j);
      for (Run run{}; run.end < height;) {
        run = next_run(t, j, run.end, height);
        run.masked ? run_constant<true, STORE, SUMS>(t, j, run.begin, run.end)
                   : run_constant<false, STORE, SUMS>(t, j, run.begin, run.end);
      }
    }
    if constexpr (STORE == kStreamed) fence();
    if constexpr (SUMS) {
      add_lanes(t);
    }
  }

  static void store_similarities(const Similarity& t) {
    for (int64_t j = 0; j < t.width; j += NR) {
      const int64_t height = panel_height(t, j);
      for (int64_t i = 0; i < height; i += MR) {
        const bool masked = needs_mask(t.exclusion, t.row + i, t.column + j);
        V acc[MR][NV] = {};
        similarities(acc, t, i, j);
        for (int m = 0; m < MR; ++m) {
          for (int v = 0; v < NV; ++v) {
            V s = acc[m][v];
            if (masked) s = mask_entries(t, s, t.row + i + m, t.column + j + v * L);
            if (is_stored(t, i + m, j)) store(t.out + (i + m) * t.out_stride + j + v * L, s);
          }
        }
      }
    }
  }

  // Sums relative to running maxima, from the stored similarities: first of rows, then of columns.
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
        sum += x > all(kLowest) ? Tile::template exp2<true>(x - top, scale, rest, V{}, table) : V{};
      }
      const V before = Tile::template exp2<true>(all(t.row_max[i]) - top, scale, rest, V{}, table);
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
        sum +=
            x > all(kLowest) ? Tile::template exp2<true>(x - shift, scale, rest, V{}, table) : V{};
      }
      const V before = previous > all(kLowest)
                           ? Tile::template exp2<true>(previous - shift, scale, rest, V{}, table)
                           : V{};
      store(t.column_sum + j, load(t.column_sum + j) * before + sum);
      store(t.column_max + j, top);
    }
  }

  // A stored tile on the diagonal is symmetric: the part above it is copied to the part below.
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
      tile_constant<kNotStored, true>(t);
    } else if (t.row_sum == nullptr) {
      t.past_caches ? tile_constant<kStreamed, false>(t) : tile_constant<kStored, false>(t);
      mirror(t);
    } else {
      t.past_caches ? tile_constant<kStreamed, true>(t) : tile_constant<kStored, true>(t);
      mirror(t);
    }
  }

  static int64_t scratch_size(int64_t height) { return 2 * height * L; }
};

}  // namespace
}  // namespace cjepa
