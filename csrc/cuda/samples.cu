// The launches behind statistics of each sample. Where a statistic is that of one channel, reduction and map are one
// launch, as for batch normalization. Where it covers several, the reduction leaves sums of each cell, combine.cuh
// makes those of each statistic of them, and the map is a launch of its own.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <utility>

#include "../sums.h"
#include "combine.cuh"
#include "launch.h"
#include "samples.h"

namespace batchnorm_ext::cuda {
namespace {

// Moves the running statistics to the average of those of the samples, and counts the batch.
void track(const Operands& o, const Spec& s, const Geometry& g, const Tensor& stats) {
  if (o.num_batches_tracked) o.num_batches_tracked->add_(1);
  const auto move = [&](const Tensor& running, const Tensor& to) {
    const Tensor from = running.to(at::kDouble);
    running.copy_(s.momentum ? from.lerp(to, *s.momentum)
                             : from.lerp(to, o.num_batches_tracked->to(at::kDouble).reciprocal().squeeze()));
  };
  const double n = static_cast<double>(g.count());
  const Tensor samples = stats.view({2, g.batch, g.channels});
  move(*o.running_mean, samples[0].mean(0));
  move(*o.running_var, (samples[1].pow(-2) - s.eps).mean(0) * (n / (n - 1)));
}

// Leaves mean and invstd of each statistic in op.stats.
template <typename T>
void reduce_groups(Forward<T> op, const Tensor& x) {
  const Geometry g = op.geometry, merged = g.merged();
  op.y = nullptr;
  op.weight = op.bias = {};
  if (merged.per_stat == 1 && merged.inner <= kMostElements) {  // the cells of a statistic make one run
    op.geometry = merged;
    return launch(op, request<Forward<T>>(merged, aligned(x), true, false));
  }
  double* const stats = std::exchange(op.stats, nullptr);
  const Tensor sums = empty_sums(x, sums_size(g.cells()));
  op.sums_out = write<double>(sums);
  op.geometry.per_stat = 1;
  op.count = static_cast<double>(g.cell_count());
  launch(op, request<Forward<T>>(op.geometry, aligned(x), true, false));
  launch_combine(CombineMoments<T>{op.x, g, op.eps, read<double>(sums), stats});
}

}  // namespace

Normalized normalize_samples(const Operands& o, const Spec& s) {
  const Tensor x = dense(o.x, s.domain);
  const Geometry g = checked_geometry(x, s.domain);
  const After after(o.residual, s.activation, x);
  Tensor y = at::empty_like(x);
  Tensor stats = at::empty({2, g.stats()}, x.options().dtype(at::kDouble));
  with_dtype(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Forward<T> op = forward_of<T>(x, g);
    op.y = write<T>(y);
    op.eps = s.eps;
    op.weight = read_channels<T>(o.weight);
    op.bias = read_channels<T>(o.bias);
    op.stats = write<double>(stats);
    const bool grouped = g.per_stat > 1;
    if (grouped) reduce_groups(op, x);
    op.source = grouped ? Source::kStats : Source::kBatch;
    launch(op, after, aligned(x, y), !grouped);
  });
  if (s.update) track(o, s, g, stats);
  return {std::move(y), std::move(stats)};
}

void backward_of_samples(const Gradient& gradient, const OptionalTensor& weight, const Tensor& stats, bool training,
                         const Tensor& dx, const Tensor& dweight, const Tensor& dbias) {
  const bool wants_parameters = dweight.defined() || dbias.defined(), maps = dx.defined();
  if (!maps && !wants_parameters) return;
  const Geometry& g = gradient.geometry;
  const Tensor sums = empty_sums(gradient.x, 2 * g.cells());
  with_dtype(gradient.x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Backward<T> op = gradient.op<T>(weight, stats);
    op.training = training;
    op.sums_out = write<double>(sums);
    op.count = static_cast<double>(g.cell_count());
    const bool maps_later = maps && g.per_stat > 1;
    if (maps && !maps_later) op.dx = write<T>(dx);
    gradient.launch(op, dx, true, maps && !maps_later);
    if (!wants_parameters && !maps_later) return;
    const Tensor combined = maps_later ? empty_sums(gradient.x, 2 * g.stats()) : Tensor();
    launch_combine(CombineGrads<T>{g, op.weight, write_channels<T>(optional(dweight)),
                                   write_channels<T>(optional(dbias)), read<double>(sums),
                                   maps_later ? write<double>(combined) : nullptr});
    if (!maps_later) return;
    op.dx = write<T>(dx);
    op.sums = read<double>(combined);
    op.sums_out = nullptr;
    op.count = static_cast<double>(g.count());
    gradient.launch(op, dx, false, true);
  });
}

}  // namespace batchnorm_ext::cuda
