// The operators where there is no data: checks and shapes, for meta and fake tensors, whose sizes may be symbols.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>
#include <utility>

#include "checks.h"
#include "sums.h"

namespace batchnorm_ext {
namespace {

using at::Tensor;

Tensor empty_doubles(const Tensor& x, c10::SymIntArrayRef size) {
  return x.new_empty_symint(size, x.options().dtype(at::kDouble));
}

// For fake tensors PyTorch reads NotImplementedError as a missing kernel, so the checks raise RuntimeError here.
template <typename Check>
void require(const Check& check) {
  try {
    check();
  } catch (const c10::NotImplementedError& refusal) {
    TORCH_CHECK(false, refusal.what_without_backtrace());
  }
}

Normalized normalized(const Tensor& x, const Domain& domain = {}) {
  return {at::empty_like(x), empty_doubles(x, {2, domain.stats(x)})};
}

Normalized forward(const Operands& o, const Spec& s) {
  require([&] { check_forward(o, s); });
  return normalized(o.x, s.domain);
}

Tensor map(const Operands& o, const Tensor& stats, const Spec& s) {
  require([&] { check_map(o, stats, s); });
  return at::empty_like(o.x);
}

Normalized apply(const Operands& o, const Spec& s) {
  require([&] { check_operands(o, s); });
  check_sums(o.x, *o.sums, sums_size(o.x.sym_size(1)), "sums");
  return normalized(o.x);
}

ActivatedGradients backward(const GradOperands& o, const GradSpec& s) {
  require([&] { check_backward(o, s); });
  auto [dweight, dbias] = empty_parameter_gradients(o.x, o.weight, s.bias_dtype, s.mask, s.domain.parameter_dim);
  const auto like_x = [&](bool wanted) { return wanted ? at::empty_like(o.x) : Tensor(); };
  return {like_x(s.mask[0] || o.residual), std::move(dweight), std::move(dbias), like_x(o.residual.has_value())};
}

Tensor moments(const Tensor& x) {
  require([&] { check_input(x); });
  return empty_doubles(x, {sums_size(x.sym_size(1))});
}

Tensor grad_moments(const GradOperands& o, const GradSpec& s, const OptionalTensor& count) {
  require([&] { check_backward(o, s); });
  if (count) check_sums(o.x, *count, 1, "count");
  return empty_doubles(o.x, {o.x.sym_size(1) * 2});
}

InputGradients grad_apply(const GradOperands& o, const GradSpec& s, const Tensor& grad_sums, const Tensor& count) {
  require([&] { check_backward(o, s); });
  check_sums(o.x, grad_sums, o.x.sym_size(1) * 2, "grad_sums");
  check_sums(o.x, count, 1, "count");
  return {at::empty_like(o.x), o.residual ? at::empty_like(o.x) : Tensor()};
}

TORCH_LIBRARY_IMPL(batchnorm_ext, Meta, m) {
  register_forward<forward>(m);
  register_map<map>(m);
  register_apply<apply>(m);
  register_backward<backward>(m);
  m.impl("moments", moments);
  register_grad_halves<grad_moments, grad_apply>(m);
}

}  // namespace
}  // namespace batchnorm_ext
