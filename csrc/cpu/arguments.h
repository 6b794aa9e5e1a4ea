// What the arguments of the operators have in common: how they are checked, and how options that
// come as text are read.
//
// Python checks what users pass. These checks keep a call of the operator itself inside its memory.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "tensors.h"

namespace cjepa {

enum class Reduction { kMean, kSum, kNone };

// Throws std::invalid_argument, which Python sees as a ValueError.
void check(bool holds, const char* what);

bool is_floating(ScalarType dtype);

// Two batches of rows whose products are taken, and the options of that.
void check_inputs(const Tensor& a, const Tensor& b, const std::optional<Tensor>& temperature,
                  std::optional<ScalarType> product_dtype);

// Checks that `t` holds one number for each row, in the dtype of the sums over inputs like `like`:
// something that a forward left for its backward, or a gradient.
void check_rows(const Tensor& t, const Tensor& like, int64_t rows, const char* what);

// The text of a handle, which this function also releases.
std::string read_string(StringHandle handle);

// The value that `known` has for the text of the handle. `name` is the argument's, for the error.
template <typename Value>
Value read_choice(StringHandle handle, const char* name,
                  std::initializer_list<std::pair<const char*, Value>> known) {
  const std::string text = read_string(handle);
  std::string choices;
  for (const auto& [choice, value] : known) {
    if (text == choice) return value;
    choices += (choices.empty() ? "" : ", ") + std::string(choice);
  }
  throw std::invalid_argument("cjepa_kernels: " + std::string(name) + " must be one of " + choices +
                              ", got " + text);
}

Reduction read_reduction(StringHandle handle);

}  // namespace cjepa
