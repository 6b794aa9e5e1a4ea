// Bound by memory: the forward reads both sides once, the backward reads them once more and writes
// each gradient once. Errors are added in blocks of rows that depend on the shapes alone: the same
// bits on any number of threads.
#include "prediction_loss.h"

#include <cmath>

#include "packing.h"
#include "selected_core.h"

namespace cjepa {
namespace {

// A (B, N, D) or (B, D) tensor, or the mask (B, N) or (B,) of one, as rows.
struct Rows {
  char* data;
  ScalarType dtype;
  int64_t patches, features;
  int64_t batch_stride, patch_stride, feature_stride;  // bytes

  Rows(const Tensor& t, bool with_features)
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

 private:
  static int64_t element_size(ScalarType dtype) {
    if (dtype == ScalarType::Double) return 8;
    if (dtype == ScalarType::Float) return 4;
    return dtype == ScalarType::Bool ? 1 : 2;
  }
};

std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < t.dim(); ++i) shape.push_back(t.size(i));
  return shape;
}

template <typename T>
constexpr ScalarType kDtype = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

template <typename S, typename T>
void convert(const char* from, int64_t stride, int64_t count, T* to) {
  for (int64_t d = 0; d < count; ++d) {
    S x;
    std::memcpy(&x, from + d * stride, sizeof(S));
    to[d] = static_cast<T>(x);
  }
}

// The row itself where it lies contiguous in T, else a copy of it in `space`.
template <typename T>
const T* read_row(const PredictionFunctions<T>& core, const Rows& rows, int64_t index, T* space) {
  const char* from = rows.row(index);
  const int64_t stride = rows.feature_stride, count = rows.features;
  if (rows.dtype == kDtype<T> && stride == sizeof(T)) return reinterpret_cast<const T*>(from);
  if (rows.dtype == ScalarType::BFloat16 && stride == 2) {
    core.widen(reinterpret_cast<const uint16_t*>(from), count, space);
  } else if (rows.dtype == ScalarType::BFloat16) {
    convert<torch::headeronly::BFloat16>(from, stride, count, space);
  } else if (rows.dtype == ScalarType::Half) {
    convert<torch::headeronly::Half>(from, stride, count, space);
  } else if (rows.dtype == ScalarType::Double) {
    convert<double>(from, stride, count, space);
  } else {
    convert<float>(from, stride, count, space);
  }
  return space;
}

// Where a row's gradient is computed: its place, if that holds numbers T, else `space`.
template <typename T>
T* place(const Rows& rows, int64_t index, T* space) {
  return rows.dtype == kDtype<T> ? reinterpret_cast<T*>(rows.row(index)) : space;
}

// To the place of a row, contiguous, what was computed in `space`.
template <typename T>
void write_row(const PredictionFunctions<T>& core, const Rows& rows, int64_t index,
               const T* space) {
  char* to = rows.row(index);
  if (rows.dtype == kDtype<T>) return;
  const auto narrow = [&](auto number) {
    using S = decltype(number);
    for (int64_t d = 0; d < rows.features; ++d)
      reinterpret_cast<S*>(to)[d] = static_cast<S>(static_cast<float>(space[d]));
  };
  if (rows.dtype == ScalarType::BFloat16) {
    core.narrow(space, rows.features, reinterpret_cast<uint16_t*>(to));
  } else if (rows.dtype == ScalarType::Half) {
    narrow(torch::headeronly::Half());
  } else if (rows.dtype == ScalarType::Double) {
    for (int64_t d = 0; d < rows.features; ++d) reinterpret_cast<double*>(to)[d] = space[d];
  } else {
    narrow(float());
  }
}

struct Level {
  Rows prediction, target;
  std::optional<Rows> mask;
  int64_t rows, first_row, first_element;  // the latter two: of those of all levels
  int64_t first_block, block_rows;

  bool keeps(int64_t row) const { return !mask.has_value() || *mask->row(row) != 0; }
};

struct Levels {
  std::vector<Level> levels;
  int64_t rows = 0, elements = 0, blocks = 0;

