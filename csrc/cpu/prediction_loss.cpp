// The loss is bound by memory. The forward reads both sides once. The backward reads them once more
// and writes each gradient once. core/prediction_core.h derives the formulas. Errors are added in
// blocks of rows that depend on the shapes alone, so the sums have the same bits on any number of
// threads.
#include "prediction_loss.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#include "memory.h"
#include "selected_core.h"

namespace cjepa {
namespace {

int64_t element_size(ScalarType dtype) {
  if (dtype == ScalarType::Double) return 8;
  if (dtype == ScalarType::Float) return 4;
  return dtype == ScalarType::Bool ? 1 : 2;
}

// The rows of a (B, N, D) or (B, D) tensor, or of its mask, (B, N) or (B,).
struct TensorRows {
  char* data;
  ScalarType dtype;
  int64_t patches, features;
  int64_t batch_stride, patch_stride, feature_stride;  // bytes

  TensorRows(const Tensor& t, bool with_features)
      : data(static_cast<char*>(const_cast<void*>(t.const_data_ptr()))), dtype(t.scalar_type()) {
    const int64_t bytes = element_size(dtype), dims = t.dim() - (with_features ? 1 : 0);
    patches = dims == 2 ? t.size(1) : 1;
    batch_stride = bytes * t.stride(0);
    patch_stride = dims == 2 ? bytes * t.stride(1) : 0;
    features = with_features ? t.size(dims) : 1;
    feature_stride = with_features ? bytes * t.stride(dims) : 0;
  }
  char* row(int64_t index) const {
    return data + index / patches * batch_stride + index % patches * patch_stride;
  }
};

std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < t.dim(); ++i) shape.push_back(t.size(i));
  return shape;
}

template <typename S, typename T>
void convert(const char* from, int64_t stride, int64_t count, T* to) {
  for (int64_t d = 0; d < count; ++d) {
    S x;
    std::memcpy(&x, from + d * stride, sizeof(S));
    to[d] = static_cast<T>(x);
  }
}

// The numbers of a row, in place or in `space`, as View::row in packing.h returns them. That loop
// is not used here, because with it the loss of fp16 takes an eighth longer, and because rows of
// bf16 have a function for each instruction set.
template <typename T>
const T* read_row(const PredictionFunctions<T>& core, const TensorRows& rows, int64_t index,
                  T* space) {
  const char* from = rows.row(index);
  const int64_t stride = rows.feature_stride, count = rows.features;
  if (rows.dtype == dtype_of<T>() && stride == sizeof(T)) return reinterpret_cast<const T*>(from);
  if (rows.dtype == ScalarType::BFloat16 && stride == 2) {
    core.widen(reinterpret_cast<const uint16_t*>(from), count, space);
  } else {
    with_number(rows.dtype,
                [&](auto zero) { convert<decltype(zero)>(from, stride, count, space); });
  }
  return space;
}

// Where a row's gradient is computed: in its own place if that holds numbers T, else in `space`.
template <typename T>
T* place(const TensorRows& rows, int64_t index, T* space) {
  return rows.dtype == dtype_of<T>() ? reinterpret_cast<T*>(rows.row(index)) : space;
}

// Writes what was computed in `space` to the row's own place, which is contiguous.
template <typename T>
void write_row(const PredictionFunctions<T>& core, const TensorRows& rows, int64_t index,
               const T* space) {
  char* to = rows.row(index);
  if (rows.dtype == dtype_of<T>()) return;
  if (rows.dtype == ScalarType::BFloat16) {
    core.narrow(space, rows.features, reinterpret_cast<uint16_t*>(to));
    return;
  }
  with_number(rows.dtype, [&](auto zero) {
    using S = decltype(zero);
    for (int64_t d = 0; d < rows.features; ++d) {
      if constexpr (sizeof(S) == sizeof(double)) {
        reinterpret_cast<S*>(to)[d] = space[d];
      } else {
        reinterpret_cast<S*>(to)[d] = static_cast<S>(static_cast<float>(space[d]));
      }
    }
  });
}

struct Level {
  TensorRows prediction, target;
  std::optional<TensorRows> mask;
  int64_t rows, block_rows;
  // How many rows, elements and blocks the levels before this one have.
  int64_t first_row, first_element, first_block;

