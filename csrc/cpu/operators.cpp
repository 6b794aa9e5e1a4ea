#include "operators.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cross_logsumexp.h"
#include "memory.h"
#include "nt_xent.h"
#include "prediction_loss.h"

namespace cjepa {
namespace {

// Python checks what users pass; these keep a call of the operator itself inside its memory.
void check(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("cjepa_kernels: ") + what);
}

bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Double || dtype == ScalarType::Float ||
         dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

void check_inputs(const Tensor& a, const Tensor& b, const std::optional<Tensor>& temperature,
                  std::optional<ScalarType> product_dtype) {
  check(a.dim() == 2 && b.dim() == 2, "inputs must be 2-D");
  check(a.size(0) > 0 && b.size(0) > 0 && a.size(1) > 0, "inputs must not be empty");
  check(a.size(1) == b.size(1), "inputs must have as many features as each other");
  const ScalarType dtype = a.scalar_type();
  check(dtype == b.scalar_type(), "inputs must have the same dtype");
  check(is_floating(dtype), "inputs must be of fp64, fp32, bf16 or fp16");
  check(!temperature.has_value() ||
            (temperature->numel() == 1 && is_floating(temperature->scalar_type())),
        "temperature must be one number of fp64, fp32, bf16 or fp16");
  check(is_floating(product_dtype.value_or(dtype)),
        "product_dtype must be fp64, fp32, bf16 or fp16");
}

// PyTorch's own conversion to std::string (2.11 to 2.13) leaks one with every call.
std::string read_string(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

// Rows of what a forward left for a backward, or of a gradient.
void check_rows(const Tensor& t, const Tensor& like, int64_t rows, const char* what) {
  const ScalarType dtype =
      like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check(t.scalar_type() == dtype && t.dim() == 1 && t.size(0) == rows, what);
}

void check_pairs(const Options& o) {
  check_inputs(o.z_i, o.z_j, o.temperature_tensor, o.product_dtype);
  const int64_t batch = o.z_i.size(0);
  check(batch == o.z_j.size(0), "z_i and z_j must have the same number of rows");
  check(!o.mask.has_value() || (o.mask->scalar_type() == ScalarType::Bool && o.mask->dim() == 2 &&
                                o.mask->size(0) == batch && o.mask->size(1) == batch),
        "mask must be a (B, B) tensor of bool");
  check(o.reduction == "mean" || o.reduction == "sum" || o.reduction == "none",
        "reduction must be mean, sum or none");
}

Outputs forward(Tensor z_i, Tensor z_j, std::optional<Tensor> mask,
                std::optional<Tensor> temperature_tensor, double temperature, bool cosine,
                double eps, StringHandle reduction, std::optional<ScalarType> product_dtype,
                bool keep) {
  const Options options{z_i,          z_j,    mask, temperature_tensor,
                        temperature,  cosine, eps,  read_string(reduction),
                        product_dtype};
  check_pairs(options);
  return with_types(z_i.scalar_type(), options.rounded_dtype(), [&](auto sum, auto operand) {
    return nt_xent_forward<decltype(sum), decltype(operand)>(options, keep);
  });
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_loss, Tensor z_i, Tensor z_j,
                                            std::optional<Tensor> mask,
                                            std::optional<Tensor> temperature_tensor, Tensor shift,
                                            Tensor log_sum, Tensor positive, Tensor kept,
                                            double temperature, bool cosine, double eps,
                                            StringHandle reduction,
                                            std::optional<ScalarType> product_dtype) {
  const Options options{z_i,          z_j,    mask, temperature_tensor,
                        temperature,  cosine, eps,  read_string(reduction),
                        product_dtype};
  check_pairs(options);
  const int64_t rows = 2 * z_i.size(0);
  for (const Tensor* t : {&shift, &log_sum, &positive}) {
    check_rows(*t, z_i, rows, "shift, log_sum and positive must be those of the forward");
    check(t->is_contiguous(), "shift, log_sum and positive must be contiguous");
  }
  check(kept.size(0) == 0 || kept.size(0) == kept_size(rows),
        "kept must be empty or what the forward kept");
  check_rows(kept, z_i, kept.size(0), "kept must be what the forward kept");
  check(kept.is_contiguous(), "kept must be contiguous");
  if (options.reduction == "none") {
    check_rows(grad_loss, z_i, rows, "grad_loss must be like the loss");
  } else {
    check(grad_loss.dim() == 0 && grad_loss.scalar_type() == shift.scalar_type(),
          "grad_loss must be like the loss");
  }
  const ScalarType operands = backward_operands(options.rounded_dtype(), temperature_tensor);
  return with_types(z_i.scalar_type(), operands, [&](auto sum, auto operand) {
    return nt_xent_backward<decltype(sum), decltype(operand)>(options, grad_loss,
                                                              {shift, log_sum, positive, kept});
  });
}

auto cross_forward(Tensor x, Tensor y, std::optional<Tensor> temperature_tensor, double temperature,
                   bool cosine, double eps, std::optional<ScalarType> product_dtype) {
  check_inputs(x, y, temperature_tensor, product_dtype);
  return cross_logsumexp(x, y, temperature_tensor, temperature, cosine, eps, product_dtype);
}

auto cross_backward(Tensor grad_row, Tensor grad_column, Tensor x, Tensor y,
                    std::optional<Tensor> temperature_tensor, Tensor row_shift, Tensor row_log_sum,
                    Tensor column_shift, Tensor column_log_sum, double temperature, bool cosine,
                    double eps, std::optional<ScalarType> product_dtype, bool of_x, bool of_y) {
  check_inputs(x, y, temperature_tensor, product_dtype);
  constexpr const char* kRows = "gradients, shifts and log sums must be those of rows and columns";
  for (const Tensor* t : {&grad_row, &row_shift, &row_log_sum}) check_rows(*t, x, x.size(0), kRows);
  for (const Tensor* t : {&grad_column, &column_shift, &column_log_sum})
    check_rows(*t, x, y.size(0), kRows);
  for (const Tensor* t : {&row_shift, &row_log_sum, &column_shift, &column_log_sum})
    check(t->is_contiguous(), "shifts and log sums must be contiguous");
  return cross_logsumexp_backward(grad_row, grad_column, x, y, temperature_tensor, row_shift,
                                  row_log_sum, column_shift, column_log_sum, temperature, cosine,
                                  eps, product_dtype, of_x, of_y);
}

bool same_shape(const Tensor& a, const Tensor& b, int64_t dims) {
  for (int64_t i = 0; i < dims; ++i)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

template <typename Value>
Value one_of(StringHandle handle, std::initializer_list<std::pair<const char*, Value>> known,
             const char* what) {
  const std::string text = read_string(handle);
  for (const auto& [name, value] : known)
    if (text == name) return value;
  throw std::invalid_argument(std::string("cjepa_kernels: unknown ") + what + " " + text);
}

Penalty<double> penalty_of(StringHandle handle, double threshold) {
  enum class Type { kSquare, kSmoothL1, kHuber };
  const Type type = one_of<Type>(
      handle, {{"mse", Type::kSquare}, {"smoothl1", Type::kSmoothL1}, {"huber", Type::kHuber}},
      "loss_type");
  if (type == Type::kSquare) return {true, 0, 0, 0};
  check(threshold > 0, "threshold must be positive");
  if (type == Type::kHuber) return {false, 1, threshold, 0.5};
  return {false, 1 / threshold, 1, threshold / 2};
}

PredictionOptions prediction_options(Tensors predictions, Tensors targets, Tensors masks,
                                     std::vector<double> weights, StringHandle loss_type,
                                     StringHandle normalization, double threshold, double eps,
                                     StringHandle reduction) {
  PredictionOptions options{
      std::move(predictions),
      std::move(targets),
      std::move(masks),
      std::move(weights),
      one_of<Normalization>(normalization,
                            {{"none", Normalization::kNone},
                             {"l2", Normalization::kL2},
                             {"layer", Normalization::kLayer}},
                            "normalization"),
      penalty_of(loss_type, threshold),
      eps,
      one_of<Reduction>(
          reduction,
          {{"mean", Reduction::kMean}, {"sum", Reduction::kSum}, {"none", Reduction::kNone}},
          "reduction")};
  const size_t levels = options.predictions.size();
  check(levels > 0, "predictions must hold at least one level");
  check(options.targets.size() == levels &&
            (options.masks.empty() || options.masks.size() == levels) &&
            options.weights.size() == levels,
        "targets, masks and weights must be as many as the predictions");
  const bool in_double = options.predictions[0].scalar_type() == ScalarType::Double;
  for (size_t l = 0; l < levels; ++l) {
    const Tensor &p = options.predictions[l], &t = options.targets[l];
    check(p.dim() == 2 || p.dim() == 3, "predictions must be 2-D or 3-D");
    check(t.dim() == p.dim() && same_shape(p, t, p.dim()),
          "targets must have the shapes of the predictions");
    check(p.numel() > 0, "predictions must not be empty");
    check(is_floating(p.scalar_type()) && is_floating(t.scalar_type()),
          "predictions and targets must be of fp64, fp32, bf16 or fp16");
    check((p.scalar_type() == ScalarType::Double) == in_double,
          "predictions must all be of fp64, or none of them");
    if (options.masks.empty() || options.masks[l].numel() == 0) continue;
    const Tensor& mask = options.masks[l];
    check(mask.scalar_type() == ScalarType::Bool && mask.dim() == p.dim() - 1 &&
              same_shape(p, mask, mask.dim()),
          "masks must be of bool, one entry for each row of the predictions");
  }
  return options;
}

auto prediction_forward(Tensors predictions, Tensors targets, Tensors masks,
                        std::vector<double> weights, StringHandle loss_type,
                        StringHandle normalization, double threshold, double eps,
                        StringHandle reduction) {
  const PredictionOptions options =
      prediction_options(std::move(predictions), std::move(targets), std::move(masks),
                         std::move(weights), loss_type, normalization, threshold, eps, reduction);
  return options.predictions[0].scalar_type() == ScalarType::Double
             ? prediction_loss<double>(options)
             : prediction_loss<float>(options);
}

auto prediction_backward(std::optional<Tensor> grad_loss, std::optional<Tensor> grad_unweighted,
                         std::optional<Tensor> grad_levels, Tensors predictions, Tensors targets,
                         Tensors masks, Tensor statistics, Tensor scales,
                         std::vector<double> weights, StringHandle loss_type,
                         StringHandle normalization, double threshold, double eps,
                         StringHandle reduction, bool targets_too) {
  const PredictionOptions options =
      prediction_options(std::move(predictions), std::move(targets), std::move(masks),
                         std::move(weights), loss_type, normalization, threshold, eps, reduction);
  const Tensor& like = options.predictions[0];
  const int64_t levels = static_cast<int64_t>(options.predictions.size());
  int64_t rows = 0, elements = 0;
  for (const Tensor& p : options.predictions) {
    elements += p.numel();
    rows += p.numel() / p.size(p.dim() - 1);
  }
  const ScalarType dtype =
      like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check(statistics.scalar_type() == dtype && statistics.dim() == 2 && statistics.size(0) == rows &&
            statistics.size(1) == 2 && statistics.is_contiguous(),
        "statistics must be those of the forward");
  check_rows(scales, like, levels, "scales must be those of the forward");
  check(scales.is_contiguous(), "scales must be contiguous");
  for (const std::optional<Tensor>* grad : {&grad_loss, &grad_unweighted})
    check(!grad->has_value() || ((*grad)->scalar_type() == dtype && (*grad)->numel() == 1),
          "gradients of the loss must be like the loss");
  if (grad_levels.has_value()) {
    check_rows(*grad_levels, like, options.reduction == Reduction::kNone ? elements : levels,
               "grad_levels must be like the levels");
    check(grad_levels->is_contiguous(), "grad_levels must be contiguous");
  }
  const PredictionUpstream upstream{grad_loss, grad_unweighted, grad_levels};
  return dtype == ScalarType::Double
             ? prediction_loss_backward<double>(options, upstream, statistics, scales, targets_too)
             : prediction_loss_backward<float>(options, upstream, statistics, scales, targets_too);
}

// (B, tokens, D) with the rows, (B, D), as token 0 and zeros elsewhere.
Tensor pad_tokens(Tensor rows, int64_t tokens) {
  check(rows.dim() == 2 && tokens > 0, "rows must be 2-D, and tokens positive");
  constexpr int64_t kMost = int64_t{1} << 48;
  check(tokens <= kMost / std::max<int64_t>(rows.numel(), 1), "too many tokens");
  check(is_floating(rows.scalar_type()), "rows must be of fp64, fp32, bf16 or fp16");
  Tensor padded = zero_tensor({rows.size(0), tokens, rows.size(1)}, rows.scalar_type());
  Tensor first = torch::stable::select(padded, 1, 0);
  torch::stable::copy_(first, rows);
  return padded;
}

void implement(torch::stable::detail::StableLibrary& library) {
  library.impl("nt_xent", TORCH_BOX(&forward));
  library.impl("nt_xent_backward", TORCH_BOX(&backward));
  library.impl("cross_logsumexp", TORCH_BOX(&cross_forward));
  library.impl("cross_logsumexp_backward", TORCH_BOX(&cross_backward));
  library.impl("prediction_loss", TORCH_BOX(&prediction_forward));
  library.impl("prediction_loss_backward", TORCH_BOX(&prediction_backward));
  library.impl("pad_tokens", TORCH_BOX(&pad_tokens));
}

}  // namespace

void register_operators() {
  using torch::stable::detail::StableLibrary;
  static const torch::stable::detail::StableTorchLibraryInit registered(
      StableLibrary::Kind::IMPL, &implement, "cjepa_kernels", "CPU", __FILE__, __LINE__);
}

}  // namespace cjepa
