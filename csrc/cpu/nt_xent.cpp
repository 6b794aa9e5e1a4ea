// NT-Xent on the CPU: the operators nt_xent and nt_xent_backward under the dispatch key CPU.
//
//   forward   tiles on and above the diagonal of S; a row's sum is that of its tiles' rows and,
//             S being symmetric, of the columns of the tiles above
//   backward  G = e_ab (w_a + w_b) a tile at a time, dz_I += G z_J and dz_J += G^T z_I; a
//             tournament of row blocks, in which every block plays once a round, so that no two
//             threads add to the same rows
//
// Every sum has an order that depends on M alone: the same bits on any number of threads.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <string>
#include <tuple>

#include "../instruction_sets.h"
#include "packing.h"
#include "tile_core.h"
#include "tile_cores.h"

namespace cjepa {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

double read_scalar(const Tensor& t) {
  const void* data = t.const_data_ptr();
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return *static_cast<const double*>(data);
    case ScalarType::Half:
      return static_cast<float>(*static_cast<const torch::headeronly::Half*>(data));
    case ScalarType::BFloat16:
      return static_cast<float>(*static_cast<const torch::headeronly::BFloat16*>(data));
    default:
      return *static_cast<const float*>(data);
  }
}

double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }

// Which shift the exponents take. |s| <= 1.008 with rounded operands, so with the constant 1 / tau
// no exponent leaves the dtype's range while 2 / tau log2(e) stays inside it.
template <typename T>
struct Exponents {
  double tau;
  bool constant;
  T scale, scale_rest, shift;
  double shift_error;  // log of what rounding the shift to T multiplies every exponential by

  Exponents(const std::optional<Tensor>& tensor, double number, bool cosine)
      : tau(tensor.has_value() ? read_scalar(*tensor) : number) {
    if (!(tau > 0)) tau = kNaN;
    const double range = std::is_same_v<T, float> ? 124 : 1000;
    constant = cosine && 2.02 * kLog2E / tau < range;
    scale = static_cast<T>(kLog2E / tau);
    scale_rest = static_cast<T>(kLog2E / tau - scale);
    shift = constant ? scale : T{0};
    shift_error = constant ? (kLog2E / tau - shift) / kLog2E : 0;
  }
};

std::vector<uint8_t> symmetric_mask(const std::optional<Tensor>& mask, int64_t batch) {
  std::vector<uint8_t> out;
  if (!mask.has_value()) return out;
  const auto* m = static_cast<const uint8_t*>(mask->const_data_ptr());
  const int64_t row = mask->stride(0), column = mask->stride(1);
  out.resize(batch * batch);
  for (int64_t k = 0; k < batch; ++k)
    for (int64_t l = 0; l < batch; ++l)
      out[k * batch + l] = m[k * row + l * column] | m[l * row + k * column];
  return out;
}

template <typename T>
Tile<T> make_tile(const PackedBatch<T>& z, const TileCore<T>& core, const Exponents<T>& exponents,
                  bool masked, int64_t i, int64_t j, T* scratch) {
  const Layout& layout = z.layout;
  const int64_t row = i * layout.block, column = j * layout.block;
  Tile<T> t;
  t.z = z.rows.get() + row * layout.features;
  t.panels = z.panels.get() + column * layout.features;
  t.features = layout.features;
  t.row = row;
  t.column = column;
  t.height = round_up(layout.valid(i), core.micro_rows);
  t.width = round_up(layout.valid(j), core.panel);
  t.masked = masked || i == j || layout.valid(i) < layout.block || layout.valid(j) < layout.block;
  t.scale = exponents.scale;
  t.scale_rest = exponents.scale_rest;
  t.scratch = scratch;
  return t;
}

Tensor make(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

template <typename T>
constexpr ScalarType dtype_of() {
  return std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double;
}

template <typename T>
Tensor scalar(const Tensor& like, double value) {
  Tensor t = make(like, {}, dtype_of<T>());
  *static_cast<T*>(t.mutable_data_ptr()) = static_cast<T>(value);
  return t;
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Mean over the negative pairs without a pass over pairs:
// (|sum z|^2 - sum |z_a|^2 - sum s_pos) / (M (M - 2))
template <typename T>
double mean_negative(const PackedBatch<T>& z, double positive_sum) {
  const Layout& layout = z.layout;
  if (layout.rows <= 2) return kNaN;
  std::vector<double> sums(layout.blocks * layout.features), squares(layout.blocks);
  torch::stable::parallel_for(0, layout.blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      double* sum = sums.data() + b * layout.features;
      for (int64_t a = b * layout.block; a < b * layout.block + layout.valid(b); ++a) {
        const T* row = z.rows.get() + a * layout.features;
        for (int64_t d = 0; d < layout.features; ++d) sum[d] += row[d];
        squares[b] += sum_of_products(row, row, layout.features);
      }
    }
  });
  double total = -positive_sum;
  for (double s : squares) total -= s;
  for (int64_t d = 0; d < layout.features; ++d) {
    double s = 0;
    for (int64_t b = 0; b < layout.blocks; ++b) s += sums[b * layout.features + d];
    total += s * s;
  }
  return total / (static_cast<double>(layout.rows) * (layout.rows - 2));
}

