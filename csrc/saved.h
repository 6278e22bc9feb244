// What a backward is given beside dy.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "ops.h"

namespace batchnorm_ext {

// The inputs of the backward other than dy. `count`: elements per channel over all ranks; undefined without
// synchronization.
struct Saved {
  at::Tensor x;
  OptionalTensor weight, bias, residual;  // the latter two only with an activation
  at::Tensor stats, count;
  bool training;
  std::optional<at::ScalarType> bias_dtype;
  Domain domain = {};
  std::string activation = {};
  std::vector<int64_t> normalized_shape = {};  // not empty: x is taken as rows of so many elements

  GradOperands operands(const at::Tensor& dy) const { return {dy, x, weight, bias, residual, stats}; }
  GradSpec spec(const Mask& mask) const { return {training, mask, bias_dtype, domain, activation}; }
};

// What a backward needs beside tensors, as one list of numbers: of several values autograd would look up each by its
// name.
struct Kept {
  bool training;
  std::optional<at::ScalarType> weight_dtype, bias_dtype;
  Domain domain;
  std::vector<int64_t> normalized_shape;

  Kept(const Operands& o, const Spec& s, at::IntArrayRef shape)
      : training(s.training),
        weight_dtype(dtype_of(o.weight)),
        bias_dtype(dtype_of(o.bias)),
        domain(s.domain),
        normalized_shape(shape.vec()) {}

  explicit Kept(const std::vector<int64_t>& list)
      : training(list[0] != 0),
        weight_dtype(from_number(list[1])),
        bias_dtype(from_number(list[2])),
        domain{list[3], list[4] != 0, list[5]},
        normalized_shape(list.begin() + 6, list.end()) {}

  std::vector<int64_t> list() const {
    std::vector<int64_t> list = {training,      to_number(weight_dtype), to_number(bias_dtype),
                                 domain.groups, domain.centred,          domain.parameter_dim};
    list.insert(list.end(), normalized_shape.begin(), normalized_shape.end());
    return list;
  }

 private:
  using Dtype = std::optional<at::ScalarType>;

  static Dtype dtype_of(const OptionalTensor& tensor) { return tensor ? Dtype(tensor->scalar_type()) : std::nullopt; }
  static int64_t to_number(const Dtype& dtype) { return dtype ? static_cast<int64_t>(*dtype) : -1; }
  static Dtype from_number(int64_t n) { return n < 0 ? std::nullopt : Dtype(static_cast<at::ScalarType>(n)); }
};

}  // namespace batchnorm_ext
