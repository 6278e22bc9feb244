// Backwards, tensors in and pointers out: as a whole, and in halves as the forwards of forward.cpp.
#include "backward.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <utility>

#include "../activation_table.h"
#include "../checks.h"
#include "../dtype.h"
#include "../layout.h"
#include "combine.h"
#include "elementwise.h"
#include "per_channel.h"

namespace batchnorm_ext::cpu {
namespace {

using at::Tensor;

ActivatedGradients backward(const GradOperands& o, const GradSpec& s) {
  check_backward(o, s);
  const Tensor x = dense(o.x, s.domain);
  const Geometry geometry = arranged(x, s.domain);
  const Tensor dy = like_layout(o.dy, x);
  const OptionalTensor residual = like_layout(o.residual, x);
  const auto [want_dx, want_dweight, want_dbias] = s.mask;
  const bool maps = want_dx || residual;
  Tensor dx = maps ? empty_output_like(x) : Tensor(), dresidual = residual ? empty_output_like(x) : Tensor();
  const int64_t parameters = x.size(s.domain.parameter_dim);
  auto [dweight, dbias] = make_parameter_gradients(x, o.weight, s.bias_dtype, s.mask, [&](at::ScalarType dtype) {
    return at::detail::empty_cpu({parameters}, dtype);
  });
  if (x.numel() == 0) {
    if (want_dweight) dweight.zero_();
    if (want_dbias) dbias.zero_();
    return {std::move(dx), std::move(dweight), std::move(dbias), std::move(dresidual)};
  }
  const auto leave = [&](const double* dweights, const double* dbiases) {
    if (want_dweight) write_channels(dweight, parameters, dweights);
    if (want_dbias) write_channels(dbias, parameters, dbiases);
  };
  const double *const mean = o.stats.const_data_ptr<double>(), *const invstd = mean + geometry.stats();
  with_dtype(x.scalar_type(), [&](auto like) {
    using scalar_t = decltype(like);
    const auto write = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr<scalar_t>() : nullptr; };
    const scalar_t *const dy_in = dy.const_data_ptr<scalar_t>(), *const x_in = x.const_data_ptr<scalar_t>();
    if (has_parameters_within(geometry, s.domain)) {
      const Channels dweights(new double[parameters]), dbiases(new double[parameters]);
      elementwise_backward(geometry, read_channels(o.weight, parameters, 1).get(), dy_in, x_in, write(dx),
                           s.domain.centred, mean, invstd, dweights.get(), dbiases.get());
      return leave(dweights.get(), dbiases.get());
    }
    const PerCell cell_mean(geometry, mean), cell_invstd(geometry, invstd);
    cell_mean.set(0, geometry.cells());
    cell_invstd.set(0, geometry.cells());
    const Channels dbiases(new double[geometry.cells()]), dweights(new double[geometry.cells()]);
    Backward<scalar_t> run{
        .geometry = geometry,
        .dy = dy_in,
        .x = x_in,
        .residual = read<scalar_t>(residual),
        .dx = write(dx),
        .dresidual = write(dresidual),
        .training = s.training,
        .centred = s.domain.centred,
        .count = static_cast<double>(geometry.count()),
        .activation = activation_named(s.activation).make(),
        .mean = cell_mean.get(),
        .invstd = cell_invstd.get(),
        .weight = read_channels(o.weight, parameters, 1, geometry.batch),
        .bias = s.activation.empty() ? Channels() : read_channels(o.bias, parameters, 0, geometry.batch),
        .dbias = dbiases.get(),
        .dweight = dweights.get()};
    if (!want_dweight && !want_dbias && !(want_dx && s.training)) {
      if (maps) run.map_without_sums();
      return;
    }
    run.reduce_and_map();
    for (const Channels* sums : {&dweights, &dbiases}) sum_over_batch(geometry, sums->get());
    leave(dweights.get(), dbiases.get());
  });
  return {std::move(dx), std::move(dweight), std::move(dbias), std::move(dresidual)};
}

// The backward of statistics of `count` elements. dx and dresidual are undefined, sums null, where they are not wanted.
template <typename T>
Backward<T> backward_of(const GradOperands& o, const GradSpec& s, const Tensor& dy, const Tensor& x,
                        const OptionalTensor& residual, double count, const Tensor& dx, const Tensor& dresidual,
                        double* sums) {
  const int64_t channels = x.size(1);
  const bool activated = !s.activation.empty(), maps = dx.defined();
  const double* const mean = o.stats.const_data_ptr<double>();
  return {.geometry = geometry_of(x),
          .dy = dy.const_data_ptr<T>(),
          .x = x.const_data_ptr<T>(),
          .residual = read<T>(residual),
          .dx = maps ? dx.mutable_data_ptr<T>() : nullptr,
          .dresidual = dresidual.defined() ? dresidual.mutable_data_ptr<T>() : nullptr,
          .training = s.training,
          .centred = s.domain.centred,
          .count = count,
          .activation = activation_named(s.activation).make(),
          .mean = mean,
          .invstd = mean + channels,
          .weight = maps || activated ? read_channels(o.weight, channels, 1) : Channels(),
          .bias = activated ? read_channels(o.bias, channels, 0) : Channels(),
          .dbias = sums,
          .dweight = sums == nullptr ? nullptr : sums + channels};
}

Tensor grad_moments(const GradOperands& o, const GradSpec& s, const OptionalTensor& total) {
  check_backward(o, s);
  if (total) check_sums(o.x, *total, 1, "count");
  const Tensor x = dense(o.x);
  const int64_t channels = x.size(1);
  const auto options = x.options().dtype(at::kDouble);
  if (x.numel() == 0) return at::zeros({2 * channels}, options);
  const Tensor dy = like_layout(o.dy, x);
  const OptionalTensor residual = like_layout(o.residual, x);
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
  const OptionalTensor residual = like_layout(o.residual, x);
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
  register_backward<backward>(m);
  register_grad_halves<grad_moments, grad_apply>(m);
}

}  // namespace
}  // namespace batchnorm_ext::cpu
