// Strides in, Geometry out.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include "geometry.h"
#include "ops.h"

namespace batchnorm_ext {

// The tensor itself if its elements fill their memory without gaps or overlaps, in whatever order of the dimensions;
// otherwise a copy that does, in the order that empty_like gives an output.
// With statistics of each sample (groups > 0), samples lie one after the other.
inline at::Tensor dense(const at::Tensor& x, const Domain& domain = {}) {
  const auto fits = [groups = domain.groups](const at::Tensor& tensor) {
    if (!tensor.is_non_overlapping_and_dense()) return false;
    for (int64_t d = 1; groups > 0 && d < tensor.dim(); ++d)
      if (tensor.size(0) > 1 && tensor.size(d) > 1 && tensor.stride(d) > tensor.stride(0)) return false;
    return true;
  };
  if (fits(x)) return x;
  const at::Tensor copy = at::empty_like(x);
  return fits(copy) ? copy.copy_(x) : x.contiguous();
}

// `tensor` in the memory order of the dense tensor x, which has the same sizes.
inline at::Tensor like_layout(const at::Tensor& tensor, const at::Tensor& x) {
  for (int64_t d = 0; d < x.dim(); ++d)
    if (x.size(d) > 1 && tensor.stride(d) != x.stride(d)) return at::empty_like(x).copy_(tensor);
  return tensor;
}

inline OptionalTensor like_layout(const OptionalTensor& tensor, const at::Tensor& x) {
  return tensor ? OptionalTensor(like_layout(*tensor, x)) : std::nullopt;
}

inline Geometry geometry_of(const at::Tensor& dense, const Domain& domain = {}) {
  const int64_t groups = domain.groups;
  Geometry g{1, dense.size(1), 1};
  if (groups > 0) {
    g.batch = dense.size(0);
    g.per_stat = g.channels / groups;
  }
  for (int64_t d = groups > 0 ? 1 : 0; d < dense.dim(); ++d) {
    if (d == 1 || dense.size(d) == 1) continue;
    const bool outside = g.channels > 1 && dense.stride(d) > dense.stride(1);
    (outside ? g.outer : g.inner) *= dense.size(d);
  }
  return g;
}

}  // namespace batchnorm_ext
