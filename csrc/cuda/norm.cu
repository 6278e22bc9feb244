// Tensors in, pointers out: the CUDA side of the ops.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>

#include "../checks.h"
#include "../layout.h"
#include "../recompute.h"
#include "backward.cuh"
#include "forward.cuh"
#include "launch.h"

namespace batchnorm_ext::cuda {
namespace {

using at::Tensor;
using c10::cuda::CUDAGuard;
using OptionalTensor = std::optional<Tensor>;

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
  return {data, tensor.dim() == 1 ? tensor.stride(0) : 1, tensor.scalar_type() == at::kFloat};
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

// Of an empty tensor one that has its channels, so that what is done once per channel is done.
Geometry checked_geometry(const Tensor& x) {
  const Geometry g = x.numel() > 0 ? geometry_of(x) : Geometry{1, x.size(1), 1};
  constexpr int64_t most = int64_t{1} << 30;
  TORCH_CHECK(g.stats <= most && g.inner <= most,
              "batch_norm: expected input to have at most 2^30 channels and as many ",
              "neighbouring elements in each on a CUDA device, got size ", x.sizes());
  return g;
}

template <typename Op>
Request request(const Geometry& geometry, bool aligned, bool reduces, bool maps) {
  return {geometry, sizeof(typename Op::T), Op::kInputs, Op::kCoefficients, aligned, reduces, maps};
}

template <typename T>
Forward<T> forward(const Tensor& x, const Geometry& geometry) {
  Forward<T> op{};
  op.x = read<T>(x);
  op.channels = geometry.stats;
  op.inner = geometry.inner;
  op.count = static_cast<double>(geometry.count());
  op.centred = true;
  return op;
}

Tensor empty_sums(const Tensor& x, int64_t size) { return at::empty({size}, x.options().dtype(at::kDouble)); }

// What the forwards over a batch share: [y, stats] from the batch itself, or from `sums`.
std::tuple<Tensor, Tensor> normalize(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                     const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                     const OptionalTensor& num_batches_tracked, Source source, const double* sums,
                                     std::optional<double> momentum, double eps) {
  const Tensor x = dense(input);
  const Geometry geometry = checked_geometry(x);
  Tensor y = at::empty_like(x);
  Tensor stats = at::empty({2, geometry.stats}, x.options().dtype(at::kDouble));
  if (geometry.stats == 0) return {std::move(y), std::move(stats)};
  with_dtype(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Forward<T> op = forward<T>(x, geometry);
    op.y = x.numel() > 0 ? write<T>(y) : nullptr;
    op.source = source;
    op.eps = eps;
    op.momentum = momentum.value_or(std::numeric_limits<double>::quiet_NaN());
    op.weight = read_channels<T>(weight);
    op.bias = read_channels<T>(bias);
    if (source == Source::kRunning) {
      op.running_mean = read_channels<T>(running_mean);
      op.running_var = read_channels<T>(running_var);
    } else if (!recomputes_forward()) {
      op.running_mean = write_channels<T>(running_mean);
      op.running_var = write_channels<T>(running_var);
      if (num_batches_tracked) op.num_batches_tracked = write<int64_t>(*num_batches_tracked);
    }
    op.sums = sums;
    op.stats = write<double>(stats);
    launch(op, request<Forward<T>>(geometry, aligned(x, y), source == Source::kBatch, true));
  });
  return {std::move(y), std::move(stats)};
}

std::tuple<Tensor, Tensor> batch_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                      const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                      const OptionalTensor& num_batches_tracked, bool training,
                                      std::optional<double> momentum, double eps) {
  check_forward(x, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps);
  const CUDAGuard guard(x.device());
  if (training && x.numel() == 0) {  // no element, no statistics, nothing to track
    const auto options = x.options().dtype(at::kDouble);
    return {at::empty_like(x), at::empty({2, x.size(1)}, options).fill_(std::nan(""))};
  }
  return normalize(x, weight, bias, running_mean, running_var, num_batches_tracked,
                   training ? Source::kBatch : Source::kRunning, nullptr, momentum, eps);
}

std::tuple<Tensor, Tensor> apply(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                 const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                 const OptionalTensor& num_batches_tracked, const Tensor& sums,
                                 std::optional<double> momentum, double eps) {
  check_parameters(x, weight, bias, running_mean, running_var, num_batches_tracked, /*training=*/true, momentum, eps);
  check_sums(x, sums, 2 * x.size(1) + 1, "sums");
  const CUDAGuard guard(x.device());
  return normalize(x, weight, bias, running_mean, running_var, num_batches_tracked, Source::kSums, read<double>(sums),
                   momentum, eps);
}

Tensor moments(const Tensor& input) {
  check_input(input);
  const CUDAGuard guard(input.device());
  const Tensor x = dense(input);
  const int64_t size = 2 * x.size(1) + 1;
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
  Gradient(const Tensor& grad, const Tensor& input)
      : x(dense(input)), dy(like_layout(grad, x)), geometry(checked_geometry(x)) {}

  const Tensor x, dy;
  const Geometry geometry;

  template <typename T>
  Backward<T> op(const OptionalTensor& weight, const Tensor& stats) const {
    Backward<T> op{};
    op.dy = read<T>(dy);
    op.x = read<T>(x);
    op.channels = geometry.stats;
    op.inner = geometry.inner;
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

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad, const Tensor& input,
                                                       const OptionalTensor& weight, const Tensor& stats, bool training,
                                                       std::array<bool, 3> output_mask) {
  check_backward(grad, input, weight, stats);
  const CUDAGuard guard(input.device());
  const Gradient gradient(grad, input);
  const Tensor& x = gradient.x;
  const auto [want_dx, want_dweight, want_dbias] = output_mask;
  const auto options =
      weight ? weight->options() : x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const int64_t channels = x.size(1);
  Tensor dx = want_dx ? at::empty_like(x) : Tensor();
  Tensor dweight = want_dweight ? at::empty(weight ? weight->sizes() : at::IntArrayRef(channels), options) : Tensor();
  Tensor dbias = want_dbias ? at::empty({channels}, options) : Tensor();
  if (x.numel() == 0) {
    if (want_dweight) dweight.zero_();
    if (want_dbias) dbias.zero_();
  } else if (want_dweight || want_dbias || (want_dx && training)) {
    with_dtype(x.scalar_type(), [&](auto type) {
      using T = decltype(type);
      Backward<T> op = gradient.op<T>(weight, stats);
      op.training = training;
      if (want_dx) op.dx = write<T>(dx);
      if (want_dweight) op.dweight = write_channels<T>(dweight);
      if (want_dbias) op.dbias = write_channels<T>(dbias);
      const bool packs = want_dx ? aligned(x, gradient.dy, dx) : aligned(x, gradient.dy);
      launch(op, request<Backward<T>>(gradient.geometry, packs, true, want_dx));
    });
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
  m.impl("batch_norm", batch_norm);
  m.impl("batch_norm_backward", batch_norm_backward);
  m.impl("moments", moments);
  m.impl("apply", apply);
  m.impl("grad_moments", grad_moments);
  m.impl("grad_apply", grad_apply);
}

}  // namespace
}  // namespace batchnorm_ext::cuda