  bool includes(int64_t row) const { return !mask.has_value() || *mask->row(row) != 0; }
};

// A block of a level's rows, which one thread takes.
struct RowBlock {
  int64_t index, level, first, last;  // index: among the blocks of all levels
};

struct Levels {
  std::vector<Level> levels;
  int64_t rows = 0, elements = 0, blocks = 0;

  explicit Levels(const PredictionLossOptions& o) {
    constexpr int64_t kBlockElements = 32768;
    for (size_t l = 0; l < o.predictions.size(); ++l) {
      const Tensor& p = o.predictions[l];
      Level level{.prediction = TensorRows(p, true),
                  .target = TensorRows(o.targets[l], true),
                  .mask = std::nullopt,
                  .rows = p.size(0),
                  .block_rows = 1,
                  .first_row = rows,
                  .first_element = elements,
                  .first_block = blocks};
      if (!o.masks.empty() && o.masks[l].numel() > 0) level.mask.emplace(o.masks[l], false);
      level.rows *= level.prediction.patches;
      level.block_rows = std::max<int64_t>(1, kBlockElements / level.prediction.features);
      rows += level.rows;
      elements += level.rows * level.prediction.features;
      blocks += (level.rows + level.block_rows - 1) / level.block_rows;
      levels.push_back(level);
    }
  }

  // Runs visit(block) for every block, in threads that each have a visit = make_visit().
  // `operations` is the number of operations for each element.
  template <typename MakeVisit>
  void for_blocks(double operations, const MakeVisit& make_visit) const {
    parallel_tasks(blocks, operations * static_cast<double>(elements), [&](const auto& take) {
      auto visit = make_visit();
      for (int64_t b; (b = take()) < blocks;) {
        int64_t l = count() - 1;
        while (levels[l].first_block > b) --l;
        const int64_t first = (b - levels[l].first_block) * levels[l].block_rows;
        visit(RowBlock{.index = b,
                       .level = l,
                       .first = first,
                       .last = std::min(first + levels[l].block_rows, levels[l].rows)});
      }
    });
  }
  int64_t count() const { return static_cast<int64_t>(levels.size()); }
  int64_t widest() const {
    int64_t widest = 0;
    for (const Level& level : levels) widest = std::max(widest, level.prediction.features);
    return widest;
  }
};

template <typename T>
PredictionRow<T> row_of(const PredictionLossOptions& o, const T* prediction, const T* target,
                        int64_t features) {
  const Penalty<double>& p = o.penalty;
  return {.prediction = prediction,
          .target = target,
          .features = features,
          .normalization = o.normalization,
          .penalty = {.square = p.square,
                      .slope = static_cast<T>(p.slope),
                      .limit = static_cast<T>(p.limit),
                      .half_width = static_cast<T>(p.half_width)},
          .eps = static_cast<T>(o.eps)};
}

template <typename T>
Tensor filled(const Tensor& like, std::vector<int64_t> shape, const double* values) {
  Tensor t = new_tensor(like, shape, dtype_of<T>());
  T* data = data_of<T>(t);
  for (int64_t i = 0; i < t.numel(); ++i) data[i] = static_cast<T>(values[i]);
  return t;
}

template <typename T>
double read_or_zero(const std::optional<Tensor>& number) {
  return number.has_value() ? static_cast<double>(*data_of<T>(*number)) : 0.0;
}

}  // namespace

