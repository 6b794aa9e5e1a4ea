// With e_ab = exp(s_ab / tau - c), c being the shift, and S_a the sum of e_ab over the negatives b:
//
//   LSE-_a = c + log S_a,   loss_a = softplus(LSE-_a - s_pos / tau),   r_a = sigmoid of the same
//   dL/dz_a = (1 / tau) [ sum_b e_ab (w_a + w_b) z_b - (g_a r_a + g_pos r_pos) z_pos ]
//
// for unit rows, with the upstream gradient g_a = dL/dloss_a and w_a = g_a r_a / S_a.
//
// The forward runs over the tiles on and above the diagonal of S. S is symmetric, so a row's sum is
// that of the rows of its tiles and of the columns of the tiles above. All sums are added in an
// order that depends on M alone, so they have the same bits on any number of threads. The loop of
// the backward is run_backward in gradients.h, which cross_logsumexp.cpp shares.
#include "nt_xent.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <vector>

#include "constants.h"
#include "core/tile_core.h"
#include "gradients.h"
#include "memory.h"
#include "packing.h"
#include "sample_mask.h"
#include "tiles.h"

namespace cjepa {
namespace {

// Two views as one batch. Row 2k is view i of sample k and row 2k + 1 is view j of it, so that an
// anchor and its positive (row ^ 1) lie side by side.
template <typename T, typename P>
struct Pairs {
  View views[2];
  Rounding<T> rounding;
  PackedBatch<T, P> z;
  Shift<T> shift;
  SampleMask mask;
  Logits<T, P> logits;

  Pairs(const NTXentOptions& o, typename PackedBatch<T, P>::Wanted wanted)
      : views{View(o.z_i), View(o.z_j)},
        rounding{.cosine = o.use_cosine_similarity,
                 .eps = static_cast<T>(o.eps),
                 .dtype = o.rounded_dtype()},
        z(source(), block_size(source().rows()), rounding, wanted),
        shift(read_temperature(o.temperature_tensor, o.temperature), z.bounded),
        mask(o.mask.has_value() && wanted.similarity ? SampleMask(*o.mask) : SampleMask()),
        logits{.core = z.core,
               .x = z,
               .y = z,
               .exclusion = {.rows = z.layout.rows,
                             .columns = z.layout.rows,
                             .self = true,
                             .pairs = true,
                             .mask = mask.get(),
                             .mask_stride = mask.stride,
                             .positives = nullptr,
                             .class_ends = nullptr},
               .exponent = shift.exponent} {}
  Pairs(const Pairs&) = delete;
  Pairs& operator=(const Pairs&) = delete;

