// Tensors in, pointers out: the CPU side of the ops. Built once per instruction set.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../checks.h"
#include "../geometry.h"
#include "../layout.h"
#include "../math.h"
#include "column.h"
#include "memory.h"
#include "per_channel.h"
#include "row.h"
#include "schedule.h"

namespace batchnorm_ext::cpu {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Long runs of a channel are read one by one. Short ones are read across channels, several vectors at a time, as long
// as there are enough of them below each other to reduce.
bool has_long_runs(const Geometry& g) { return g.inner >= 256 || (g.outer < 32 && g.inner > 2 * g.outer); }

// kCount numbers per channel, each in a row of its own.
template <typename A, int kCount>
class CoefficientTable {
 public:
  using View = const A* [kCount];

  explicit CoefficientTable(int64_t stats) : pitch_(stats + kLanes<A>), values_(new A[kCount * pitch_]) {
    for (int i = 0; i < kCount; ++i) view_[i] = values_.get() + i * pitch_;
  }
  A* row(int i) { return values_.get() + i * pitch_; }
  const View& view() const { return view_; }

 private:
  int64_t pitch_;  // padded: whole vectors are read from any channel on
  std::unique_ptr<A[]> values_;
  View view_;
};

// y = (x - mean) * scale + shift
template <typename A>
struct Normalize {
  static constexpr int kCoefficients = 3;
  using Coefficients = typename CoefficientTable<A, kCoefficients>::View;
  Vec<A> operator()(const Vec<A> (&c)[3], const Vec<A>& x) const { return at::vec::fmadd(x - c[0], c[1], c[2]); }
};

// dx = scale * (dy - (x - mean) * slope - offset)
template <typename A>
struct NormalizeGrad {
  static constexpr int kCoefficients = 4;
  using Coefficients = typename CoefficientTable<A, kCoefficients>::View;
  Vec<A> operator()(const Vec<A> (&c)[4], const Vec<A>& dy, const Vec<A>& x) const {
    return c[3] * (dy - at::vec::fmadd(x - c[0], c[1], c[2]));
  }
};

// dx = scale * dy
template <typename A>
struct Scale {
  static constexpr int kCoefficients = 1;
  using Coefficients = typename CoefficientTable<A, kCoefficients>::View;
  Vec<A> operator()(const Vec<A> (&c)[1], const Vec<A>& dy) const { return c[0] * dy; }
};

// Of channels [first, first + width). Separate rows, so that the compiler may turn channels into lanes.
template <typename A>
void set_normalize(CoefficientTable<A, 3>& table, int64_t first, int64_t width, const double* mean,
                   const double* invstd, const double* weight, const double* bias) {
  A *const centre = table.row(0), *const scale = table.row(1), *const shift = table.row(2);
#pragma GCC ivdep
  for (int64_t c = first; c < first + width; ++c) {
    const Affine<A> affine = make_affine<A>(mean[c], invstd[c], weight[c], bias[c]);
    centre[c] = affine.mean;
    scale[c] = affine.scale;
    shift[c] = affine.shift;
  }
}

// The same for NormalizeGrad, from sum(dy) and sum(dy * (x - centre)); leaves the gradient of the weight in `dot`.
template <typename A>
void set_normalize_grad(CoefficientTable<A, 4>& table, int64_t first, int64_t width, const double* sum, double* dot,
                        double count, const double* mean, const double* invstd, const double* weight) {
  A *const centre = table.row(0), *const slope = table.row(1), *const offset = table.row(2),
           *const scale = table.row(3);
#pragma GCC ivdep
  for (int64_t i = 0; i < width; ++i) {
    const int64_t c = first + i;
    const GradSums sums = make_grad_sums(sum[i], dot[i], mean[c], centre[c], invstd[c]);
    const GradAffine<A> affine = make_grad_affine<A>(sums, count, mean[c], invstd[c], weight[c]);
    slope[c] = affine.slope;
    offset[c] = affine.offset;
    scale[c] = affine.scale;
    dot[i] = sums.dweight;
  }
}

template <typename T, typename F>
void with_pattern(const Geometry& geometry, const F& f) {
  if (has_long_runs(geometry))
    f(Row<T>(geometry));
  else
    f(Column<T>(geometry));
}

// For a map alone, which goes through memory in order: run by run, unless runs are short, or would share the cache
// lines that are streamed.
template <typename T, typename F>
void with_map_pattern(const Geometry& geometry, const F& f) {
  constexpr int64_t line = 64 / sizeof(T);
  const bool streams = geometry.numel() * static_cast<int64_t>(sizeof(T)) >= stream_bytes();
  if (geometry.inner >= 8 * line && (!streams || geometry.inner % line == 0))
    f(Row<T>(geometry, /*most_runs=*/1));
  else
    with_pattern<T>(geometry, f);
}

template <typename F>
void with_streaming(const Tensor& out, const F& f) {
  if (static_cast<int64_t>(out.nbytes()) >= stream_bytes())
    f(std::true_type());
  else
    f(std::false_type());
}

std::tuple<Tensor, Tensor> batch_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                      const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                      const OptionalTensor& num_batches_tracked, bool training,
                                      std::optional<double> momentum, double eps) {
  check_forward(input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps);
  const Tensor x = dense(input);
  const int64_t channels = x.size(1);
  Tensor y = empty_output_like(x);
  Tensor stats = at::empty({2, channels}, x.options().dtype(at::kDouble));
  double* const mean_out = stats.mutable_data_ptr<double>();
  double* const invstd_out = mean_out + channels;
  const auto w = read_channels(weight, channels, 1), b = read_channels(bias, channels, 0);
  const Channels running_means = read_channels(running_mean, channels, 0),
                 running_vars = read_channels(running_var, channels, 0);

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "batch_norm", [&] {
    using T = scalar_t;
    using A = Acc<T>;
    const T* const in = x.const_data_ptr<T>();
    T* const out = y.mutable_data_ptr<T>();
    CoefficientTable<A, 3> table(channels);
    const auto normalize_with = [&](int64_t first, int64_t width, const double* mean, const double* var) {
      std::copy_n(mean, width, mean_out + first);
      for (int64_t i = 0; i < width; ++i) invstd_out[first + i] = 1 / std::sqrt(var[i] + eps);
      set_normalize(table, first, width, mean_out, invstd_out, w.get(), b.get());
    };
    if (!training) normalize_with(0, channels, running_means.get(), running_vars.get());
    if (x.numel() == 0) {
      if (training) stats.fill_(std::nan(""));  // no element, no statistics, nothing to track
      return;
    }
    double factor = 0;
    if (training && num_batches_tracked) {
      const int64_t batches = ++*num_batches_tracked->mutable_data_ptr<int64_t>();
      factor = 1.0 / static_cast<double>(batches);
    }
    if (momentum) factor = *momentum;

    const Geometry geometry = geometry_of(x);
    const double count = static_cast<double>(geometry.count());
    const Channels var(new double[channels]);
    const auto finish = [&](int64_t first, int64_t width, const double* mean, const double* m2) {
      for (int64_t i = 0; i < width; ++i) var[first + i] = m2[i] / count;
      normalize_with(first, width, mean, &var[first]);
    };
    const auto run = [&](const auto& pattern) {
      with_streaming(y, [&](auto streaming) {
        const Schedule schedule(pattern, channels, x.numel());
        const auto map = [&](int64_t block, int64_t chunk) {
          pattern.template map<streaming.value>(block, chunk, Normalize<A>(), table.view(), out, in);
        };
        if (!training) return map_all(schedule, map);
        const auto reduce = [&](int64_t block, int64_t chunk, double* mean, double* m2) {
          pattern.moments(in, block, chunk, mean, m2);
        };
        const auto merge = [](double n, double n2, int64_t width, double* mean, double* m2, const double* mean2,
                              const double* m22) {
          for (int64_t c = 0; c < width; ++c) merge_moments(n, n2 / (n + n2), mean[c], m2[c], mean2[c], m22[c]);
        };
        reduce_then_map(pattern, schedule, reduce, merge, finish, map);
      });
    };
    training ? with_pattern<T>(geometry, run) : with_map_pattern<T>(geometry, run);
    if (!training || !running_mean) return;
    const double unbiased = count / (count - 1);
    for (int64_t c = 0; c < channels; ++c) {
      running_means[c] = (1 - factor) * running_means[c] + factor * mean_out[c];
      running_vars[c] = (1 - factor) * running_vars[c] + factor * (var[c] * unbiased);
    }
    write_channels(*running_mean, channels, running_means.get());
    write_channels(*running_var, channels, running_vars.get());
  });
  return {std::move(y), std::move(stats)};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad, const Tensor& input,
                                                       const OptionalTensor& weight, const Tensor& stats, bool training,
                                                       std::array<bool, 3> output_mask) {
  check_backward(grad, input, weight, stats);
  const Tensor x = dense(input);
  const Tensor dy = like_layout(grad, x);
  const int64_t channels = x.size(1);
  const auto [want_dx, want_dweight, want_dbias] = output_mask;
  const auto parameter_options =
      weight ? weight->options() : x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  Tensor dx = want_dx ? empty_output_like(x) : Tensor();
  Tensor dweight =
      want_dweight ? at::empty(weight ? weight->sizes() : at::IntArrayRef(channels), parameter_options) : Tensor();
  Tensor dbias = want_dbias ? at::empty({channels}, parameter_options) : Tensor();
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
    const double count = static_cast<double>(geometry.count());
    const Channels dweight_sums(new double[channels]), dbias_sums(new double[channels]);
    const auto finish = [&](int64_t first, int64_t width, const double* sum, double* dot) {
      set_normalize_grad(table, first, width, sum, dot, count, mean, invstd, w.get());
      std::copy_n(dot, width, &dweight_sums[first]);
      std::copy_n(sum, width, &dbias_sums[first]);
    };
    if (x.numel() == 0) {
      if (want_dweight) dweight.zero_();
      if (want_dbias) dbias.zero_();
      return;
    }
    const auto run = [&](const auto& pattern) {
      with_streaming(x, [&](auto streaming) {
        const Schedule schedule(pattern, channels, x.numel());
        const auto reduce = [&](int64_t block, int64_t chunk, double* sum, double* dot) {
          pattern.grad_sums(dy_in, x_in, table.view()[0], block, chunk, sum, dot);
        };
        const auto merge = [](double, double, int64_t width, double* sum, double* dot, const double* sum2,
                              const double* dot2) {
          for (int64_t c = 0; c < width; ++c) sum[c] += sum2[c], dot[c] += dot2[c];
        };
        const auto map = [&](int64_t block, int64_t chunk) {
          if (!want_dx) return;
          if (training)
            pattern.template map<streaming.value>(block, chunk, NormalizeGrad<A>(), table.view(), dx_out, dy_in, x_in);
          else
            pattern.template map<streaming.value>(block, chunk, Scale<A>(), {table.view()[3]}, dx_out, dy_in);
        };
        if (want_sums) return reduce_then_map(pattern, schedule, reduce, merge, finish, map);
        for (int64_t c = 0; c < channels; ++c) table.row(3)[c] = static_cast<A>(w[c] * invstd[c]);
        map_all(schedule, map);
      });
    };
    want_sums ? with_pattern<T>(geometry, run) : with_map_pattern<T>(geometry, run);
    if (want_dweight) write_channels(dweight, channels, dweight_sums.get());
    if (want_dbias) write_channels(dbias, channels, dbias_sums.get());
  });
  return {std::move(dx), std::move(dweight), std::move(dbias)};
}

TORCH_LIBRARY_IMPL(batchnorm_ext, CPU, m) {
  m.impl("batch_norm", batch_norm);
  m.impl("batch_norm_backward", batch_norm_backward);
}

}  // namespace
}  // namespace batchnorm_ext::cpu
