// The triangle of S = Z Z^T: the log-sum-exp of every row of S / tau over the entries that count,
// and the gradients. With e_ab = exp(s_ab / tau - c), c being the shift, N(a) the entries that
// count in row a, S_a the sum of e_ab over N(a), and the upstream gradients g_a of the log-sum-exp
// and u_a of the similarity of the positive p(a):
//
//   dL/dz_a = (1 / tau) sum over N(a) of e_ab (w_a + w_b) z_b + (u_a + u_p(a)) z_p(a),
//   w_a = g_a / S_a
//
// for unit rows. If the n_a + 1 rows of a class attract each other, they are in N(a), and the
// result is the log-sum-exp minus the row's mean logit with them. For two different rows of a class
//
//   e_ab (w_a + w_b)   becomes   e_ab (w_a + w_b) - (g_a / n_a + g_b / n_b)
//
// before it is multiplied with rows. In a tight class both terms are nearly equal, and the
// difference keeps its digits.
//
// As in nt_xent.cpp the tiles are those on and above the diagonal. With classes the rows are sorted
// by class, so that only the tiles near the diagonal need a mask or an attraction.
#include "self_logsumexp.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "constants.h"
#include "gradients.h"
#include "logsumexp_rows.h"
#include "memory.h"
#include "packing.h"
#include "row_order.h"
#include "tiles.h"

namespace cjepa {
namespace {

// Half of what the other operators take, because losses with labels hold more memory beside it. The
// results at 32,768 rows are in bench/results/losses_cpu.json.
constexpr int64_t kHalfWorkspace = kWorkspaceBytes / 2;

template <typename T, typename P>
struct Triangle {
  View views[2];
  RowOrder order;
  std::vector<int64_t> positives;  // (rows) in the order of the kernel; empty if no row has one
  Rounding<T> rounding;
  PackedBatch<T, P> z;
  Shift<T> shift;
  Logits<T, P> logits;

  Triangle(const SelfLogSumExpOptions& o, typename PackedBatch<T, P>::Wanted wanted)
      : views{View(o.z_i), View(o.z_j.has_value() ? *o.z_j : o.z_i)},
        order(o.z_i.size(0), o.views(), o.classes),
        rounding{.cosine = o.use_cosine_similarity,
                 .eps = static_cast<T>(o.eps),
                 .dtype = o.rounded_dtype()},
        z(source(), block_size(o.rows()), rounding, wanted),
        shift(read_temperature(o.temperature_tensor, o.temperature),
              z.bounded && o.rows() > kFewRows),
        logits{.core = z.core,
               .x = z,
               .y = z,
               .exclusion = {.rows = o.rows(),
                             .columns = o.rows(),
                             .self = true,
                             .pairs = o.z_j.has_value(),
                             .mask = nullptr,
                             .mask_stride = 0,
                             .positives = nullptr,
                             .class_ends = o.attract ? nullptr : order.ends()},
               .exponent = shift.exponent} {
    if (!o.z_j.has_value() && !o.positives.has_value()) return;
    positives = order.positives_of_rows(o.positives);
    if (!o.z_j.has_value()) logits.exclusion.positives = positives.data();
  }
  Triangle(const Triangle&) = delete;
  Triangle& operator=(const Triangle&) = delete;