  Source source() const { return {views, 2}; }
  // The position of a row in the caller's order: view i, then view j.
  int64_t original(int64_t row) const { return (row & 1) * views[0].rows + (row >> 1); }
};

double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }

struct Totals {
  double loss = 0, positive = 0;
  int64_t hits = 0;
};

// Results of each row in the caller's order. `loss` may be null.
template <typename T>
struct PerRow {
  T *loss, *lse, *largest_negative, *shift, *log_sum, *positive;
};

// Adds up the chunks of kReducedRows rows from `begin`, and computes the results of those rows.
template <typename T, typename P>
Totals reduce_rows(const Pairs<T, P>& pairs, const PartialSums<T>& sums, int64_t begin,
                   const PerRow<T>& out) {
  const Shift<T>& shift = pairs.shift;
  const int64_t count = std::min(kReducedRows, pairs.z.layout.rows - begin);
  const ReducedRows<T> reduced(shift, sums.of_rows(), begin, count);
  Totals totals;
  for (int64_t a = 0; a < count; ++a) {
    const double positive = sums.positive[begin + a], row_shift = reduced.shift_of(shift, a);
    double log_sum = reduced.log_sum(shift, a);
    if (!pairs.z.finite || std::isnan(shift.tau)) log_sum = kNaN;
    const double gap = (row_shift - positive) / shift.tau + log_sum;  // LSE-_a - s_pos / tau
    const double loss = softplus(gap);
    const int64_t at = pairs.original(begin + a);
    out.largest_negative[at] = pairs.z.finite ? reduced.largest[a] : static_cast<T>(kNaN);
    out.shift[at] = static_cast<T>(row_shift);
    out.log_sum[at] = static_cast<T>(log_sum);
    out.lse[at] = static_cast<T>(positive / shift.tau + loss);
    out.positive[at] = static_cast<T>(positive);
    if (out.loss != nullptr) out.loss[at] = static_cast<T>(loss);
    totals.loss += loss;
    totals.positive += positive;
    // The maxima skip a NaN, so without this condition the other rows could still have hits.
    totals.hits += pairs.z.finite && positive > reduced.largest[a];
  }
  return totals;
}

// The mean similarity of the negative pairs, without a pass over the pairs:
// (|sum z|^2 - sum |z_a|^2 - sum s_pos) / (M (M - 2))
template <typename T, typename P>
double mean_negative(const PackedBatch<T, P>& z, double positive_sum) {
  const Layout& layout = z.layout;
  if (layout.rows <= 2) return kNaN;
  double total = -positive_sum;
  for (double s : z.squares) total -= s;
  for (double s : z.sum_of_rows()) total += s * s;
  return total / (static_cast<double>(layout.rows) * (layout.rows - 2));
}

// What the positives and the negatives of a row are multiplied by in the gradient, relative to the
// largest upstream gradient.
template <typename T>
struct PairWeights {
  Weights<T> negatives;     // w_a
  Buffer<T> positive;       // g_a r_a
  double largest_grad = 0;  // the largest |g_a|
};

// The largest |g| and the 1 / M of "mean" are applied at the end, so that a loss scale takes no
// weight out of range.
template <typename T, typename P>
PairWeights<T> make_weights(const Pairs<T, P>& pairs, const NTXentOptions& options,
                            const Tensor& grad_loss, const NTXentSaved& saved) {
  const int64_t padded = pairs.z.layout.padded_rows(), rows = pairs.z.layout.rows;
  PairWeights<T> w{.negatives = {.weight = Buffer<T>(padded), .shift = Buffer<T>(padded)},
                   .positive = Buffer<T>(padded)};
  const T *shift = data_of<T>(saved.shift), *log_sum = data_of<T>(saved.log_sum);
  const T *positive = data_of<T>(saved.positive), *grad = data_of<T>(grad_loss);
  const int64_t stride = options.reduction == Reduction::kNone ? grad_loss.stride(0) : 0;
  for (int64_t a = 0; a < (stride == 0 ? 1 : rows); ++a)
    w.largest_grad = std::max(w.largest_grad, std::fabs(static_cast<double>(grad[a * stride])));
  if (w.largest_grad == 0) w.largest_grad = 1;
  constexpr int64_t kRows = 512;  // of a task
  const int64_t parts = (padded + kRows - 1) / kRows;
  parallel_tasks(parts, 100.0 * padded, [&](const auto& take) {
    for (int64_t k; (k = take()) < parts;) {
      for (int64_t a = k * kRows; a < std::min(padded, (k + 1) * kRows); ++a) {
        w.negatives.weight[a] = w.negatives.shift[a] = w.positive[a] = 0;
        if (a >= rows) continue;
        const int64_t at = pairs.original(a);
        const double sum = log_sum[at], tau = pairs.shift.tau;
        const double gap = (static_cast<double>(shift[at]) - positive[at]) / tau + sum;
        const double r = 1 / (1 + std::exp(-gap));
        const double g = grad[at * stride] / w.largest_grad;
        w.negatives.shift[a] = shift[at];
        w.positive[a] = static_cast<T>(g * r);
        if (sum == -kInfinity) continue;  // a row without negatives: r is 0, and so is its weight
        w.negatives.weight[a] = static_cast<T>(g * r * std::exp(-sum - pairs.shift.error));
      }
    }
  });
  return w;
}

// Whether the saved exponentials are relative to the constant shift, the logit of a similarity
// of 1. For rows without negatives it does not matter.
template <typename T>
bool has_constant_shift(const NTXentSaved& saved) {
  const T *shift = data_of<T>(saved.shift), *log_sum = data_of<T>(saved.log_sum);
  for (int64_t a = 0; a < saved.shift.size(0); ++a)
    if (shift[a] != 1 && log_sum[a] != -kInfinity) return false;
  return true;
}

}  // namespace

