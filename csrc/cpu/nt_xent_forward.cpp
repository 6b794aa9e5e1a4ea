// Tiles on and above the diagonal of S: a row's sum is that of its tiles' rows and, S being
// symmetric, of the columns of the tiles above. Sums are added in an order that depends on M alone:
// the same bits on any number of threads.
#include "nt_xent.h"

namespace cjepa {
namespace {

double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }

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

}  // namespace

template <typename T>
Outputs nt_xent_forward(const Tensor& z_i, const Tensor& z_j, const std::optional<Tensor>& mask,
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

template Outputs nt_xent_forward<float>(const Tensor&, const Tensor&, const std::optional<Tensor>&,
                                        const Exponents<float>&, bool, double, const std::string&,
                                        std::optional<ScalarType>);

template Outputs nt_xent_forward<double>(const Tensor&, const Tensor&, const std::optional<Tensor>&,
                                         const Exponents<double>&, bool, double, const std::string&,
                                         std::optional<ScalarType>);

}  // namespace cjepa
