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

// What the forwards share: [y, stats] from the batch itself, from running statistics or from sums.
Normalized normalize(const Operands& o, const Spec& s, Source source) {
  const Tensor x = dense(o.x);
  const Geometry geometry = checked_geometry(x);
  const After after(o.residual, s.activation, x);
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
    launch(op, after, aligned(x, y), source == Source::kBatch);
  });
  return {std::move(y), std::move(stats)};
}

Normalized forward(const Operands& o, const Spec& s) {
  check_centred(s.domain);
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

Tensor map(const Operands& o, const Tensor& stats, const Spec& s) {
  check_map(o, stats, s);
  const CUDAGuard guard(o.x.device());
  const Tensor x = dense(o.x, s.domain);
  const Geometry geometry = checked_geometry(x, s.domain);
  const After after(o.residual, s.activation, x);
  Tensor y = at::empty_like(x);
  if (x.numel() == 0) return y;
  with_dtype(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Forward<T> op = forward_of<T>(x, geometry);
    op.y = write<T>(y);
    op.source = Source::kStats;
    if (!s.training) op.count = INFINITY;
    op.weight = read_channels<T>(o.weight);
    op.bias = read_channels<T>(o.bias);
    op.stats = const_cast<double*>(read<double>(stats));
    launch(op, after, aligned(x, y), false);
  });
  return y;
}

Normalized apply(const Operands& o, const Spec& s) {
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

ActivatedGradients backward(const GradOperands& o, const GradSpec& s) {
  check_centred(s.domain);
  check_backward(o, s);
  const CUDAGuard guard(o.x.device());
  const auto [want_dx, want_dweight, want_dbias] = s.mask;
  if (s.domain.parameter_dim == 2 && o.x.numel() > 0) {
    auto [dx, dweight, dbias] = backward_across(o.dy, o.x, o.weight, o.stats, s.mask, s.bias_dtype);
    return {std::move(dx), std::move(dweight), std::move(dbias), Tensor()};
  }
  const bool maps = want_dx || o.residual;
  const Gradient gradient(o, s, maps);
  const bool activated = !gradient.after.is_nothing();
  Tensor dx = maps ? at::empty_like(gradient.x) : Tensor(), dweight, dbias;
  std::tie(dweight, dbias) =
      empty_parameter_gradients(gradient.x, o.weight, s.bias_dtype, s.mask, s.domain.parameter_dim);
  const bool reduces = want_dweight || want_dbias || (want_dx && s.training);
  if (gradient.x.numel() == 0) {
    if (want_dweight) dweight.zero_();
    if (want_dbias) dbias.zero_();
  } else if (s.domain.groups > 0) {
    backward_of_samples(gradient, o.weight, o.stats, s.training, dx, dweight, dbias);
  } else if (reduces || (maps && activated)) {
    with_dtype(gradient.x.scalar_type(), [&](auto type) {
      using T = decltype(type);
      Backward<T> op = gradient.op<T>(o.weight, o.stats);
      op.training = s.training;
      if (maps) op.dx = write<T>(dx);
      if (want_dweight) op.dweight = write_channels<T>(dweight);
      if (want_dbias) op.dbias = write_channels<T>(dbias);
      gradient.launch(op, dx, reduces, maps);
    });
  } else if (maps) {
    scale(gradient, o.weight, o.stats, dx);
  }
  return {std::move(dx), std::move(dweight), std::move(dbias), gradient.dresidual};
}

Tensor grad_moments(const GradOperands& o, const GradSpec& s, const OptionalTensor& count) {
  check_backward(o, s);
  if (count) check_sums(o.x, *count, 1, "count");
  const CUDAGuard guard(o.x.device());
  const int64_t size = 2 * o.x.size(1);
  if (o.x.numel() == 0) return at::zeros({size}, o.x.options().dtype(at::kDouble));
  const Gradient gradient(o, s, /*maps=*/false);
  Tensor sums = empty_sums(o.x, size);
  with_dtype(o.x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Backward<T> op = gradient.op<T>(o.weight, o.stats);
    op.sums_out = write<double>(sums);
    if (count) op.total_count = read<double>(*count);
    gradient.launch(op, Tensor(), true, false);
  });
  return sums;
}

InputGradients grad_apply(const GradOperands& o, const GradSpec& s, const Tensor& grad_sums, const Tensor& count) {
  check_backward(o, s);
  check_sums(o.x, grad_sums, 2 * o.x.size(1), "grad_sums");
  check_sums(o.x, count, 1, "count");
  const CUDAGuard guard(o.x.device());
  const Gradient gradient(o, s, /*maps=*/true);
  Tensor dx = at::empty_like(gradient.x);
  if (dx.numel() == 0) return {std::move(dx), gradient.dresidual};
  with_dtype(o.x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Backward<T> op = gradient.op<T>(o.weight, o.stats);
    op.dx = write<T>(dx);
    op.sums = read<double>(grad_sums);
    op.total_count = read<double>(count);
    gradient.launch(op, dx, false, true);
  });
  return {std::move(dx), gradient.dresidual};
}

TORCH_LIBRARY_IMPL(batchnorm_ext, CUDA, m) {
  register_forward<forward>(m);
  register_map<map>(m);
  register_apply<apply>(m);
  register_backward<backward>(m);
  m.impl("moments", moments);
  register_grad_halves<grad_moments, grad_apply>(m);
}

}  // namespace
}  // namespace batchnorm_ext::cuda
