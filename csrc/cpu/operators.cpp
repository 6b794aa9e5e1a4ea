#include "operators.h"

#include <torch/csrc/stable/library.h>

#include "cross_logsumexp.h"
#include "nt_xent.h"

namespace cjepa {
namespace {

Outputs forward(Tensor z_i, Tensor z_j, std::optional<Tensor> mask,
                std::optional<Tensor> temperature_tensor, double temperature, bool cosine,
                double eps, std::string reduction, std::optional<ScalarType> product_dtype,
                bool keep) {
  const Options options{z_i,    z_j, mask,      temperature_tensor, temperature,
                        cosine, eps, reduction, product_dtype};
  return with_types(z_i.scalar_type(), options.rounded_dtype(), [&](auto sum, auto operand) {
    return nt_xent_forward<decltype(sum), decltype(operand)>(options, keep);
  });
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_loss, Tensor z_i, Tensor z_j,
                                            std::optional<Tensor> mask,
                                            std::optional<Tensor> temperature_tensor, Tensor shift,
                                            Tensor log_sum, Tensor positive, Tensor kept,
                                            double temperature, bool cosine, double eps,
                                            std::string reduction,
                                            std::optional<ScalarType> product_dtype) {
  const Options options{z_i,    z_j, mask,      temperature_tensor, temperature,
                        cosine, eps, reduction, product_dtype};
  return with_types(z_i.scalar_type(), options.rounded_dtype(), [&](auto sum, auto operand) {
    return nt_xent_backward<decltype(sum), decltype(operand)>(options, grad_loss,
                                                              {shift, log_sum, positive, kept});
  });
}

void implement(torch::stable::detail::StableLibrary& library) {
  library.impl("nt_xent", TORCH_BOX(&forward));
  library.impl("nt_xent_backward", TORCH_BOX(&backward));
  library.impl("cross_logsumexp", TORCH_BOX(&cross_logsumexp));
  library.impl("cross_logsumexp_backward", TORCH_BOX(&cross_logsumexp_backward));
}

}  // namespace

void register_operators() {
  using torch::stable::detail::StableLibrary;
  static const torch::stable::detail::StableTorchLibraryInit registered(
      StableLibrary::Kind::IMPL, &implement, "cjepa_kernels", "CPU", __FILE__, __LINE__);
}

}  // namespace cjepa
