// Weight normalization of the first or the last dimension, by PyTorch's fused kernels. Their own derivative takes the
// norm for a constant when it is differentiated again (torch 2.13), so second derivatives go through the formula here.
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_weight_norm_interface.h>
#include <ATen/ops/_weight_norm_interface_backward.h>
#include <ATen/ops/norm_except_dim.h>
#include <torch/library.h>

#include <tuple>
#include <utility>
#include <vector>

#include "node.h"

namespace batchnorm_ext {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// With n = norm(v), w = g * v / n:  dg = sum(dw * v) / n,  dv = g / n * (dw - v * sum(dw * v) / n^2)
variable_list differentiable_gradients(const Tensor& dw, const Tensor& v, const Tensor& g, int64_t dim) {
  std::vector<int64_t> others;
  for (int64_t i = 0; i < v.dim(); ++i)
    if (i != dim) others.push_back(i);
  const auto wide = v.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor direction = v.to(wide), grad = dw.to(wide), norm = at::norm_except_dim(direction, 2, dim);
  const Tensor along = (grad * direction).sum(others, /*keepdim=*/true) / norm;
  const Tensor dv = g.to(wide) / norm * (grad - direction / norm * along);
  return {dv.to(v.scalar_type()), along.to(g.scalar_type())};
}

struct WeightNorm {
  static constexpr bool is_traceable = true;
  static constexpr const char* name = "batchnorm_ext::WeightNorm";

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor& dw = grads[0];
    if (!dw.defined()) return variable_list(2);
    const variable_list saved = ctx->get_saved_variables();
    const int64_t dim = ctx->saved_data["dim"].toInt();
    // a tracer has no stand-in for the kernel, and fuses the formula by itself
    if (at::GradMode::is_enabled() || dw.key_set().has(c10::DispatchKey::Python))
      return differentiable_gradients(dw, saved[0], saved[1], dim);
    auto [dv, dg] = at::_weight_norm_interface_backward(dw.contiguous(), saved[0], saved[1], saved[2], dim);
    return {std::move(dv), std::move(dg)};
  }
};

Tensor weight_norm(const Tensor& some_v, const Tensor& some_g, int64_t dim) {
  const Tensor v = some_v.contiguous(), g = some_g.contiguous();
  const auto forward = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return at::_weight_norm_interface(v, g, dim);
  };
  if (!is_differentiated(v, g)) return std::get<0>(forward());
  const auto run = [&](auto& node) {
    auto [w, norms] = forward();
    node.ctx_.save_for_backward({v, g, norms});
    node.ctx_.saved_data["dim"] = dim;
    return std::move(w);
  };
  return recorded<WeightNorm>(run, v, g);
}

}  // namespace

TORCH_LIBRARY_IMPL(batchnorm_ext, CompositeImplicitAutograd, m) { m.impl("weight_norm", weight_norm); }

}  // namespace batchnorm_ext