template <typename T>
Outputs forward(const Tensor& z_i, const Tensor& z_j, const std::optional<Tensor>& mask,
                const Exponents<T>& exponents, bool cosine, double eps,
                const std::string& reduction, std::optional<ScalarType> product_dtype) {
  const TileCore<T>& core = tile_core<T>();
  const PackedBatch<T> z(z_i, z_j, cosine, static_cast<T>(eps), product_dtype, core.panel);
  const Layout& layout = z.layout;
  const std::vector<uint8_t> excluded = symmetric_mask(mask, layout.batch);
  const Exclusion exclusion{layout.rows, mask.has_value() ? excluded.data() : nullptr,
                            layout.batch};

  // The tiles are dealt to a fixed number of chunks, each with sums of its own that are added up
  // in order at the end.
  const int64_t tiles = layout.blocks * (layout.blocks + 1) / 2;
  const int64_t chunks = std::min<int64_t>(tiles, layout.rows >= 8192 ? 64 : 16);
  Buffer<T> sums(chunks * layout.padded_rows), maxima(chunks * layout.padded_rows);
  Buffer<T> positive(layout.padded_rows);
  std::vector<double> kept_sum(chunks);
  std::vector<int64_t> kept_count(chunks);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    Buffer<T> scratch(core.scratch_size(layout.block, layout.block));
    for (int64_t c = begin; c < end; ++c) {
      T* sum = sums.get() + c * layout.padded_rows;
      T* maximum = maxima.get() + c * layout.padded_rows;
      std::fill(sum, sum + layout.padded_rows, T{0});
      std::fill(maximum, maximum + layout.padded_rows, -std::numeric_limits<T>::infinity());
      int64_t t = tiles * c / chunks;
      const int64_t last = tiles * (c + 1) / chunks;
      int64_t i = 0, first = 0;  // tile row of t, and its first tile
      while (t >= first + layout.blocks - i) first += layout.blocks - i++;
      for (int64_t j = i + t - first; t < last; ++t, ++j) {
        if (j == layout.blocks) j = ++i;
        ForwardTile<T> f;
        f.tile = make_tile(z, core, exponents, mask.has_value(), i, j, scratch.get());
        f.exclusion = exclusion;
        f.constant_shift = exponents.constant;
        f.shift = exponents.shift;
        f.row_sum = sum + i * layout.block;
        f.row_max = maximum + i * layout.block;
        f.column_sum = i == j ? nullptr : sum + j * layout.block;
        f.column_max = i == j ? nullptr : maximum + j * layout.block;
        f.positive = i == j ? positive.get() + i * layout.block : nullptr;
        f.kept_sum = mask.has_value() ? &kept_sum[c] : nullptr;
        f.kept_count = mask.has_value() ? &kept_count[c] : nullptr;
        core.forward(f);
      }
    }
  });

  const ScalarType dtype = dtype_of<T>();
  Tensor lse = make(z_i, {layout.rows}, dtype), shifts = make(z_i, {layout.rows}, dtype);
  Tensor log_sums = make(z_i, {layout.rows}, dtype);
  Tensor positive_out = make(z_i, {layout.rows}, dtype);
  Tensor loss = reduction == "none" ? make(z_i, {layout.rows}, dtype) : make(z_i, {}, dtype);
  T* lse_data = static_cast<T*>(lse.mutable_data_ptr());
  T* shift_data = static_cast<T*>(shifts.mutable_data_ptr());
  T* log_sum_data = static_cast<T*>(log_sums.mutable_data_ptr());
  T* positive_data = static_cast<T*>(positive_out.mutable_data_ptr());
  T* loss_data = static_cast<T*>(loss.mutable_data_ptr());
  double loss_sum = 0, positive_sum = 0;
  int64_t hits = 0;
  for (int64_t a = 0; a < layout.rows; ++a) {
    double hardest = -kInfinity, total = 0;
    for (int64_t c = 0; c < chunks; ++c)
      hardest = std::max<double>(hardest, maxima[c * layout.padded_rows + a]);
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t at = c * layout.padded_rows + a;
      if (exponents.constant) {
        total += sums[at];
      } else if (maxima[at] > -std::numeric_limits<T>::infinity()) {
        total += sums[at] * std::exp((maxima[at] - hardest) / exponents.tau);
      }
    }
    const bool has_negatives = hardest > -kInfinity;
    const double shift = !has_negatives ? 0 : exponents.constant ? 1 : hardest;
    double log_sum = has_negatives ? std::log(total) - exponents.shift_error : -kInfinity;
    if (!z.finite || std::isnan(exponents.tau)) log_sum = kNaN;
    const double gap = (shift - positive[a]) / exponents.tau + log_sum;  // LSE- minus l_pos
    const double own = softplus(gap);
    const int64_t at = layout.original(a);
    shift_data[at] = static_cast<T>(shift);
    log_sum_data[at] = static_cast<T>(log_sum);
    lse_data[at] = static_cast<T>(positive[a] / exponents.tau + own);
    positive_data[at] = positive[a];
    if (reduction == "none") loss_data[at] = static_cast<T>(own);
    loss_sum += own;
    positive_sum += positive[a];
    hits += positive[a] > hardest;
  }
  const double rows = static_cast<double>(layout.rows);
  if (reduction != "none")
    *loss_data = static_cast<T>(reduction == "mean" ? loss_sum / rows : loss_sum);
  double negative = kNaN;
  if (mask.has_value()) {
    double sum = 0;
    int64_t count = 0;
    for (int64_t c = 0; c < chunks; ++c) {
      sum += kept_sum[c];
      count += kept_count[c];
    }
    if (count > 0) negative = sum / static_cast<double>(count);
  } else {
    negative = mean_negative(z, positive_sum);
  }
  return {loss,
          scalar<T>(z_i, static_cast<double>(hits) / rows),
          scalar<T>(z_i, positive_sum / rows),
          scalar<T>(z_i, negative),
          lse,
          shifts,
          log_sums,
          positive_out};
}

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

