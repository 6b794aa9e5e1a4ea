// The rectangle: log-sum-exp of every row and every column of X Y^T / tau in one pass over its
// tiles, and the gradients. Operators cross_logsumexp and cross_logsumexp_backward.
#include "cross_logsumexp.h"

#include <tuple>

#include "gradients.h"

namespace cjepa {
namespace {

struct Inputs {
  Tensor x, y;
  std::optional<Tensor> temperature_tensor;
  double temperature;
  bool cosine;
  double eps;
  std::optional<ScalarType> product_dtype;

  ScalarType rounded_dtype() const { return product_dtype.value_or(x.scalar_type()); }
};

template <typename T, typename P>
struct Rectangle {
  View views[2];
  Rounding<T> rounding;
  PackedBatch<T, P> x, y;
  Shift<T> shift;
  Logits<T, P> logits;

  Rectangle(const Inputs& in, const TileCore<T, P>& core, typename PackedBatch<T, P>::Wanted wanted)
      : views{View(in.x), View(in.y)},
        rounding{in.cosine, static_cast<T>(in.eps), in.rounded_dtype()},
        x(source(0), block(), rounding, core, wanted),
        y(source(1), block(), rounding, core, wanted),
        shift(read_temperature(in.temperature_tensor, in.temperature),
              x.bounded && y.bounded && std::min(views[0].rows, views[1].rows) > kFew),
        logits{core, x, y, {views[0].rows, views[1].rows, false, nullptr, 0}, shift.exponent} {}
  Rectangle(const Rectangle&) = delete;
  Rectangle& operator=(const Rectangle&) = delete;

  Source source(int64_t which) const { return {views + which, 1}; }
  // The constant shift leaves an error of a few roundings of 1 / tau in every log-sum-exp. Of a few
  // rows all may be near 0, as that of a single similarity is, and the error large beside them.
  static constexpr int64_t kFew = 8;

