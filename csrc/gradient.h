// The gradient in differentiable operators, for derivatives of any order.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/rsqrt.h>
#include <torch/csrc/autograd/variable.h>

#include <vector>

#include "activation_table.h"
#include "ops.h"

namespace batchnorm_ext {

// One value for each index of a dimension, shaped to broadcast against x.
inline at::Tensor along_channels(const at::Tensor& values, const at::Tensor& x, int64_t dim = 1) {
  std::vector<c10::SymInt> shape(x.dim(), 1);
  shape[dim] = x.sym_size(dim);
  return values.reshape_symint(shape);
}

// The dimensions that the gradient of a parameter runs over: all but its own.
inline std::vector<int64_t> reduced_dims(const at::Tensor& x, int64_t dim = 1) {
  std::vector<int64_t> dims;
  for (int64_t d = 0; d < x.dim(); ++d)
    if (d != dim) dims.push_back(d);
  return dims;
}

// One value per statistic, shaped to broadcast against x.
inline at::Tensor along_stats(const at::Tensor& values, const at::Tensor& x, int64_t groups) {
  if (groups == 0) return along_channels(values, x);
  std::vector<c10::SymInt> shape(x.dim(), 1);
  shape[0] = x.sym_size(0);
  shape[1] = x.sym_size(1);
  const auto per_cell =
      values.reshape_symint({shape[0], groups, 1}).expand_symint({shape[0], groups, shape[1] / groups});
  return per_cell.reshape_symint(shape);
}

// The average of the values of each statistic, shaped to broadcast.
inline at::Tensor average_of(const at::Tensor& values, int64_t groups) {
  if (groups == 0) return values.mean(reduced_dims(values), /*keepdim=*/true);
  return along_stats(values.reshape_symint({values.sym_size(0), groups, -1}).mean(-1), values, groups);
}

// invstd and xhat in training as functions of x. average({v...}) gives the average of each v over the elements of a
// statistic, differentiably and shaped to broadcast; where these are on several ranks it is one message.
struct Normed {
  at::Tensor invstd, xhat;

  template <typename Average>
  Normed(const at::Tensor& x, const at::Tensor& stats, bool training, bool differentiates, const Domain& domain,
         const Average& average) {
    using at::Tensor;
    const auto dtype = x.scalar_type();
    // Halves, because x - mean may overflow where xhat does not.
    const Tensor half_mean = stats[0] * -0.5, rounded = half_mean.to(dtype);
    Tensor half = at::add(along_stats(rounded, x, domain.groups), x, 0.5);
    // What rounding takes from the mean, for channels far from zero; running statistics have fewer bits.
    if (training && dtype != at::kDouble) half = half + along_stats((half_mean - rounded).to(dtype), x, domain.groups);
    invstd = along_stats(stats[1].to(dtype), x, domain.groups);
    if (training && differentiates) {
      // These terms are zero; they only make the statistics differentiable functions of x. The variance is relative to
      // its value, so that it neither overflows nor underflows, and needs no eps: it stands for
      // (var + eps) / (its value + eps).
      if (domain.centred) half = half - average({half - half.detach()})[0];
      const Tensor relative = average({(half * (2 * invstd)).square()})[0];
      invstd = invstd * at::rsqrt(1 + (relative - relative.detach()));
    }
    xhat = half * (2 * invstd);
  }
};

// The formulas of batch_norm_activated_backward (ops.cpp).
template <typename Average>
ActivatedGradients differentiable_gradients(const GradOperands& o, const GradSpec& s, const Average& average) {
  using at::Tensor;
  const auto own = o.x.scalar_type(), dtype = own == at::kDouble ? at::kDouble : at::kFloat;
  const int64_t dim = s.domain.parameter_dim;
  const Tensor x = o.x.to(dtype);
  const Normed normed(x, o.stats, s.training, o.x.requires_grad(), s.domain, average);
  const auto along = [&](const OptionalTensor& parameter) { return along_channels(parameter->to(dtype), x, dim); };
  Tensor dy = o.dy.to(dtype), dx, dweight, dbias, dresidual;
  if (const ChosenActivation activation = activation_named(s.activation); activation.row != nullptr) {
    Tensor z = normed.xhat;
    if (o.weight) z = z * along(o.weight);
    if (o.bias) z = z + along(o.bias);
    if (o.residual) z = activation.make().curve == Curve::kPiecewise ? o.residual->to(dtype).detach() : z + *o.residual;
    dy = activation.grad(dy, z);
    if (o.residual) dresidual = dy.to(own);
  }
  if (s.mask[0]) {
    const Tensor g = o.weight ? dy * along(o.weight) : dy;
    dx = g;
    if (s.training) {
      const auto averages = average({g, g * normed.xhat});
      dx = g - normed.xhat * averages[1];
      if (s.domain.centred) dx = dx - averages[0];
    }
    dx = (normed.invstd * dx).to(own);
  }
  const auto sum = [&](const Tensor& terms, at::ScalarType to) { return terms.sum(reduced_dims(x, dim)).to(to); };
  if (s.mask[1]) dweight = sum(dy * normed.xhat, o.weight ? o.weight->scalar_type() : dtype);
  if (s.mask[2]) dbias = sum(dy, s.bias_dtype.value_or(dtype));
  return {std::move(dx), std::move(dweight), std::move(dbias), std::move(dresidual)};
}

}  // namespace batchnorm_ext
