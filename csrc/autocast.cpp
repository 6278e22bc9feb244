// Autocast: the input stays in the dtype it comes in, since the kernels take every mix; half-precision affine
// parameters are raised to fp32, so that statistics, parameters and their gradients never drop below it.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace batchnorm_ext {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

OptionalTensor raised(const OptionalTensor& parameter) {
  if (!parameter) return parameter;
  const auto dtype = parameter->scalar_type();
  return dtype == at::kHalf || dtype == at::kBFloat16 ? parameter->to(at::kFloat) : parameter;
}

template <at::DeviceType device>
std::tuple<Tensor, Tensor> batch_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                      const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                      const OptionalTensor& num_batches_tracked, bool training,
                                      std::optional<double> momentum, double eps) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("batchnorm_ext::batch_norm", "")
                             .typed<decltype(batch_norm<device>)>();
  return op.call(x, raised(weight), raised(bias), running_mean, running_var, num_batches_tracked, training, momentum,
                 eps);
}

}  // namespace

TORCH_LIBRARY_IMPL(batchnorm_ext, AutocastCPU, m) { m.impl("batch_norm", batch_norm<at::kCPU>); }
TORCH_LIBRARY_IMPL(batchnorm_ext, AutocastCUDA, m) { m.impl("batch_norm", batch_norm<at::kCUDA>); }

}  // namespace batchnorm_ext
