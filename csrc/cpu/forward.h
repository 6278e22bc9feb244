// The forward of what has one weight and one bias per cell: statistics and map at once, or the map alone.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>

#include "../geometry.h"
#include "../ops.h"
#include "activate.h"
#include "combine.h"
#include "maps.h"
#include "passes.h"
#include "per_channel.h"

namespace batchnorm_ext::cpu {

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
    map_all_cells();
  }

  // With mean and invstd as they are. `count`: see set_normalize.
  void map_all_cells(double count = std::numeric_limits<double>::infinity()) {
    const PerCell cell_mean(geometry, mean), cell_invstd(geometry, invstd);
    cell_mean.set(0, geometry.cells());
    cell_invstd.set(0, geometry.cells());
    set_normalize(table, 0, geometry.cells(), cell_mean.get(), cell_invstd.get(), weight.get(), bias.get(), count);
    with_map([&](const auto& op, const auto*... in) { map_tensor(geometry, op, table.view(), std::array{y}, in...); });
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

}  // namespace batchnorm_ext::cpu
