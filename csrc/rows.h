// Layer normalization takes the last dimensions of a tensor as rows.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops.h"

namespace batchnorm_ext {

inline int64_t numel_of(at::IntArrayRef shape) { return c10::multiply_integers(shape); }

// What has the right number of dimensions is taken as it is: a view costs as much as a small kernel.
inline at::Tensor as_rows(const at::Tensor& x, at::IntArrayRef normalized_shape) {
  const bool are_rows = x.dim() == 2 && normalized_shape.size() == 1;
  return are_rows ? x : x.reshape_symint({-1, numel_of(normalized_shape)});
}

inline at::Tensor from_rows(const at::Tensor& rows, c10::SymIntArrayRef size) {
  return !rows.defined() || rows.dim() == static_cast<int64_t>(size.size()) ? rows : rows.view_symint(size);
}

inline OptionalTensor as_row(const OptionalTensor& parameter) {
  return !parameter || parameter->dim() == 1 ? parameter : OptionalTensor(parameter->reshape({-1}));
}

}  // namespace batchnorm_ext
