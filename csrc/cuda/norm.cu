// Tensors in, pointers out: the CUDA side of the ops.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <utility>

#include "../checks.h"
#include "../sums.h"
#include "across.h"
#include "launch.h"
#include "operands.h"
#include "samples.h"

namespace batchnorm_ext::cuda {
namespace {

using c10::cuda::CUDAGuard;

// The kernels sum deviations from a mean only.
void check_centred(const Domain& domain) {
  refusing(
      [&] { TORCH_CHECK_NOT_IMPLEMENTED(domain.centred, "batch_norm: expected centred=True on CUDA, got False"); });
}

// They have nothing after the affine map.
void check_plain(const OptionalTensor& residual, std::string_view activation) {
  refusing([&] {
    TORCH_CHECK_NOT_IMPLEMENTED(!residual && activation.empty(),
                                "batch_norm: expected neither residual nor activation on CUDA");
  });
}

// What the forwards share: [y, stats] from the batch itself, from running statistics or from sums.
Normalized normalize(const Operands& o, const Spec& s, Source source) {
  const Tensor x = dense(o.x);
  const Geometry geometry = checked_geometry(x);
  Tensor y = at::empty_like(x);
  Tensor stats = at::empty({2, geometry.stats()}, x.options().dtype(at::kDouble));
  if (geometry.channels == 0) return {std::move(y), std::move(stats)};
  with_dtype(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Forward<T> op = forward_of<T>(x, geometry);
    op.y = x.numel() > 0 ? write<T>(y) : nullptr;
    op.source = source;
    op.eps = s.eps;
    op.momentum = s.momentum.value_or(0);
    op.cumulative = s.update && !s.momentum;
    op.weight = read_channels<T>(o.weight);
    op.bias = read_channels<T>(o.bias);
    if (source == Source::kRunning) {
      op.running_mean = read_channels<T>(o.running_mean);
      op.running_var = read_channels<T>(o.running_var);
    } else if (s.update) {
      op.running_mean = write_channels<T>(o.running_mean);
      op.running_var = write_channels<T>(o.running_var);
      if (o.num_batches_tracked) op.num_batches_tracked = write<int64_t>(*o.num_batches_tracked);
    }
    if (o.sums) op.sums = read<double>(*o.sums);
    op.stats = write<double>(stats);
    launch(op, request<Forward<T>>(geometry, aligned(x, y), source == Source::kBatch, true));
  });
  return {std::move(y), std::move(stats)};
}

Normalized forward(const Operands& o, const Spec& s) {
  check_centred(s.domain);
  check_plain(o.residual, s.activation);
  check_forward(o, s);
  check_memory(o, s);
  const CUDAGuard guard(o.x.device());
  if (s.training && o.x.numel() == 0) {  // no element, no statistics, nothing to track
    const auto options = o.x.options().dtype(at::kDouble);
    return {at::empty_like(o.x), at::empty_symint({2, s.domain.stats(o.x)}, options).fill_(std::nan(""))};
  }
  if (s.domain.parameter_dim == 2) return normalize_across(o, s);
  if (s.domain.groups > 0) return normalize_samples(o, s);
  return normalize(o, s, s.training ? Source::kBatch : Source::kRunning);
}

Normalized apply(const Operands& o, const Spec& s) {
  check_plain(o.residual, s.activation);
  check_operands(o, s);
  check_memory(o, s);
  check_sums(o.x, *o.sums, sums_size(o.x.size(1)), "sums");
  const CUDAGuard guard(o.x.device());
  return normalize(o, s, Source::kSums);
}

Tensor moments(const Tensor& input) {
  check_input(input);
  const CUDAGuard guard(input.device());
  const Tensor x = dense(input);
  const int64_t size = sums_size(x.size(1));
  if (x.numel() == 0) return at::zeros({size}, x.options().dtype(at::kDouble));
  const Geometry geometry = checked_geometry(x);
  Tensor sums = empty_sums(x, size);
  with_dtype(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Forward<T> op = forward_of<T>(x, geometry);
    op.sums_out = write<double>(sums);
    launch(op, request<Forward<T>>(geometry, aligned(x), true, false));
  });
  return sums;
}

// dx = weight * invstd * dy: the map of a forward without mean and bias.
void scale(const Gradient& gradient, const OptionalTensor& weight, const Tensor& stats, const Tensor& dx) {
  with_dtype(gradient.x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Forward<T> op = forward_of<T>(gradient.dy, gradient.geometry);
    op.y = write<T>(dx);
    op.source = Source::kStats;
    op.centred = false;
    op.weight = read_channels<T>(weight);
    op.stats = const_cast<double*>(read<double>(stats));
    launch(op, request<Forward<T>>(gradient.geometry, aligned(gradient.dy, dx), false, true));
  });
}

