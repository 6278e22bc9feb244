// The fused ops, tensors in and pointers out: the CPU side of training on one device, and of evaluation. Built once per
// instruction set.
#include <ATen/Dispatch.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
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
#include "elementwise.h"
#include "maps.h"
#include "passes.h"
#include "per_channel.h"

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
    if (reduced.per_stat < geometry.per_stat) {  // a statistic is one run, along which the coefficients change
      const Row<T> pattern(reduced);
      return with_streaming<T>(geometry, [&](auto streaming) {
        const auto map = [&](int64_t block, int64_t chunk, Scratch&) {
          const auto [begin, end] = pattern.extent(block, chunk);
          map_range<streaming.value>(geometry, Normalize<A>(), table.view(), begin, end, y, x);
        };
        reduce_moments(pattern, x, finish_cells, map);
      });
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

// The geometry of x. Where parameters run along a statistic in memory, that is a row of channels.
Geometry arranged(const Tensor& x, const Domain& domain) {
  const Geometry g = geometry_of(x, domain);
  return domain.parameter_dim == 2 && g.outer == 1 ? Geometry{1, g.inner, 1, g.cells(), g.inner} : g;
}

// Whether the elements of a statistic have parameters of their own.
bool has_parameters_within(const Geometry& g, const Domain& domain) {
  return domain.parameter_dim == 2 || is_rowwise(g);
}

Normalized forward(const Operands& o, const Spec& s) {
  check_forward(o, s);
  check_memory(o, s);
  const Tensor x = dense(o.x, s.domain);
  const Geometry geometry = arranged(x, s.domain);
  Tensor y = empty_output_like(x);
  Tensor stats = at::detail::empty_cpu({2, geometry.stats()}, at::kDouble);
  double* const mean = stats.mutable_data_ptr<double>();
  double* const invstd = mean + geometry.stats();
  if (s.training && x.numel() == 0) {
    stats.fill_(std::nan(""));  // no element, no statistics, nothing to track
    return {std::move(y), std::move(stats)};
  }
  const int64_t parameters = x.size(s.domain.parameter_dim);
  const auto read = [&](int64_t batch) {
    return std::pair(read_channels(o.weight, parameters, 1, batch), read_channels(o.bias, parameters, 0, batch));
  };
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "batch_norm", [&] {
    const scalar_t* const in = x.const_data_ptr<scalar_t>();
    scalar_t* const out = y.mutable_data_ptr<scalar_t>();
    if (has_parameters_within(geometry, s.domain)) {
      const auto [weight, bias] = read(1);
      ElementwiseForward<scalar_t>(geometry, parameters, weight.get(), bias.get())
          .run(in, out, s.domain.centred, s.eps, mean, invstd);
      return;
    }
    auto [weight, bias] = read(geometry.batch);
    Forward<scalar_t> run{geometry, in, out, s.eps, s.domain.centred, mean, invstd, std::move(weight), std::move(bias)};
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
                   bool training, const Mask& mask, std::optional<at::ScalarType> bias_dtype, const Domain& domain) {
  check_backward(grad, input, weight, stats, domain);
  const Tensor x = dense(input, domain);
  const Geometry geometry = arranged(x, domain);
  const Tensor dy = like_layout(grad, x);
  const auto [want_dx, want_dweight, want_dbias] = mask;
  Tensor dx = want_dx ? empty_output_like(x) : Tensor(), dweight, dbias;
  const int64_t parameters = x.size(domain.parameter_dim);
  std::tie(dweight, dbias) = make_parameter_gradients(
      x, weight, bias_dtype, mask, [&](at::ScalarType dtype) { return at::detail::empty_cpu({parameters}, dtype); });
  if (x.numel() == 0) {
    if (want_dweight) dweight.zero_();
    if (want_dbias) dbias.zero_();
    return {std::move(dx), std::move(dweight), std::move(dbias)};
  }
  const auto leave = [&](const double* dweights, const double* dbiases) {
    if (want_dweight) write_channels(dweight, parameters, dweights);
    if (want_dbias) write_channels(dbias, parameters, dbiases);
  };
  const double* const mean = stats.const_data_ptr<double>();
  const double* const invstd = mean + geometry.stats();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "batch_norm_backward", [&] {
    const scalar_t *const dy_in = dy.const_data_ptr<scalar_t>(), *const x_in = x.const_data_ptr<scalar_t>();
    scalar_t* const dx_out = want_dx ? dx.mutable_data_ptr<scalar_t>() : nullptr;
    if (has_parameters_within(geometry, domain)) {
      const Channels dweights(new double[parameters]), dbiases(new double[parameters]);
      elementwise_backward(geometry, read_channels(weight, parameters, 1).get(), dy_in, x_in, dx_out, domain.centred,
                           mean, invstd, dweights.get(), dbiases.get());
      return leave(dweights.get(), dbiases.get());
    }
    const PerCell cell_mean(geometry, mean), cell_invstd(geometry, invstd);
    cell_mean.set(0, geometry.cells());
    cell_invstd.set(0, geometry.cells());
    Backward<scalar_t> run{geometry,
                           dy_in,
                           x_in,
                           dx_out,
                           training,
                           domain.centred,
                           cell_mean.get(),
                           cell_invstd.get(),
                           read_channels(weight, parameters, 1, geometry.batch)};
    if (!want_dweight && !want_dbias && !(want_dx && training)) {
      if (want_dx) run.scale();
      return;
    }
    run.reduce_and_map();
    sum_over_batch(geometry, run.dweight.get());
    sum_over_batch(geometry, run.dbias.get());
    leave(run.dweight.get(), run.dbias.get());
  });
  return {std::move(dx), std::move(dweight), std::move(dbias)};
}

TORCH_LIBRARY_IMPL(batchnorm_ext, CPU, m) {
  register_forward<forward>(m);
  register_backward<backward>(m);
}

}  // namespace
}  // namespace batchnorm_ext::cpu
