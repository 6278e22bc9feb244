// The gradient in differentiable operators, for derivatives of any order.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/rsqrt.h>
#include <torch/csrc/autograd/variable.h>

#include <vector>

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

// The formulas of batch_norm_backward (ops.cpp), with mean and invstd as functions of x in training. average({v...})
// gives the average of each v over the elements of a statistic, differentiably and shaped to broadcast; where these are
// on several ranks it is one message.
template <typename Average>
Gradients differentiable_gradients(const at::Tensor& dy_, const at::Tensor& x_, const OptionalTensor& weight,
                                   const at::Tensor& stats, bool training, std::optional<at::ScalarType> bias_dtype,
                                   const Mask& mask, const Domain& domain, const Average& average) {
  using at::Tensor;
  const auto& [groups, centred, parameter_dim] = domain;
  const auto dtype = x_.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor x = x_.to(dtype), dy = dy_.to(dtype);
  // Halves, because x - mean may overflow where xhat does not.
  const Tensor half_mean = stats[0] * -0.5, rounded = half_mean.to(dtype);
  Tensor half = at::add(along_stats(rounded, x, groups), x, 0.5);
  // What rounding takes from the mean, for channels far from zero; running statistics have fewer bits.
  if (training && dtype != at::kDouble) half = half + along_stats((half_mean - rounded).to(dtype), x, groups);
  Tensor invstd = along_stats(stats[1].to(dtype), x, groups);
  if (training && x_.requires_grad()) {
    // These terms are zero; they only make the statistics differentiable functions of x. The variance is relative to
    // its value, so that it neither overflows nor underflows, and needs no eps: it stands for
    // (var + eps) / (its value + eps).
    if (centred) half = half - average({half - half.detach()})[0];
    const Tensor relative = average({(half * (2 * invstd)).square()})[0];
    invstd = invstd * at::rsqrt(1 + (relative - relative.detach()));
  }
  const Tensor xhat = half * (2 * invstd);
  Tensor dx, dweight, dbias;
  if (mask[0]) {
    const Tensor g = weight ? dy * along_channels(weight->to(dtype), x, parameter_dim) : dy;
    dx = g;
    if (training) {
      const auto averages = average({g, g * xhat});
      dx = g - xhat * averages[1];
      if (centred) dx = dx - averages[0];
    }
    dx = (invstd * dx).to(x_.scalar_type());
  }
  const auto sum = [&](const Tensor& terms, at::ScalarType to) {
    return terms.sum(reduced_dims(x, domain.parameter_dim)).to(to);
  };
  if (mask[1]) dweight = sum(dy * xhat, weight ? weight->scalar_type() : dtype);
  if (mask[2]) dbias = sum(dy, bias_dtype.value_or(dtype));
  return {std::move(dx), std::move(dweight), std::move(dbias)};
}

}  // namespace batchnorm_ext
