// Between a launch that reduces cells and one that maps them: the statistics that cover several cells, one by each
// warp.
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

  template <typename Sum>
  __device__ __forceinline__ void combine(int64_t s, bool writes, const Sum& sum) const {
    const int64_t first = s * geometry.per_stat;
    const auto cell = [&](int64_t i) { return read_sums(sums, geometry.cells(), first + i); };
    Moments moments = combine_moments(
        geometry.per_stat, static_cast<double>(geometry.cell_count()), [&](int64_t i) { return cell(i).mean; },
        [&](int64_t i) { return cell(i).scaled_m2; }, sum);
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
  Channels<T> weight;
  const double* sums;  // [sum(dy) | sum(dy * xhat)] of each cell
  double* combined;    // the same of weight * dy and of each statistic

  template <typename Sum>
  __device__ __forceinline__ void combine(int64_t s, bool writes, const Sum& sum) const {
    const int64_t first = s * geometry.per_stat;
    const auto weight_of = [&](int64_t i) { return weight.get(channel_of(geometry, first + i), 1); };
    const auto at = [=](const double* of) { return [=](int64_t i) { return of[first + i]; }; };
    const GradSums grads = combine_grads(weight_of, at(sums), at(sums + geometry.cells()), sum);
    if (!writes) return;
    combined[s] = grads.dbias;
    combined[stats_of(geometry) + s] = grads.dweight;
  }
};

template <typename Op>
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ Op op) {
  const int64_t s = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (s >= stats_of(op.geometry)) return;
  op.combine(s, lane == 0, [&](const auto& f) {
    double sum = 0;
#pragma unroll 1
    for (int64_t i = lane; i < op.geometry.per_stat; i += kWarp) sum += f(i);
    return warp_sum(sum);
  });
}

}  // namespace batchnorm_ext::cuda
