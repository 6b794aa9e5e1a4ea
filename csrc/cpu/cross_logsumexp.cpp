// The rectangle S = X Y^T: the log-sum-exp of every row and of every column of S / tau in one pass
// over its tiles, and the gradients. With e_ab = exp(s_ab / tau - c), c being the shift, S_a the
// sum of e_ab over b, S_b that over a, and the upstream gradients g_a and h_b:
//
//   dL/dx_a = (1 / tau) sum_b e_ab (w_a + v_b) y_b,   w_a = g_a / S_a,   v_b = h_b / S_b
//
// and dL/dy_b alike, for unit rows.
#include "cross_logsumexp.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "constants.h"
#include "gradients.h"
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
                             .mask = nullptr,
                             .mask_stride = 0},
               .exponent = shift.exponent} {}
  Rectangle(const Rectangle&) = delete;
  Rectangle& operator=(const Rectangle&) = delete;

  Source source(int64_t which) const { return {views + which, 1}; }
  int64_t block() const { return block_size(std::max(views[0].rows, views[1].rows)); }
  bool finite() const { return x.finite && y.finite; }
};

// Results of each row, or of each column: log-sum-exp, largest similarity, shift, and the log of
// the sum of exponentials relative to the shift.
struct SideResults {
  Tensor lse, largest, shift, log_sum;
};

// Adds up the chunks of the first `rows` rows, or columns.
template <typename T, typename P>
SideResults reduce(const Rectangle<T, P>& r, const Tensor& like, const ChunkSums<T>& sums,
                   int64_t rows) {
  const auto new_result = [&] { return new_tensor(like, {rows}, dtype_of<T>()); };
  SideResults out{
      .lse = new_result(), .largest = new_result(), .shift = new_result(), .log_sum = new_result()};
  T *lse = data_of<T>(out.lse), *largest = data_of<T>(out.largest);
  T *shifts = data_of<T>(out.shift), *log_sums = data_of<T>(out.log_sum);
  const Shift<T>& shift = r.shift;
  const bool finite = r.finite();
  const int64_t parts = (rows + kReducedRows - 1) / kReducedRows;
  parallel_tasks(parts, 100.0 * rows, [&](const auto& take) {
    for (int64_t k; (k = take()) < parts;) {
      const int64_t begin = k * kReducedRows, count = std::min(kReducedRows, rows - begin);
      const ReducedRows<T> reduced(shift, sums, begin, count);
      for (int64_t a = 0; a < count; ++a) {
        const double row_shift = reduced.shift_of(shift, a);
        const double log_sum = finite && !std::isnan(shift.tau) ? reduced.log_sum(shift, a) : kNaN;
        shifts[begin + a] = static_cast<T>(row_shift);
        log_sums[begin + a] = static_cast<T>(log_sum);
        lse[begin + a] = static_cast<T>(row_shift / shift.tau + log_sum);
        largest[begin + a] = finite ? reduced.largest[a] : static_cast<T>(kNaN);
      }
    }
  });
  return out;
}

template <typename T, typename P>
CrossLogSumExpForward forward(const CrossLogSumExpOptions& o) {
  const Rectangle<T, P> r(o, {.similarity = true});
  const PartialSums<T> sums = sum_tiles<T, P>(r.logits, nullptr);
  const SideResults rows = reduce(r, o.x, sums.of_rows(), r.x.layout.rows);
  const SideResults columns = reduce(r, o.x, sums.of_columns(), r.y.layout.rows);
  return {.row_lse = rows.lse,
          .column_lse = columns.lse,
          .row_max = rows.largest,
          .column_max = columns.largest,
          .row_shift = rows.shift,
          .row_log_sum = rows.log_sum,
          .column_shift = columns.shift,
          .column_log_sum = columns.log_sum};
}

// The upstream gradient of one side's log-sum-exps, and what the forward saved of them.
struct SideInputs {
  const Tensor &grad, &shift, &log_sum;
};

// g / S of each row. The largest |g| of both sides is applied at the end, so that a loss scale
// takes no weight out of range. `error` is that of the shift.
template <typename T>
Weights<T> make_weights(const SideInputs& side, double largest_grad, double error, int64_t padded) {
  const int64_t rows = side.grad.size(0), stride = side.grad.stride(0);
  const T *grad = data_of<T>(side.grad), *log_sum = data_of<T>(side.log_sum);
  const T* shift = data_of<T>(side.shift);
  Weights<T> w{.weight = Buffer<T>(padded), .shift = Buffer<T>(padded)};
  for (int64_t a = 0; a < padded; ++a) {
    w.weight[a] = w.shift[a] = 0;
    if (a >= rows) continue;
    const double sum = log_sum[a], g = grad[a * stride];
    w.weight[a] = static_cast<T>(g / largest_grad * std::exp(-sum - error));
    w.shift[a] = shift[a];
  }
  return w;
}

template <typename T>
bool all_are(const Tensor& t, T value) {
  const T* data = data_of<T>(t);
  return std::all_of(data, data + t.size(0), [&](T x) { return x == value; });
}

template <typename T>
double largest_magnitude(const Tensor& t) {
  const T* data = data_of<T>(t);
  const int64_t stride = t.stride(0);
  double largest = 0;
  for (int64_t a = 0; a < t.size(0); ++a)
    largest = std::max<double>(largest, std::fabs(data[a * stride]));
  return largest;
}

