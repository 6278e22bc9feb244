// The halves of training on the CPU: what is reduced leaves as float64 sums, which SyncBatchNorm adds up over ranks,
// and what is mapped takes such sums. The passes are those of the fused ops. Built once per instruction set.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <utility>

#include "../checks.h"
#include "../dtype.h"
#include "../layout.h"
#include "../sums.h"
#include "maps.h"
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

Normalized apply(const Operands& o, const Spec& s) {
  check_operands(o, s);
  check_memory(o, s);
  const int64_t channels = o.x.size(1);
  check_sums(o.x, *o.sums, sums_size(channels), "sums");
  const Tensor x = dense(o.x);
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
    using A = Acc<scalar_t>;
    CoefficientTable<A, 3> table(channels);
    set_normalize(table, 0, channels, mean, invstd, read_channels(o.weight, channels, 1).get(),
                  read_channels(o.bias, channels, 0).get(), count);
    map_tensor(geometry_of(x), Normalize<A>(), table.view(), std::array{y.mutable_data_ptr<scalar_t>()},
               x.const_data_ptr<scalar_t>());
  });
  if (count > 0) track(o, s, geometry_of(x), count, mean, var.get());
  return {std::move(y), std::move(stats)};
}

Tensor grad_moments(const Tensor& grad, const Tensor& input, const Tensor& stats) {
  check_backward({grad, input, kNone, kNone, kNone, stats}, {true, {}, {}});
  const Tensor x = dense(input);
  const int64_t channels = x.size(1);
  const auto options = x.options().dtype(at::kDouble);
  if (x.numel() == 0) return at::zeros({2 * channels}, options);
  const Tensor dy = like_layout(grad, x);
  Tensor sums = at::empty({2 * channels}, options);
  double *const dbias_out = sums.mutable_data_ptr<double>(), *const dweight_out = dbias_out + channels;
  const double *const mean = stats.const_data_ptr<double>(), *const invstd = mean + channels;
  const auto finish = [&](int64_t first, int64_t width, const double* dbias, const double* dweight) {
    std::copy_n(dbias, width, dbias_out + first);
    std::copy_n(dweight, width, dweight_out + first);
  };
  with_dtype(x.scalar_type(), [&](auto like) {
    using scalar_t = decltype(like);
    using A = Acc<scalar_t>;
    const Geometry geometry = geometry_of(x);
    CoefficientTable<A, 1> centre(channels);
    for (int64_t c = 0; c < channels; ++c) centre.row(0)[c] = static_cast<A>(mean[c]);
    with_pattern<scalar_t>(geometry, [&](const auto& pattern) {
      reduce_grads(pattern, PlainGrad(), Centres<A>{centre.row(0), mean, invstd}, finish, kNoMap,
                   dy.const_data_ptr<scalar_t>(), x.const_data_ptr<scalar_t>());
    });
  });
  return sums;
}

Tensor grad_apply(const Tensor& grad, const Tensor& input, const OptionalTensor& weight, const Tensor& stats,
                  const Tensor& grad_sums, const Tensor& count) {
  check_backward({grad, input, weight, kNone, kNone, stats}, {true, {}, {}});
  const int64_t channels = input.size(1);
  check_sums(input, grad_sums, 2 * channels, "grad_sums");
  check_sums(input, count, 1, "count");
  const Tensor x = dense(input);
  const Tensor dy = like_layout(grad, x);
  Tensor dx = empty_output_like(x);
  const double *const mean = stats.const_data_ptr<double>(), *const invstd = mean + channels;
  const double* const sums = grad_sums.const_data_ptr<double>();
  with_dtype(x.scalar_type(), [&](auto like) {
    using scalar_t = decltype(like);
    using A = Acc<scalar_t>;
    CoefficientTable<A, 5> table(channels);
    set_normalize_grad(table, 0, channels, sums, sums + channels, *count.const_data_ptr<double>(), mean, invstd,
                       read_channels(weight, channels, 1).get());
    map_tensor(geometry_of(x), NormalizeGrad<A>(), table.view(), std::array{dx.mutable_data_ptr<scalar_t>()},
               dy.const_data_ptr<scalar_t>(), x.const_data_ptr<scalar_t>());
  });
  return dx;
}

TORCH_LIBRARY_IMPL(batchnorm_ext, CPU, m) {
  m.impl("moments", moments);
  register_apply<apply>(m);
  m.impl("grad_moments", grad_moments);
  m.impl("grad_apply", grad_apply);
}

}  // namespace
}  // namespace batchnorm_ext::cpu
