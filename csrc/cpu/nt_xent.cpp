// The operators nt_xent and nt_xent_backward under the dispatch key CPU.
#include "nt_xent.h"

#include <torch/csrc/stable/library.h>

namespace cjepa {
namespace {

// Calls run(T(), P()) with the types of sums and of operands.
template <typename Run>
auto with_types(const Options& options, const Run& run) {
  if (options.z_i.scalar_type() == ScalarType::Double) return run(double(), double());
  if (options.rounded_dtype() == ScalarType::BFloat16 && has_bf16_core())
    return run(float(), Bf16Pair());
  return run(float(), float());
}

Outputs forward(Tensor z_i, Tensor z_j, std::optional<Tensor> mask,
                std::optional<Tensor> temperature_tensor, double temperature, bool cosine,
                double eps, std::string reduction, std::optional<ScalarType> product_dtype,
                bool keep) {
  const Options options{z_i,    z_j, mask,      temperature_tensor, temperature,
                        cosine, eps, reduction, product_dtype};
  return with_types(options, [&](auto sum, auto operand) {
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
  return with_types(options, [&](auto sum, auto operand) {
    return nt_xent_backward<decltype(sum), decltype(operand)>(options, grad_loss,
                                                              {shift, log_sum, positive, kept});
  });
}

}  // namespace
}  // namespace cjepa

STABLE_TORCH_LIBRARY_IMPL(cjepa_kernels, CPU, m) {
  m.impl("nt_xent", TORCH_BOX(&cjepa::forward));
  m.impl("nt_xent_backward", TORCH_BOX(&cjepa::backward));
}