  explicit Levels(const PredictionOptions& o) {
    constexpr int64_t kBlockElements = 32768;
    for (size_t l = 0; l < o.predictions.size(); ++l) {
      const Tensor& p = o.predictions[l];
      Level level{Rows(p, true), Rows(o.targets[l], true),
                  std::nullopt,  p.size(0),
                  rows,          elements,
                  blocks,        1};
      if (!o.masks.empty() && o.masks[l].numel() > 0) level.mask.emplace(o.masks[l], false);
      level.rows *= level.prediction.patches;
      level.block_rows = std::max<int64_t>(1, kBlockElements / level.prediction.features);
      rows += level.rows;
      elements += level.rows * level.prediction.features;
      blocks += (level.rows + level.block_rows - 1) / level.block_rows;
      levels.push_back(level);
    }
  }

  // Runs visit(level, index of the level, first row, last row) for every block; `operations` for
  // each element.
  template <typename MakeVisit>
  void for_blocks(double operations, const MakeVisit& make_visit) const {
    deal(blocks, operations * static_cast<double>(elements), [&](const auto& take) {
      auto visit = make_visit();
      for (int64_t b; (b = take()) < blocks;) {
        size_t l = levels.size() - 1;
        while (levels[l].first_block > b) --l;
        const int64_t first = (b - levels[l].first_block) * levels[l].block_rows;
        visit(b, l, first, std::min(first + levels[l].block_rows, levels[l].rows));
      }
    });
  }
  int64_t widest() const {
    int64_t widest = 0;
    for (const Level& level : levels) widest = std::max(widest, level.prediction.features);
    return widest;
  }
};

template <typename T>
PredictionRow<T> row_of(const PredictionOptions& o, const T* prediction, const T* target,
                        int64_t features) {
  const Penalty<double>& p = o.penalty;
  return {
      prediction,
      target,
      features,
      o.normalization,
      {p.square, static_cast<T>(p.slope), static_cast<T>(p.limit), static_cast<T>(p.half_width)},
      static_cast<T>(o.eps)};
}

template <typename T>
Tensor filled(const Tensor& like, std::vector<int64_t> shape, const double* values) {
  Tensor t = torch::stable::new_empty(like, shape, kDtype<T>);
  T* data = static_cast<T*>(t.mutable_data_ptr());
  for (int64_t i = 0; i < t.numel(); ++i) data[i] = static_cast<T>(values[i]);
  return t;
}