template <typename T, typename P>
NTXentForward nt_xent_forward(const NTXentOptions& options, bool save_exponentials) {
  const Pairs<T, P> pairs(options,
                          {.similarity = true, .panels = true, .sums = !options.mask.has_value()});
  const int64_t rows = pairs.z.layout.rows;
  const ScalarType dtype = dtype_of<T>();
  const auto new_result = [&](std::vector<int64_t> sizes) {
    return new_tensor(options.z_i, sizes, dtype);
  };
  Tensor saved_exponentials =
      save_exponentials ? cached_tensor({saved_exponentials_size(rows)}, dtype) : new_result({0});
  const PartialSums<T> sums =
      sum_tiles(pairs.logits, save_exponentials ? data_of<T>(saved_exponentials) : nullptr);

  const bool none = options.reduction == Reduction::kNone;
  Tensor loss = none ? new_result({rows}) : new_result({});
  Tensor lse = new_result({rows}), largest_negative = new_result({rows});
  Tensor shift = new_result({rows}), log_sum = new_result({rows}), positive = new_result({rows});
  const PerRow<T> out{.loss = none ? data_of<T>(loss) : nullptr,
                      .lse = data_of<T>(lse),
                      .largest_negative = data_of<T>(largest_negative),
                      .shift = data_of<T>(shift),
                      .log_sum = data_of<T>(log_sum),
                      .positive = data_of<T>(positive)};
  const int64_t parts = (rows + kReducedRows - 1) / kReducedRows;
  std::vector<Totals> totals(parts);
  parallel_tasks(parts, 100.0 * rows, [&](const auto& take) {
    for (int64_t k; (k = take()) < parts;)
      totals[k] = reduce_rows(pairs, sums, k * kReducedRows, out);
  });
  Totals total;
  for (const Totals& t : totals) {
    total.loss += t.loss;
    total.positive += t.positive;
    total.hits += t.hits;
  }

  const double count = static_cast<double>(rows);
  if (!none) {
    const bool mean = options.reduction == Reduction::kMean;
    *data_of<T>(loss) = static_cast<T>(mean ? total.loss / count : total.loss);
  }
  double negative = kNaN;
  if (options.mask.has_value()) {
    double sum = 0;
    for (double s : sums.negative_sum) sum += s;
    const int64_t negatives = rows * (rows - 2) - 4 * pairs.mask.pairs;
    if (negatives > 0) negative = sum / static_cast<double>(negatives);
  } else {
    negative = mean_negative(pairs.z, total.positive);
  }
  const Tensor& like = options.z_i;
  return {.loss = loss,
          .accuracy = scalar<T>(like, static_cast<double>(total.hits) / count),
          .positive_similarity = scalar<T>(like, total.positive / count),
          .negative_similarity = scalar<T>(like, negative),
          .lse = lse,
          .largest_negative = largest_negative,
          .shift = shift,
          .log_sum = log_sum,
          .positive = positive,
          .saved_exponentials = saved_exponentials};
}

