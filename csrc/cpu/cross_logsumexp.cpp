// The rectangle S = X Y^T: the log-sum-exp of every row and of every column of S / tau in one pass
// over its tiles, and the gradients. With e_ab = exp(s_ab / tau - c), c being the shift, S_a the
// sum of e_ab over b, S_b that over a, and the upstream gradients g_a and h_b:
//
//   dL/dx_a = (1 / tau) sum_b e_ab (w_a + v_b) y_b,   w_a = g_a / S_a,   v_b = h_b / S_b
//
// and dL/dy_b alike, for unit rows. With positives p(a), the entries (a, p(a)) count in neither
// sum. Their similarities are a result, which has the upstream gradient u_a:
//
//   dL/dx_a += u_a y_p(a),   dL/dy_p(a) += u_a x_a
#include "cross_logsumexp.h"

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
#include "tiles.h"

namespace cjepa {
namespace {

template <typename T, typename P>
struct Rectangle {
  View views[2];
  Rounding<T> rounding;
  PackedBatch<T, P> x, y;
  Shift<T> shift;
  Logits<T, P> logits;

  Rectangle(const CrossLogSumExpOptions& o, typename PackedBatch<T, P>::Wanted wanted)
      : views{View(o.x), View(o.y)},
        rounding{.cosine = o.use_cosine_similarity,
                 .eps = static_cast<T>(o.eps),
                 .dtype = o.rounded_dtype()},
        x(source(0), block(), rounding, wanted),
        y(source(1), block(), rounding, wanted),
        shift(read_temperature(o.temperature_tensor, o.temperature),
              x.bounded && y.bounded && std::min(views[0].rows, views[1].rows) > kFewRows),
        logits{.core = x.core,
               .x = x,
               .y = y,
               .exclusion = {.rows = views[0].rows,
                             .columns = views[1].rows,
                             .self = false,
                             .pairs = false,
                             .mask = nullptr,
                             .mask_stride = 0,
                             .positives = positives_of(o),
                             .class_ends = nullptr},
               .exponent = shift.exponent} {}
  Rectangle(const Rectangle&) = delete;
  Rectangle& operator=(const Rectangle&) = delete;

  Source source(int64_t which) const { return {views + which, 1}; }
  int64_t block() const { return block_size(std::max(views[0].rows, views[1].rows)); }
  bool finite() const { return x.finite && y.finite; }

