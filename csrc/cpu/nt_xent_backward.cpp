// G = e_ab (w_a + w_b) a tile at a time, dz_I += G z_J and dz_J += G^T z_I: a tournament of row
// blocks, in which every block plays once a round, so that no two threads add to the same rows.
#include "nt_xent.h"

namespace cjepa {
namespace {

// Blocks that meet in a round of the tournament; round -1 has the diagonal.
std::vector<std::pair<int64_t, int64_t>> tournament_round(int64_t round, int64_t blocks) {
  std::vector<std::pair<int64_t, int64_t>> pairs;
  if (round < 0) {
    for (int64_t b = 0; b < blocks; ++b) pairs.emplace_back(b, b);
    return pairs;
  }
  const int64_t players = blocks + blocks % 2;  // an odd number gets a bye
  for (int64_t k = 0; k < players / 2; ++k) {
    const int64_t a = k == 0 ? players - 1 : (round + k) % (players - 1);
    const int64_t b = k == 0 ? round : (round - k + players - 1) % (players - 1);
    if (a < blocks && b < blocks) pairs.emplace_back(std::min(a, b), std::max(a, b));
  }
  return pairs;
}

template <typename T, typename S>
void write_rows(Tensor& out, int64_t row, int64_t features, const T* from) {
  S* to = static_cast<S*>(out.mutable_data_ptr()) + row * features;
  for (int64_t d = 0; d < features; ++d) to[d] = static_cast<S>(static_cast<T>(from[d]));
}

template <typename T>
void write_row(Tensor& out, int64_t row, int64_t features, const T* from) {
  switch (out.scalar_type()) {
    case ScalarType::Double:
      return write_rows<T, double>(out, row, features, from);
    case ScalarType::Half:
      return write_rows<float, torch::headeronly::Half>(out, row, features,
                                                        reinterpret_cast<const float*>(from));
    case ScalarType::BFloat16:
      return write_rows<float, torch::headeronly::BFloat16>(out, row, features,
                                                            reinterpret_cast<const float*>(from));
    default:
      return write_rows<T, float>(out, row, features, from);
  }
}

}  // namespace

template <typename T>
std::tuple<Tensor, Tensor, Tensor> nt_xent_backward(
    const Tensor& grad_loss, const Tensor& z_i, const Tensor& z_j,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& temperature_tensor,
    const Tensor& shifts, const Tensor& log_sums, const Tensor& positive,
    const Exponents<T>& exponents, bool cosine, double eps, const std::string& reduction,
    std::optional<ScalarType> product_dtype) {
  const TileCore<T>& core = tile_core<T>();
  const PackedBatch<T> z(z_i, z_j, cosine, static_cast<T>(eps), product_dtype, core.panel);
  const Layout& layout = z.layout;
  const std::vector<uint8_t> excluded = symmetric_mask(mask, layout.batch);
  const Exclusion exclusion{layout.rows, mask.has_value() ? excluded.data() : nullptr,
                            layout.batch};
  const int64_t padded_features = round_up(layout.features, core.panel);

  // w_a = g_a r_a / S_a, S_a being the sum of exponentials relative to the shift. The largest |g|
  // and the 1 / M of "mean" are applied at the end, so that a loss scale pushes no weight out of
  // range.
  Buffer<T> weight(layout.padded_rows), pull(layout.padded_rows), shift(layout.padded_rows);
  const T* shift_data = static_cast<const T*>(shifts.const_data_ptr());
  const T* log_sum_data = static_cast<const T*>(log_sums.const_data_ptr());
  const T* positive_data = static_cast<const T*>(positive.const_data_ptr());
  const T* grad_data = static_cast<const T*>(grad_loss.const_data_ptr());
  const int64_t grad_stride = reduction == "none" ? grad_loss.stride(0) : 0;
  double largest = 0;
  for (int64_t a = 0; a < (grad_stride == 0 ? 1 : layout.rows); ++a)
    largest = std::max(largest, std::fabs(static_cast<double>(grad_data[a * grad_stride])));
  if (largest == 0) largest = 1;
  for (int64_t a = 0; a < layout.padded_rows; ++a) {
    weight[a] = pull[a] = shift[a] = 0;
    if (a >= layout.rows) continue;
    const int64_t at = layout.original(a);
    const double log_sum = log_sum_data[at];
    const double gap =
        (static_cast<double>(shift_data[at]) - positive_data[at]) / exponents.tau + log_sum;
    const double r = 1 / (1 + std::exp(-gap));
    const double g = grad_data[at * grad_stride] / largest;
    shift[a] = shift_data[at];
    pull[a] = static_cast<T>(g * r);
    if (log_sum == -kInfinity) continue;  // no negatives: r is 0, and nothing pulls
    weight[a] = static_cast<T>(g * r * std::exp(-log_sum - exponents.shift_error));
  }

  // The rows once more, as right-hand sides of the products: [block][D / panel][row][panel]
  Buffer<T> products(layout.padded_rows * padded_features);
  Buffer<T> grad(layout.padded_rows * padded_features);
  torch::stable::parallel_for(0, layout.blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      T* to = products.get() + b * layout.block * padded_features;
      for (int64_t d = 0; d < padded_features; d += core.panel) {
        const int64_t width = std::min(core.panel, layout.features - d);
        for (int64_t a = 0; a < layout.block; ++a, to += core.panel) {
          const T* from = z.rows.get() + (b * layout.block + a) * layout.features + d;
          std::copy(from, from + width, to);
          std::fill(to + width, to + core.panel, T{0});
        }
      }
      T* g = grad.get() + b * layout.block * padded_features;
      std::fill(g, g + layout.block * padded_features, T{0});
    }
  });

  const int64_t rounds = layout.blocks + layout.blocks % 2 - 1;
  for (int64_t round = -1; round < rounds; ++round) {
    const auto pairs = tournament_round(round, layout.blocks);
    torch::stable::parallel_for(0, pairs.size(), 1, [&](int64_t begin, int64_t end) {
      Buffer<T> coefficients(layout.block * layout.block);
      for (int64_t p = begin; p < end; ++p) {
        const auto [i, j] = pairs[p];
        BackwardTile<T> g;
        g.tile = make_tile(z, core, exponents, mask.has_value(), i, j, static_cast<T*>(nullptr));
        g.exclusion = exclusion;
        g.constant_shift = exponents.constant;
        g.shift = exponents.shift;
        const int64_t row = g.tile.row, column = g.tile.column;
        g.row_shift = shift.get() + row;
        g.column_shift = shift.get() + column;
        g.row_weight = weight.get() + row;
        g.column_weight = weight.get() + column;
        g.row_pull = pull.get() + row;
        g.column_pull = pull.get() + column;
        g.out = coefficients.get();
        g.stride = layout.block;
        core.backward(g);
        Product<T> product;
        product.panel_rows = layout.block;
        product.features = padded_features;
        product.out_stride = padded_features;
        product.a = coefficients.get();
        product.a_row = layout.block;
        product.a_column = 1;
        product.height = g.tile.height;
        product.depth = layout.valid(j);
        product.panels = products.get() + column * padded_features;
        product.out = grad.get() + row * padded_features;
        core.product(product);
        if (i == j) continue;
        product.a_row = 1;
        product.a_column = layout.block;
        product.height = round_up(layout.valid(j), core.micro_rows);
        product.depth = layout.valid(i);
        product.panels = products.get() + row * padded_features;
        product.out = grad.get() + column * padded_features;
        core.product(product);
      }
    });
  }

  Tensor grads[2] = {make(z_i, {layout.batch, layout.features}, z_i.scalar_type()),
                     make(z_j, {layout.batch, layout.features}, z_j.scalar_type())};
  const View<T> views[2] = {View<T>(z_i), View<T>(z_j)};
  const double factor = largest / exponents.tau / (reduction == "mean" ? layout.rows : 1);
  std::vector<double> along(layout.rows);  // z . dL/dz of each row, for the temperature
  torch::stable::parallel_for(0, layout.rows, 64, [&](int64_t begin, int64_t end) {
    Buffer<T> unit(layout.features);
    for (int64_t a = begin; a < end; ++a) {
      T* g = grad.get() + a * padded_features;
      const int64_t features = layout.features;
      for (int64_t d = 0; d < features; ++d) g[d] *= static_cast<T>(factor);
      along[a] = sum_of_products(g, z.rows.get() + a * features, features);
      if (cosine) {
        views[a & 1].read(a >> 1, features, unit.get());
        const T norm = std::sqrt(sum_of_products(unit.get(), unit.get(), features));
        if (norm <= static_cast<T>(eps)) {
          std::fill(g, g + features, T{0});
        } else {
          for (int64_t d = 0; d < features; ++d) unit[d] /= norm;
          const T projection = sum_of_products(g, unit.get(), features);
          for (int64_t d = 0; d < features; ++d) g[d] = (g[d] - projection * unit[d]) / norm;
        }
      }
      write_row(grads[a & 1], a >> 1, features, g);
    }
  });
  double total = 0;
  for (double x : along) total += x;
  const Tensor& like = temperature_tensor.has_value() ? *temperature_tensor : shifts;
  Tensor grad_temperature = make(like, {1}, like.scalar_type());
  const T value = static_cast<T>(total / (-2 * exponents.tau));
  write_row(grad_temperature, 0, 1, &value);
  return {grads[0], grads[1], torch::stable::view(grad_temperature, {})};
}

template std::tuple<Tensor, Tensor, Tensor> nt_xent_backward<float>(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&,
    const std::optional<Tensor>&, const Tensor&, const Tensor&, const Tensor&,
    const Exponents<float>&, bool, double, const std::string&, std::optional<ScalarType>);

template std::tuple<Tensor, Tensor, Tensor> nt_xent_backward<double>(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&,
    const std::optional<Tensor>&, const Tensor&, const Tensor&, const Tensor&,
    const Exponents<double>&, bool, double, const std::string&, std::optional<ScalarType>);

}  // namespace cjepa