template <typename T>
PredictionLossForward prediction_loss_forward(const PredictionLossOptions& o) {
  const PredictionFunctions<T>& core = tile_core<T, T>().prediction;
  const Levels all(o);
  const Tensor& like = o.predictions[0];
  const int64_t count = all.count();
  const bool none = o.reduction == Reduction::kNone;
  Tensor statistics = new_tensor(like, {all.rows, 2}, dtype_of<T>());
  auto* statistic = data_of<RowStatistics<T>>(statistics);
  Tensor errors = new_tensor(like, {none ? all.elements : 0}, dtype_of<T>());
  T* error = data_of<T>(errors);

  std::vector<double> sums(all.blocks);
  std::vector<int64_t> included(all.blocks);  // rows
  all.for_blocks(4, [&] {
    return [&, space = Buffer<T>(2 * all.widest())](const RowBlock& block) {
      const Level& level = all.levels[block.level];
      const int64_t features = level.prediction.features;
      double sum = 0;
      for (int64_t r = block.first; r < block.last; ++r) {
        RowStatistics<T>& of_row = statistic[level.first_row + r];
        T* row_errors = none ? error + level.first_element + r * features : nullptr;
        if (!level.includes(r)) {
          of_row = {0, 0};
          if (none) std::fill_n(row_errors, features, T{0});
          continue;
        }
        const T* p = read_row(core, level.prediction, r, space.get());
        const T* t = read_row(core, level.target, r, space.get() + all.widest());
        sum += core.forward(row_of(o, p, t, features), &of_row, row_errors);
        ++included[block.index];
      }
      sums[block.index] = sum;
    };
  });

  std::vector<double> levels(count), scales(count);
  double loss = 0, unweighted = 0;
  for (int64_t l = 0; l < count; ++l) {
    const Level& level = all.levels[l];
    double elements = 0;
    const int64_t end = l + 1 < count ? all.levels[l + 1].first_block : all.blocks;
    for (int64_t b = level.first_block; b < end; ++b) {
      levels[l] += sums[b];
      elements += static_cast<double>(included[b] * level.prediction.features);
    }
    scales[l] = o.reduction == Reduction::kSum ? 1 : 1 / std::max(elements, 1.0);
    levels[l] *= scales[l];
    loss += o.weights[l] * levels[l];
    unweighted += levels[l] / static_cast<double>(count);
  }
  return {.loss = filled<T>(like, {}, &loss),
          .unweighted = filled<T>(like, {}, &unweighted),
          .levels = none ? errors : filled<T>(like, {count}, levels.data()),
          .statistics = statistics,
          .scales = filled<T>(like, {count}, scales.data())};
}

template <typename T>
PredictionLossBackward prediction_loss_backward(const PredictionLossOptions& o,
                                                const PredictionLossUpstream& upstream,
                                                const PredictionLossSaved& saved,
                                                bool with_targets) {
  const PredictionFunctions<T>& core = tile_core<T, T>().prediction;
  const Levels all(o);
  const int64_t count = all.count();
  const auto* statistic = data_of<RowStatistics<T>>(saved.statistics);
  const T* scale = data_of<T>(saved.scales);
  const T* of_levels = upstream.levels.has_value() ? data_of<T>(*upstream.levels) : nullptr;
  const bool none = o.reduction == Reduction::kNone;
  std::vector<T> factors(count);
  for (int64_t l = 0; l < count; ++l) {
    double factor = o.weights[l] * read_or_zero<T>(upstream.loss) +
                    read_or_zero<T>(upstream.unweighted) / static_cast<double>(count);
    if (of_levels != nullptr && !none) factor += of_levels[l];
    factors[l] = static_cast<T>(factor * scale[l]);
  }

  PredictionLossBackward grads;
  std::vector<TensorRows> to_predictions, to_targets;
  const auto add_gradient = [](const Tensor& like, Tensors& to, std::vector<TensorRows>& rows) {
    to.push_back(cached_tensor(shape_of(like), like.scalar_type()));
    rows.emplace_back(to.back(), true);
  };
  for (int64_t l = 0; l < count; ++l) {
    add_gradient(o.predictions[l], grads.grad_predictions, to_predictions);
    if (with_targets) add_gradient(o.targets[l], grads.grad_targets, to_targets);
  }
  // Gradients that are larger than a cache are written around it.
  constexpr int64_t kCacheBytes = int64_t{16} << 20;
  const bool past_caches = all.elements * static_cast<int64_t>(sizeof(T)) > kCacheBytes;

  all.for_blocks(8, [&] {
    return [&, space = Buffer<T>(4 * all.widest())](const RowBlock& block) {
      const int64_t l = block.level;
      const Level& level = all.levels[l];
      const int64_t features = level.prediction.features;
      T* const spaces[] = {space.get(), space.get() + all.widest(), space.get() + 2 * all.widest(),
                           space.get() + 3 * all.widest()};
      for (int64_t r = block.first; r < block.last; ++r) {
        T* to_prediction = place(to_predictions[l], r, spaces[2]);
        T* to_target = with_targets ? place(to_targets[l], r, spaces[3]) : nullptr;
        const bool in_place = to_prediction != spaces[2] && to_target != spaces[3];
        if (level.includes(r)) {
          const T* p = read_row(core, level.prediction, r, spaces[0]);
          const T* t = read_row(core, level.target, r, spaces[1]);
          const T* of_elements = none && of_levels != nullptr
                                     ? of_levels + level.first_element + r * features
                                     : nullptr;
          core.gradient(row_of(o, p, t, features), {.statistics = statistic[level.first_row + r],
                                                    .factor = factors[l],
                                                    .upstream = of_elements,
                                                    .prediction = to_prediction,
                                                    .target = to_target,
                                                    .past_caches = past_caches && in_place});
        } else {
          std::fill_n(to_prediction, features, T{0});
          if (with_targets) std::fill_n(to_target, features, T{0});
        }
        write_row(core, to_predictions[l], r, to_prediction);
        if (with_targets) write_row(core, to_targets[l], r, to_target);
      }
      if (past_caches) core.fence();
    };
  });
  return grads;
}

