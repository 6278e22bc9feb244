// Weight normalization, w = g * v / ||v||: root mean square normalization of slices of v, with the weight g / sqrt(n)
// for the n elements of each.
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/norm_except_dim.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "node.h"
#include "ops.h"

namespace batchnorm_ext {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr Domain kSlices{.groups = 0, .centred = false};

at::ScalarType wide(const Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// The slices as the channels of (N, C, L). dim == -1: all of the tensor is one.
Tensor slices_of(const Tensor& v, int64_t dim) {
  if (dim < 0) return v.view({1, 1, -1});
  const auto sizes = v.sym_sizes();
  return v.view_symint({c10::multiply_integers(sizes.slice(0, dim)), sizes[dim], -1});
}

// 1 / sqrt(n)
double share_of(const Tensor& slices) {
  const c10::SymInt n = slices.sym_size(0) * slices.sym_size(2);
  return 1 / std::sqrt(static_cast<double>(n.guard_int(__FILE__, __LINE__)));
}

// With n = norm(v), w = g * v / n:  dg = sum(dw * v) / n,  dv = g / n * (dw - v * sum(dw * v) / n^2)
variable_list differentiable_gradients(const Tensor& dw, const Tensor& v, const Tensor& g, int64_t dim) {
  std::vector<int64_t> others;
  for (int64_t i = 0; i < v.dim(); ++i)
    if (i != dim) others.push_back(i);
  const Tensor direction = v.to(wide(v)), grad = dw.to(wide(v)), norm = at::norm_except_dim(direction, 2, dim);
  const Tensor along = (grad * direction).sum(others, /*keepdim=*/true) / norm;
  const Tensor dv = g.to(wide(v)).view_as(norm) / norm * (grad - direction / norm * along);
  return {dv.to(v.scalar_type()), along.to(g.scalar_type()).view_as(g)};
}

struct WeightNorm {
  static constexpr bool is_traceable = true;
  static constexpr const char* name = "batchnorm_ext::WeightNorm";

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor& dw = grads[0];
    if (!dw.defined()) return variable_list(2);
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &v = saved[0], &g = saved[1], &scale = saved[2], &stats = saved[3];
    const int64_t dim = ctx->saved_data["dim"].toInt();
    if (is_differentiated(dw, v, g)) return differentiable_gradients(dw, v, g, dim);
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor x = slices_of(v, dim), dy = dw.reshape_symint(x.sym_sizes());
    const Mask mask{ctx->needs_input_grad(0), ctx->needs_input_grad(1), false};
    auto [dx, dscale, none, nothing] =
        call_backward({dy, x, scale, kNone, kNone, stats}, {true, mask, std::nullopt, kSlices});
    variable_list gradients(2);
    if (mask[0]) gradients[0] = dx.view_symint(v.sym_sizes());
    if (mask[1]) gradients[1] = dscale.mul_(share_of(x)).to(g.scalar_type()).view_symint(g.sym_sizes());
    return gradients;
  }
};

Tensor weight_norm(const Tensor& some_v, const Tensor& g, int64_t dim) {
  const Tensor v = some_v.contiguous();
  const auto forward = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor x = slices_of(v, dim);
    const OptionalTensor scale = g.reshape(-1).to(wide(v)).mul(share_of(x));
    auto [w, stats] = call_forward({x, scale, kNone, kNone, kNone, kNone, kNone, kNone},
                                   {.training = true, .eps = 0, .domain = kSlices});
    return std::tuple(w.view_symint(v.sym_sizes()), *scale, std::move(stats));
  };
  if (!is_differentiated(v, g)) return std::get<0>(forward());
  const auto run = [&](auto& node) {
    auto [w, scale, stats] = forward();
    node.ctx_.save_for_backward({v, g, std::move(scale), std::move(stats)});
    node.ctx_.saved_data["dim"] = dim;
    return std::move(w);
  };
  return recorded<WeightNorm>(run, v, g);
}

}  // namespace

TORCH_LIBRARY_IMPL(batchnorm_ext, CompositeImplicitAutograd, m) { m.impl("weight_norm", weight_norm); }

}  // namespace batchnorm_ext
