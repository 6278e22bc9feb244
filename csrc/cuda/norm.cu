// Tensors in, pointers out: the CUDA side of the ops.
#include <ATen/TensorOperators.h>
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
#include "../layout.h"
#include "../sums.h"
#include "backward.cuh"
#include "forward.cuh"
#include "launch.h"

namespace batchnorm_ext::cuda {
namespace {

using at::Tensor;
using c10::cuda::CUDAGuard;

// f(T()) with the kernels' type of that name.
template <typename F>
void with_dtype(at::ScalarType dtype, const F& f) {
  switch (dtype) {
    case at::kDouble:
      return f(double());
    case at::kHalf:
      return f(__half());
    case at::kBFloat16:
      return f(__nv_bfloat16());
    default:
      return f(float());
  }
}

template <typename T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* write(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename T>
Channels<T> channels(const Tensor& tensor, void* data) {
  return {data, tensor.stride(0), tensor.scalar_type() == at::kFloat};
}

template <typename T>
Channels<T> read_channels(const OptionalTensor& tensor) {
  return tensor ? channels<T>(*tensor, const_cast<void*>(tensor->const_data_ptr())) : Channels<T>();
}

template <typename T>
Channels<T> write_channels(const OptionalTensor& tensor) {
  return tensor ? channels<T>(*tensor, tensor->mutable_data_ptr()) : Channels<T>();
}

template <typename... Tensors>
bool aligned(const Tensors&... tensors) {
  return ((reinterpret_cast<uintptr_t>(tensors.const_data_ptr()) % 16 == 0) && ...);
}

// For an empty tensor: one element per channel, so that the work per channel still runs.
Geometry checked_geometry(const Tensor& x, const Domain& domain = {}) {
  const Geometry g = x.numel() > 0 ? geometry_of(x, domain) : Geometry{1, x.size(1), 1};
  constexpr int64_t most = int64_t{1} << 30;
  TORCH_CHECK(g.cells() <= most && g.inner <= most,
              "batch_norm: on CUDA, input may have at most 2^30 channels and at most 2^30 contiguous elements ",
              "per channel, got size ", x.sizes());
  return g;
}

// Only what the kernels have groups for: those of one channel.
void check_groups(const Tensor& x, const Domain& domain) {
  refusing([&] {
    TORCH_CHECK_NOT_IMPLEMENTED(
        domain.centred && domain.parameter_dim == 1 && (domain.groups == 0 || domain.groups == x.size(1)),
        "batch_norm: expected groups of one channel on CUDA, got ", domain.groups);
  });
}

// One value for each channel of each sample.
OptionalTensor per_cell(const OptionalTensor& parameter, const Geometry& g) {
  return parameter && g.batch > 1 ? OptionalTensor(parameter->repeat({g.batch})) : parameter;
}

// Moves the running statistics to the average of those of the samples.
void track_samples(const Operands& o, const Spec& s, const Geometry& g, const Tensor& stats) {
  const double n = static_cast<double>(g.count());
  const Tensor cells = stats.view({2, g.batch, g.channels});
  const auto move = [&](const Tensor& running, const Tensor& to) {
    running.copy_(running.to(at::kDouble).lerp(to, *s.momentum));
  };
  move(*o.running_mean, cells[0].mean(0));
  move(*o.running_var, (cells[1].pow(-2) - s.eps).mean(0) * (n / (n - 1)));
}

template <typename Op>
Request request(const Geometry& geometry, bool aligned, bool reduces, bool maps) {
  return {geometry, sizeof(typename Op::T), Op::kInputs, Op::kCoefficients, aligned, reduces, maps};
}

template <typename T>
Forward<T> forward(const Tensor& x, const Geometry& geometry) {
  Forward<T> op{};
  op.x = read<T>(x);
  op.geometry = geometry;
  op.count = static_cast<double>(geometry.count());
  op.centred = true;
  return op;
}

Tensor empty_sums(const Tensor& x, int64_t size) { return at::empty({size}, x.options().dtype(at::kDouble)); }

// What the forwards share: [y, stats] from the batch itself, from running statistics or from sums.
Normalized normalize(const Operands& o, const Spec& s, Source source) {
  const Tensor x = dense(o.x, s.domain);
  const Geometry geometry = checked_geometry(x, s.domain);
  Tensor y = at::empty_like(x);
  Tensor stats = at::empty({2, geometry.stats()}, x.options().dtype(at::kDouble));
  if (geometry.channels == 0) return {std::move(y), std::move(stats)};
  const bool samples = s.domain.groups > 0;
  const OptionalTensor weight = per_cell(o.weight, geometry), bias = per_cell(o.bias, geometry);
  with_dtype(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Forward<T> op = forward<T>(x, geometry);
    op.y = x.numel() > 0 ? write<T>(y) : nullptr;
    op.source = source;
    op.eps = s.eps;
    op.momentum = s.momentum.value_or(0);
    op.cumulative = s.update && !s.momentum;
    op.weight = read_channels<T>(weight);
    op.bias = read_channels<T>(bias);
    if (source == Source::kRunning) {
      op.running_mean = read_channels<T>(o.running_mean);
      op.running_var = read_channels<T>(o.running_var);
    } else if (s.update && !samples) {
      op.running_mean = write_channels<T>(o.running_mean);
      op.running_var = write_channels<T>(o.running_var);
      if (o.num_batches_tracked) op.num_batches_tracked = write<int64_t>(*o.num_batches_tracked);
    }
    if (o.sums) op.sums = read<double>(*o.sums);
    op.stats = write<double>(stats);
    launch(op, request<Forward<T>>(geometry, aligned(x, y), source == Source::kBatch, true));
  });
  if (s.update && samples) track_samples(o, s, geometry, stats);
  return {std::move(y), std::move(stats)};
}

Normalized forward(const Operands& o, const Spec& s) {
  check_groups(o.x, s.domain);
  check_forward(o, s);
  check_memory(o, s);
  const CUDAGuard guard(o.x.device());
  if (s.training && o.x.numel() == 0) {  // no element, no statistics, nothing to track
    const auto options = o.x.options().dtype(at::kDouble);
    return {at::empty_like(o.x), at::empty_symint({2, s.domain.stats(o.x)}, options).fill_(std::nan(""))};
  }
  return normalize(o, s, s.training ? Source::kBatch : Source::kRunning);
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
    Forward<T> op = forward<T>(x, geometry);
    op.sums_out = write<double>(sums);
    launch(op, request<Forward<T>>(geometry, aligned(x), true, false));
  });
  return sums;
}

