// The gradient of batch normalization's gradient, for statistics of one batch or of all ranks.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <vector>

namespace batchnorm_ext {

// One value per channel, shaped to broadcast against x.
inline at::Tensor along_channels(const at::Tensor& values, const at::Tensor& x) {
  std::vector<int64_t> shape(x.dim(), 1);
  shape[1] = x.size(1);
  return values.reshape(shape);
}

// The dimensions that a statistic runs over: all but the channel.
inline std::vector<int64_t> reduced_dims(const at::Tensor& x) {
  std::vector<int64_t> dims;
  for (int64_t d = 0; d < x.dim(); ++d)
    if (d != 1) dims.push_back(d);
  return dims;
}

// With L = <ddx, dx> + <ddw, dweight> + <ddb, dbias>, r = invstd, e = w r ddx and the projection
//   P(v) = v - avg(v) - xhat * avg(v * xhat)      (the identity in evaluation, where mean and r are constants)
// dx is w r P(dy), and P is self-adjoint, so that
//   dL/ddy = P(e) + ddw * xhat + ddb
//   dL/dw  = sum(r ddx P(dy))
//   dL/dx  = r P(h) - xhat * r avg(e P(dy)),   h = dL/dxhat = ddw * dy - e * avg(dy * xhat) - dy * avg(e * xhat)
// Written with differentiable operators on x itself, so that derivatives of any order are right. average({v...}) gives
// the average of each v over the elements of a channel, differentiably and shaped to broadcast; where the elements are
// on several ranks it is one message.
template <typename Average>
torch::autograd::variable_list double_backward(const torch::autograd::variable_list& grads, const at::Tensor& dy_,
                                               const at::Tensor& x_, const at::Tensor& weight, const at::Tensor& stats,
                                               bool training, const Average& average) {
  using at::Tensor;
  const Tensor &ddx_ = grads[0], &ddw_ = grads[1], &ddb_ = grads[2];
  const auto dtype = x_.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor x = x_.to(dtype), dy = dy_.to(dtype);
  const auto widen = [&](const Tensor& values) {
    return values.defined() ? along_channels(values.to(dtype), x) : at::zeros({}, x.options());
  };

  Tensor centred = x - along_channels(stats[0].to(dtype), x);
  Tensor r = along_channels(stats[1].to(dtype), x);
  if (training && at::GradMode::is_enabled()) {
    // Adds nothing to the saved statistics but their dependence on x; it needs no eps.
    centred = centred - average({centred - centred.detach()})[0];
    const Tensor var = average({centred * centred})[0];
    r = at::rsqrt(r.pow(-2) + (var - var.detach()));
  }
  const Tensor xhat = centred * r;
  const Tensor ddx = ddx_.defined() ? ddx_.to(dtype) : at::zeros_like(x);
  const Tensor ddw = widen(ddw_), ddb = widen(ddb_);
  const Tensor e = (weight.defined() ? widen(weight) * r : r) * ddx;

  Tensor projected_dy = dy, projected_e = e, grad_x = ddw * dy * r;
  if (training) {
    const auto avg = average({dy, dy * xhat, e, e * xhat});
    projected_dy = dy - avg[0] - xhat * avg[1];
    projected_e = e - avg[2] - xhat * avg[3];
    const Tensor h = ddw * dy - e * avg[1] - dy * avg[3];
    const auto avg_h = average({h, h * xhat, e * projected_dy});
    grad_x = r * (h - avg_h[0] - xhat * (avg_h[1] + avg_h[2]));
  }
  const Tensor grad_dy = projected_e + ddw * xhat + ddb;
  Tensor grad_weight;
  if (weight.defined())
    grad_weight = (r * ddx * projected_dy).sum(reduced_dims(x)).reshape(weight.sizes()).to(weight.scalar_type());
  return {grad_dy.to(dy_.scalar_type()), grad_x.to(x_.scalar_type()), grad_weight};
}

}  // namespace batchnorm_ext
