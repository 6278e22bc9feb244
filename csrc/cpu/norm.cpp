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
#include "rowwise.h"

namespace batchnorm_ext::cpu {
namespace {

using at::Tensor;

// A forward: pointers, geometry, and what its steps hand on. One value per statistic: mean, invstd. Per cell: weight,
// bias, the coefficients.
template <typename T>
struct Forward {
  using A = Acc<T>;

  const Geometry geometry;
  const T* const x;
  T* const y;
  const double eps;
  const bool centred;
  double *const mean, *const invstd;
  const Channels weight, bias;
  CoefficientTable<A, 3> table{geometry.cells()};

  void set_statistics(int64_t first, int64_t width, const double* means, const double* vars) {
    std::copy_n(means, width, mean + first);
    for (int64_t i = 0; i < width; ++i) invstd[first + i] = 1 / std::sqrt(vars[i] + eps);
  }

  // With the running statistics.
  void evaluate(const Operands& o) {
    const int64_t channels = geometry.channels;
    set_statistics(0, channels, read_channels(o.running_mean, channels, 0).get(),
                   read_channels(o.running_var, channels, 0).get());
    set_normalize(table, 0, channels, mean, invstd, weight.get(), bias.get());
    map_tensor(geometry, Normalize<A>(), table.view(), y, x);
  }

  // With the statistics of x, whose variances this returns.
  Channels train() {
    const double count = static_cast<double>(geometry.count());
    Channels var(new double[geometry.stats()]);
    const PerCell cell_mean(geometry, mean), cell_invstd(geometry, invstd);
    reduce_and_map([&](int64_t first, int64_t width, const double* means, const double* m2) {
      for (int64_t i = 0; i < width; ++i) var[first + i] = m2[i] / count + (centred ? 0 : means[i] * means[i]);
      set_statistics(first, width, means, &var[first]);
      if (centred)
        mend_spread(geometry, x, first, width, eps, mean + first, &var[first], invstd + first);
      else
        std::fill_n(mean + first, width, 0.0);
      const int64_t first_cell = first * geometry.per_stat, cells = width * geometry.per_stat;
      cell_mean.set(first_cell, cells);
      cell_invstd.set(first_cell, cells);
      set_normalize(table, first_cell, cells, cell_mean.get(), cell_invstd.get(), weight.get(), bias.get(), count);
    });
    return var;
  }

 private:
  // finish(first, width, mean, m2) takes the moments of statistics [first, first + width).
  template <typename Finish>
  void reduce_and_map(const Finish& finish) {
    const Geometry reduced = geometry.merged();
    const auto finish_cells = [&](int64_t first, int64_t width, double* means, double* m2) {
      combine_moments(reduced, width, means, m2);
      finish(first / reduced.per_stat, width / reduced.per_stat, means, m2);
    };
    if (reduced.per_stat < geometry.per_stat) {  // the reduction and the map have other blocks
      with_pattern<T>(reduced, [&](const auto& pattern) { reduce_moments(pattern, x, finish_cells, NoMap()); });
      return map_tensor(geometry, Normalize<A>(), table.view(), y, x);
    }
    with_pattern<T>(geometry, [&](const auto& pattern) {
      with_streaming<T>(geometry, [&](auto streaming) {
        const auto map = [&](int64_t block, int64_t chunk, Scratch& scratch) {
          pattern.template map<streaming.value>(block, chunk, Normalize<A>(), table.view(), scratch, y, x);
        };
        reduce_moments(pattern, x, finish_cells, map);
      });
    });
  }
};

Normalized forward(const Operands& o, const Spec& s) {
  check_forward(o, s);
  check_memory(o, s);
  const Tensor x = dense(o.x, s.groups);
  const Geometry geometry = geometry_of(x, s.groups);
  Tensor y = empty_output_like(x);
  Tensor stats = at::empty({2, geometry.stats()}, x.options().dtype(at::kDouble));
  double* const mean = stats.mutable_data_ptr<double>();
  if (s.training && x.numel() == 0) {
    stats.fill_(std::nan(""));  // no element, no statistics, nothing to track
    return {std::move(y), std::move(stats)};
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "batch_norm", [&] {
    if (is_rowwise(geometry))
      return RowwiseForward<scalar_t>(geometry, read_channels(o.weight, geometry.channels, 1).get(),
                                      read_channels(o.bias, geometry.channels, 0).get())
          .run(x.const_data_ptr<scalar_t>(), y.mutable_data_ptr<scalar_t>(), s.centred, s.eps, mean,
               mean + geometry.stats());
    Forward<scalar_t> run{geometry,
                          x.const_data_ptr<scalar_t>(),
                          y.mutable_data_ptr<scalar_t>(),
                          s.eps,
                          s.centred,
                          mean,
                          mean + geometry.stats(),
                          read_channels(o.weight, geometry.channels, 1, geometry.batch),
                          read_channels(o.bias, geometry.channels, 0, geometry.batch)};
    if (!s.training) return run.evaluate(o);
    const Channels var = run.train();
    track(o, s, geometry, static_cast<double>(geometry.count()), mean, var.get());
  });
  return {std::move(y), std::move(stats)};
}

// A backward in the same way. One value per cell: mean, invstd, weight, the sums that are the gradients of the
// parameters, the coefficients.
template <typename T>
struct Backward {
  using A = Acc<T>;

