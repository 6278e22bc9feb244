// The fused forward, tensors in and pointers out: the CPU side of training on one device, and of evaluation. Built once
// per instruction set.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <utility>

#include "../activation_table.h"
#include "../checks.h"
#include "../dtype.h"
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
  const T *const x, *const residual;  // null: there is none
  T* const y;
  const double eps;
  const bool centred;
  const Activation activation;
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
    map_all_cells();
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
  // f(op, inputs...) with the map's op.
  template <typename F>
  void with_map(const F& f) const {
    if (activation.curve == Curve::kNone && residual == nullptr) return f(Normalize<A>(), x);
    with_activation<T>(activation, [&]<typename Act>(const Act& act) {
      if (residual == nullptr)
        f(NormalizeActivate<OfInput<A>, Act, A>{act}, x);
      else
        f(NormalizeActivate<OfSum<A>, Act, A>{act}, x, residual);
    });
  }

  void map_all_cells() const {
    with_map([&](const auto& op, const auto*... in) { map_tensor(geometry, op, table.view(), std::array{y}, in...); });
  }

  // finish(first, width, mean, m2) takes the moments of statistics [first, first + width).
  void reduce_and_map(Finish finish) {
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
          with_map([&, begin = begin, end = end](const auto& op, const auto*... in) {
            map_range<streaming.value>(geometry, op, table.view(), begin, end, std::array{y}, in...);
          });
        };
        reduce_moments(pattern, x, finish_cells, map);
      });
    }
    with_pattern<T>(geometry, [&](const auto& pattern) {
      with_streaming<T>(geometry, [&](auto streaming) {
        const auto map = [&](int64_t block, int64_t chunk, Scratch& scratch) {
          with_map([&](const auto& op, const auto*... in) {
            pattern.template map<streaming.value>(block, chunk, op, table.view(), scratch, std::array{y}, in...);
          });
        };
        reduce_moments(pattern, x, finish_cells, map);
      });
    });
  }
};

Normalized forward(const Operands& o, const Spec& s) {
  check_forward(o, s);
  check_memory(o, s);
  const Tensor x = dense(o.x, s.domain);
  const OptionalTensor residual = o.residual ? OptionalTensor(like_layout(*o.residual, x)) : std::nullopt;
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
  const auto read = [&](int64_t batch) {
    return std::pair(read_channels(o.weight, parameters, 1, batch), read_channels(o.bias, parameters, 0, batch));
  };
  with_dtype(x.scalar_type(), [&](auto like) {
    using scalar_t = decltype(like);
    const scalar_t* const in = x.const_data_ptr<scalar_t>();
    scalar_t* const out = y.mutable_data_ptr<scalar_t>();
    if (has_parameters_within(geometry, s.domain)) {
      const auto [weight, bias] = read(1);
      ElementwiseForward<scalar_t>(geometry, parameters, weight.get(), bias.get())
          .run(in, out, s.domain.centred, s.eps, mean, invstd);
      return;
    }
    auto [weight, bias] = read(geometry.batch);
    const scalar_t* const added = residual ? residual->const_data_ptr<scalar_t>() : nullptr;
    Forward<scalar_t> run{geometry,         in,         added, out,    s.eps,
                          s.domain.centred, activation, mean,  invstd, std::move(weight),
                          std::move(bias)};
    if (!s.training) return run.evaluate(o);
    const Channels var = run.train();
    track(o, s, geometry, static_cast<double>(geometry.count()), mean, var.get());
  });
  return {std::move(y), std::move(stats)};
}

TORCH_LIBRARY_IMPL(batchnorm_ext, CPU, m) { register_forward<forward>(m); }

}  // namespace
}  // namespace batchnorm_ext::cpu