  Source source() const { return {views, order.views, order.order()}; }
  bool has_positives() const { return !positives.empty(); }
};

template <typename T, typename P>
SelfLogSumExpForward forward(const SelfLogSumExpOptions& o,
                             const std::optional<Tensor>& class_means, bool save_exponentials) {
  const Triangle<T, P> r(o, {.similarity = true, .panels = true});
  const int64_t rows = o.rows();
  const auto new_result = [&](int64_t size) { return new_tensor(o.z_i, {size}, dtype_of<T>()); };
  Tensor saved_exponentials = save_exponentials
                                  ? cached_tensor({saved_exponentials_size(rows)}, dtype_of<T>())
                                  : new_result(0);
  const PartialSums<T> sums =
      sum_tiles<T, P>(r.logits, save_exponentials ? data_of<T>(saved_exponentials) : nullptr);
  std::optional<Tensor> means;
  if (o.attract) means = r.order.template to_kernel<T>(*class_means);
  const SideResults out = reduce_side<T>(r.shift, r.z.finite, sums.of_rows(), rows, o.z_i,
                                         o.attract ? data_of<T>(*means) : nullptr);
  const auto to_caller = [&](const Tensor& t) { return r.order.template to_caller<T>(t); };
  return {.lse = to_caller(out.lse),
          .largest = to_caller(out.largest),
          .shift = to_caller(out.shift),
          .log_sum = to_caller(out.log_sum),
          .positive = r.has_positives() ? to_caller(positive_result(sums, r.z.finite, rows, o.z_i))
                                        : new_result(0),
          .saved_exponentials = saved_exponentials};
}

// What rows of one class subtract from the coefficients, relative to the factor as the weights are.
template <typename T>
Attraction<T> make_attraction(const RowOrder& order, const Tensor& grad,
                              const Tensor& class_weights, double largest_grad, int64_t padded) {
  Attraction<T> out{.class_begins = std::vector<int64_t>(padded),
                    .class_ends = std::vector<int64_t>(padded),
                    .strength = Buffer<T>(padded)};
  const T *g = data_of<T>(grad), *weight = data_of<T>(class_weights);
  std::fill(out.strength.get(), out.strength.get() + padded, T{0});
  for (int64_t a = 0; a < order.rows(); ++a) {
    const int64_t begin = a > 0 ? out.class_begins[a - 1] : 0;
    out.class_ends[a] = order.class_ends[a];
    out.class_begins[a] = order.class_ends[begin] == order.class_ends[a] ? begin : a;
    out.strength[a] = static_cast<T>(g[a] / largest_grad * weight[a]);
  }
  return out;
}

template <typename T, typename P>
SelfLogSumExpBackward backward(const SelfLogSumExpOptions& o, const SelfLogSumExpUpstream& upstream,
                               const SelfLogSumExpSaved& saved) {
  const bool any_saved = saved.saved_exponentials.size(0) > 0;
  const bool saved_constant =
      SideInputs{.grad = upstream.grad_lse, .shift = saved.shift, .log_sum = saved.log_sum}
          .template has_constant_shift<T>();
  const double tau = read_temperature(o.temperature_tensor, o.temperature);
  const bool may_differ = !saved_constant && Shift<T>(tau, true).exponent.constant_shift;
  Triangle<T, P> r(o, {.similarity = !any_saved || may_differ, .products = true});
  // As in nt_xent.cpp: the saved shifts may be those of a larger S or of another back end.
  const bool differs = !saved_constant && r.shift.exponent.constant_shift;
  if (differs) {
    r.shift = Shift<T>(tau, false);
    r.logits.exponent = r.shift.exponent;
  }
  const bool use_saved = any_saved && !differs;
  const Layout& layout = r.z.layout;
  const bool positives = upstream.grad_positive.has_value();
  double largest_grad = largest_magnitude<T>(upstream.grad_lse);
  if (positives)
    largest_grad = std::max(largest_grad, tau * largest_magnitude<T>(*upstream.grad_positive));
  if (largest_grad == 0) largest_grad = 1;
  const RowOrder& order = r.order;
  const Tensor grad_lse = order.template to_kernel<T>(upstream.grad_lse);
  const Tensor shift = order.template to_kernel<T>(saved.shift);
  const Tensor log_sum = order.template to_kernel<T>(saved.log_sum);
  const Weights<T> weights =
      make_weights<T>(SideInputs{.grad = grad_lse, .shift = shift, .log_sum = log_sum},
                      largest_grad, r.shift.error, layout.padded_rows());

  std::optional<Attraction<T>> attraction;
  if (o.attract)
    attraction.emplace(make_attraction<T>(order, grad_lse,
                                          order.template to_kernel<T>(*upstream.class_weights),
                                          largest_grad, layout.padded_rows()));

  // Relative to the factor, as the weights are, and subtracted. Both rows of a pair have the sum of
  // their upstream gradients.
  Buffer<T> positive_weight(positives ? layout.rows : 0);
  PositiveRows<T> positive_rows;
  if (positives) {
    const Tensor grad_positive = order.template to_kernel<T>(*upstream.grad_positive);
    const T* u = data_of<T>(grad_positive);
    for (int64_t a = 0; a < layout.rows; ++a) {
      const int64_t p = r.positives[a];
      const double sum = p < 0 ? 0 : static_cast<double>(u[a]) + u[p];
      positive_weight[a] = static_cast<T>(-sum / largest_grad * tau);
    }
    positive_rows =
        positives_of_rows(r.source(), r.positives.data(), layout.rows, positive_weight.get());
  }

  const auto new_gradient = [&](int64_t rows) {
    return new_tensor(o.z_i, {rows, layout.features}, o.z_i.scalar_type());
  };
  Tensor grads[2] = {new_gradient(o.z_i.size(0)),
                     new_gradient(o.z_j.has_value() ? o.z_j->size(0) : 0)};
  const int64_t square_blocks =
      use_saved ? layout.blocks
                : std::min(layout.blocks, blocks_of_square<T>(layout.block, kHalfWorkspace));
  const GradientSums<T> sums(grads, r.source(), r.z.padded_features, square_blocks < layout.blocks);
  std::vector<T> row_dot_gradient(layout.rows);
  const Side<T, P> side{.finisher = {.core = r.z.core,
                                     .source = r.source(),
                                     .rounding = r.rounding,
                                     .positive_weight = nullptr,
                                     .factor = static_cast<T>(largest_grad / r.shift.tau),
                                     .grads = grads,
                                     .in_place = sums.in_place,
                                     .row_dot_gradient = row_dot_gradient.data(),
                                     .positive_rows = positives ? &positive_rows : nullptr},
                        .sums = sums.rows};
  run_backward<T, P>(
      {.logits = r.logits,
       .row_weights = weights,
       .column_weights = weights,
       .saved_exponentials = use_saved ? data_of<T>(saved.saved_exponentials) : nullptr,
       .square_blocks = square_blocks,
       .x = &side,
       .y = nullptr,
       .attraction = o.attract ? &*attraction : nullptr});
  if (sums.in_place)
    for (int64_t v = 0; v < order.views; ++v) order.template restore_rows<T>(grads[v]);

  // The log-sum-exps are functions of z z^T / tau, so dL/dtau = -(1 / 2 tau) sum z . dL/dz (Euler).
  double total = 0;
  for (T x : row_dot_gradient) total += x;
  const Tensor& like = o.temperature_tensor.has_value() ? *o.temperature_tensor : saved.shift;
  return {.grad_z_i = grads[0],
          .grad_z_j = grads[1],
          .grad_temperature = scalar_gradient<T>(like, total / (-2 * r.shift.tau))};
}

}  // namespace

SelfLogSumExpForward self_logsumexp_forward(const SelfLogSumExpOptions& options,
                                            const std::optional<Tensor>& class_means,
                                            bool save_exponentials) {
  return with_types(
      options.z_i.scalar_type(), options.rounded_dtype(), [&](auto sum, auto operand) {
        return forward<decltype(sum), decltype(operand)>(options, class_means, save_exponentials);
      });
}

SelfLogSumExpBackward self_logsumexp_backward(const SelfLogSumExpOptions& options,
                                              const SelfLogSumExpUpstream& upstream,
                                              const SelfLogSumExpSaved& saved) {
  const ScalarType operands =
      backward_operands(options.rounded_dtype(), options.temperature_tensor);
  return with_types(options.z_i.scalar_type(), operands, [&](auto sum, auto operand) {
    return backward<decltype(sum), decltype(operand)>(options, upstream, saved);
  });
}

namespace {

void check_numbers(const std::optional<Tensor>& numbers, int64_t size, const char* what) {
  if (!numbers.has_value()) return;
  check(numbers->scalar_type() == ScalarType::Long && numbers->dim() == 1 &&
            numbers->size(0) == size && numbers->is_contiguous() && numbers->is_cpu(),
        what);
}

constexpr const char* kClassRows = "class_means and class_weights must be numbers of the rows";

void check_options(const SelfLogSumExpOptions& o) {
  check_inputs(o.z_i, o.z_j.has_value() ? *o.z_j : o.z_i, o.temperature_tensor, o.product_dtype);
  check(!o.z_j.has_value() || o.z_j->size(0) == o.z_i.size(0),
        "z_i and z_j must have the same number of rows");
  check(!o.z_j.has_value() || !o.positives.has_value(), "positives must not be given with z_j");
  check(!o.attract || (o.classes.has_value() && !o.z_j.has_value()),
        "class_means and class_weights must be given with classes and without z_j");
  check_numbers(o.classes, o.z_i.size(0), "classes must be a contiguous (B,) tensor of int64");
  check_numbers(o.positives, o.rows(), "positives must be a contiguous (M,) tensor of int64");
  if (!o.positives.has_value()) return;
  const int64_t *of = data_of<int64_t>(*o.positives), rows = o.rows();
  for (int64_t a = 0; a < rows; ++a) {
    const bool none = of[a] == -1;
    check(none || (of[a] >= 0 && of[a] < rows && of[a] != a && of[of[a]] == a),
          "positives must hold -1, or rows that are each other's positive");
  }
}

void check_saved(const SelfLogSumExpOptions& o, const SelfLogSumExpUpstream& upstream,
                 const SelfLogSumExpSaved& saved) {
  constexpr const char* kRows = "gradients, shifts and log sums must be those of the rows";
  for (const Tensor* t : {&upstream.grad_lse, &saved.shift, &saved.log_sum})
    check_rows(*t, o.z_i, o.rows(), kRows);
  check(saved.shift.is_contiguous() && saved.log_sum.is_contiguous(),
        "shift and log_sum must be contiguous");
  check(upstream.grad_positive.has_value() == (o.z_j.has_value() || o.positives.has_value()),
        "grad_positive must be given with positives, and only then");
  if (upstream.grad_positive.has_value())
    check_rows(*upstream.grad_positive, o.z_i, o.rows(), kRows);
  if (o.attract) check_rows(*upstream.class_weights, o.z_i, o.rows(), kClassRows);
  const Tensor& exponentials = saved.saved_exponentials;
  check(
      exponentials.dim() == 1 && exponentials.is_contiguous() &&
          exponentials.scalar_type() == sum_dtype(o.z_i.scalar_type()) &&
          (exponentials.size(0) == 0 || exponentials.size(0) == saved_exponentials_size(o.rows())),
      "kept must be empty, or hold the exponentials of the forward");
}

// The operators as PyTorch calls them: arguments and results by position, in the order of the
// schemas.
auto call_forward(Tensor z_i, std::optional<Tensor> z_j, std::optional<Tensor> positives,
                  std::optional<Tensor> classes, std::optional<Tensor> class_means,
                  std::optional<Tensor> class_weights, std::optional<Tensor> temperature_tensor,
                  double temperature, bool use_cosine_similarity, double eps,
                  std::optional<ScalarType> product_dtype, bool keep) {
  const SelfLogSumExpOptions options{.z_i = z_i,
                                     .z_j = z_j,
                                     .positives = positives,
                                     .classes = classes,
                                     .attract = class_weights.has_value(),
                                     .temperature_tensor = temperature_tensor,
                                     .temperature = temperature,
                                     .use_cosine_similarity = use_cosine_similarity,
                                     .eps = eps,
                                     .product_dtype = product_dtype};
  check_options(options);
  check(class_means.has_value() == class_weights.has_value(),
        "class_means and class_weights must both be given, or neither");
  if (class_means.has_value()) check_rows(*class_means, z_i, options.rows(), kClassRows);
  const SelfLogSumExpForward out = self_logsumexp_forward(options, class_means, keep);
  return std::tuple(out.lse, out.largest, out.shift, out.log_sum, out.positive,
                    out.saved_exponentials);
}

auto call_backward(Tensor grad_lse, std::optional<Tensor> grad_positive, Tensor z_i,
                   std::optional<Tensor> z_j, std::optional<Tensor> positives,
                   std::optional<Tensor> classes, std::optional<Tensor> class_weights,
                   std::optional<Tensor> temperature_tensor, Tensor shift, Tensor log_sum,
                   Tensor kept, double temperature, bool use_cosine_similarity, double eps,
                   std::optional<ScalarType> product_dtype) {
  const SelfLogSumExpOptions options{.z_i = z_i,
                                     .z_j = z_j,
                                     .positives = positives,
                                     .classes = classes,
                                     .attract = class_weights.has_value(),
                                     .temperature_tensor = temperature_tensor,
                                     .temperature = temperature,
                                     .use_cosine_similarity = use_cosine_similarity,
                                     .eps = eps,
                                     .product_dtype = product_dtype};
  const SelfLogSumExpUpstream upstream{
      .grad_lse = grad_lse, .grad_positive = grad_positive, .class_weights = class_weights};
  const SelfLogSumExpSaved saved{.shift = shift, .log_sum = log_sum, .saved_exponentials = kept};
  check_options(options);
  check_saved(options, upstream, saved);
  const SelfLogSumExpBackward out = self_logsumexp_backward(options, upstream, saved);
  return std::tuple(out.grad_z_i, out.grad_z_j, out.grad_temperature);
}

}  // namespace

void implement_self_logsumexp(torch::stable::detail::StableLibrary& library) {
  library.impl("self_logsumexp", TORCH_BOX(&call_forward));
  library.impl("self_logsumexp_backward", TORCH_BOX(&call_backward));
}

}  // namespace cjepa
