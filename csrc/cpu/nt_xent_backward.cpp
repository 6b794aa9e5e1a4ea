// dL/dz_a = (1 / tau) [ sum_b e_ab (w_a + w_b) z_b - (g_a r_a + g_pos r_pos) z_pos ] for unit rows.
#include "gradients.h"
#include "nt_xent.h"

namespace cjepa {
namespace {

template <typename T>
struct PairWeights {
  Weights<T> tiles;
  Buffer<T> pull;      // g r of each row
  double largest = 0;  // of |dL/dloss_a|; all else is relative to it
};

// w_a = g_a r_a / S_a, S_a being the sum of exponentials relative to the shift. The largest |g| and
// the 1 / M of "mean" are applied at the end, so that a loss scale pushes no weight out of range.
template <typename T, typename P>
PairWeights<T> make_weights(const Pairs<T, P>& pairs, const Options& options,
                            const Tensor& grad_loss, const Saved& saved) {
  const int64_t padded = pairs.z.layout.padded_rows(), rows = pairs.z.layout.rows;
  PairWeights<T> w{{Buffer<T>(padded), Buffer<T>(padded)}, Buffer<T>(padded)};
  const T *shift = data_of<T>(saved.shift), *log_sum = data_of<T>(saved.log_sum);
  const T *positive = data_of<T>(saved.positive), *grad = data_of<T>(grad_loss);
  const int64_t stride = options.reduction == "none" ? grad_loss.stride(0) : 0;
  for (int64_t a = 0; a < (stride == 0 ? 1 : rows); ++a)
    w.largest = std::max(w.largest, std::fabs(static_cast<double>(grad[a * stride])));
  if (w.largest == 0) w.largest = 1;
  constexpr int64_t kRows = 512;
  const int64_t parts = (padded + kRows - 1) / kRows;
  deal(parts, 100.0 * padded, [&](const auto& take) {
    for (int64_t k; (k = take()) < parts;) {
      for (int64_t a = k * kRows; a < std::min(padded, (k + 1) * kRows); ++a) {
        w.tiles.weight[a] = w.tiles.shift[a] = w.pull[a] = 0;
        if (a >= rows) continue;
        const int64_t at = pairs.original(a);
        const double sum = log_sum[at], tau = pairs.shift.tau;
        const double gap = (static_cast<double>(shift[at]) - positive[at]) / tau + sum;
        const double r = 1 / (1 + std::exp(-gap));
        const double g = grad[at * stride] / w.largest;
        w.tiles.shift[a] = shift[at];
        w.pull[a] = static_cast<T>(g * r);
        if (sum == -kInfinity) continue;  // no negatives: r is 0, and nothing pulls
        w.tiles.weight[a] = static_cast<T>(g * r * std::exp(-sum - pairs.shift.error));
      }
    }
  });
  return w;
}

// Whether exponentials are saved relative to 1. Those of a row without negatives are not looked at.
template <typename T>
bool relative_to_one(const Saved& saved) {
  const T *shift = data_of<T>(saved.shift), *log_sum = data_of<T>(saved.log_sum);
  for (int64_t a = 0; a < saved.shift.size(0); ++a)
    if (shift[a] != 1 && log_sum[a] != -kInfinity) return false;
  return true;
}

}  // namespace

template <typename T, typename P>
std::tuple<Tensor, Tensor, Tensor> nt_xent_backward(const Options& options, const Tensor& grad_loss,
                                                    const Saved& saved) {
  const TileCore<T, P>& core = tile_core<T, P>();
  const double tau = read_temperature(options.temperature_tensor, options.temperature);
  const bool any_kept = saved.kept.size(0) > 0, relative = relative_to_one<T>(saved);
  const bool may_differ = !relative && Shift<T>(tau, true).exponent.constant_shift;
  Pairs<T, P> pairs(options, core, {!any_kept || may_differ, true, false});
  // The saved shifts may be those of a larger S, which these rows are a part of, or of another back
  // end: exponentials that were kept relative to 1 are then of no use.
  const bool differs = !relative && pairs.shift.exponent.constant_shift;
  if (differs) {
    pairs.shift = Shift<T>(tau, false);
    pairs.logits.exponent = pairs.shift.exponent;
  }
  const bool kept = any_kept && !differs;
  const Layout& layout = pairs.z.layout;
  const PairWeights<T> weights = make_weights(pairs, options, grad_loss, saved);

  const ScalarType dtype = options.z_i.scalar_type();
  const std::vector<int64_t> sizes{options.z_i.size(0), layout.features};
  Tensor grads[2] = {make(options.z_i, sizes, dtype), make(options.z_j, sizes, dtype)};
  const int64_t side = kept ? layout.blocks : std::min(layout.blocks, square_side<T>(layout.block));
  const GradientSums<T> sums(grads, 2, layout.rows, pairs.z.padded_features, side == layout.blocks);
  const double mean = options.reduction == "mean" ? static_cast<double>(layout.rows) : 1;
  std::vector<T> along(layout.rows);
  const Side<T, P> rows{{core, pairs.source(), pairs.rounding, weights.pull.get(),
                         static_cast<T>(weights.largest / pairs.shift.tau / mean), grads,
                         sums.in_place, along.data()},
                        sums.rows};
  run_backward<T, P>(pairs.logits, weights.tiles, weights.tiles,
                     kept ? data_of<T>(saved.kept) : nullptr, side, &rows, nullptr);

  // L is a function of z z^T / tau, so dL/dtau = -(1 / 2 tau) sum z . dL/dz (Euler).
  double total = 0;
  for (T x : along) total += x;
  const Tensor& like =
      options.temperature_tensor.has_value() ? *options.temperature_tensor : saved.shift;
  return {grads[0], grads[1], scalar_gradient<T>(like, total / (-2 * pairs.shift.tau))};
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
