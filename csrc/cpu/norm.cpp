// The fused ops, tensors in and pointers out: the CPU side of training on one device, and of evaluation. Built once per
// instruction set.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <utility>

#include "../checks.h"
#include "../layout.h"
#include "maps.h"
#include "passes.h"
#include "per_channel.h"

namespace batchnorm_ext::cpu {
namespace {

using at::Tensor;

Normalized forward(const Operands& o, const Spec& s) {
  check_forward(o, s);
  check_memory(o, s);
  const Tensor x = dense(o.x);
  const int64_t channels = x.size(1);
  Tensor y = empty_output_like(x);
  Tensor stats = at::empty({2, channels}, x.options().dtype(at::kDouble));
  double* const mean_out = stats.mutable_data_ptr<double>();
  double* const invstd_out = mean_out + channels;
  const auto w = read_channels(o.weight, channels, 1), b = read_channels(o.bias, channels, 0);

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "batch_norm", [&] {
    using T = scalar_t;
    using A = Acc<T>;
    const T* const in = x.const_data_ptr<T>();
    T* const out = y.mutable_data_ptr<T>();
    const Geometry geometry = geometry_of(x);
    CoefficientTable<A, 3> table(channels);
    const auto set_stats = [&](int64_t first, int64_t width, const double* mean, const double* var) {
      std::copy_n(mean, width, mean_out + first);
      for (int64_t i = 0; i < width; ++i) invstd_out[first + i] = 1 / std::sqrt(var[i] + s.eps);
    };
    if (!s.training) {
      set_stats(0, channels, read_channels(o.running_mean, channels, 0).get(),
                read_channels(o.running_var, channels, 0).get());
      set_normalize(table, 0, channels, mean_out, invstd_out, w.get(), b.get());
      return map_tensor(geometry, Normalize<A>(), table.view(), out, in);
    }
    if (x.numel() == 0) {
      stats.fill_(std::nan(""));  // no element, no statistics, nothing to track
      return;
    }
    const double count = static_cast<double>(geometry.count());
    const Channels var(new double[channels]);
    const auto finish = [&](int64_t first, int64_t width, const double* mean, const double* m2) {
      for (int64_t i = 0; i < width; ++i) var[first + i] = m2[i] / count;
      set_stats(first, width, mean, &var[first]);
      mend_spread(geometry, in, first, width, s.eps, &var[first], invstd_out + first);
      set_normalize(table, first, width, mean_out, invstd_out, w.get(), b.get(), count);
    };
    with_pattern<T>(geometry, [&](const auto& pattern) {
      with_streaming<T>(geometry, [&](auto streaming) {
        const auto map = [&](int64_t block, int64_t chunk, Scratch& scratch) {
          pattern.template map<streaming.value>(block, chunk, Normalize<A>(), table.view(), scratch, out, in);
        };
        reduce_moments(pattern, Schedule(pattern, channels, x.numel()), in, finish, map);
      });
    });
    track(o, s, channels, count, mean_out, var.get());
  });
  return {std::move(y), std::move(stats)};
}

Gradients backward(const Tensor& grad, const Tensor& input, const OptionalTensor& weight, const Tensor& stats,
                   bool training, Mask mask, std::optional<at::ScalarType> bias_dtype) {
  check_backward(grad, input, weight, stats);
  const Tensor x = dense(input);
  const Tensor dy = like_layout(grad, x);
  const int64_t channels = x.size(1);
  const auto [want_dx, want_dweight, want_dbias] = mask;
  Tensor dx = want_dx ? empty_output_like(x) : Tensor(), dweight, dbias;
  std::tie(dweight, dbias) = empty_parameter_gradients(x, weight, bias_dtype, mask);
  const auto w = read_channels(weight, channels, 1);
  const double* const mean = stats.const_data_ptr<double>();
  const double* const invstd = mean + channels;
  const bool want_sums = want_dweight || want_dbias || (want_dx && training);

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "batch_norm_backward", [&] {
    using T = scalar_t;
    using A = Acc<T>;
    const T* const dy_in = dy.const_data_ptr<T>();
    const T* const x_in = x.const_data_ptr<T>();
    T* const dx_out = want_dx ? dx.mutable_data_ptr<T>() : nullptr;
    const Geometry geometry = geometry_of(x);
    CoefficientTable<A, 4> table(channels);
    A* const centre = table.row(0);
    for (int64_t c = 0; c < channels; ++c) centre[c] = static_cast<A>(mean[c]);
    const typename Scale<A>::Coefficients scale = {table.view()[3]};
    if (!want_sums) {
      for (int64_t c = 0; c < channels; ++c) table.row(3)[c] = static_cast<A>(w[c] * invstd[c]);
      if (want_dx) map_tensor(geometry, Scale<A>(), scale, dx_out, dy_in);
      return;
    }
    if (x.numel() == 0) {
      if (want_dweight) dweight.zero_();
      if (want_dbias) dbias.zero_();
      return;
    }
    const double count = static_cast<double>(geometry.count());
    const Channels dweight_sums(new double[channels]), dbias_sums(new double[channels]);
    const auto finish = [&](int64_t first, int64_t width, const double* dbias, const double* dweight) {
      set_normalize_grad(table, first, width, dbias, dweight, count, mean, invstd, w.get());
      std::copy_n(dweight, width, &dweight_sums[first]);
      std::copy_n(dbias, width, &dbias_sums[first]);
    };
    with_pattern<T>(geometry, [&](const auto& pattern) {
      with_streaming<T>(geometry, [&](auto streaming) {
        const auto map = [&](int64_t block, int64_t chunk, Scratch& scratch) {
          if (!want_dx) return;
          if (training)
            pattern.template map<streaming.value>(block, chunk, NormalizeGrad<A>(), table.view(), scratch, dx_out,
                                                  dy_in, x_in);
          else
            pattern.template map<streaming.value>(block, chunk, Scale<A>(), scale, scratch, dx_out, dy_in);
        };
        reduce_grads(pattern, Schedule(pattern, channels, x.numel()), dy_in, x_in, centre, mean, invstd, finish, map);
      });
    });
    if (want_dweight) write_channels(dweight, channels, dweight_sums.get());
    if (want_dbias) write_channels(dbias, channels, dbias_sums.get());
  });
  return {std::move(dx), std::move(dweight), std::move(dbias)};
}

TORCH_LIBRARY_IMPL(batchnorm_ext, CPU, m) {
  register_forward<forward>(m);
  m.impl("batch_norm_backward", backward);
}

}  // namespace
}  // namespace batchnorm_ext::cpu