template <typename T>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_loss, const Tensor& z_i,
                                            const Tensor& z_j, const std::optional<Tensor>& mask,
                                            const std::optional<Tensor>& temperature_tensor,
                                            const Tensor& shifts, const Tensor& log_sums,
                                            const Tensor& positive, const Exponents<T>& exponents,
                                            bool cosine, double eps, const std::string& reduction,
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

Outputs nt_xent(Tensor z_i, Tensor z_j, std::optional<Tensor> mask,
                std::optional<Tensor> temperature_tensor, double temperature, bool cosine,
                double eps, std::string reduction, std::optional<ScalarType> product_dtype) {
  if (z_i.scalar_type() == ScalarType::Double) {
    const Exponents<double> exponents(temperature_tensor, temperature, cosine);
    return forward<double>(z_i, z_j, mask, exponents, cosine, eps, reduction, product_dtype);
  }
  const Exponents<float> exponents(temperature_tensor, temperature, cosine);
  return forward<float>(z_i, z_j, mask, exponents, cosine, eps, reduction, product_dtype);
}

std::tuple<Tensor, Tensor, Tensor> nt_xent_backward(Tensor grad_loss, Tensor z_i, Tensor z_j,
                                                    std::optional<Tensor> mask,
                                                    std::optional<Tensor> temperature_tensor,
                                                    Tensor shift, Tensor log_sum, Tensor positive,
                                                    double temperature, bool cosine, double eps,
                                                    std::string reduction,
                                                    std::optional<ScalarType> product_dtype) {
  if (z_i.scalar_type() == ScalarType::Double) {
    const Exponents<double> exponents(temperature_tensor, temperature, cosine);
    return backward<double>(grad_loss, z_i, z_j, mask, temperature_tensor, shift, log_sum, positive,
                            exponents, cosine, eps, reduction, product_dtype);
  }
  const Exponents<float> exponents(temperature_tensor, temperature, cosine);
  return backward<float>(grad_loss, z_i, z_j, mask, temperature_tensor, shift, log_sum, positive,
                         exponents, cosine, eps, reduction, product_dtype);
}

}  // namespace
}  // namespace cjepa

STABLE_TORCH_LIBRARY_IMPL(cjepa_kernels, CPU, m) {
  m.impl("nt_xent", TORCH_BOX(&cjepa::nt_xent));
  m.impl("nt_xent_backward", TORCH_BOX(&cjepa::nt_xent_backward));
}
