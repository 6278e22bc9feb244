// Autocast: the input stays in the dtype it comes in, since the kernels take every mix; half-precision affine
// parameters are raised to fp32, so that statistics, parameters and their gradients never drop below it.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <optional>
#include <string>
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

// The operators that share the arguments (x, weight, bias, ...).
constexpr char kBatchNorm[] = "batchnorm_ext::batch_norm", kSyncBatchNorm[] = "batchnorm_ext::sync_batch_norm";

template <at::DeviceType device, const char* name, typename Result, typename... Rest>
Result with_raised_parameters(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, Rest... rest) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow(name, "")
                             .typed<Result(const Tensor&, const OptionalTensor&, const OptionalTensor&, Rest...)>();
  return op.call(x, raised(weight), raised(bias), rest...);
}

template <at::DeviceType device>
void register_on(torch::Library& m) {
  m.impl("batch_norm",
         with_raised_parameters<device, kBatchNorm, std::tuple<Tensor, Tensor>, const OptionalTensor&,
                                const OptionalTensor&, const OptionalTensor&, bool, std::optional<double>, double>);
  m.impl("sync_batch_norm",
         with_raised_parameters<device, kSyncBatchNorm, Tensor, const OptionalTensor&, const OptionalTensor&,
                                const OptionalTensor&, std::optional<double>, double, std::string>);
}

}  // namespace

TORCH_LIBRARY_IMPL(batchnorm_ext, AutocastCPU, m) { register_on<at::kCPU>(m); }
TORCH_LIBRARY_IMPL(batchnorm_ext, AutocastCUDA, m) { register_on<at::kCUDA>(m); }

}  // namespace batchnorm_ext
