#include "arguments.h"

#include <torch/csrc/stable/c/shim.h>

#include <cstddef>

namespace cjepa {

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

void check_rows(const Tensor& t, const Tensor& like, int64_t rows, const char* what) {
  check(t.scalar_type() == sum_dtype(like.scalar_type()) && t.dim() == 1 && t.size(0) == rows,
        what);
}

// PyTorch's own conversion to std::string (2.11 to 2.13) leaks one string with every call.
std::string read_string(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

Reduction read_reduction(StringHandle handle) {
  return read_choice<Reduction>(
      handle, "reduction",
      {{"mean", Reduction::kMean}, {"sum", Reduction::kSum}, {"none", Reduction::kNone}});
}

}  // namespace cjepa
