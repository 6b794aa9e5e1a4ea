// The operators nt_xent and nt_xent_backward under the dispatch key CPU.
#include "nt_xent.h"

#include <torch/csrc/stable/library.h>

namespace cjepa {
namespace {

Outputs forward(Tensor z_i, Tensor z_j, std::optional<Tensor> mask,
                std::optional<Tensor> temperature_tensor, double temperature, bool cosine,
                double eps, std::string reduction, std::optional<ScalarType> product_dtype) {
  if (z_i.scalar_type() == ScalarType::Double) {
    const Exponents<double> exponents(temperature_tensor, temperature, cosine);
    return nt_xent_forward<double>(z_i, z_j, mask, exponents, cosine, eps, reduction,
                                   product_dtype);
  }
  const Exponents<float> exponents(temperature_tensor, temperature, cosine);
  return nt_xent_forward<float>(z_i, z_j, mask, exponents, cosine, eps, reduction, product_dtype);
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_loss, Tensor z_i, Tensor z_j,
                                            std::optional<Tensor> mask,
                                            std::optional<Tensor> temperature_tensor, Tensor shift,
                                            Tensor log_sum, Tensor positive, double temperature,
                                            bool cosine, double eps, std::string reduction,
                                            std::optional<ScalarType> product_dtype) {
  if (z_i.scalar_type() == ScalarType::Double) {
    const Exponents<double> exponents(temperature_tensor, temperature, cosine);
    return nt_xent_backward<double>(grad_loss, z_i, z_j, mask, temperature_tensor, shift, log_sum,
                                    positive, exponents, cosine, eps, reduction, product_dtype);
  }
  const Exponents<float> exponents(temperature_tensor, temperature, cosine);
  return nt_xent_backward<float>(grad_loss, z_i, z_j, mask, temperature_tensor, shift, log_sum,
                                 positive, exponents, cosine, eps, reduction, product_dtype);
}

}  // namespace
}  // namespace cjepa

STABLE_TORCH_LIBRARY_IMPL(cjepa_kernels, CPU, m) {
  m.impl("nt_xent", TORCH_BOX(&cjepa::forward));
  m.impl("nt_xent_backward", TORCH_BOX(&cjepa::backward));
}