template PredictionLossForward prediction_loss_forward<float>(const PredictionLossOptions&);
template PredictionLossForward prediction_loss_forward<double>(const PredictionLossOptions&);
template PredictionLossBackward prediction_loss_backward<float>(const PredictionLossOptions&,
                                                                const PredictionLossUpstream&,
                                                                const PredictionLossSaved&, bool);
template PredictionLossBackward prediction_loss_backward<double>(const PredictionLossOptions&,
                                                                 const PredictionLossUpstream&,
                                                                 const PredictionLossSaved&, bool);

namespace {

bool same_shape(const Tensor& a, const Tensor& b, int64_t dims) {
  for (int64_t i = 0; i < dims; ++i)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

Normalization read_normalization(StringHandle handle) {
  return read_choice<Normalization>(handle, "normalization",
                                    {{"none", Normalization::kNone},
                                     {"l2", Normalization::kL2},
                                     {"layer", Normalization::kLayer}});
}

// The penalty of a loss; `threshold` is the beta of smooth-L1 or the delta of Huber.
Penalty<double> read_penalty(StringHandle handle, double threshold) {
  enum class Type { kSquare, kSmoothL1, kHuber };
  const Type type = read_choice<Type>(
      handle, "loss_type",
      {{"mse", Type::kSquare}, {"smoothl1", Type::kSmoothL1}, {"huber", Type::kHuber}});
  if (type == Type::kSquare) return {.square = true, .slope = 0, .limit = 0, .half_width = 0};
  check(threshold > 0, "threshold must be positive");
  if (type == Type::kHuber)
    return {.square = false, .slope = 1, .limit = threshold, .half_width = 0.5};
  return {.square = false, .slope = 1 / threshold, .limit = 1, .half_width = threshold / 2};
}

void check_options(const PredictionLossOptions& o) {
  const size_t levels = o.predictions.size();
  check(levels > 0, "predictions must hold at least one level");
  check(o.targets.size() == levels && (o.masks.empty() || o.masks.size() == levels) &&
            o.weights.size() == levels,
        "targets, masks and weights must be as many as the predictions");
  const bool in_double = o.predictions[0].scalar_type() == ScalarType::Double;
  for (size_t l = 0; l < levels; ++l) {
    const Tensor &p = o.predictions[l], &t = o.targets[l];
    check(p.dim() == 2 || p.dim() == 3, "predictions must be 2-D or 3-D");
    check(t.dim() == p.dim() && same_shape(p, t, p.dim()),
          "targets must have the shapes of the predictions");
    check(p.numel() > 0, "predictions must not be empty");
    check(is_floating(p.scalar_type()) && is_floating(t.scalar_type()),
          "predictions and targets must be of fp64, fp32, bf16 or fp16");
    check((p.scalar_type() == ScalarType::Double) == in_double,
          "predictions must all be of fp64, or none of them");
    if (o.masks.empty() || o.masks[l].numel() == 0) continue;
    const Tensor& mask = o.masks[l];
    check(mask.scalar_type() == ScalarType::Bool && mask.dim() == p.dim() - 1 &&
              same_shape(p, mask, mask.dim()),
          "masks must be of bool, one entry for each row of the predictions");
  }
}

void check_saved(const PredictionLossOptions& o, const PredictionLossSaved& saved) {
  const Tensor& like = o.predictions[0];
  int64_t rows = 0;
  for (const Tensor& p : o.predictions) rows += p.numel() / p.size(p.dim() - 1);
  const Tensor& statistics = saved.statistics;
  check(statistics.scalar_type() == sum_dtype(like.scalar_type()) && statistics.dim() == 2 &&
            statistics.size(0) == rows && statistics.size(1) == 2 && statistics.is_contiguous(),
        "statistics must be those of the forward");
  check_rows(saved.scales, like, static_cast<int64_t>(o.predictions.size()),
             "scales must be those of the forward");
  check(saved.scales.is_contiguous(), "scales must be contiguous");
}

void check_upstream(const PredictionLossOptions& o, const PredictionLossUpstream& upstream) {
  const Tensor& like = o.predictions[0];
  for (const std::optional<Tensor>* grad : {&upstream.loss, &upstream.unweighted})
    check(!grad->has_value() ||
              ((*grad)->scalar_type() == sum_dtype(like.scalar_type()) && (*grad)->numel() == 1),
          "grad_loss and grad_unweighted must have the shape and dtype of the loss");
  if (!upstream.levels.has_value()) return;
  int64_t elements = 0;
  for (const Tensor& p : o.predictions) elements += p.numel();
  const int64_t levels = static_cast<int64_t>(o.predictions.size());
  check_rows(*upstream.levels, like, o.reduction == Reduction::kNone ? elements : levels,
             "grad_levels must have the shape and dtype of the levels");
  check(upstream.levels->is_contiguous(), "grad_levels must be contiguous");
}

// The operators as PyTorch calls them: arguments and results by position, in the order of the
// schemas.
auto call_forward(Tensors predictions, Tensors targets, Tensors masks, std::vector<double> weights,
                  StringHandle loss_type, StringHandle normalization, double threshold, double eps,
                  StringHandle reduction) {
  const PredictionLossOptions options{.predictions = std::move(predictions),
                                      .targets = std::move(targets),
                                      .masks = std::move(masks),
                                      .weights = std::move(weights),
                                      .normalization = read_normalization(normalization),
                                      .penalty = read_penalty(loss_type, threshold),
                                      .eps = eps,
                                      .reduction = read_reduction(reduction)};
  check_options(options);
  const PredictionLossForward out = options.predictions[0].scalar_type() == ScalarType::Double
                                        ? prediction_loss_forward<double>(options)
                                        : prediction_loss_forward<float>(options);
  return std::tuple(out.loss, out.unweighted, out.levels, out.statistics, out.scales);
}

auto call_backward(std::optional<Tensor> grad_loss, std::optional<Tensor> grad_unweighted,
                   std::optional<Tensor> grad_levels, Tensors predictions, Tensors targets,
                   Tensors masks, Tensor statistics, Tensor scales, std::vector<double> weights,
                   StringHandle loss_type, StringHandle normalization, double threshold, double eps,
                   StringHandle reduction, bool with_targets) {
  const PredictionLossOptions options{.predictions = std::move(predictions),
                                      .targets = std::move(targets),
                                      .masks = std::move(masks),
                                      .weights = std::move(weights),
                                      .normalization = read_normalization(normalization),
                                      .penalty = read_penalty(loss_type, threshold),
                                      .eps = eps,
                                      .reduction = read_reduction(reduction)};
  const PredictionLossUpstream upstream{
      .loss = grad_loss, .unweighted = grad_unweighted, .levels = grad_levels};
  const PredictionLossSaved saved{.statistics = statistics, .scales = scales};
  check_options(options);
  check_saved(options, saved);
  check_upstream(options, upstream);
  const PredictionLossBackward out =
      options.predictions[0].scalar_type() == ScalarType::Double
          ? prediction_loss_backward<double>(options, upstream, saved, with_targets)
          : prediction_loss_backward<float>(options, upstream, saved, with_targets);
  return std::tuple(out.grad_predictions, out.grad_targets);
}

}  // namespace

void implement_prediction_loss(torch::stable::detail::StableLibrary& library) {
  library.impl("prediction_loss", TORCH_BOX(&call_forward));
  library.impl("prediction_loss_backward", TORCH_BOX(&call_backward));
}

}  // namespace cjepa
