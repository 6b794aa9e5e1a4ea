// The gradient of rows that were taken out of a batch of tokens.
#pragma once

#include <torch/csrc/stable/library.h>

namespace cjepa {

// Registers the operator pad_tokens.
void implement_pad_tokens(torch::stable::detail::StableLibrary& library);

}  // namespace cjepa
