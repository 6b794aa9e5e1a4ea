#include "operators.h"

#include <torch/csrc/stable/library.h>

#include "class_similarity.h"
#include "cross_logsumexp.h"
#include "nt_xent.h"
#include "pad_tokens.h"
#include "prediction_loss.h"
#include "self_logsumexp.h"

namespace cjepa {
namespace {

using torch::stable::detail::StableLibrary;

void implement(StableLibrary& library) {
  implement_nt_xent(library);
  implement_cross_logsumexp(library);
  implement_self_logsumexp(library);
  implement_class_similarity(library);
  implement_prediction_loss(library);
  implement_pad_tokens(library);
}

}  // namespace

void register_operators() {
  static const torch::stable::detail::StableTorchLibraryInit registered(
      StableLibrary::Kind::IMPL, &implement, "cjepa_kernels", "CPU", __FILE__, __LINE__);
}

}  // namespace cjepa
