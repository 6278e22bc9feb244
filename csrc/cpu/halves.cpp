// The halves of training on the CPU: what is reduced leaves as float64 sums, which SyncBatchNorm adds up over ranks,
// and what is mapped takes such sums. Forward and backward are those of the fused ops, one half at a time. Built once
// per instruction set.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <utility>

#include "../activation_table.h"
#include "../checks.h"
#include "../dtype.h"
#include "../layout.h"
#include "../sums.h"
#include "backward.h"
#include "forward.h"
#include "passes.h"
#include "per_channel.h"

namespace batchnorm_ext::cpu {
namespace {

using at::Tensor;

Tensor moments(const Tensor& input) {
  check_input(input);
  const Tensor x = dense(input);
  const int64_t channels = x.size(1);
  const auto options = x.options().dtype(at::kDouble);
  if (x.numel() == 0) return at::zeros({sums_size(channels)}, options);
  Tensor sums = at::empty({sums_size(channels)}, options);
  const Geometry geometry = geometry_of(x);
  const double count = static_cast<double>(geometry.count());
  double* const out = sums.mutable_data_ptr<double>();
  write_count(out, channels, count);
  const auto finish = [&](int64_t first, int64_t width, const double* mean, const double* m2) {
#pragma GCC ivdep
    for (int64_t i = 0; i < width; ++i) write_sums(out, channels, first + i, count, mean[i], m2[i]);
  };
  with_dtype(x.scalar_type(), [&](auto like) {
    using scalar_t = decltype(like);
    with_pattern<scalar_t>(
        geometry, [&](const auto& pattern) { reduce_moments(pattern, x.const_data_ptr<scalar_t>(), finish, kNoMap); });
  });
  return sums;
}

OptionalTensor in_layout(const OptionalTensor& tensor, const Tensor& x) {
  return tensor ? OptionalTensor(like_layout(*tensor, x)) : std::nullopt;
}

template <typename T>
const T* read(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

Normalized apply(const Operands& o, const Spec& s) {
  check_operands(o, s);
  check_memory(o, s);
  const int64_t channels = o.x.size(1);
  check_sums(o.x, *o.sums, sums_size(channels), "sums");
  const Tensor x = dense(o.x);
  const OptionalTensor residual = in_layout(o.residual, x);
  Tensor y = empty_output_like(x);
  Tensor stats = at::empty({2, channels}, x.options().dtype(at::kDouble));
  double* const mean = stats.mutable_data_ptr<double>();
  double* const invstd = mean + channels;
  const double* const in = o.sums->const_data_ptr<double>();
  const double count = read_count(in, channels);
  const Channels var(new double[channels]);
#pragma GCC ivdep
  for (int64_t c = 0; c < channels; ++c) {
    const Moments moments = read_sums(in, channels, c);
    mean[c] = moments.mean;
    var[c] = moments.m2_over(count);
    invstd[c] = 1 / std::sqrt(var[c] + s.eps);
  }
  with_dtype(x.scalar_type(), [&](auto like) {
    using scalar_t = decltype(like);
    Forward<scalar_t> run{geometry_of(x),
                          x.const_data_ptr<scalar_t>(),
                          read<scalar_t>(residual),
                          y.mutable_data_ptr<scalar_t>(),
                          s.eps,
                          s.domain.centred,
                          activation_named(s.activation).make(),
                          mean,
                          invstd,
                          read_channels(o.weight, channels, 1),
                          read_channels(o.bias, channels, 0)};
    run.map_all_cells(count);
  });
  if (count > 0) track(o, s, geometry_of(x), count, mean, var.get());
  return {std::move(y), std::move(stats)};
}

// The backward of statistics of `count` elements. dx and dresidual are undefined, sums null, where they are not wanted.
template <typename T>
Backward<T> backward_of(const GradOperands& o, const GradSpec& s, const Tensor& dy, const Tensor& x,
                        const OptionalTensor& residual, double count, const Tensor& dx, const Tensor& dresidual,
                        double* sums) {
  const int64_t channels = x.size(1);
  const bool activated = !s.activation.empty(), maps = dx.defined();
  const double* const mean = o.stats.const_data_ptr<double>();
  return {geometry_of(x),
          dy.const_data_ptr<T>(),
          x.const_data_ptr<T>(),
          read<T>(residual),
          maps ? dx.mutable_data_ptr<T>() : nullptr,
          dresidual.defined() ? dresidual.mutable_data_ptr<T>() : nullptr,
          s.training,
          s.domain.centred,
          count,
          activation_named(s.activation).make(),
          mean,
          mean + channels,
          maps || activated ? read_channels(o.weight, channels, 1) : Channels(),
          activated ? read_channels(o.bias, channels, 0) : Channels(),
          sums,
          sums + channels};
}

Tensor grad_moments(const GradOperands& o, const GradSpec& s, const OptionalTensor& total) {
  check_backward(o, s);
  if (total) check_sums(o.x, *total, 1, "count");
  const Tensor x = dense(o.x);
  const int64_t channels = x.size(1);
  const auto options = x.options().dtype(at::kDouble);
  if (x.numel() == 0) return at::zeros({2 * channels}, options);
  const Tensor dy = like_layout(o.dy, x);
  const OptionalTensor residual = in_layout(o.residual, x);
  Tensor sums = at::empty({2 * channels}, options);
  const double count = total ? *total->const_data_ptr<double>() : std::numeric_limits<double>::infinity();
  with_dtype(x.scalar_type(), [&](auto like) {
    using scalar_t = decltype(like);
    backward_of<scalar_t>(o, s, dy, x, residual, count, {}, {}, sums.mutable_data_ptr<double>()).reduce();
  });
  return sums;
}

InputGradients grad_apply(const GradOperands& o, const GradSpec& s, const Tensor& grad_sums, const Tensor& count) {
  check_backward(o, s);
  const int64_t channels = o.x.size(1);
  check_sums(o.x, grad_sums, 2 * channels, "grad_sums");
  check_sums(o.x, count, 1, "count");
  const Tensor x = dense(o.x);
  const Tensor dy = like_layout(o.dy, x);
  const OptionalTensor residual = in_layout(o.residual, x);
  Tensor dx = empty_output_like(x), dresidual = residual ? empty_output_like(x) : Tensor();
  const double* const sums = grad_sums.const_data_ptr<double>();
  const double total = *count.const_data_ptr<double>();
  with_dtype(x.scalar_type(), [&](auto like) {
    using scalar_t = decltype(like);
    backward_of<scalar_t>(o, s, dy, x, residual, total, dx, dresidual, nullptr).map_by(sums, sums + channels);
  });
  return {std::move(dx), std::move(dresidual)};
}

TORCH_LIBRARY_IMPL(batchnorm_ext, CPU, m) {
  m.impl("moments", moments);
  register_apply<apply>(m);
  register_grad_halves<grad_moments, grad_apply>(m);
}

}  // namespace
}  // namespace batchnorm_ext::cpu
