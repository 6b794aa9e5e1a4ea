// dL/dz_a = sum_b e_ab (w_a + w_b) z_b - the positive's pull: the rows of a block meet the tiles of
// all others, so no two threads add to the same row. The exponentials are the ones the forward
// kept; without them they are computed again, a square of blocks at a time, in a workspace of
// bounded size.
#include "nt_xent.h"

namespace cjepa {
namespace {

constexpr int64_t kWorkspaceBytes = int64_t{64} << 20;

// Exponentials (or similarities) of the tiles (i, j), i <= j, i in [first, last) and j in
// [column_first, column_last) of blocks.
template <typename T>
struct KeptTiles {
  T* data;
  int64_t blocks, block;
  bool all;  // every tile on and above the diagonal, as the forward leaves them
  int64_t first, last, column_first, column_last;

  T* tile(int64_t i, int64_t j) const {
    const int64_t number = all ? tile_number(i, j, blocks)
                               : (i - first) * (column_last - column_first) + j - column_first;
    return data + number * block * block;
  }
};

template <typename T>
struct Weights {  // per row, padded with zeros
  Buffer<T> weight, pull, shift;
  double largest = 0;  // of |dL/dloss_a|; weights are relative to it
};

// w_a = g_a r_a / S_a, S_a being the sum of exponentials relative to the shift. The largest |g| and
// the 1 / M of "mean" are applied at the end, so that a loss scale pushes no weight out of range.
template <typename T, typename P>
Weights<T> make_weights(const Pairs<T, P>& pairs, const Options& options, const Tensor& grad_loss,
                        const Saved& saved) {
  const int64_t padded = pairs.z.layout.padded_rows(), rows = pairs.z.layout.rows;
  Weights<T> w{Buffer<T>(padded), Buffer<T>(padded), Buffer<T>(padded)};
  const auto data = [](const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
  const T *shift = data(saved.shift), *log_sum = data(saved.log_sum);
  const T *positive = data(saved.positive), *grad = data(grad_loss);
  const int64_t stride = options.reduction == "none" ? grad_loss.stride(0) : 0;
  for (int64_t a = 0; a < (stride == 0 ? 1 : rows); ++a)
    w.largest = std::max(w.largest, std::fabs(static_cast<double>(grad[a * stride])));
  if (w.largest == 0) w.largest = 1;
  constexpr int64_t kRows = 512;
  const int64_t parts = (padded + kRows - 1) / kRows;
  deal(parts, 100.0 * padded, [&](const auto& take) {
    for (int64_t k; (k = take()) < parts;) {
      for (int64_t a = k * kRows; a < std::min(padded, (k + 1) * kRows); ++a) {
        w.weight[a] = w.pull[a] = w.shift[a] = 0;
        if (a >= rows) continue;
        const int64_t at = pairs.original(a);
        const double sum = log_sum[at], tau = pairs.shift.tau;
        const double gap = (static_cast<double>(shift[at]) - positive[at]) / tau + sum;
        const double r = 1 / (1 + std::exp(-gap));
        const double g = grad[at * stride] / w.largest;
        w.shift[a] = shift[at];
        w.pull[a] = static_cast<T>(g * r);
        if (sum == -kInfinity) continue;  // no negatives: r is 0, and nothing pulls
        w.weight[a] = static_cast<T>(g * r * std::exp(-sum - pairs.shift.error));
      }
    }
  });
  return w;
}

template <typename T, typename P>
void fill_tiles(const TileCore<T, P>& core, const Pairs<T, P>& pairs, const KeptTiles<T>& kept) {
  const PackedBatch<T, P>& z = pairs.z;
  const int64_t panels = z.layout.block / core.panel;
  const int64_t columns = kept.column_last - kept.column_first;
  const int64_t count = (kept.last - kept.first) * columns * panels;
  const double work = 1.0 * count * z.layout.block * core.panel * z.depth;
  deal(count, work, [&](const auto& take) {
    for (int64_t k; (k = take()) < count;) {
      const int64_t i = kept.first + k / panels / columns;
      const int64_t j = kept.column_first + k / panels % columns;
      const int64_t begin = k % panels * core.panel;
      if (i > j || begin >= z.layout.valid(j)) continue;
      SimilarityTile<T, P> t = make_tile(core, z, z, i, j, begin, begin + core.panel);
      t.exclusion = pairs.exclusion;
      t.exponent = pairs.shift.exponent;
      t.out = kept.tile(i, j) + begin;
      t.out_stride = z.layout.block;
      core.similarity(t);
    }
  });
}

// Where sums of gradients are kept: rows alternate between two bases.
template <typename T>
struct Rows {
  T* base[2];
  int64_t stride;
  T* row(int64_t a) const { return base[a & 1] + (a >> 1) * stride; }
  Rows from(int64_t a) const { return {{row(a), row(a + 1)}, stride}; }  // a is even
};

template <typename T>
void write_row(Tensor& out, int64_t row, int64_t features, const T* from) {
  const auto write = [&](auto zero) {
    auto* to = static_cast<decltype(zero)*>(out.mutable_data_ptr()) + row * features;
    for (int64_t d = 0; d < features; ++d) to[d] = static_cast<decltype(zero)>(from[d]);
  };
  switch (out.scalar_type()) {
    case ScalarType::Double:
      return write(double());
    case ScalarType::Half:
      if constexpr (sizeof(T) == 4) return write(torch::headeronly::Half());
      return;
    case ScalarType::BFloat16:
      if constexpr (sizeof(T) == 4) return write(torch::headeronly::BFloat16());
      return;
    default:
      return write(float());
  }
}

// Turns sums into gradients of the raw embeddings.
template <typename T, typename P>
struct Finisher {
  const TileCore<T, P>& core;
  const Pairs<T, P>& pairs;
  const Weights<T>& weights;
  T factor;
  Tensor* grads;       // of the two views
  bool in_place;       // the sums lie in `grads`
  std::vector<double>& along;  // z . dL/dz of each row, for the temperature

  // Rows [begin, end), even numbers; sums.row(0) is row `begin`.
  void run(int64_t begin, int64_t end, const Rows<T>& sums) const {
    const int64_t features = pairs.z.layout.features;
    Buffer<T> raw(features), unit(2 * features), rounded(2 * features);
    for (int64_t a = begin; a < end; a += 2) {
      T norm[2];
      for (int64_t v = 0; v < 2; ++v) {
        const int64_t at = v * features;
        norm[v] = pairs.rounding.apply(core, pairs.views[v].row(a >> 1, raw.get()), features,
                                       unit.get() + at, rounded.get() + at);
      }
      const T pull = weights.pull[a] + weights.pull[a + 1];
      for (int64_t v = 0; v < 2; ++v) {
        FinishRow<T> f{};
        f.gradient = sums.row(a + v - begin);
        f.own = rounded.get() + v * features;
        f.positive = rounded.get() + (1 - v) * features;
        f.unit = pairs.rounding.cosine ? unit.get() + v * features : nullptr;
        f.pull = pull;
        f.factor = factor;
        f.norm = norm[v];
        f.features = features;
        along[a + v] = core.finish(f);
        if (pairs.rounding.cosine && norm[v] <= pairs.rounding.eps)
          std::fill(f.gradient, f.gradient + features, T{0});
        if (!in_place) write_row(grads[v], a >> 1, features, f.gradient);
      }
    }
  }
};

// Adds the products of rows [begin, end) of block i with the tiles (i, j) and (j, i) for j in
// [first, last) to `out`, whose row 0 is row `begin` of the block.
template <typename T, typename P>
void add_products(const TileCore<T, P>& core, const Pairs<T, P>& pairs, const Weights<T>& weights,
                  const KeptTiles<T>& kept, int64_t i, int64_t begin, int64_t end, int64_t first,
                  int64_t last, bool accumulate, const Rows<T>& out, P* coefficients) {
  const PackedBatch<T, P>& z = pairs.z;
  constexpr int64_t kNumbers = PackedBatch<T, P>::kNumbers;
  const int64_t block = z.layout.block, row = i * block + begin;
  for (int64_t j = first; j < last; ++j) {
    const bool above = i <= j;  // the tile's rows are ours, else its columns
    const int64_t depth = z.layout.valid(j), other = j * block;
    Coefficients<T, P> c{};
    c.kept = above ? kept.tile(i, j) + begin * block : kept.tile(j, i) + begin;
    c.kept_stride = block;
    c.height = above ? end - begin : depth;
    c.width = above ? depth : end - begin;
    c.exponent = pairs.shift.exponent;
    const int64_t of_rows = above ? row : other, of_columns = above ? other : row;
    c.row_shift = weights.shift.get() + of_rows;
    c.row_weight = weights.weight.get() + of_rows;
    c.column_shift = weights.shift.get() + of_columns;
    c.column_weight = weights.weight.get() + of_columns;
    c.out = coefficients;
    c.out_stride = kCoefficientStride;
    above ? core.coefficients(c) : core.coefficients_over_rows(c);
    Product<T, P> p{};
    p.a = coefficients;
    p.transposed = !above;
    p.a_stride = kCoefficientStride;
    p.height = end - begin;
    p.depth = depth / kNumbers;
    p.panels = z.products_of(j);
    p.panel_depth = block / kNumbers;
    p.features = z.padded_features;
    p.out[0] = out.base[0];
    p.out[1] = out.base[1];
    p.stride = out.stride;
    p.accumulate = accumulate || j > first;
    if (j + 1 < last) {
      p.next_panels = z.products_of(j + 1);
      const bool next_above = i <= j + 1;
      p.prefetch = reinterpret_cast<const char*>(next_above ? kept.tile(i, j + 1) + begin * block
                                                            : kept.tile(j + 1, i) + begin);
      p.prefetch_rows = next_above ? end - begin : z.layout.valid(j + 1);
      p.prefetch_bytes = (next_above ? z.layout.valid(j + 1) : end - begin) * sizeof(T);
      p.prefetch_stride = block * sizeof(T);
    }
    core.product(p);
  }
}

}  // namespace

template <typename T, typename P>
std::tuple<Tensor, Tensor, Tensor> nt_xent_backward(const Options& options, const Tensor& grad_loss,
                                                    const Saved& saved) {
  const TileCore<T, P>& core = tile_core<T, P>();
  const bool have_all = saved.kept.size(0) > 0;
  const Pairs<T, P> pairs(options, core, {!have_all, true, false});
  const Layout& layout = pairs.z.layout;
  const int64_t block = layout.block, blocks = layout.blocks, features = layout.features;
  const Weights<T> weights = make_weights(pairs, options, grad_loss, saved);

  const ScalarType dtype = options.z_i.scalar_type();
  Tensor grads[2] = {make(options.z_i, {options.z_i.size(0), features}, dtype),
                     make(options.z_j, {options.z_j.size(0), features}, dtype)};

  // The workspace holds a square of `side` by `side` tiles. Where that is all of them, the sums of
  // a few rows are complete in one go and need no memory beyond that.
  const int64_t area = block * block;
  const int64_t most = static_cast<int64_t>(
      std::sqrt(static_cast<double>(kWorkspaceBytes) / static_cast<double>(area * sizeof(T))));
  const int64_t side = have_all ? blocks : std::min(blocks, most);
  const bool single = side == blocks;
  const int64_t padded_features = pairs.z.padded_features;
  const bool in_place = !single && dtype == dtype_of<T>() && padded_features == features;
  const Buffer<T> workspace(have_all ? 0 : side * side * area);
  const Buffer<T> buffer(single || in_place ? 0 : layout.rows * padded_features);
  Rows<T> sums{{buffer.get(), buffer.get() + padded_features}, 2 * padded_features};
  if (in_place) {
    sums = {{static_cast<T*>(grads[0].mutable_data_ptr()),
             static_cast<T*>(grads[1].mutable_data_ptr())},
            features};
  }

  const double mean = options.reduction == "mean" ? static_cast<double>(layout.rows) : 1;
  std::vector<double> along(layout.rows);
  const Finisher<T, P> finisher{core,
                                pairs,
                                weights,
                                static_cast<T>(weights.largest / pairs.shift.tau / mean),
                                grads,
                                in_place,
                                along};

  // Rows of a block for one thread at a time: few enough that the threads end together.
  const int64_t threads = torch::stable::get_num_threads();
  int64_t unit = 96;
  while (unit > 24 && layout.rows < 4 * threads * unit) unit /= 2;
  const int64_t units = block / unit;
  for (int64_t first = 0; first < blocks; first += side) {
    const int64_t last = std::min(first + side, blocks);
    for (int64_t other = first; other < blocks; other += side) {
      const int64_t other_last = std::min(other + side, blocks);
      KeptTiles<T> kept{workspace.get(), blocks, block, false, first, last, other, other_last};
      if (have_all) {
        kept.data = const_cast<T*>(static_cast<const T*>(saved.kept.const_data_ptr()));
        kept.all = true;
      } else {
        fill_tiles(core, pairs, kept);
      }
      // Rows of the square's first side, then, off the diagonal, of its second.
      const int64_t own = (last - first) * units;
      const int64_t count = own + (other == first ? 0 : (other_last - other) * units);
      const double work = 1.0 * count * unit * (last - first) * block * features;
      deal(count, work, [&](const auto& take) {
        Buffer<P> coefficients(block * kCoefficientStride + 64);
        Buffer<T> space(single ? unit * padded_features : 0);
        for (int64_t k; (k = take()) < count;) {
          const bool second = k >= own;
          const int64_t i = second ? other + (k - own) / units : first + k / units;
          const int64_t begin = k % units * unit, end = std::min(begin + unit, layout.valid(i));
          if (begin >= end) continue;
          const int64_t row = i * block + begin;
          const Rows<T> out =
              single ? Rows<T>{{space.get(), space.get() + padded_features}, 2 * padded_features}
                     : sums.from(row);
          add_products(core, pairs, weights, kept, i, begin, end, second ? first : other,
                       second ? last : other_last, second ? first > 0 : other > 0, out,
                       coefficients.get());
          if (single) finisher.run(row, row + end - begin, out);
        }
      });
    }
  }
  if (!single) {
    const int64_t parts = (layout.rows + kPackedRows - 1) / kPackedRows;
    deal(parts, 20.0 * layout.rows * features, [&](const auto& take) {
      for (int64_t k; (k = take()) < parts;) {
        const int64_t begin = k * kPackedRows, end = std::min(begin + kPackedRows, layout.rows);
        finisher.run(begin, end, sums.from(begin));
      }
    });
  }

  // L is a function of z z^T / tau, so dL/dtau = -(1 / 2 tau) sum z . dL/dz (Euler).
  double total = 0;
  for (double x : along) total += x;
  const Tensor& like =
      options.temperature_tensor.has_value() ? *options.temperature_tensor : saved.shift;
  Tensor grad_temperature = make(like, {1}, like.scalar_type());
  const T value = static_cast<T>(total / (-2 * pairs.shift.tau));
  write_row(grad_temperature, 0, 1, &value);
  return {grads[0], grads[1], torch::stable::view(grad_temperature, {})};
}

template std::tuple<Tensor, Tensor, Tensor> nt_xent_backward<float, float>(const Options&,
                                                                           const Tensor&,
                                                                           const Saved&);
template std::tuple<Tensor, Tensor, Tensor> nt_xent_backward<float, Bf16Pair>(const Options&,
                                                                              const Tensor&,
                                                                              const Saved&);
template std::tuple<Tensor, Tensor, Tensor> nt_xent_backward<double, double>(const Options&,
                                                                             const Tensor&,
                                                                             const Saved&);

}  // namespace cjepa
