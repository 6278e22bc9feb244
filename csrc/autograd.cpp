// Derivatives of the ops. The kernels are reached through the dispatcher, so that tracing sees them.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>

#include "double_backward.h"
#include "functions.h"

namespace batchnorm_ext {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Forward = std::tuple<Tensor, Tensor>(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                           const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, bool,
                                           std::optional<double>, double);
using Backward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                                                    bool, std::array<bool, 3>);

const auto& forward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("batchnorm_ext::batch_norm", "").typed<Forward>();
  return op;
}

const auto& backward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("batchnorm_ext::batch_norm_backward", "").typed<Backward>();
  return op;
}

struct BatchNormBackward : torch::autograd::Function<BatchNormBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                               const Tensor& stats, bool training, std::array<bool, 3> output_mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({dy, x, weight.value_or(Tensor()), stats});
    ctx->saved_data["training"] = training;
    ctx->saved_data["output_mask"] = output_mask;
    return defined(backward_op().call(dy, x, weight, stats, training, output_mask));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& wanted) {
    const variable_list saved = ctx->get_saved_variables();
    const auto average = [](const variable_list& values) {
      variable_list averages;
      for (const Tensor& v : values) averages.push_back(v.mean(reduced_dims(v), /*keepdim=*/true));
      return averages;
    };
    variable_list result = double_backward(spread(wanted, ctx->saved_data["output_mask"].toBoolList()), saved[0],
                                           saved[1], saved[2], saved[3], ctx->saved_data["training"].toBool(), average);
    result.resize(6);
    return result;
  }
};

struct BatchNorm : torch::autograd::Function<BatchNorm> {
  // The statistics have no derivative of their own, and leave beside the outputs: each of these costs the graph.
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& running_mean, const OptionalTensor& running_var,
                        const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum,
                        double eps, Tensor* stats) {
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor y;
    std::tie(y, *stats) =
        forward_op().call(x, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({x, weight.value_or(Tensor()), *stats});
    ctx->saved_data["training"] = training;
    ctx->saved_data["has_bias"] = bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(10);
    const Tensor& dy = grads[0];
    if (!dy.defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const auto output_mask = wanted_gradients(ctx, saved[1].defined(), ctx->saved_data["has_bias"].toBool());
    auto [dx, dweight, dbias] = backward_op().call(dy, saved[0], optional(saved[1]), saved[2],
                                                   ctx->saved_data["training"].toBool(), output_mask);
    result[0] = std::move(dx);
    result[1] = std::move(dweight);
    result[2] = std::move(dbias);
    return result;
  }
};

std::tuple<Tensor, Tensor> batch_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                      const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                      const OptionalTensor& num_batches_tracked, bool training,
                                      std::optional<double> momentum, double eps) {
  if (at::GradMode::is_enabled() && (requires_grad(x) || requires_grad(weight) || requires_grad(bias))) {
    Tensor stats;
    Tensor y = BatchNorm::apply(x, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum,
                                eps, &stats);
    return {std::move(y), std::move(stats)};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return forward_op().call(x, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                                       const Tensor& stats, bool training,
                                                       std::array<bool, 3> output_mask) {
  if (at::GradMode::is_enabled() && (requires_grad(dy) || requires_grad(x) || requires_grad(weight))) {
    variable_list out = spread(BatchNormBackward::apply(dy, x, weight, stats, training, output_mask), output_mask);
    return {std::move(out[0]), std::move(out[1]), std::move(out[2])};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return backward_op().call(dy, x, weight, stats, training, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(batchnorm_ext, Autograd, m) {
  m.impl("batch_norm", batch_norm);
  m.impl("batch_norm_backward", batch_norm_backward);
}

}  // namespace batchnorm_ext
