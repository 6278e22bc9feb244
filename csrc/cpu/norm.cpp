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
#include "combine.h"
#include "maps.h"
#include "passes.h"
#include "per_channel.h"

namespace batchnorm_ext::cpu {
namespace {

using at::Tensor;

Normalized forward(const Operands& o, const Spec& s) {
  check_forward(o, s);
  check_memory(o, s);
  const Tensor x = dense(o.x, s.groups);
  const Geometry geometry = geometry_of(x, s.groups);
  Tensor y = empty_output_like(x);
  Tensor stats = at::empty({2, geometry.stats()}, x.options().dtype(at::kDouble));
  double* const mean = stats.mutable_data_ptr<double>();
  double* const invstd = mean + geometry.stats();
  const auto w = read_channels(o.weight, geometry.channels, 1, geometry.batch);
  const auto b = read_channels(o.bias, geometry.channels, 0, geometry.batch);

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "batch_norm", [&] {
    using T = scalar_t;
    using A = Acc<T>;
    const T* const in = x.const_data_ptr<T>();
    T* const out = y.mutable_data_ptr<T>();
    CoefficientTable<A, 3> table(geometry.cells());
    const auto set_stats = [&](int64_t first, int64_t width, const double* means, const double* vars) {
      std::copy_n(means, width, mean + first);
      for (int64_t i = 0; i < width; ++i) invstd[first + i] = 1 / std::sqrt(vars[i] + s.eps);
    };
    if (!s.training) {
      const int64_t channels = geometry.channels;
      set_stats(0, channels, read_channels(o.running_mean, channels, 0).get(),
                read_channels(o.running_var, channels, 0).get());
      set_normalize(table, 0, channels, mean, invstd, w.get(), b.get());
      return map_tensor(geometry, Normalize<A>(), table.view(), out, in);
    }
    if (x.numel() == 0) {
      stats.fill_(std::nan(""));  // no element, no statistics, nothing to track
      return;
    }
    const double count = static_cast<double>(geometry.count());
    const Channels var(new double[geometry.stats()]);
    const PerCell cell_mean(geometry, mean), cell_invstd(geometry, invstd);
    const auto finish = [&](int64_t first_cell, int64_t cells, double* means, double* m2) {
      combine_moments(geometry, cells, means, m2);
      const int64_t first = first_cell / geometry.per_stat, width = cells / geometry.per_stat;
      for (int64_t i = 0; i < width; ++i) var[first + i] = m2[i] / count;
      set_stats(first, width, means, &var[first]);
      mend_spread(geometry, in, first, width, s.eps, mean + first, &var[first], invstd + first);
      cell_mean.set(first_cell, cells);
      cell_invstd.set(first_cell, cells);
      set_normalize(table, first_cell, cells, cell_mean.get(), cell_invstd.get(), w.get(), b.get(), count);
    };
    with_pattern<T>(geometry, [&](const auto& pattern) {
      with_streaming<T>(geometry, [&](auto streaming) {
        const auto map = [&](int64_t block, int64_t chunk, Scratch& scratch) {
          pattern.template map<streaming.value>(block, chunk, Normalize<A>(), table.view(), scratch, out, in);
        };
        reduce_moments(pattern, in, finish, map);
      });
    });
    track(o, s, geometry, count, mean, var.get());
  });
  return {std::move(y), std::move(stats)};
}

Gradients backward(const Tensor& grad, const Tensor& input, const OptionalTensor& weight, const Tensor& stats,
                   bool training, Mask mask, std::optional<at::ScalarType> bias_dtype, int64_t groups) {
  check_backward(grad, input, weight, stats, groups);
  const Tensor x = dense(input, groups);
  const Geometry geometry = geometry_of(x, groups);
  const Tensor dy = like_layout(grad, x);
  const auto [want_dx, want_dweight, want_dbias] = mask;
  Tensor dx = want_dx ? empty_output_like(x) : Tensor(), dweight, dbias;
  std::tie(dweight, dbias) = empty_parameter_gradients(x, weight, bias_dtype, mask);
  const int64_t cells = geometry.cells();
  const auto w = read_channels(weight, geometry.channels, 1, geometry.batch);
  const PerCell cell_mean(geometry, stats.const_data_ptr<double>());
  const PerCell cell_invstd(geometry, stats.const_data_ptr<double>() + geometry.stats());
  cell_mean.set(0, cells);
  cell_invstd.set(0, cells);
  const double *const mean = cell_mean.get(), *const invstd = cell_invstd.get();
  const bool want_sums = want_dweight || want_dbias || (want_dx && training);

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "batch_norm_backward", [&] {
    using T = scalar_t;
    using A = Acc<T>;
    const T* const dy_in = dy.const_data_ptr<T>();
    const T* const x_in = x.const_data_ptr<T>();
    T* const dx_out = want_dx ? dx.mutable_data_ptr<T>() : nullptr;
    CoefficientTable<A, 5> table(cells);
    A* const centre = table.row(0);
    for (int64_t c = 0; c < cells; ++c) centre[c] = static_cast<A>(mean[c]);
    const A* const* const scale = table.view() + 3;
    if (!want_sums) {
      for (int64_t c = 0; c < cells; ++c) table.row(3)[c] = static_cast<A>(w[c] * invstd[c]);
      if (want_dx) map_tensor(geometry, Scale<A>(), scale, dx_out, dy_in);
      return;
    }
    if (x.numel() == 0) {
      if (want_dweight) dweight.zero_();
      if (want_dbias) dbias.zero_();
      return;
    }
    const double count = static_cast<double>(geometry.count());
    const Channels dweight_sums(new double[cells]), dbias_sums(new double[cells]);
    const bool shared = geometry.per_stat > 1;
    const auto finish = [&](int64_t first, int64_t width, const double* dbias, const double* dweight) {
      if (shared)
        set_group_grad(table, geometry.per_stat, first, width, dbias, dweight, count, mean, invstd, w.get());
      else
        set_normalize_grad(table, first, width, dbias, dweight, count, mean, invstd, w.get());
      std::copy_n(dweight, width, &dweight_sums[first]);
      std::copy_n(dbias, width, &dbias_sums[first]);
    };
    with_pattern<T>(geometry, [&](const auto& pattern) {
      with_streaming<T>(geometry, [&](auto streaming) {
        const auto map = [&](int64_t block, int64_t chunk, Scratch& scratch) {
          const auto run = [&](const auto& op, const A* const* coefficients, const auto*... in) {
            pattern.template map<streaming.value>(block, chunk, op, coefficients, scratch, dx_out, in...);
          };
          if (!want_dx) return;
          if (!training) return run(Scale<A>(), scale, dy_in);
          if (shared) return run(GroupGrad<A>(), table.view(), dy_in, x_in);
          run(NormalizeGrad<A>(), table.view(), dy_in, x_in);
        };
        reduce_grads(pattern, dy_in, x_in, centre, mean, invstd, finish, map);
      });
    });
    const auto leave = [&](const Tensor& gradient, double* sums) {
      sum_over_batch(geometry, sums);
      write_channels(gradient, geometry.channels, sums);
    };
    if (want_dweight) leave(dweight, dweight_sums.get());
    if (want_dbias) leave(dbias, dbias_sums.get());
  });
  return {std::move(dx), std::move(dweight), std::move(dbias)};
}

TORCH_LIBRARY_IMPL(batchnorm_ext, CPU, m) {
  register_forward<forward>(m);
  m.impl("batch_norm_backward", backward);
}

}  // namespace
}  // namespace batchnorm_ext::cpu
