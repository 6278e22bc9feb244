// Derivatives of the ops. The kernels are reached through the dispatcher, so that tracing sees them.
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace batchnorm_ext {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
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

OptionalTensor optional(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

// One value per channel, shaped to broadcast against x.
Tensor along_channels(const Tensor& values, const Tensor& x) {
  std::vector<int64_t> shape(x.dim(), 1);
  shape[1] = x.size(1);
  return values.reshape(shape);
}

// Gradient of batch_norm_backward. With L = <ddx, dx> + <ddw, dweight> + <ddb, dbias>, r = invstd and the projection
//   P(v) = v - avg(v) - xhat * avg(v * xhat)      (the identity in evaluation, where mean and r are constants)
// dx is w r P(dy), and P is self-adjoint, so that
//   dL/ddy = w r P(ddx) + ddw * xhat + ddb
//   dL/dw  = sum(r ddx P(dy))
//   dL/dx  = r P(h) - xhat * (w r^2 / count) * sum(ddx P(dy)),
//   h = dL/dxhat = ddw * dy - w r (ddx * avg(dy * xhat) + dy * avg(ddx * xhat))
// Written with differentiable operators on x itself, so that derivatives of any order are right.
variable_list double_backward(const Tensor& ddx_, const Tensor& ddw_, const Tensor& ddb_, const Tensor& dy_,
                              const Tensor& x_, const Tensor& weight, const Tensor& stats, bool training) {
  const auto dtype = x_.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor x = x_.to(dtype), dy = dy_.to(dtype);
  std::vector<int64_t> others;
  for (int64_t d = 0; d < x.dim(); ++d)
    if (d != 1) others.push_back(d);
  const auto avg = [&](const Tensor& v) { return v.mean(others, /*keepdim=*/true); };
  const auto widen = [&](const Tensor& values) {
    return values.defined() ? along_channels(values.to(dtype), x) : at::zeros({}, x.options());
  };

  Tensor centred = x - along_channels(stats[0].to(dtype), x);
  Tensor r = along_channels(stats[1].to(dtype), x);
  if (training) {
    // Adds nothing to the saved statistics but their dependence on x; it needs no eps.
    centred = centred - avg(centred - centred.detach());
    const Tensor var = avg(centred * centred);
    r = at::rsqrt(r.pow(-2) + (var - var.detach()));
  }
  const Tensor xhat = centred * r;
  const auto project = [&](const Tensor& v) { return training ? v - avg(v) - xhat * avg(v * xhat) : v; };
  const Tensor ddx = ddx_.defined() ? ddx_.to(dtype) : at::zeros_like(x);
  const Tensor ddw = widen(ddw_), ddb = widen(ddb_);
  const Tensor wr = weight.defined() ? widen(weight) * r : r;

  const Tensor inner = ddx * project(dy);
  const Tensor grad_dy = wr * project(ddx) + ddw * xhat + ddb;
  Tensor grad_x = ddw * dy * r;
  if (training) {
    const Tensor h = ddw * dy - wr * (ddx * avg(dy * xhat) + dy * avg(ddx * xhat));
    grad_x = r * project(h) - xhat * (wr * r * avg(inner));
  }
  Tensor grad_weight;
  if (weight.defined()) grad_weight = (r * inner).sum(others).reshape(weight.sizes()).to(weight.scalar_type());
  return {grad_dy.to(dy_.scalar_type()), grad_x.to(x_.scalar_type()), grad_weight};
}

// A Function cannot return an undefined tensor, so only the wanted outputs pass through one. This puts them in place.
variable_list spread(const variable_list& wanted, const std::array<bool, 3>& output_mask) {
  variable_list all(3);
  for (size_t i = 0, next = 0; i < 3; ++i)
    if (output_mask[i]) all[i] = wanted[next++];
  return all;
}

struct BatchNormBackward : torch::autograd::Function<BatchNormBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                               const Tensor& stats, bool training, std::array<bool, 3> output_mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({dy, x, weight.value_or(Tensor()), stats});
    ctx->saved_data["training"] = training;
    ctx->saved_data["output_mask"] = output_mask;
    auto [dx, dweight, dbias] = backward_op().call(dy, x, weight, stats, training, output_mask);
    variable_list wanted;
    for (const Tensor& grad : {dx, dweight, dbias})
      if (grad.defined()) wanted.push_back(grad);
    return wanted;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& wanted) {
    const variable_list saved = ctx->get_saved_variables();
    const auto mask = ctx->saved_data["output_mask"].toBoolList();
    const variable_list grads = spread(wanted, {mask[0], mask[1], mask[2]});
    variable_list result = double_backward(grads[0], grads[1], grads[2], saved[0], saved[1], saved[2], saved[3],
                                           ctx->saved_data["training"].toBool());
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
    // Only the tensors that were given count as inputs.
    const bool has_weight = saved[1].defined(), has_bias = ctx->saved_data["has_bias"].toBool();
    const std::array<bool, 3> output_mask = {ctx->needs_input_grad(0), has_weight && ctx->needs_input_grad(1),
                                             has_bias && ctx->needs_input_grad(1 + has_weight)};
    auto [dx, dweight, dbias] = backward_op().call(dy, saved[0], optional(saved[1]), saved[2],
                                                   ctx->saved_data["training"].toBool(), output_mask);
    result[0] = std::move(dx);
    result[1] = std::move(dweight);
    result[2] = std::move(dbias);
    return result;
  }
};

bool requires_grad(const Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }
bool requires_grad(const OptionalTensor& tensor) { return tensor && requires_grad(*tensor); }

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
