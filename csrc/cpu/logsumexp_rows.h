// Log-sum-exps of rows from the sums over tiles, and the weights of rows in their gradients, which
// the rectangle and the triangle share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "constants.h"
#include "gradients.h"
#include "memory.h"
#include "tensors.h"
#include "tiles.h"

namespace cjepa {

// Results of each row, or of each column: log-sum-exp, largest similarity, shift, and the log of
// the sum of exponentials relative to the shift. Without an entry that counts, the log-sum-exp and
// the largest similarity are -inf.
struct SideResults {
  Tensor lse, largest, shift, log_sum;
};

// Adds up the chunks of the first `rows` rows, or columns. If some number of the operands is not
// finite, all results are NaN. Unless it is null, `subtracted` holds similarities whose logits are
// subtracted from the log-sum-exps.
template <typename T>
SideResults reduce_side(const Shift<T>& shift, bool finite, const ChunkSums<T>& sums, int64_t rows,
                        const Tensor& like, const T* subtracted = nullptr) {
  const auto new_result = [&] { return new_tensor(like, {rows}, dtype_of<T>()); };
  SideResults out{
      .lse = new_result(), .largest = new_result(), .shift = new_result(), .log_sum = new_result()};
  T *lse = data_of<T>(out.lse), *largest = data_of<T>(out.largest);
  T *shifts = data_of<T>(out.shift), *log_sums = data_of<T>(out.log_sum);
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
        const double from = subtracted == nullptr ? 0 : subtracted[begin + a];
        lse[begin + a] = static_cast<T>((row_shift - from) / shift.tau + log_sum);
        largest[begin + a] = finite ? reduced.largest[a] : static_cast<T>(kNaN);
      }
    }
  });
  return out;
}

// The similarities of the positives as a result: (rows) numbers, of which padding is left out.
template <typename T>
Tensor positive_result(const PartialSums<T>& sums, bool finite, int64_t rows, const Tensor& like) {
  Tensor out = new_tensor(like, {rows}, dtype_of<T>());
  T* to = data_of<T>(out);
  for (int64_t a = 0; a < rows; ++a) to[a] = finite ? sums.positive[a] : static_cast<T>(kNaN);
  return out;
}

// The positives of each row of X: at most one, -1 stands for none.
template <typename T>
PositiveRows<T> positives_of_rows(Source columns, const int64_t* positives, int64_t rows,
                                  const T* weight) {
  PositiveRows<T> out{.other = columns, .of_y = false, .starts = {0}, .rows = {}, .weight = weight};
  for (int64_t a = 0; a < rows; ++a) {
    if (positives[a] >= 0) out.rows.push_back(positives[a]);
    out.starts.push_back(static_cast<int64_t>(out.rows.size()));
  }
  return out;
}

// The upstream gradient of one side's log-sum-exps, and what the forward saved of them.
struct SideInputs {
  const Tensor &grad, &shift, &log_sum;

  // Whether the saved numbers are relative to the constant shift, the logit of a similarity of 1.
  // For rows without entries it does not matter.
  template <typename T>
  bool has_constant_shift() const {
    const T *shifts = data_of<T>(shift), *log_sums = data_of<T>(log_sum);
    for (int64_t a = 0; a < shift.size(0); ++a)
      if (shifts[a] != 1 && log_sums[a] != -kInfinity) return false;
    return true;
  }
};

// g / S of each row. The largest |g| of all sides is applied at the end, so that a loss scale
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
    w.shift[a] = shift[a];
    const double sum = log_sum[a], g = grad[a * stride];
    if (sum == -kInfinity) continue;  // a row without entries
    w.weight[a] = static_cast<T>(g / largest_grad * std::exp(-sum - error));
  }
  return w;
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

}  // namespace cjepa
