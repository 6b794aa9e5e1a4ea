// Tiles on and above the diagonal of S: a row's sum is that of its tiles' rows and, S being
// symmetric, of the columns of the tiles above. Sums are added in an order that depends on M alone:
// the same bits on any number of threads.
#include "nt_xent.h"

namespace cjepa {
namespace {

double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }

template <typename T>
Tensor scalar(const Tensor& like, double value) {
  Tensor t = make(like, {}, dtype_of<T>());
  *static_cast<T*>(t.mutable_data_ptr()) = static_cast<T>(value);
  return t;
}

struct Totals {
  double loss = 0, positive = 0;
  int64_t hits = 0;
};

template <typename T>
struct PerRow {  // outputs in the caller's order; loss may be null
  T *loss, *lse, *hardest, *shift, *log_sum, *positive;
};

// Adds up the chunks of some rows, and finishes those rows.
template <typename T, typename P>
Totals reduce_rows(const Pairs<T, P>& pairs, const PartialSums<T>& sums, int64_t begin,
                   const PerRow<T>& out) {
  const Shift<T>& shift = pairs.shift;
  const int64_t count = std::min(kReducedRows, pairs.z.layout.rows - begin);
  const ReducedRows<T> reduced(shift, sums.row_sum.get(), sums.row_max.get(), sums.chunks,
                               sums.rows, begin, count);
  Totals totals;
  for (int64_t a = 0; a < count; ++a) {
    const double positive = sums.positive[begin + a], top = reduced.top(shift, a);
    double log_sum = reduced.log_sum(shift, a);
    if (!pairs.z.finite || std::isnan(shift.tau)) log_sum = kNaN;
    const double gap = (top - positive) / shift.tau + log_sum;  // LSE- minus the positive's logit
    const double own = softplus(gap);
    const int64_t at = pairs.original(begin + a);
    out.hardest[at] = pairs.z.finite ? reduced.hardest[a] : static_cast<T>(kNaN);
    out.shift[at] = static_cast<T>(top);
    out.log_sum[at] = static_cast<T>(log_sum);
    out.lse[at] = static_cast<T>(positive / shift.tau + own);
    out.positive[at] = static_cast<T>(positive);
    if (out.loss != nullptr) out.loss[at] = static_cast<T>(own);
    totals.loss += own;
    totals.positive += positive;
    // A NaN is not among the maxima: it would leave hits to the rows of others.
    totals.hits += pairs.z.finite && positive > reduced.hardest[a];
  }
  return totals;
}

// Mean over the negative pairs without a pass over pairs:
// (|sum z|^2 - sum |z_a|^2 - sum s_pos) / (M (M - 2))
template <typename T, typename P>
double mean_negative(const PackedBatch<T, P>& z, double positive_sum) {
  const Layout& layout = z.layout;
  if (layout.rows <= 2) return kNaN;
  std::vector<double> sum(layout.features);
  for (size_t at = 0; at < z.sums.size();)
    for (int64_t d = 0; d < layout.features; ++d) sum[d] += z.sums[at++];
  double total = -positive_sum;
  for (double s : z.squares) total -= s;
  for (double s : sum) total += s * s;
  return total / (static_cast<double>(layout.rows) * (layout.rows - 2));
}

}  // namespace

template <typename T, typename P>
Outputs nt_xent_forward(const Options& options, bool keep) {
  const TileCore<T, P>& core = tile_core<T, P>();
  const Pairs<T, P> pairs(options, core, {true, false, !options.mask.has_value()});
  const int64_t rows = pairs.z.layout.rows;
  const Tensor& like = options.z_i;
  const ScalarType dtype = dtype_of<T>();
  Tensor kept = keep ? cached_tensor({kept_size(rows)}, dtype) : make(like, {0}, dtype);
  const PartialSums<T> sums = sum_tiles(pairs.logits, keep ? data_of<T>(kept) : nullptr);

  const bool none = options.reduction == "none";
  Tensor loss = none ? make(like, {rows}, dtype) : make(like, {}, dtype);
  Tensor lse = make(like, {rows}, dtype), hardest = make(like, {rows}, dtype);
  Tensor shift = make(like, {rows}, dtype);
  Tensor log_sum = make(like, {rows}, dtype), positive = make(like, {rows}, dtype);
  const PerRow<T> out{none ? data_of<T>(loss) : nullptr,
                      data_of<T>(lse),
                      data_of<T>(hardest),
                      data_of<T>(shift),
                      data_of<T>(log_sum),
                      data_of<T>(positive)};
  const int64_t parts = (rows + kReducedRows - 1) / kReducedRows;
  std::vector<Totals> totals(parts);
  deal(parts, 100.0 * rows, [&](const auto& take) {
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
  if (!none)
    *data_of<T>(loss) =
        static_cast<T>(options.reduction == "mean" ? total.loss / count : total.loss);
  double negative = kNaN;
  if (options.mask.has_value()) {
    double sum = 0;
    for (double s : sums.negative_sum) sum += s;
    const int64_t negatives = rows * (rows - 2) - 4 * pairs.mask.pairs;
    if (negatives > 0) negative = sum / static_cast<double>(negatives);
  } else {
    negative = mean_negative(pairs.z, total.positive);
  }
  return {loss,
          scalar<T>(like, static_cast<double>(total.hits) / count),
          scalar<T>(like, total.positive / count),
          scalar<T>(like, negative),
          lse,
          hardest,
          shift,
          log_sum,
          positive,
          kept};
}

template Outputs nt_xent_forward<float, float>(const Options&, bool);
template Outputs nt_xent_forward<float, Bf16Pair>(const Options&, bool);
template Outputs nt_xent_forward<double, double>(const Options&, bool);

}  // namespace cjepa
