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

// More than this is written around the caches: it would not be found there by the backward.
constexpr size_t kPastCaches = size_t{4} << 20;

// Sums over tiles. The panels of all tiles, in order, are dealt to a fixed number of chunks, each
// with sums of its own.
template <typename T>
struct PartialSums {
  int64_t chunks, rows;
  Buffer<T> sum, maximum;  // (chunks, rows)
  Buffer<T> positive;      // (rows)
  std::vector<double> negative_sum;
  std::vector<int64_t> negative_count;

  PartialSums(int64_t chunks_, int64_t rows_)
      : chunks(chunks_),
        rows(rows_),
        sum(chunks * rows),
        maximum(chunks * rows),
        positive(rows),
        negative_sum(chunks),
        negative_count(chunks) {}
};

template <typename T, typename P>
PartialSums<T> sum_tiles(const TileCore<T, P>& core, const Pairs<T, P>& pairs, T* kept) {
  const PackedBatch<T, P>& z = pairs.z;
  const Layout& layout = z.layout;
  const int64_t tiles = layout.blocks * (layout.blocks + 1) / 2;
  const int64_t panels = layout.block / core.panel;  // of a tile
  const int64_t area = layout.block * layout.block;
  const int64_t chunks = std::min<int64_t>(tiles * panels, layout.rows >= 1536 ? 64 : 16);
  PartialSums<T> sums(chunks, layout.padded_rows());
  const double work = 1.0 * layout.rows * layout.rows * (z.depth + 20);
  deal(chunks, work, [&](const auto& take) {
    Buffer<T> scratch(core.scratch_size(layout.block)), space(kept == nullptr ? area : 0);
    for (int64_t c; (c = take()) < chunks;) {
      T* sum = sums.sum.get() + c * sums.rows;
      T* maximum = sums.maximum.get() + c * sums.rows;
      std::fill(sum, sum + sums.rows, T{0});
      std::fill(maximum, maximum + sums.rows, -std::numeric_limits<T>::infinity());
      int64_t p = tiles * panels * c / chunks;
      const int64_t last = tiles * panels * (c + 1) / chunks;
      int64_t i = 0, first = 0;  // tile row of p, and the number of its first tile
      while (p / panels >= first + layout.blocks - i) first += layout.blocks - i++;
      for (int64_t j = i + p / panels - first; p < last; ++j) {
        if (j == layout.blocks) j = ++i;
        const int64_t begin = p % panels * core.panel;
        const int64_t end = std::min(layout.block, begin + (last - p) * core.panel);
        p += (end - begin) / core.panel;
        if (begin >= layout.valid(j)) continue;
        SimilarityTile<T, P> t = make_tile(core, z, z, i, j, begin, end);
        if (p < last && end == layout.block)
          t.next_panels = z.panels_of(j + 1 < layout.blocks ? j + 1 : i + 1);
        t.exclusion = pairs.exclusion;
        t.exponent = pairs.shift.exponent;
        if (kept != nullptr) {
          t.out = kept + tile_number(i, j, layout.blocks) * area + begin;
        } else if (!t.exponent.constant_shift) {
          t.out = space.get() + begin;
        }
        t.out_stride = layout.block;
        t.past_caches = tiles * area * sizeof(T) > kPastCaches;
        t.row_sum = sum + t.row;
        t.row_max = maximum + t.row;
        t.column_sum = sum + t.column;
        t.column_max = maximum + t.column;
        t.positive = i == j ? sums.positive.get() + t.row : nullptr;
        t.negative_sum = t.exclusion.mask == nullptr ? nullptr : &sums.negative_sum[c];
        t.negative_count = t.exclusion.mask == nullptr ? nullptr : &sums.negative_count[c];
        t.scratch = scratch.get();
        core.similarity(t);
      }
    }
  });
  return sums;
}

struct Totals {
  double loss = 0, positive = 0;
  int64_t hits = 0;
};

template <typename T>
struct PerRow {  // outputs in the caller's order; loss may be null
  T *loss, *lse, *shift, *log_sum, *positive;
};

constexpr int64_t kReducedRows = 256;  // at a time

