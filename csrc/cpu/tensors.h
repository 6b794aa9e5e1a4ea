// PyTorch's tensors through its stable ABI, in the words that the operators use.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>
#include <vector>

namespace cjepa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
constexpr ScalarType dtype_of() {
  return std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double;
}

// The dtype of norms, sums and losses: fp64 for fp64 inputs, fp32 for all others.
inline ScalarType sum_dtype(ScalarType input) {
  return input == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor new_tensor(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

template <typename T>
T* data_of(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <typename T>
const T* data_of(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

// A new 0-dim tensor that holds `value`.
template <typename T>
Tensor scalar(const Tensor& like, double value) {
  Tensor t = new_tensor(like, {}, dtype_of<T>());
  *data_of<T>(t) = static_cast<T>(value);
  return t;
}

// Calls run(S()) with the C++ type of a floating dtype.
template <typename Run>
auto with_number(ScalarType dtype, const Run& run) {
  switch (dtype) {
    case ScalarType::Double:
      return run(double());
    case ScalarType::Half:
      return run(torch::headeronly::Half());
    case ScalarType::BFloat16:
      return run(torch::headeronly::BFloat16());
    default:
      return run(float());
  }
}

inline double read_scalar(const Tensor& t) {
  return with_number(t.scalar_type(),
                     [&](auto zero) { return static_cast<double>(*data_of<decltype(zero)>(t)); });
}

}  // namespace cjepa