template <typename T, typename P>
NTXentBackward nt_xent_backward(const NTXentOptions& options, const Tensor& grad_loss,
                                const NTXentSaved& saved) {
  const double tau = read_temperature(options.temperature_tensor, options.temperature);
  const bool any_saved = saved.saved_exponentials.size(0) > 0;
  const bool saved_constant = has_constant_shift<T>(saved);
  const bool may_differ = !saved_constant && Shift<T>(tau, true).exponent.constant_shift;
  Pairs<T, P> pairs(options, {.similarity = !any_saved || may_differ, .products = true});
  // The saved shifts may be those of a larger S, which these rows are a part of, or of another back
  // end. Exponentials that were saved relative to the constant shift are then of no use.
  const bool differs = !saved_constant && pairs.shift.exponent.constant_shift;
  if (differs) {
    pairs.shift = Shift<T>(tau, false);
    pairs.logits.exponent = pairs.shift.exponent;
  }
  const bool use_saved = any_saved && !differs;
  const Layout& layout = pairs.z.layout;
  const PairWeights<T> weights = make_weights(pairs, options, grad_loss, saved);

  const ScalarType dtype = options.z_i.scalar_type();
  const std::vector<int64_t> sizes{options.z_i.size(0), layout.features};
  Tensor grads[2] = {new_tensor(options.z_i, sizes, dtype), new_tensor(options.z_j, sizes, dtype)};
  const int64_t square_blocks =
      use_saved ? layout.blocks : std::min(layout.blocks, blocks_of_square<T>(layout.block));
  const GradientSums<T> sums(grads, pairs.source(), pairs.z.padded_features,
                             square_blocks < layout.blocks);
  const double mean = options.reduction == Reduction::kMean ? static_cast<double>(layout.rows) : 1;
  std::vector<T> row_dot_gradient(layout.rows);
  const Side<T, P> side{
      .finisher = {.core = pairs.z.core,
                   .source = pairs.source(),
                   .rounding = pairs.rounding,
                   .positive_weight = weights.positive.get(),
                   .factor = static_cast<T>(weights.largest_grad / pairs.shift.tau / mean),
                   .grads = grads,
                   .in_place = sums.in_place,
                   .row_dot_gradient = row_dot_gradient.data()},
      .sums = sums.rows};
  run_backward<T, P>(
      {.logits = pairs.logits,
       .row_weights = weights.negatives,
       .column_weights = weights.negatives,
       .saved_exponentials = use_saved ? data_of<T>(saved.saved_exponentials) : nullptr,
       .square_blocks = square_blocks,
       .x = &side,
       .y = nullptr});

  // L is a function of z z^T / tau, so dL/dtau = -(1 / 2 tau) sum z . dL/dz (Euler).
  double total = 0;
  for (T x : row_dot_gradient) total += x;
  const Tensor& like =
      options.temperature_tensor.has_value() ? *options.temperature_tensor : saved.shift;
  return {.grad_z_i = grads[0],
          .grad_z_j = grads[1],
          .grad_temperature = scalar_gradient<T>(like, total / (-2 * pairs.shift.tau))};
}

template NTXentForward nt_xent_forward<float, float>(const NTXentOptions&, bool);
template NTXentForward nt_xent_forward<float, Bf16Pair>(const NTXentOptions&, bool);
template NTXentForward nt_xent_forward<double, double>(const NTXentOptions&, bool);

template NTXentBackward nt_xent_backward<float, float>(const NTXentOptions&, const Tensor&,
                                                       const NTXentSaved&);
template NTXentBackward nt_xent_backward<float, Bf16Pair>(const NTXentOptions&, const Tensor&,
                                                          const NTXentSaved&);
template NTXentBackward nt_xent_backward<double, double>(const NTXentOptions&, const Tensor&,
                                                         const NTXentSaved&);

