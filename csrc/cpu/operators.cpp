#include "operators.h"

#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>

#include "cross_logsumexp.h"
#include "nt_xent.h"

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
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, length);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
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
                    double eps, std::optional<ScalarType> product_dtype) {
  check_inputs(x, y, temperature_tensor, product_dtype);
  constexpr const char* kRows = "gradients, shifts and log sums must be those of rows and columns";
  for (const Tensor* t : {&grad_row, &row_shift, &row_log_sum}) check_rows(*t, x, x.size(0), kRows);
  for (const Tensor* t : {&grad_column, &column_shift, &column_log_sum})
    check_rows(*t, x, y.size(0), kRows);
  for (const Tensor* t : {&row_shift, &row_log_sum, &column_shift, &column_log_sum})
    check(t->is_contiguous(), "shifts and log sums must be contiguous");
  return cross_logsumexp_backward(grad_row, grad_column, x, y, temperature_tensor, row_shift,
                                  row_log_sum, column_shift, column_log_sum, temperature, cosine,
                                  eps, product_dtype);
}

void implement(torch::stable::detail::StableLibrary& library) {
  library.impl("nt_xent", TORCH_BOX(&forward));
  library.impl("nt_xent_backward", TORCH_BOX(&backward));
  library.impl("cross_logsumexp", TORCH_BOX(&cross_forward));
  library.impl("cross_logsumexp_backward", TORCH_BOX(&cross_backward));
}

}  // namespace

void register_operators() {
  using torch::stable::detail::StableLibrary;
  static const torch::stable::detail::StableTorchLibraryInit registered(
      StableLibrary::Kind::IMPL, &implement, "cjepa_kernels", "CPU", __FILE__, __LINE__);
}

}  // namespace cjepa