// Adds up the chunks of some rows, and finishes those rows.
template <typename T, typename P>
Totals reduce_rows(const Pairs<T, P>& pairs, const PartialSums<T>& sums, int64_t begin,
                   const PerRow<T>& out) {
  const Shift<T>& shift = pairs.shift;
  const int64_t count = std::min(kReducedRows, pairs.z.layout.rows - begin);
  T hardest[kReducedRows];
  double total[kReducedRows];
  std::fill(hardest, hardest + count, -std::numeric_limits<T>::infinity());
  std::fill(total, total + count, 0.0);
  for (int64_t c = 0; c < sums.chunks; ++c) {
    const T* maximum = sums.maximum.get() + c * sums.rows + begin;
    for (int64_t a = 0; a < count; ++a)
      hardest[a] = maximum[a] > hardest[a] ? maximum[a] : hardest[a];
  }
  for (int64_t c = 0; c < sums.chunks; ++c) {
    const T* sum = sums.sum.get() + c * sums.rows + begin;
    const T* maximum = sums.maximum.get() + c * sums.rows + begin;
    if (shift.exponent.constant_shift) {
      for (int64_t a = 0; a < count; ++a) total[a] += sum[a];
      continue;
    }
    for (int64_t a = 0; a < count; ++a) {
      if (maximum[a] > -std::numeric_limits<T>::infinity())
        total[a] += sum[a] * std::exp((static_cast<double>(maximum[a]) - hardest[a]) / shift.tau);
    }
  }
  Totals totals;
  for (int64_t a = 0; a < count; ++a) {
    const double positive = sums.positive[begin + a];
    const bool has_negatives = hardest[a] > -kInfinity;
    const double top =
        !has_negatives ? 0 : shift.exponent.constant_shift ? 1 : static_cast<double>(hardest[a]);
    double log_sum = has_negatives ? std::log(total[a]) - shift.error : -kInfinity;
    if (!pairs.z.finite || std::isnan(shift.tau)) log_sum = kNaN;
    const double gap = (top - positive) / shift.tau + log_sum;  // LSE- minus the positive's logit
    const double own = softplus(gap);
    const int64_t at = pairs.original(begin + a);
    out.shift[at] = static_cast<T>(top);
    out.log_sum[at] = static_cast<T>(log_sum);
    out.lse[at] = static_cast<T>(positive / shift.tau + own);
    out.positive[at] = static_cast<T>(positive);
    if (out.loss != nullptr) out.loss[at] = static_cast<T>(own);
    totals.loss += own;
    totals.positive += positive;
    totals.hits += positive > hardest[a];
  }
  return totals;
}

// From the kernel's own memory, to which it returns with the tensor.
template <typename T>
Tensor make_kept(int64_t count) {
  const Block block = take_block(sizeof(T) * count);
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(block.data, {count}, {int64_t{1}}, cpu, dtype_of<T>(),
                                  [block](void*) { give_back(block); });
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
  Tensor kept = keep ? make_kept<T>(kept_size(rows)) : make(like, {0}, dtype);
  const PartialSums<T> sums =
      sum_tiles(core, pairs, keep ? static_cast<T*>(kept.mutable_data_ptr()) : nullptr);

  const bool none = options.reduction == "none";
  Tensor loss = none ? make(like, {rows}, dtype) : make(like, {}, dtype);
  Tensor lse = make(like, {rows}, dtype), shift = make(like, {rows}, dtype);
  Tensor log_sum = make(like, {rows}, dtype), positive = make(like, {rows}, dtype);
  const auto data = [](Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); };
  const PerRow<T> out{none ? data(loss) : nullptr, data(lse), data(shift), data(log_sum),
                      data(positive)};
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
    *data(loss) = static_cast<T>(options.reduction == "mean" ? total.loss / count : total.loss);
  double negative = kNaN;
  if (options.mask.has_value()) {
    double sum = 0;
    int64_t negatives = 0;
    for (int64_t c = 0; c < sums.chunks; ++c) {
      sum += sums.negative_sum[c];
      negatives += sums.negative_count[c];
    }
    if (negatives > 0) negative = sum / static_cast<double>(negatives);
  } else {
    negative = mean_negative(pairs.z, total.positive);
  }
  return {loss,
          scalar<T>(like, static_cast<double>(total.hits) / count),
          scalar<T>(like, total.positive / count),
          scalar<T>(like, negative),
          lse,
          shift,
          log_sum,
          positive,
          kept};
}

template Outputs nt_xent_forward<float, float>(const Options&, bool);
template Outputs nt_xent_forward<float, Bf16Pair>(const Options&, bool);
template Outputs nt_xent_forward<double, double>(const Options&, bool);

}  // namespace cjepa
