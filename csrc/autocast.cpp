// Autocast: the input stays in the dtype it comes in, since the kernels take every mix; half-precision affine
// parameters are raised to fp32, so that statistics, parameters and their gradients never drop below it.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <string_view>

#include "ops.h"

namespace batchnorm_ext {
namespace {

using at::Tensor;

OptionalTensor raised(const OptionalTensor& parameter) {
  if (!parameter) return parameter;
  const auto dtype = parameter->scalar_type();
  return dtype == at::kHalf || dtype == at::kBFloat16 ? parameter->to(at::kFloat) : parameter;
}

template <at::DeviceType device>
c10::impl::ExcludeDispatchKeyGuard without_autocast() {
  return c10::impl::ExcludeDispatchKeyGuard(at::autocast::get_autocast_dispatch_key_from_device_type(device));
}

template <at::DeviceType device>
Normalized forward(const Operands& o, const Spec& s) {
  const auto guard = without_autocast<device>();
  const OptionalTensor weight = raised(o.weight), bias = raised(o.bias);
  return call_forward({o.x, weight, bias, o.running_mean, o.running_var, o.num_batches_tracked, kNone, o.residual}, s);
}

template <at::DeviceType device>
Normalized sync_batch_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& running_mean, const OptionalTensor& running_var,
                           const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps,
                           std::string group, std::string layer, const OptionalTensor& residual,
                           std::string_view activation) {
  const auto guard = without_autocast<device>();
  static const auto op = find_operator<decltype(sync_batch_norm<device>)>("batchnorm_ext::sync_batch_norm");
  return op.call(x, raised(weight), raised(bias), running_mean, running_var, num_batches_tracked, momentum, eps, group,
                 layer, residual, activation);
}

template <at::DeviceType device>
void register_on(torch::Library& m) {
  register_forward<forward<device>>(m);
  m.impl("sync_batch_norm", sync_batch_norm<device>);
}

}  // namespace

TORCH_LIBRARY_IMPL(batchnorm_ext, AutocastCPU, m) { register_on<at::kCPU>(m); }
TORCH_LIBRARY_IMPL(batchnorm_ext, AutocastCUDA, m) { register_on<at::kCUDA>(m); }

}  // namespace batchnorm_ext