template <typename T, typename P>
CrossLogSumExpBackward backward(const CrossLogSumExpOptions& o,
                                const CrossLogSumExpUpstream& upstream,
                                const CrossLogSumExpSaved& saved) {
  Rectangle<T, P> r(o, {.similarity = true, .products = true});
  // The saved shifts may be those of a larger S, which these rows are a part of.
  if (!all_are(saved.row_shift, T{1}) || !all_are(saved.column_shift, T{1})) {
    r.shift = Shift<T>(r.shift.tau, false);
    r.logits.exponent = r.shift.exponent;
  }
  const Layout &rows = r.x.layout, &columns = r.y.layout;
  double largest_grad =
      std::max(largest_magnitude<T>(upstream.grad_row), largest_magnitude<T>(upstream.grad_column));
  if (largest_grad == 0) largest_grad = 1;
  const Weights<T> row_weights = make_weights<T>(
      {.grad = upstream.grad_row, .shift = saved.row_shift, .log_sum = saved.row_log_sum},
      largest_grad, r.shift.error, rows.padded_rows());
  const Weights<T> column_weights = make_weights<T>(
      {.grad = upstream.grad_column, .shift = saved.column_shift, .log_sum = saved.column_log_sum},
      largest_grad, r.shift.error, columns.padded_rows());

  const int64_t blocks = std::max(rows.blocks, columns.blocks);
  const int64_t square_blocks = std::min(blocks, blocks_of_square<T>(rows.block));
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
  const Side<T, P> x{.finisher = {.core = r.x.core,
                                  .source = r.source(0),
                                  .rounding = r.rounding,
                                  .positive_weight = nullptr,
                                  .factor = factor,
                                  .grads = &grad_x,
                                  .in_place = x_sums.in_place,
                                  .row_dot_gradient = x_dot_gradient.data()},
                     .sums = x_sums.rows};
  const Side<T, P> y{.finisher = {.core = r.y.core,
                                  .source = r.source(1),
                                  .rounding = r.rounding,
                                  .positive_weight = nullptr,
                                  .factor = factor,
                                  .grads = &grad_y,
                                  .in_place = y_sums.in_place,
                                  .row_dot_gradient = y_dot_gradient.data()},
                     .sums = y_sums.rows};
  run_backward<T, P>({.logits = r.logits,
                      .row_weights = row_weights,
                      .column_weights = column_weights,
                      .saved_exponentials = nullptr,
                      .square_blocks = square_blocks,
                      .x = of_x ? &x : nullptr,
                      .y = of_y ? &y : nullptr});

  // Both outputs are functions of x y^T / tau: dL/dtau = -(1 / tau) sum x . dL/dx, and so for y.
  double total = 0;
  for (T a : of_x ? x_dot_gradient : y_dot_gradient) total += a;
  const Tensor& like = o.temperature_tensor.has_value() ? *o.temperature_tensor : saved.row_shift;
  return {.grad_x = upstream.of_x ? grad_x : new_gradient(o.x, false),
          .grad_y = grad_y,
          .grad_temperature = scalar_gradient<T>(like, total / -r.shift.tau)};
}

}  // namespace

CrossLogSumExpForward cross_logsumexp_forward(const CrossLogSumExpOptions& options) {
  return with_types(options.x.scalar_type(), options.rounded_dtype(), [&](auto sum, auto operand) {
    return forward<decltype(sum), decltype(operand)>(options);
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
}

// The operators as PyTorch calls them: arguments and results by position, in the order of the
// schemas.
auto call_forward(Tensor x, Tensor y, std::optional<Tensor> temperature_tensor, double temperature,
                  bool use_cosine_similarity, double eps, std::optional<ScalarType> product_dtype) {
  const CrossLogSumExpOptions options{.x = x,
                                      .y = y,
                                      .temperature_tensor = temperature_tensor,
                                      .temperature = temperature,
                                      .use_cosine_similarity = use_cosine_similarity,
                                      .eps = eps,
                                      .product_dtype = product_dtype};
  check_options(options);
  const CrossLogSumExpForward out = cross_logsumexp_forward(options);
  return std::tuple(out.row_lse, out.column_lse, out.row_max, out.column_max, out.row_shift,
                    out.row_log_sum, out.column_shift, out.column_log_sum);
}

auto call_backward(Tensor grad_row, Tensor grad_column, Tensor x, Tensor y,
                   std::optional<Tensor> temperature_tensor, Tensor row_shift, Tensor row_log_sum,
                   Tensor column_shift, Tensor column_log_sum, double temperature,
                   bool use_cosine_similarity, double eps, std::optional<ScalarType> product_dtype,
                   bool of_x, bool of_y) {
  const CrossLogSumExpOptions options{.x = x,
                                      .y = y,
                                      .temperature_tensor = temperature_tensor,
                                      .temperature = temperature,
                                      .use_cosine_similarity = use_cosine_similarity,
                                      .eps = eps,
                                      .product_dtype = product_dtype};
  const CrossLogSumExpUpstream upstream{
      .grad_row = grad_row, .grad_column = grad_column, .of_x = of_x, .of_y = of_y};
  const CrossLogSumExpSaved saved{.row_shift = row_shift,
                                  .row_log_sum = row_log_sum,
                                  .column_shift = column_shift,
                                  .column_log_sum = column_log_sum};
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
