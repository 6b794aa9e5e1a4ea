// Tensors on guarded memory, the results of operators, and calls from several threads at once that
// each use another number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "../cpu/tensors.h"
#include "check.h"
#include "threads.h"

namespace cjepa::test {

template <ScalarType dtype>
double round_through(double x) {
  return with_number(dtype, [x](auto narrow) {
    return static_cast<double>(
        static_cast<float>(static_cast<decltype(narrow)>(static_cast<float>(x))));
  });
}

// How operands of that dtype are rounded if the sums are of type `sum`; null: not at all.
inline double (*rounding_to(ScalarType operands, ScalarType sum))(double) {
  if (operands == ScalarType::BFloat16) return round_through<ScalarType::BFloat16>;
  if (operands == ScalarType::Half) return round_through<ScalarType::Half>;
  if (operands != sum) return round_through<ScalarType::Float>;
  return nullptr;
}

inline double roundoff_of(ScalarType dtype) {
  if (dtype == ScalarType::BFloat16) return kBf16Roundoff;
  if (dtype == ScalarType::Half) return kHalfRoundoff;
  return dtype == ScalarType::Double ? kRoundoff<double> : kRoundoff<float>;
}

// A tensor on the test's own memory, which is guarded on both sides.
class Given {
 public:
  Given(ScalarType dtype, std::vector<int64_t> sizes, std::vector<int64_t> strides)
      : dtype_(dtype), sizes_(std::move(sizes)), strides_(std::move(strides)) {
    int64_t last = 0;
    for (size_t k = 0; k < sizes_.size(); ++k) last += (sizes_[k] - 1) * strides_[k];
    width_ = dtype_ == ScalarType::Bool ? 1 : with_number(dtype_, [](auto x) { return sizeof x; });
    memory_.emplace((last + 1) * static_cast<int64_t>(width_));
  }
  // Writes the value rounded to the dtype, and returns it.
  double set(int64_t row, int64_t column, double value) const {
    char* at = memory_->get() + (row * strides_[0] + column * strides_[1]) * width_;
    return with_number(dtype_, [&](auto x) {
      x = static_cast<decltype(x)>(static_cast<float>(value));
      if constexpr (std::is_same_v<decltype(x), double>) x = value;
      std::memcpy(at, &x, sizeof x);
      return static_cast<double>(x);
    });
  }
  char* bytes() const { return memory_->get(); }
  Tensor tensor() const {
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    return torch::stable::from_blob(memory_->get(), sizes_, strides_, cpu, dtype_);
  }

 private:
  ScalarType dtype_;
  std::vector<int64_t> sizes_, strides_;
  size_t width_;
  std::optional<Guarded<char>> memory_;
};

inline std::vector<double> numbers_of(const Tensor& t) {
  return with_number(t.scalar_type(), [&](auto zero) {
    const auto* data = static_cast<const decltype(zero)*>(t.const_data_ptr());
    return std::vector<double>(data, data + t.numel());
  });
}

// Exponentials relative to a higher shift are smaller, and so is the logarithm of their sum.
template <typename T>
void raise_shift(Tensor& shift, Tensor& log_sum, double by, double tau) {
  auto* shifts = static_cast<T*>(shift.mutable_data_ptr());
  auto* log_sums = static_cast<T*>(log_sum.mutable_data_ptr());
  for (int64_t a = 0; a < shift.numel(); ++a) {
    const T before = shifts[a];
    shifts[a] = static_cast<T>(before + by);
    log_sums[a] = static_cast<T>(log_sums[a] - (static_cast<double>(shifts[a]) - before) / tau);
  }
}

// The results of operators, in order.
using Results = std::vector<std::vector<double>>;

inline bool same_bits(const Results& a, const Results& b) {
  for (size_t k = 0; k < a.size(); ++k)
    if (a[k].size() != b[k].size() ||
        (!a[k].empty() &&  // whose data may be null
         std::memcmp(a[k].data(), b[k].data(), a[k].size() * sizeof(double)) != 0))
      return false;
  return true;
}

// The results of run(), which must have the same bits for all callers and all numbers of threads.
template <typename Run>
Results run_on_threads(const std::string& name, const std::vector<uint32_t>& thread_counts,
                       int callers, const Run& run) {
  std::optional<Results> first;
  for (const uint32_t threads : thread_counts) {
    use_threads(threads);
    std::vector<Results> results(callers);
    std::vector<std::thread> others;
    for (int k = 0; k < callers; ++k) others.emplace_back([&, k] { results[k] = run(); });
    for (std::thread& thread : others) thread.join();
    if (!first) first = results[0];
    for (const Results& r : results)
      CHECK(same_bits(r, *first), "%s: other bits with %u threads", name.c_str(), threads);
  }
  return *first;
}

}  // namespace cjepa::test