namespace {

void check_options(const NTXentOptions& o) {
  check_inputs(o.z_i, o.z_j, o.temperature_tensor, o.product_dtype);
  const int64_t batch = o.z_i.size(0);
  check(batch == o.z_j.size(0), "z_i and z_j must have the same number of rows");
  check(!o.mask.has_value() || (o.mask->scalar_type() == ScalarType::Bool && o.mask->dim() == 2 &&
                                o.mask->size(0) == batch && o.mask->size(1) == batch),
        "mask must be a (B, B) tensor of bool");
}

void check_saved(const NTXentOptions& o, const Tensor& grad_loss, const NTXentSaved& saved) {
  const int64_t rows = 2 * o.z_i.size(0);
  for (const Tensor* t : {&saved.shift, &saved.log_sum, &saved.positive}) {
    check_rows(*t, o.z_i, rows, "shift, log_sum and positive must be those of the forward");
    check(t->is_contiguous(), "shift, log_sum and positive must be contiguous");
  }
  const Tensor& exponentials = saved.saved_exponentials;  // the schema's argument `kept`
  const int64_t count = exponentials.size(0);
  constexpr const char* kSaved = "kept must be empty or the exponentials that the forward saved";
  check(count == 0 || count == saved_exponentials_size(rows), kSaved);
  check_rows(exponentials, o.z_i, count, kSaved);
  check(exponentials.is_contiguous(), "kept must be contiguous");
  constexpr const char* kUpstream = "grad_loss must have the shape and dtype of the loss";
  if (o.reduction == Reduction::kNone) {
    check_rows(grad_loss, o.z_i, rows, kUpstream);
  } else {
    check(grad_loss.dim() == 0 && grad_loss.scalar_type() == saved.shift.scalar_type(), kUpstream);
  }
}

// The operators as PyTorch calls them: arguments and results by position, in the order of the
// schemas, which call save_exponentials `keep`, saved_exponentials `kept` and largest_negative
// `hardest`.
auto call_forward(Tensor z_i, Tensor z_j, std::optional<Tensor> mask,
                  std::optional<Tensor> temperature_tensor, double temperature,
                  bool use_cosine_similarity, double eps, StringHandle reduction,
                  std::optional<ScalarType> product_dtype, bool save_exponentials) {
  const NTXentOptions options{.z_i = z_i,
                              .z_j = z_j,
                              .mask = mask,
                              .temperature_tensor = temperature_tensor,
                              .temperature = temperature,
                              .use_cosine_similarity = use_cosine_similarity,
                              .eps = eps,
                              .reduction = read_reduction(reduction),
                              .product_dtype = product_dtype};
  check_options(options);
  const NTXentForward out =
      with_types(z_i.scalar_type(), options.rounded_dtype(), [&](auto sum, auto operand) {
        return nt_xent_forward<decltype(sum), decltype(operand)>(options, save_exponentials);
      });
  return std::tuple(out.loss, out.accuracy, out.positive_similarity, out.negative_similarity,
                    out.lse, out.largest_negative, out.shift, out.log_sum, out.positive,
                    out.saved_exponentials);
}

auto call_backward(Tensor grad_loss, Tensor z_i, Tensor z_j, std::optional<Tensor> mask,
                   std::optional<Tensor> temperature_tensor, Tensor shift, Tensor log_sum,
                   Tensor positive, Tensor saved_exponentials, double temperature,
                   bool use_cosine_similarity, double eps, StringHandle reduction,
                   std::optional<ScalarType> product_dtype) {
  const NTXentOptions options{.z_i = z_i,
                              .z_j = z_j,
                              .mask = mask,
                              .temperature_tensor = temperature_tensor,
                              .temperature = temperature,
                              .use_cosine_similarity = use_cosine_similarity,
                              .eps = eps,
                              .reduction = read_reduction(reduction),
                              .product_dtype = product_dtype};
  const NTXentSaved saved{.shift = shift,
                          .log_sum = log_sum,
                          .positive = positive,
                          .saved_exponentials = saved_exponentials};
  check_options(options);
  check_saved(options, grad_loss, saved);
  const ScalarType operands = backward_operands(options.rounded_dtype(), temperature_tensor);
  const NTXentBackward out = with_types(z_i.scalar_type(), operands, [&](auto sum, auto operand) {
    return nt_xent_backward<decltype(sum), decltype(operand)>(options, grad_loss, saved);
  });
  return std::tuple(out.grad_z_i, out.grad_z_j, out.grad_temperature);
}

}  // namespace

void implement_nt_xent(torch::stable::detail::StableLibrary& library) {
  library.impl("nt_xent", TORCH_BOX(&call_forward));
  library.impl("nt_xent_backward", TORCH_BOX(&call_backward));
}

}  // namespace cjepa