  int64_t block() const { return Layout::block_of(std::max(views[0].rows, views[1].rows)); }
};

// lse, largest similarity, shift, log of the sum of exponentials relative to it: per row or column
struct Reduced {
  Tensor lse, largest, shift, log_sum;
};

template <typename T>
Reduced reduce(const Tensor& like, const Shift<T>& shift, bool finite, const Buffer<T>& sums,
               const Buffer<T>& maxima, int64_t chunks, int64_t padded, int64_t rows) {
  const ScalarType dtype = dtype_of<T>();
  Reduced out{make(like, {rows}, dtype), make(like, {rows}, dtype), make(like, {rows}, dtype),
              make(like, {rows}, dtype)};
  T *lse = data_of<T>(out.lse), *largest = data_of<T>(out.largest);
  T *shifts = data_of<T>(out.shift), *log_sums = data_of<T>(out.log_sum);
  const int64_t parts = (rows + kReducedRows - 1) / kReducedRows;
  deal(parts, 100.0 * rows, [&](const auto& take) {
    for (int64_t k; (k = take()) < parts;) {
      const int64_t begin = k * kReducedRows, count = std::min(kReducedRows, rows - begin);
      const ReducedRows<T> reduced(shift, sums.get(), maxima.get(), chunks, padded, begin, count);
      for (int64_t a = 0; a < count; ++a) {
        const double top = reduced.top(shift, a);
        const double log_sum = finite && !std::isnan(shift.tau) ? reduced.log_sum(shift, a) : kNaN;
        shifts[begin + a] = static_cast<T>(top);
        log_sums[begin + a] = static_cast<T>(log_sum);
        lse[begin + a] = static_cast<T>(top / shift.tau + log_sum);
        largest[begin + a] = finite ? reduced.hardest[a] : static_cast<T>(kNaN);
      }
    }
  });
  return out;
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T, typename P>
Outputs run_forward(const Inputs& in) {
  const Rectangle<T, P> r(in, tile_core<T, P>(), {true, false, false});
  const PartialSums<T> sums = sum_tiles<T, P>(r.logits, nullptr);
  const bool finite = r.x.finite && r.y.finite;
  Reduced rows = reduce(in.x, r.shift, finite, sums.row_sum, sums.row_max, sums.chunks, sums.rows,
                        r.x.layout.rows);
  Reduced columns = reduce(in.x, r.shift, finite, sums.column_sum, sums.column_max, sums.chunks,
                           sums.columns, r.y.layout.rows);
  return {rows.lse,   columns.lse,  rows.largest,  columns.largest,
          rows.shift, rows.log_sum, columns.shift, columns.log_sum};
}

// g / S of each row, S being the sum of exponentials relative to the shift; the largest |g| of both
// sides is applied at the end, so that a loss scale pushes no weight out of range.
template <typename T>
Weights<T> make_weights(const Tensor& grad, const Tensor& shift, const Tensor& log_sum,
                        double largest, double error, int64_t padded) {
  const int64_t rows = grad.size(0), stride = grad.stride(0);
  Weights<T> w{Buffer<T>(padded), Buffer<T>(padded)};
  for (int64_t a = 0; a < padded; ++a) {
    w.weight[a] = w.shift[a] = 0;
    if (a >= rows) continue;
    const double sum = data_of<T>(log_sum)[a], g = data_of<T>(grad)[a * stride];
    w.weight[a] = static_cast<T>(g / largest * std::exp(-sum - error));
    w.shift[a] = data_of<T>(shift)[a];
  }
  return w;
}

template <typename T>
bool all_are(const Tensor& t, T value) {
  const T* data = data_of<T>(t);
  return std::all_of(data, data + t.size(0), [&](T x) { return x == value; });
}

struct Saved {
  Tensor row_shift, row_log_sum, column_shift, column_log_sum;
};

template <typename T, typename P>
std::tuple<Tensor, Tensor, Tensor> run_backward_of(const Inputs& in, const Tensor& grad_row,
                                                   const Tensor& grad_column, const Saved& saved,
                                                   bool of_x, bool of_y) {
  const TileCore<T, P>& core = tile_core<T, P>();
  Rectangle<T, P> r(in, core, {true, true, false});
  // The saved shifts may be those of a larger S, which these rows are a part of.
  if (!all_are(saved.row_shift, T{1}) || !all_are(saved.column_shift, T{1})) {
    r.shift = Shift<T>(r.shift.tau, false);
    r.logits.exponent = r.shift.exponent;
  }
  const Layout &rows = r.x.layout, &columns = r.y.layout;
  double largest = 0;
  for (const Tensor* grad : {&grad_row, &grad_column})
    for (int64_t a = 0; a < grad->size(0); ++a)
      largest = std::max<double>(largest, std::fabs(data_of<T>(*grad)[a * grad->stride(0)]));
  if (largest == 0) largest = 1;
  const Weights<T> row_weights = make_weights<T>(grad_row, saved.row_shift, saved.row_log_sum,
                                                 largest, r.shift.error, rows.padded_rows());
  const Weights<T> column_weights =
      make_weights<T>(grad_column, saved.column_shift, saved.column_log_sum, largest, r.shift.error,
                      columns.padded_rows());

  const int64_t blocks = std::max(rows.blocks, columns.blocks);
  const int64_t side = std::min(blocks, square_side<T>(rows.block));
  const T factor = static_cast<T>(largest / r.shift.tau);
  const auto gradient = [&](const Tensor& like, bool wanted) {
    const int64_t wanted_rows = wanted ? like.size(0) : 0;
    return make(like, {wanted_rows, rows.features}, like.scalar_type());
  };
  // The gradient of the temperature follows from either side's.
  const bool with_x = of_x || !of_y;
  Tensor grads[2] = {gradient(in.x, with_x), gradient(in.y, of_y)};
  const bool single = side == blocks;
  const GradientSums<T> x_sums(grads, 1, rows.rows, r.x.padded_features, single || !with_x);
  const GradientSums<T> y_sums(grads + 1, 1, columns.rows, r.x.padded_features, single || !of_y);
  std::vector<T> x_along(rows.rows), y_along(columns.rows);
  const Side<T, P> x{
      {core, r.source(0), r.rounding, nullptr, factor, grads, x_sums.in_place, x_along.data()},
      x_sums.rows};
  const Side<T, P> y{
      {core, r.source(1), r.rounding, nullptr, factor, grads + 1, y_sums.in_place, y_along.data()},
      y_sums.rows};
  run_backward<T, P>(r.logits, row_weights, column_weights, nullptr, side, with_x ? &x : nullptr,
                     of_y ? &y : nullptr);

  // Both outputs are functions of x y^T / tau: dL/dtau = -(1 / tau) sum x . dL/dx, and so for y.
  double total = 0;
  for (T a : with_x ? x_along : y_along) total += a;
  const Tensor& like = in.temperature_tensor.has_value() ? *in.temperature_tensor : saved.row_shift;
  return {of_x ? grads[0] : gradient(in.x, false), grads[1],
          scalar_gradient<T>(like, total / -r.shift.tau)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cross_logsumexp(
    Tensor x, Tensor y, std::optional<Tensor> temperature_tensor, double temperature, bool cosine,
    double eps, std::optional<ScalarType> product_dtype) {
  const Inputs in{x, y, temperature_tensor, temperature, cosine, eps, product_dtype};
  return with_types(x.scalar_type(), in.rounded_dtype(), [&](auto sum, auto operand) {
    return run_forward<decltype(sum), decltype(operand)>(in);
  });
}

std::tuple<Tensor, Tensor, Tensor> cross_logsumexp_backward(
    Tensor grad_row, Tensor grad_column, Tensor x, Tensor y,
    std::optional<Tensor> temperature_tensor, Tensor row_shift, Tensor row_log_sum,
    Tensor column_shift, Tensor column_log_sum, double temperature, bool cosine, double eps,
    std::optional<ScalarType> product_dtype, bool of_x, bool of_y) {
  const Inputs in{x, y, temperature_tensor, temperature, cosine, eps, product_dtype};
  const Saved saved{row_shift, row_log_sum, column_shift, column_log_sum};
  const ScalarType operands = backward_operands(in.rounded_dtype(), temperature_tensor);
  return with_types(x.scalar_type(), operands, [&](auto sum, auto operand) {
    return run_backward_of<decltype(sum), decltype(operand)>(in, grad_row, grad_column, saved, of_x,
                                                             of_y);
  });
}

}  // namespace cjepa