// What all backwards share: the tensors as the kernels take them.
struct Gradient {
  Gradient(const Tensor& grad, const Tensor& input, const Domain& domain = {})
      : x(dense(input, domain)), dy(like_layout(grad, x)), geometry(checked_geometry(x, domain)) {}

  const Tensor x, dy;
  const Geometry geometry;

  template <typename T>
  Backward<T> op(const OptionalTensor& weight, const Tensor& stats) const {
    Backward<T> op{};
    op.dy = read<T>(dy);
    op.x = read<T>(x);
    op.geometry = geometry;
    op.training = true;
    op.count = static_cast<double>(geometry.count());
    op.stats = read<double>(stats);
    op.weight = read_channels<T>(weight);
    return op;
  }
};

// dx = weight * invstd * dy: the map of a forward without mean and bias.
void scale(const Gradient& gradient, const OptionalTensor& weight, const Tensor& stats, const Tensor& dx) {
  with_dtype(gradient.x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Forward<T> op = forward<T>(gradient.dy, gradient.geometry);
    op.y = write<T>(dx);
    op.source = Source::kStats;
    op.centred = false;
    op.weight = read_channels<T>(weight);
    op.stats = const_cast<double*>(read<double>(stats));
    launch(op, request<Forward<T>>(gradient.geometry, aligned(gradient.dy, dx), false, true));
  });
}

