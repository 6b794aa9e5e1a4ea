// Single rows: normalisation, packing, and the last step of a gradient. Only tile_core_impl.h may
// include this file.
#pragma once

#include <cstdint>

#include "micro_tile.h"
#include "tile_core.h"

namespace cjepa {
namespace {

template <typename T, typename Operand>
struct RowCore : MicroTile<T, Operand> {
  CJEPA_USING_MICRO_TILE(T, Operand)

  // There are four sums, so that an addition does not wait for the one before it.
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
      if (panel != nullptr) transpose_slice(slice, valid, count, panel + k * NR);
    }
  }

  static void pack_panel(const P* slices, int64_t slice_rows, int64_t valid, int64_t depth,
                         P* panel) {
    for (int64_t k = 0; k < depth; k += NR)
      transpose_slice(slices + k * slice_rows, valid, least(NR, depth - k), panel + k * NR);
  }

  // Writes the first `count` columns of a slice as rows.
  static void transpose_slice(const P* slice, int64_t valid, int64_t count, P* out) {
    static_assert(sizeof(P) == sizeof(T));  // P are moved as if they were T
    for (int64_t c = 0; c < count; c += L) {
      for (int64_t r = 0; r < valid; r += L) {
        V x[L];
        for (int l = 0; l < L; ++l) x[l] = *reinterpret_cast<const V*>(slice + (r + l) * NR + c);
        Tile::template transpose<L / 2>(x);
        for (int l = 0; l < least(L, count - c); ++l)
          *reinterpret_cast<V*>(out + (c + l) * NR + r) = x[l];
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
    for (int64_t d = 0; d < f.features; ++d)
      g[d] = (g[d] - f.positive_weight * f.positive[d]) * f.factor;
    const T own_dot_gradient = dot(g, f.own, f.features);
    if (f.unit != nullptr) {
      const T projection = dot(g, f.unit, f.features);
      const T inverse = 1 / f.norm;
      for (int64_t d = 0; d < f.features; ++d) g[d] = (g[d] - projection * f.unit[d]) * inverse;
    }
    return own_dot_gradient;
  }
};

}  // namespace
}  // namespace cjepa