template <typename T>
double read(const std::optional<Tensor>& number) {
  return number.has_value() ? static_cast<double>(*static_cast<const T*>(number->const_data_ptr()))
                            : 0.0;
}

}  // namespace

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prediction_loss(const PredictionOptions& o) {
  const PredictionFunctions<T>& core = tile_core<T, T>().prediction;
  const Levels all(o);
  const Tensor& like = o.predictions[0];
  const int64_t count = static_cast<int64_t>(all.levels.size());
  const bool none = o.reduction == Reduction::kNone;
  Tensor statistics = torch::stable::new_empty(like, {all.rows, 2}, kDtype<T>);
  auto* statistic = static_cast<RowStatistics<T>*>(statistics.mutable_data_ptr());
  Tensor errors = torch::stable::new_empty(like, {none ? all.elements : 0}, kDtype<T>);
  T* error = static_cast<T*>(errors.mutable_data_ptr());

  std::vector<double> sums(all.blocks);
  std::vector<int64_t> kept(all.blocks);
  all.for_blocks(4, [&] {
    return [&, space = Buffer<T>(2 * all.widest())](int64_t block, size_t l, int64_t first,
                                                    int64_t last) {
      const Level& level = all.levels[l];
      const int64_t features = level.prediction.features;
      double sum = 0;
      for (int64_t r = first; r < last; ++r) {
        RowStatistics<T>& of_row = statistic[level.first_row + r];
        T* row_errors = none ? error + level.first_element + r * features : nullptr;
        if (!level.keeps(r)) {
          of_row = {0, 0};
          if (none) std::fill_n(row_errors, features, T{0});
          continue;
        }
        const T* p = read_row(core, level.prediction, r, space.get());
        const T* t = read_row(core, level.target, r, space.get() + all.widest());
        sum += core.forward(row_of(o, p, t, features), &of_row, row_errors);
        ++kept[block];
      }
      sums[block] = sum;
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
      elements += static_cast<double>(kept[b] * level.prediction.features);
    }
    scales[l] = o.reduction == Reduction::kSum ? 1 : 1 / std::max(elements, 1.0);
    levels[l] *= scales[l];
    loss += o.weights[l] * levels[l];
    unweighted += levels[l] / static_cast<double>(count);
  }
  return {filled<T>(like, {}, &loss), filled<T>(like, {}, &unweighted),
          none ? errors : filled<T>(like, {count}, levels.data()), statistics,
          filled<T>(like, {count}, scales.data())};
}

template <typename T>
std::tuple<Tensors, Tensors> prediction_loss_backward(const PredictionOptions& o,
                                                      const PredictionUpstream& upstream,
                                                      const Tensor& statistics,
                                                      const Tensor& scales, bool targets_too) {
  const PredictionFunctions<T>& core = tile_core<T, T>().prediction;
  const Levels all(o);
  const int64_t count = static_cast<int64_t>(all.levels.size());
  const auto* statistic = static_cast<const RowStatistics<T>*>(statistics.const_data_ptr());
  const T* scale = static_cast<const T*>(scales.const_data_ptr());
  const T* of_levels = upstream.levels.has_value()
                           ? static_cast<const T*>(upstream.levels->const_data_ptr())
                           : nullptr;
  const bool none = o.reduction == Reduction::kNone;
  std::vector<T> factors(count);
  for (int64_t l = 0; l < count; ++l) {
    double factor = o.weights[l] * read<T>(upstream.loss) +
                    read<T>(upstream.unweighted) / static_cast<double>(count);
    if (of_levels != nullptr && !none) factor += of_levels[l];
    factors[l] = static_cast<T>(factor * scale[l]);
  }

  Tensors of_predictions, of_targets;
  std::vector<Rows> to_predictions, to_targets;
  const auto make = [](const Tensor& like, Tensors& gradients, std::vector<Rows>& rows) {
    gradients.push_back(cached_tensor(shape_of(like), like.scalar_type()));
    rows.emplace_back(gradients.back(), true);
  };
  for (int64_t l = 0; l < count; ++l) {
    make(o.predictions[l], of_predictions, to_predictions);
    if (targets_too) make(o.targets[l], of_targets, to_targets);
  }
  // What is larger than a cache is written around it.
  constexpr int64_t kCache = int64_t{16} << 20;
  const bool past_caches = all.elements * static_cast<int64_t>(sizeof(T)) > kCache;

  all.for_blocks(8, [&] {
    return
        [&, space = Buffer<T>(4 * all.widest())](int64_t, size_t l, int64_t first, int64_t last) {
          const Level& level = all.levels[l];
          const int64_t features = level.prediction.features;
          T* const spaces[] = {space.get(), space.get() + all.widest(),
                               space.get() + 2 * all.widest(), space.get() + 3 * all.widest()};
          for (int64_t r = first; r < last; ++r) {
            T* to_prediction = place(to_predictions[l], r, spaces[2]);
            T* to_target = targets_too ? place(to_targets[l], r, spaces[3]) : nullptr;
            const bool in_place = to_prediction != spaces[2] && to_target != spaces[3];
            if (level.keeps(r)) {
              const T* p = read_row(core, level.prediction, r, spaces[0]);
              const T* t = read_row(core, level.target, r, spaces[1]);
              const T* each = none && of_levels != nullptr
                                  ? of_levels + level.first_element + r * features
                                  : nullptr;
              core.gradient(row_of(o, p, t, features),
                            {statistic[level.first_row + r], factors[l], each, to_prediction,
                             to_target, past_caches && in_place});
            } else {
              std::fill_n(to_prediction, features, T{0});
              if (targets_too) std::fill_n(to_target, features, T{0});
            }
            write_row(core, to_predictions[l], r, to_prediction);
            if (targets_too) write_row(core, to_targets[l], r, to_target);
          }
          if (past_caches) core.fence();
        };
  });
  return {of_predictions, of_targets};
}

template std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prediction_loss<float>(
    const PredictionOptions&);
template std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prediction_loss<double>(
    const PredictionOptions&);
template std::tuple<Tensors, Tensors> prediction_loss_backward<float>(const PredictionOptions&,
                                                                      const PredictionUpstream&,
                                                                      const Tensor&, const Tensor&,
                                                                      bool);
template std::tuple<Tensors, Tensors> prediction_loss_backward<double>(const PredictionOptions&,
                                                                       const PredictionUpstream&,
                                                                       const Tensor&, const Tensor&,
                                                                       bool);

}  // namespace cjepa