Gradients backward(const Tensor& grad, const Tensor& input, const OptionalTensor& weight, const Tensor& stats,
                   bool training, const Mask& mask, std::optional<at::ScalarType> bias_dtype, const Domain& domain) {
  check_groups(input, domain);
  check_backward(grad, input, weight, stats, domain);
  const CUDAGuard guard(input.device());
  const Gradient gradient(grad, input, domain);
  const Tensor& x = gradient.x;
  const auto [want_dx, want_dweight, want_dbias] = mask;
  Tensor dx = want_dx ? at::empty_like(x) : Tensor(), dweight, dbias;
  std::tie(dweight, dbias) = empty_parameter_gradients(x, weight, bias_dtype, mask);
  const Geometry& g = gradient.geometry;
  const OptionalTensor cell_weight = per_cell(weight, g);
  const auto of_cells = [&](const Tensor& all) {  // of several samples, each has a part of the gradient
    const auto dtype = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    return all.defined() && g.batch > 1 ? at::empty({g.cells()}, x.options().dtype(dtype)) : all;
  };
  const Tensor cell_dweight = of_cells(dweight), cell_dbias = of_cells(dbias);
  if (x.numel() == 0) {
    if (want_dweight) dweight.zero_();
    if (want_dbias) dbias.zero_();
  } else if (want_dweight || want_dbias || (want_dx && training)) {
    with_dtype(x.scalar_type(), [&](auto type) {
      using T = decltype(type);
      Backward<T> op = gradient.op<T>(cell_weight, stats);
      op.training = training;
      if (want_dx) op.dx = write<T>(dx);
      if (want_dweight) op.dweight = write_channels<T>(cell_dweight);
      if (want_dbias) op.dbias = write_channels<T>(cell_dbias);
      const bool packs = want_dx ? aligned(x, gradient.dy, dx) : aligned(x, gradient.dy);
      launch(op, request<Backward<T>>(gradient.geometry, packs, true, want_dx));
    });
    for (const auto& [all, cells] : {std::pair(dweight, cell_dweight), std::pair(dbias, cell_dbias)})
      if (all.defined() && !all.is_same(cells)) all.copy_(cells.view({g.batch, g.channels}).sum(0, false, at::kDouble));
  } else if (want_dx) {
    scale(gradient, weight, stats, dx);
  }
  return {std::move(dx), std::move(dweight), std::move(dbias)};
}

Tensor grad_moments(const Tensor& grad, const Tensor& input, const Tensor& stats) {
  check_backward(grad, input, std::nullopt, stats);
  const CUDAGuard guard(input.device());
  const int64_t size = 2 * input.size(1);
  if (input.numel() == 0) return at::zeros({size}, input.options().dtype(at::kDouble));
  const Gradient gradient(grad, input);
  Tensor sums = empty_sums(input, size);
  with_dtype(input.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Backward<T> op = gradient.op<T>(std::nullopt, stats);
    op.sums_out = write<double>(sums);
    launch(op, request<Backward<T>>(gradient.geometry, aligned(gradient.x, gradient.dy), true, false));
  });
  return sums;
}

Tensor grad_apply(const Tensor& grad, const Tensor& input, const OptionalTensor& weight, const Tensor& stats,
                  const Tensor& grad_sums, const Tensor& count) {
  check_backward(grad, input, weight, stats);
  check_sums(input, grad_sums, 2 * input.size(1), "grad_sums");
  check_sums(input, count, 1, "count");
  const CUDAGuard guard(input.device());
  const Gradient gradient(grad, input);
  Tensor dx = at::empty_like(gradient.x);
  if (dx.numel() == 0) return dx;
  with_dtype(input.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Backward<T> op = gradient.op<T>(weight, stats);
    op.dx = write<T>(dx);
    op.sums = read<double>(grad_sums);
    op.total_count = read<double>(count);
    launch(op, request<Backward<T>>(gradient.geometry, aligned(gradient.x, gradient.dy, dx), false, true));
  });
  return dx;
}

TORCH_LIBRARY_IMPL(batchnorm_ext, CUDA, m) {
  register_forward<forward>(m);
  register_apply<apply>(m);
  register_backward<backward>(m);
  m.impl("moments", moments);
  m.impl("grad_moments", grad_moments);
  m.impl("grad_apply", grad_apply);
}

}  // namespace
}  // namespace batchnorm_ext::cuda