Gradients backward(const GradOperands& o, const GradSpec& s) {
  const auto& [grad, input, weight, bias, residual, stats] = o;
  const auto& [training, mask, bias_dtype, domain, activation] = s;
  check_centred(domain);
  check_backward(o, s);
  const CUDAGuard guard(input.device());
  if (domain.parameter_dim == 2 && input.numel() > 0)
    return backward_across(grad, input, weight, stats, mask, bias_dtype);
  const Gradient gradient(grad, input, domain);
  const auto [want_dx, want_dweight, want_dbias] = mask;
  Tensor dx = want_dx ? at::empty_like(gradient.x) : Tensor(), dweight, dbias;
  std::tie(dweight, dbias) = empty_parameter_gradients(gradient.x, weight, bias_dtype, mask, domain.parameter_dim);
  if (gradient.x.numel() == 0) {
    if (want_dweight) dweight.zero_();
    if (want_dbias) dbias.zero_();
  } else if (domain.groups > 0) {
    backward_of_samples(gradient, weight, stats, training, dx, dweight, dbias);
  } else if (want_dweight || want_dbias || (want_dx && training)) {
    with_dtype(gradient.x.scalar_type(), [&](auto type) {
      using T = decltype(type);
      Backward<T> op = gradient.op<T>(weight, stats);
      op.training = training;
      if (want_dx) op.dx = write<T>(dx);
      if (want_dweight) op.dweight = write_channels<T>(dweight);
      if (want_dbias) op.dbias = write_channels<T>(dbias);
      launch(op, request<Backward<T>>(gradient.geometry, gradient.aligned_with(dx), true, want_dx));
    });
  } else if (want_dx) {
    scale(gradient, weight, stats, dx);
  }
  return {std::move(dx), std::move(dweight), std::move(dbias)};
}

ActivatedGradients activated_backward(const GradOperands& o, const GradSpec& s) {
  check_plain(o.residual, s.activation);
  auto [dx, dweight, dbias] = backward(o, s);
  return {std::move(dx), std::move(dweight), std::move(dbias), Tensor()};
}

Tensor grad_moments(const GradOperands& o, const GradSpec& s, const OptionalTensor& count) {
  const auto& [grad, input, weight, bias, residual, stats] = o;
  check_plain(residual, s.activation);
  check_backward(o, s);
  const CUDAGuard guard(input.device());
  const int64_t size = 2 * input.size(1);
  if (input.numel() == 0) return at::zeros({size}, input.options().dtype(at::kDouble));
  const Gradient gradient(grad, input);
  Tensor sums = empty_sums(input, size);
  with_dtype(input.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Backward<T> op = gradient.op<T>(std::nullopt, stats);
    op.sums_out = write<double>(sums);
    launch(op, request<Backward<T>>(gradient.geometry, gradient.aligned_with({}), true, false));
  });
  return sums;
}

InputGradients grad_apply(const GradOperands& o, const GradSpec& s, const Tensor& grad_sums, const Tensor& count) {
  const auto& [grad, input, weight, bias, residual, stats] = o;
  check_plain(residual, s.activation);
  check_backward(o, s);
  check_sums(input, grad_sums, 2 * input.size(1), "grad_sums");
  check_sums(input, count, 1, "count");
  const CUDAGuard guard(input.device());
  const Gradient gradient(grad, input);
  Tensor dx = at::empty_like(gradient.x);
  if (dx.numel() == 0) return {std::move(dx), Tensor()};
  with_dtype(input.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Backward<T> op = gradient.op<T>(weight, stats);
    op.dx = write<T>(dx);
    op.sums = read<double>(grad_sums);
    op.total_count = read<double>(count);
    launch(op, request<Backward<T>>(gradient.geometry, gradient.aligned_with(dx), false, true));
  });
  return {std::move(dx), Tensor()};
}

TORCH_LIBRARY_IMPL(batchnorm_ext, CUDA, m) {
  register_forward<forward>(m);
  register_apply<apply>(m);
  register_backward<backward>(m);
  register_activated_backward<activated_backward>(m);
  m.impl("moments", moments);
  register_grad_halves<grad_moments, grad_apply>(m);
}

}  // namespace
}  // namespace batchnorm_ext::cuda
