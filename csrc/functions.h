// What the autograd functions of this library share.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <optional>
#include <tuple>

namespace batchnorm_ext {

using OptionalTensor = std::optional<at::Tensor>;

inline OptionalTensor optional(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

inline bool requires_grad(const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }
inline bool requires_grad(const OptionalTensor& tensor) { return tensor && requires_grad(*tensor); }

// A Function cannot return an undefined tensor, so only the wanted of a backward's outputs pass through one.
inline torch::autograd::variable_list defined(const std::tuple<at::Tensor, at::Tensor, at::Tensor>& all) {
  torch::autograd::variable_list wanted;
  const auto& [dx, dweight, dbias] = all;
  for (const at::Tensor& grad : {dx, dweight, dbias})
    if (grad.defined()) wanted.push_back(grad);
  return wanted;
}

// Puts them in place again.
template <typename Mask>
torch::autograd::variable_list spread(const torch::autograd::variable_list& wanted, const Mask& output_mask) {
  torch::autograd::variable_list all(3);
  for (size_t i = 0, next = 0; i < 3; ++i)
    if (output_mask[i]) all[i] = wanted[next++];
  return all;
}

// Which of x, weight and bias want a gradient, where these are the first arguments of the Function. Only the tensors
// that were given count as inputs.
inline std::array<bool, 3> wanted_gradients(torch::autograd::AutogradContext* ctx, bool has_weight, bool has_bias) {
  return {ctx->needs_input_grad(0), has_weight && ctx->needs_input_grad(1),
          has_bias && ctx->needs_input_grad(1 + has_weight)};
}

}  // namespace batchnorm_ext