  static const int64_t* positives_of(const CrossLogSumExpOptions& o) {
    return o.positives.has_value() ? data_of<int64_t>(*o.positives) : nullptr;
  }
};

// The mean of all similarities: the sums of the rows of both sides, multiplied.
template <typename T, typename P>
double mean_similarity(const PackedBatch<T, P>& x, const PackedBatch<T, P>& y) {
  const std::vector<double> of_x = x.sum_of_rows(), of_y = y.sum_of_rows();
  double total = 0;
  for (size_t d = 0; d < of_x.size(); ++d) total += of_x[d] * of_y[d];
  return total / (static_cast<double>(x.layout.rows) * static_cast<double>(y.layout.rows));
}

// The rows of X whose positive each row of Y is, in order.
template <typename T>
PositiveRows<T> positives_of_columns(Source rows, const int64_t* positives, int64_t columns,
                                     const T* weight) {
  PositiveRows<T> out{.other = rows,
                      .of_y = true,
                      .starts = std::vector<int64_t>(columns + 1),
                      .rows = {},
                      .weight = weight};
  for (int64_t a = 0; a < rows.rows(); ++a)
    if (positives[a] >= 0) ++out.starts[positives[a] + 1];
  for (int64_t b = 0; b < columns; ++b) out.starts[b + 1] += out.starts[b];
  out.rows.resize(out.starts[columns]);
  std::vector<int64_t> next(out.starts.begin(), out.starts.end() - 1);
  for (int64_t a = 0; a < rows.rows(); ++a)
    if (positives[a] >= 0) out.rows[next[positives[a]]++] = a;
  return out;
}

template <typename T, typename P>
CrossLogSumExpForward forward(const CrossLogSumExpOptions& o, bool save_exponentials) {
  const bool positives = o.positives.has_value();
  const Rectangle<T, P> r(o, {.similarity = true, .panels = true, .sums = positives});
  const int64_t rows = r.x.layout.rows, columns = r.y.layout.rows;
  const auto new_result = [&](std::vector<int64_t> sizes) {
    return new_tensor(o.x, sizes, dtype_of<T>());
  };
  Tensor saved_exponentials =
      save_exponentials ? cached_tensor({saved_rectangle_size(rows, columns)}, dtype_of<T>())
                        : new_result({0});
  const PartialSums<T> sums =
      sum_tiles<T, P>(r.logits, save_exponentials ? data_of<T>(saved_exponentials) : nullptr);
  const SideResults of_rows = reduce_side(r.shift, r.finite(), sums.of_rows(), rows, o.x);
  const SideResults of_columns = reduce_side(r.shift, r.finite(), sums.of_columns(), columns, o.x);
  return {
      .row_lse = of_rows.lse,
      .column_lse = of_columns.lse,
      .row_max = of_rows.largest,
      .column_max = of_columns.largest,
      .row_shift = of_rows.shift,
      .row_log_sum = of_rows.log_sum,
      .column_shift = of_columns.shift,
      .column_log_sum = of_columns.log_sum,
      .positive = positives ? positive_result(sums, r.finite(), rows, o.x) : new_result({0}),
      .mean_similarity = positives ? scalar<T>(o.x, mean_similarity(r.x, r.y)) : new_result({0}),
      .saved_exponentials = saved_exponentials};
}

template <typename T, typename P>
CrossLogSumExpBackward backward(const CrossLogSumExpOptions& o,
                                const CrossLogSumExpUpstream& upstream,
                                const CrossLogSumExpSaved& saved) {
  const SideInputs of_rows{
      .grad = upstream.grad_row, .shift = saved.row_shift, .log_sum = saved.row_log_sum};
  const SideInputs of_columns{
      .grad = upstream.grad_column, .shift = saved.column_shift, .log_sum = saved.column_log_sum};
  const bool any_saved = saved.saved_exponentials.size(0) > 0;
  const bool saved_constant = of_rows.has_constant_shift<T>() && of_columns.has_constant_shift<T>();
  const double tau = read_temperature(o.temperature_tensor, o.temperature);
  const bool may_differ = !saved_constant && Shift<T>(tau, true).exponent.constant_shift;
  Rectangle<T, P> r(o, {.similarity = !any_saved || may_differ, .products = true});
  // The saved shifts may be those of a larger S, which these rows are a part of, or of another back
  // end. Exponentials that were saved relative to the constant shift are then of no use.
  const bool differs = !saved_constant && r.shift.exponent.constant_shift;
  if (differs) {
    r.shift = Shift<T>(tau, false);
    r.logits.exponent = r.shift.exponent;
  }
  const bool use_saved = any_saved && !differs;
  const Layout &rows = r.x.layout, &columns = r.y.layout;
  double largest_grad =
      std::max(largest_magnitude<T>(upstream.grad_row), largest_magnitude<T>(upstream.grad_column));
  if (upstream.grad_positive.has_value())
    largest_grad = std::max(largest_grad, tau * largest_magnitude<T>(*upstream.grad_positive));
  if (largest_grad == 0) largest_grad = 1;
  const Weights<T> row_weights =
      make_weights<T>(of_rows, largest_grad, r.shift.error, rows.padded_rows());
  const Weights<T> column_weights =
      make_weights<T>(of_columns, largest_grad, r.shift.error, columns.padded_rows());

  const int64_t blocks = std::max(rows.blocks, columns.blocks);
  const int64_t square_blocks =
      use_saved ? blocks : std::min(blocks, blocks_of_square<T>(rows.block));
  const auto new_gradient = [&](const Tensor& like, bool wanted) {
    const int64_t wanted_rows = wanted ? like.size(0) : 0;
    return new_tensor(like, {wanted_rows, rows.features}, like.scalar_type());
  };
  // The gradient of the temperature follows from that of X as well as from that of Y.
  const bool of_x = upstream.of_x || !upstream.of_y, of_y = upstream.of_y;
  const bool incomplete = square_blocks < blocks;
  Tensor grad_x = new_gradient(o.x, of_x), grad_y = new_gradient(o.y, of_y);
  const GradientSums<T> x_sums(&grad_x, r.source(0), r.x.padded_features, incomplete && of_x);
  const GradientSums<T> y_sums(&grad_y, r.source(1), r.x.padded_features, incomplete && of_y);
  std::vector<T> x_dot_gradient(rows.rows), y_dot_gradient(columns.rows);
  const T factor = static_cast<T>(largest_grad / r.shift.tau);
  // Relative to the factor, as the weights are, and subtracted.
  const bool positives = upstream.grad_positive.has_value();
  Buffer<T> positive_weight(positives ? rows.rows : 0);
  PositiveRows<T> row_positives, column_positives;
  if (positives) {
    const Tensor& grad = *upstream.grad_positive;
    const T* g = data_of<T>(grad);
    for (int64_t a = 0; a < rows.rows; ++a)
      positive_weight[a] = static_cast<T>(-g[a * grad.stride(0)] / largest_grad * tau);
    const int64_t* of = r.logits.exclusion.positives;
    row_positives = positives_of_rows(r.source(1), of, rows.rows, positive_weight.get());
    column_positives = positives_of_columns(r.source(0), of, columns.rows, positive_weight.get());
  }
  const Side<T, P> x{.finisher = {.core = r.x.core,
                                  .source = r.source(0),
                                  .rounding = r.rounding,
                                  .positive_weight = nullptr,
                                  .factor = factor,
                                  .grads = &grad_x,
                                  .in_place = x_sums.in_place,
                                  .row_dot_gradient = x_dot_gradient.data(),
                                  .positive_rows = positives ? &row_positives : nullptr},
                     .sums = x_sums.rows};
  const Side<T, P> y{.finisher = {.core = r.y.core,
                                  .source = r.source(1),
                                  .rounding = r.rounding,
                                  .positive_weight = nullptr,
                                  .factor = factor,
                                  .grads = &grad_y,
                                  .in_place = y_sums.in_place,
                                  .row_dot_gradient = y_dot_gradient.data(),
                                  .positive_rows = positives ? &column_positives : nullptr},
                     .sums = y_sums.rows};
  run_backward<T, P>(
      {.logits = r.logits,
       .row_weights = row_weights,
       .column_weights = column_weights,
       .saved_exponentials = use_saved ? data_of<T>(saved.saved_exponentials) : nullptr,
       .square_blocks = square_blocks,
       .x = of_x ? &x : nullptr,
       .y = of_y ? &y : nullptr});

  // The log-sum-exps are functions of x y^T / tau: dL/dtau = -(1 / tau) sum x . dL/dx, and so for
  // y.
  double total = 0;
  for (T a : of_x ? x_dot_gradient : y_dot_gradient) total += a;
  const Tensor& like = o.temperature_tensor.has_value() ? *o.temperature_tensor : saved.row_shift;
  return {.grad_x = upstream.of_x ? grad_x : new_gradient(o.x, false),
          .grad_y = grad_y,
          .grad_temperature = scalar_gradient<T>(like, total / -r.shift.tau)};
}

}  // namespace

CrossLogSumExpForward cross_logsumexp_forward(const CrossLogSumExpOptions& options,
                                              bool save_exponentials) {
  return with_types(options.x.scalar_type(), options.rounded_dtype(), [&](auto sum, auto operand) {
    return forward<decltype(sum), decltype(operand)>(options, save_exponentials);
  });
}

CrossLogSumExpBackward cross_logsumexp_backward(const CrossLogSumExpOptions& options,
                                                const CrossLogSumExpUpstream& upstream,
                                                const CrossLogSumExpSaved& saved) {
  const ScalarType operands =
      backward_operands(options.rounded_dtype(), options.temperature_tensor);
  return with_types(options.x.scalar_type(), operands, [&](auto sum, auto operand) {
    return backward<decltype(sum), decltype(operand)>(options, upstream, saved);
  });
}

namespace {

void check_options(const CrossLogSumExpOptions& o) {
  check_inputs(o.x, o.y, o.temperature_tensor, o.product_dtype);
  if (!o.positives.has_value()) return;
  const Tensor& p = *o.positives;
  check(p.scalar_type() == ScalarType::Long && p.dim() == 1 && p.size(0) == o.x.size(0) &&
            p.is_contiguous() && p.is_cpu(),
        "positives must be a contiguous (M,) tensor of int64");
  const int64_t *from = data_of<int64_t>(p), columns = o.y.size(0);
  check(std::all_of(from, from + p.size(0), [&](int64_t b) { return b >= -1 && b < columns; }),
        "positives must be numbers of rows of the other side, from 0 on");
}

void check_saved(const CrossLogSumExpOptions& o, const CrossLogSumExpUpstream& upstream,
                 const CrossLogSumExpSaved& saved) {
  constexpr const char* kRows = "gradients, shifts and log sums must be those of rows and columns";
  for (const Tensor* t : {&upstream.grad_row, &saved.row_shift, &saved.row_log_sum})
    check_rows(*t, o.x, o.x.size(0), kRows);
  for (const Tensor* t : {&upstream.grad_column, &saved.column_shift, &saved.column_log_sum})
    check_rows(*t, o.x, o.y.size(0), kRows);
  for (const Tensor* t :
       {&saved.row_shift, &saved.row_log_sum, &saved.column_shift, &saved.column_log_sum})
    check(t->is_contiguous(), "shifts and log sums must be contiguous");
  check(upstream.grad_positive.has_value() == o.positives.has_value(),
        "grad_positive must be given with positives, and only then");
  if (upstream.grad_positive.has_value())
    check_rows(*upstream.grad_positive, o.x, o.x.size(0), kRows);
  const Tensor& exponentials = saved.saved_exponentials;
  check(exponentials.dim() == 1 && exponentials.is_contiguous() &&
            exponentials.scalar_type() == sum_dtype(o.x.scalar_type()) &&
            (exponentials.size(0) == 0 ||
             exponentials.size(0) == saved_rectangle_size(o.x.size(0), o.y.size(0))),
        "kept must be empty, or hold the exponentials of the forward");
}

// The operators as PyTorch calls them: arguments and results by position, in the order of the
// schemas.
auto call_forward(Tensor x, Tensor y, std::optional<Tensor> positives,
                  std::optional<Tensor> temperature_tensor, double temperature,
                  bool use_cosine_similarity, double eps, std::optional<ScalarType> product_dtype,
                  bool keep) {
  const CrossLogSumExpOptions options{.x = x,
                                      .y = y,
                                      .positives = positives,
                                      .temperature_tensor = temperature_tensor,
                                      .temperature = temperature,
                                      .use_cosine_similarity = use_cosine_similarity,
                                      .eps = eps,
                                      .product_dtype = product_dtype};
  check_options(options);
  const CrossLogSumExpForward out = cross_logsumexp_forward(options, keep);
  return std::tuple(out.row_lse, out.column_lse, out.row_max, out.column_max, out.row_shift,
                    out.row_log_sum, out.column_shift, out.column_log_sum, out.positive,
                    out.mean_similarity, out.saved_exponentials);
}

auto call_backward(Tensor grad_row, Tensor grad_column, std::optional<Tensor> grad_positive,
                   Tensor x, Tensor y, std::optional<Tensor> positives,
                   std::optional<Tensor> temperature_tensor, Tensor row_shift, Tensor row_log_sum,
                   Tensor column_shift, Tensor column_log_sum, Tensor kept, double temperature,
                   bool use_cosine_similarity, double eps, std::optional<ScalarType> product_dtype,
                   bool of_x, bool of_y) {
  const CrossLogSumExpOptions options{.x = x,
                                      .y = y,
                                      .positives = positives,
                                      .temperature_tensor = temperature_tensor,
                                      .temperature = temperature,
                                      .use_cosine_similarity = use_cosine_similarity,
                                      .eps = eps,
                                      .product_dtype = product_dtype};
  const CrossLogSumExpUpstream upstream{.grad_row = grad_row,
                                        .grad_column = grad_column,
                                        .grad_positive = grad_positive,
                                        .of_x = of_x,
                                        .of_y = of_y};
  const CrossLogSumExpSaved saved{.row_shift = row_shift,
                                  .row_log_sum = row_log_sum,
                                  .column_shift = column_shift,
                                  .column_log_sum = column_log_sum,
                                  .saved_exponentials = kept};
  check_options(options);
  check_saved(options, upstream, saved);
  const CrossLogSumExpBackward out = cross_logsumexp_backward(options, upstream, saved);
  return std::tuple(out.grad_x, out.grad_y, out.grad_temperature);
}

}  // namespace

void implement_cross_logsumexp(torch::stable::detail::StableLibrary& library) {
  library.impl("cross_logsumexp", TORCH_BOX(&call_forward));
  library.impl("cross_logsumexp_backward", TORCH_BOX(&call_backward));
}

}  // namespace cjepa