  const Geometry geometry;
  const T *const dy, *const x;
  T* const dx;  // null: not wanted
  const bool training, centred;
  const double *const mean, *const invstd;
  const Channels weight;
  const Channels dbias{new double[geometry.cells()]}, dweight{new double[geometry.cells()]};
  CoefficientTable<A, 5> table{geometry.cells()};

  // dx in evaluation.
  void scale() {
    for (int64_t c = 0; c < geometry.cells(); ++c) table.row(3)[c] = static_cast<A>(weight[c] * invstd[c]);
    map_tensor(geometry, Scale<A>(), table.view() + 3, dx, dy);
  }

  void reduce_and_map() {
    A* const centre = table.row(0);
    for (int64_t c = 0; c < geometry.cells(); ++c) centre[c] = static_cast<A>(mean[c]);
    const auto finish = [&](int64_t first, int64_t width, const double* sums, const double* dots) {
      std::copy_n(sums, width, &dbias[first]);
      std::copy_n(dots, width, &dweight[first]);
      set_coefficients(first, width, sums, dots);
    };
    with_pattern<T>(geometry, [&](const auto& pattern) {
      with_streaming<T>(geometry, [&](auto streaming) {
        const auto map = [&](int64_t block, int64_t chunk, Scratch& scratch) {
          const auto run = [&](const auto& op, const A* const* coefficients, const auto*... in) {
            pattern.template map<streaming.value>(block, chunk, op, coefficients, scratch, dx, in...);
          };
          if (dx == nullptr) return;
          if (!training) return run(Scale<A>(), table.view() + 3, dy);
          if (geometry.per_stat > 1) return run(GroupGrad<A>(), table.view(), dy, x);
          run(NormalizeGrad<A>(), table.view(), dy, x);
        };
        reduce_grads(pattern, dy, x, centre, mean, invstd, finish, map);
      });
    });
  }

 private:
  void set_coefficients(int64_t first, int64_t width, const double* sums, const double* dots) {
    const double count = static_cast<double>(geometry.count());
    const Channels none(centred ? nullptr : new double[width]());  // where the mean is no function of x
    if (!centred) sums = none.get();
    if (geometry.per_stat > 1)
      set_group_grad(table, geometry.per_stat, first, width, sums, dots, count, mean, invstd, weight.get());
    else
      set_normalize_grad(table, first, width, sums, dots, count, mean, invstd, weight.get());
  }
};

Gradients backward(const Tensor& grad, const Tensor& input, const OptionalTensor& weight, const Tensor& stats,
                   bool training, Mask mask, std::optional<at::ScalarType> bias_dtype, int64_t groups, bool centred) {
  check_backward(grad, input, weight, stats, groups);
  const Tensor x = dense(input, groups);
  const Geometry geometry = geometry_of(x, groups);
  const Tensor dy = like_layout(grad, x);
  const auto [want_dx, want_dweight, want_dbias] = mask;
  Tensor dx = want_dx ? empty_output_like(x) : Tensor(), dweight, dbias;
  std::tie(dweight, dbias) = empty_parameter_gradients(x, weight, bias_dtype, mask);
  if (x.numel() == 0) {
    if (want_dweight) dweight.zero_();
    if (want_dbias) dbias.zero_();
    return {std::move(dx), std::move(dweight), std::move(dbias)};
  }
  const double* const per_stat = stats.const_data_ptr<double>();
  if (is_rowwise(geometry)) {
    const Channels dweights(new double[geometry.channels]), dbiases(new double[geometry.channels]);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "batch_norm_backward", [&] {
      RowwiseBackward<scalar_t>(geometry, read_channels(weight, geometry.channels, 1).get())
          .run(dy.const_data_ptr<scalar_t>(), x.const_data_ptr<scalar_t>(),
               want_dx ? dx.mutable_data_ptr<scalar_t>() : nullptr, centred, per_stat, per_stat + geometry.stats(),
               dweights.get(), dbiases.get());
    });
    if (want_dweight) write_channels(dweight, geometry.channels, dweights.get());
    if (want_dbias) write_channels(dbias, geometry.channels, dbiases.get());
    return {std::move(dx), std::move(dweight), std::move(dbias)};
  }
  const PerCell mean(geometry, per_stat), invstd(geometry, per_stat + geometry.stats());
  mean.set(0, geometry.cells());
  invstd.set(0, geometry.cells());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "batch_norm_backward", [&] {
    Backward<scalar_t> run{geometry,
                           dy.const_data_ptr<scalar_t>(),
                           x.const_data_ptr<scalar_t>(),
                           want_dx ? dx.mutable_data_ptr<scalar_t>() : nullptr,
                           training,
                           centred,
                           mean.get(),
                           invstd.get(),
                           read_channels(weight, geometry.channels, 1, geometry.batch)};
    if (!want_dweight && !want_dbias && !(want_dx && training)) {
      if (want_dx) run.scale();
      return;
    }
    run.reduce_and_map();
    const auto leave = [&](const Tensor& gradient, double* sums) {
      sum_over_batch(geometry, sums);
      write_channels(gradient, geometry.channels, sums);
    };
    if (want_dweight) leave(dweight, run.dweight.get());
    if (want_dbias) leave(dbias, run.dbias.get());
  });
  return {std::move(dx), std::move(dweight), std::move(dbias)};
}

TORCH_LIBRARY_IMPL(batchnorm_ext, CPU, m) {
  register_forward<forward>(m);
  m.impl("batch_norm_backward", backward);
}

}  // namespace
}  // namespace batchnorm_ext::cpu
