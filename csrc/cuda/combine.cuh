// After a launch that reduces cells: what covers several of them, each by a warp. A statistic covers cells of adjacent
// channels, the gradient of a parameter those of all samples.
#pragma once

#include "../combine.h"
#include "backward.cuh"
#include "reduce.cuh"

namespace batchnorm_ext::cuda {

template <typename T>
struct CombineMoments {
  const T* x;
  Geometry geometry;
  double eps;
  const double* sums;  // of each cell, as in sums.h
  double* stats;       // [mean | invstd] of each statistic

  BATCHNORM_EXT_HD int64_t warps() const { return stats_of(geometry); }

  template <typename SumOver>
  __device__ __forceinline__ void combine(int64_t s, bool writes, const SumOver& sum_over) const {
    const int64_t first = s * geometry.per_stat;
    const auto cell = [&](int64_t i) { return read_sums(sums, geometry.cells(), first + i); };
    Moments moments = combine_moments(
        geometry.per_stat, static_cast<double>(geometry.cell_count()), [&](int64_t i) { return cell(i).mean; },
        [&](int64_t i) { return cell(i).scaled_m2; }, sum_over(geometry.per_stat));
    if (!writes) return;
    if constexpr (std::is_same_v<T, double>)
      if (!isfinite(moments.scaled_m2))  // as in a forward
        moments = resum_moments(geometry.count(), kShrink, [&](int64_t i) { return x[geometry.element_of(first, i)]; });
    stats[s] = moments.mean;
    stats[stats_of(geometry) + s] = moments.invstd(static_cast<double>(geometry.count()), eps);
  }
};

template <typename T>
struct CombineGrads {
  Geometry geometry;
  Channels<T> weight, dweight, dbias;
  const double* sums;  // [sum(dy) | sum(dy * xhat)] of each cell
  double* combined;    // the same of weight * dy and of each statistic; none: not wanted

  BATCHNORM_EXT_HD int64_t combined_stats() const { return combined == nullptr ? 0 : stats_of(geometry); }
  BATCHNORM_EXT_HD int64_t warps() const { return combined_stats() + geometry.channels; }

  template <typename SumOver>
  __device__ __forceinline__ void combine(int64_t warp, bool writes, const SumOver& sum_over) const {
    const int64_t stats = combined_stats();
    if (warp < stats)
      combine_cells(warp, writes, sum_over(geometry.per_stat));
    else
      combine_samples(warp - stats, writes, sum_over(geometry.batch));
  }

 private:
  template <typename Sum>
  __device__ __forceinline__ void combine_cells(int64_t s, bool writes, const Sum& sum) const {
    const int64_t first = s * geometry.per_stat;
    const auto weight_of = [&](int64_t i) { return weight.get(channel_of(geometry, first + i), 1); };
    const auto at = [=](const double* of) { return [=](int64_t i) { return of[first + i]; }; };
    const GradSums grads = combine_grads(weight_of, at(sums), at(sums + geometry.cells()), sum);
    if (!writes) return;
    combined[s] = grads.dbias;
    combined[stats_of(geometry) + s] = grads.dweight;
  }

  template <typename Sum>
  __device__ __forceinline__ void combine_samples(int64_t channel, bool writes, const Sum& sum) const {
    const auto total = [&](const double* of) {
      return sum([&](int64_t i) { return of[channel + i * geometry.channels]; });
    };
    const double db = total(sums), dw = total(sums + geometry.cells());
    if (writes && dbias) dbias.set(channel, db);
    if (writes && dweight) dweight.set(channel, dw);
  }
};

template <typename Op>
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ Op op) {
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (warp >= op.warps()) return;
  op.combine(warp, lane == 0, [&](int64_t count) {
    return [=](const auto& f) {
      double sum = 0;
#pragma unroll 1
      for (int64_t i = lane; i < count; i += kWarp) sum += f(i);
      return warp_sum(sum);
    };
  });
}

}  // namespace batchnorm_ext::cuda
