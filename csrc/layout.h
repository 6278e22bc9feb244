// Strides in, Geometry out.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include "geometry.h"

namespace batchnorm_ext {

// The tensor itself if its elements fill their memory without gaps or overlaps, in whatever order of the dimensions;
// otherwise a copy that does, in the order that empty_like gives an output.
inline at::Tensor dense(const at::Tensor& x) {
  return x.is_non_overlapping_and_dense() ? x : at::empty_like(x).copy_(x);
}

// `tensor` in the memory order of the dense tensor x, which has the same sizes.
inline at::Tensor like_layout(const at::Tensor& tensor, const at::Tensor& x) {
  for (int64_t d = 0; d < x.dim(); ++d)
    if (x.size(d) > 1 && tensor.stride(d) != x.stride(d)) return at::empty_like(x).copy_(tensor);
  return tensor;
}

inline Geometry geometry_of(const at::Tensor& dense) {
  Geometry g{1, dense.size(1), 1};
  for (int64_t d = 0; d < dense.dim(); ++d) {
    if (d == 1 || dense.size(d) == 1) continue;
    const bool outside = g.stats > 1 && dense.stride(d) > dense.stride(1);
    (outside ? g.outer : g.inner) *= dense.size(d);
  }
  return g;
}

}  // namespace batchnorm_ext
