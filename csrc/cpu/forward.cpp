// Forwards, tensors in and pointers out: the CPU side of training on one device, of evaluation, and of the halves of
// training, whose sums SyncBatchNorm adds up over ranks. Built once per instruction set.
#include "forward.h"

#include <ATen/EmptyTensor.h>
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
#include "elementwise.h"
#include "passes.h"
#include "per_channel.h"

namespace batchnorm_ext::cpu {
namespace {

using at::Tensor;

Normalized forward(const Operands& o, const Spec& s) {
  check_forward(o, s);
  check_memory(o, s);
  const Tensor x = dense(o.x, s.domain);
  const OptionalTensor residual = like_layout(o.residual, x);
  const Geometry geometry = arranged(x, s.domain);
  const Activation activation = activation_named(s.activation).make();
  Tensor y = empty_output_like(x);
  Tensor stats = at::detail::empty_cpu({2, geometry.stats()}, at::kDouble);
  double* const mean = stats.mutable_data_ptr<double>();
  double* const invstd = mean + geometry.stats();
  if (s.training && x.numel() == 0) {
    stats.fill_(std::nan(""));  // no element, no statistics, nothing to track
    return {std::move(y), std::move(stats)};
  }
  const int64_t parameters = x.size(s.domain.parameter_dim);
  const auto parameters_of = [&](int64_t batch) {
    return std::pair(read_channels(o.weight, parameters, 1, batch), read_channels(o.bias, parameters, 0, batch));
  };
  with_dtype(x.scalar_type(), [&](auto like) {
    using scalar_t = decltype(like);
    const scalar_t* const in = x.const_data_ptr<scalar_t>();
    scalar_t* const out = y.mutable_data_ptr<scalar_t>();
    if (has_parameters_within(geometry, s.domain)) {
      const auto [weight, bias] = parameters_of(1);
      ElementwiseForward<scalar_t>(geometry, parameters, weight.get(), bias.get())
          .run(in, out, s.domain.centred, s.eps, mean, invstd);
      return;
    }
    auto [weight, bias] = parameters_of(geometry.batch);
    Forward<scalar_t> run{.geometry = geometry,
                          .x = in,
                          .residual = read<scalar_t>(residual),
                          .y = out,
                          .eps = s.eps,
                          .centred = s.domain.centred,
                          .activation = activation,
                          .mean = mean,
                          .invstd = invstd,
                          .weight = std::move(weight),
                          .bias = std::move(bias)};
    if (!s.training) return run.evaluate(o);
    const Channels var = run.train();
    track(o, s, geometry, static_cast<double>(geometry.count()), mean, var.get());
  });
  return {std::move(y), std::move(stats)};
}

Tensor map(const Operands& o, const Tensor& given, const Spec& s) {
  check_map(o, given, s);
  const Tensor x = dense(o.x, s.domain);
  const OptionalTensor residual = like_layout(o.residual, x);
  const Geometry geometry = arranged(x, s.domain);
  Tensor y = empty_output_like(x), stats = given.clone();
  double* const mean = stats.mutable_data_ptr<double>();
  with_dtype(x.scalar_type(), [&](auto like) {
    using scalar_t = decltype(like);
    Forward<scalar_t> run{.geometry = geometry,
                          .x = x.const_data_ptr<scalar_t>(),
                          .residual = read<scalar_t>(residual),
                          .y = y.mutable_data_ptr<scalar_t>(),
                          .eps = 0,
                          .centred = true,
                          .activation = activation_named(s.activation).make(),
                          .mean = mean,
                          .invstd = mean + geometry.stats(),
                          .weight = read_channels(o.weight, geometry.channels, 1, geometry.batch),
                          .bias = read_channels(o.bias, geometry.channels, 0, geometry.batch)};
    run.map_all_cells(s.training ? static_cast<double>(geometry.count()) : std::numeric_limits<double>::infinity());
  });
  return y;
}

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

Normalized apply(const Operands& o, const Spec& s) {
  check_operands(o, s);
  check_memory(o, s);
  const int64_t channels = o.x.size(1);
  check_sums(o.x, *o.sums, sums_size(channels), "sums");
  const Tensor x = dense(o.x);
  const OptionalTensor residual = like_layout(o.residual, x);
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
    Forward<scalar_t> run{.geometry = geometry_of(x),
                          .x = x.const_data_ptr<scalar_t>(),
                          .residual = read<scalar_t>(residual),
                          .y = y.mutable_data_ptr<scalar_t>(),
                          .eps = s.eps,
                          .centred = s.domain.centred,
                          .activation = activation_named(s.activation).make(),
                          .mean = mean,
                          .invstd = invstd,
                          .weight = read_channels(o.weight, channels, 1),
                          .bias = read_channels(o.bias, channels, 0)};
    run.map_all_cells(count);
  });
  if (count > 0) track(o, s, geometry_of(x), count, mean, var.get());
  return {std::move(y), std::move(stats)};
}

TORCH_LIBRARY_IMPL(batchnorm_ext, CPU, m) {
  register_forward<forward>(m);
  register_map<map>(m);
  m.impl("moments", moments);
  register_apply<apply>(m);
}

}  // namespace
}  // namespace batchnorm_ext::cpu
