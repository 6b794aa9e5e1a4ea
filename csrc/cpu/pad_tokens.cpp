#include "pad_tokens.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "arguments.h"
#include "memory.h"
#include "tensors.h"

namespace cjepa {
namespace {

// (B, tokens, D) whose token 0 holds the rows, (B, D), and whose other tokens are zeros.
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

}  // namespace

void implement_pad_tokens(torch::stable::detail::StableLibrary& library) {
  library.impl("pad_tokens", TORCH_BOX(&pad_tokens));
}

}  // namespace cjepa
