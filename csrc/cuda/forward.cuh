// The forward as the kernel sees it: what is summed over a channel, what becomes of the sums, what is mapped.
#pragma once

#include "../resum.h"
#include "../sums.h"
#include "lanes.cuh"

namespace batchnorm_ext::cuda {

// Where mean and variance come from: the batch at hand, the running statistics, sums over several batches, or an
// earlier launch that has left mean and invstd.
enum class Source { kBatch, kRunning, kSums, kStats };

// y = (x - centre) * scale + shift, with statistics of n elements (`count` in centre_of).
template <typename A>
__device__ __forceinline__ Affine<A> affine_about(double n, double mean, double invstd, double weight, double bias) {
  return make_affine<A>(centre_of<A>(mean, invstd, n, weight * invstd), mean, invstd, weight, bias);
}

// What a launch is told. Of its inputs the first kKept may stay on chip from the reduction to the map; the rest enters
// the map and, if kSumsRest, the sums. The map has kCoefficients numbers of each channel that come from the sums, and
// kKnown that are known before them.
template <typename T_>
struct Forward {
  using T = T_;
  using A = Acc<T>;
  static constexpr int kInputs = 1, kKept = 1, kCoefficients = 3, kKnown = 0;
  static constexpr int kMostHeld = 40;  // coefficients that a thread holds in registers, if it needs no more
  static constexpr bool kMoments = true, kSumsRest = false;
  static constexpr bool kResums = std::is_same_v<A, float>;  // part of a channel, where sums left the range of fp32
  template <int kLanes>
  using Lanes = MomentLanes<A, kLanes>;

  const T* x;
  T* y;  // none: nothing is mapped
  Geometry geometry;
  Source source;
  double count, eps, momentum;
  bool cumulative;  // running statistics are averages over all batches, whatever the momentum
  Channels<T> weight, bias, running_mean, running_var;
  int64_t* num_batches_tracked;
  const double* sums;  // as in sums.h, of kSums
  double* sums_out;    // the same, for the caller; then nothing else is
  double* stats;       // [mean | invstd] of each statistic, out but for kStats
  bool centred;        // false: kStats, with mean = 0

  // The sums are about the first element, which is as close to the mean as any; sums in fp64 bear that.
  __device__ __forceinline__ double origin(int64_t channel) const {
    const double first = widen(x[geometry.first_of(channel)]);
    return isfinite(first) ? first : 0;
  }

  // Whether fp32 sums over part of a channel may have lost something, and the terms of an element in fp64.
  __device__ __forceinline__ bool loses(int64_t, double2 sum, double) const { return !isfinite(sum.y); }
  __device__ __forceinline__ double2 terms(int64_t, int64_t offset, double origin) const {
    const double d = static_cast<double>(widen(x[offset])) - origin;
    return {d, d * d};
  }

  __device__ __forceinline__ void known_before(int64_t, const auto&) const {}

  template <typename Packs>
  __device__ __forceinline__ void load(Packs& packs, int64_t offset, bool again) const {
    packs.in[0] = load_pack<Packs::kWidth>(x + offset, again);
  }
  __device__ __forceinline__ void load_rest(const auto&, int64_t) const {}

  // Centres on the mean of the first packs, which is as good as any but must be near: they may begin with an outlier.
  template <int kLanes, typename Packs, int kCount>
  __device__ __forceinline__ void start(MomentLanes<A, kLanes>& lanes, const auto&, const Packs (&packs)[kCount],
                                        int count) const {
    constexpr int kWidth = Packs::kWidth;
#pragma unroll
    for (int l = 0; l < kLanes; ++l) lanes.start(l, packs[0].in[0].get(l));
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      if (u >= count) break;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) lanes.s1[i % kLanes] += packs[u].in[0].get(i) - lanes.k[i % kLanes];
    }
    const A share = 1 / static_cast<A>(count * (kWidth / kLanes));
#pragma unroll
    for (int l = 0; l < kLanes; ++l) lanes.start(l, fused(lanes.s1[l], share, lanes.k[l]));
  }

  template <int kLanes, typename Packs>
  __device__ __forceinline__ void add(MomentLanes<A, kLanes>& lanes, const Packs& packs, const auto&) const {
#pragma unroll
    for (int i = 0; i < Packs::kWidth; ++i) lanes.add(i % kLanes, packs.in[0].get(i));
  }

  // The map of a channel, from the sums of this launch about `about`. The leader of a team also writes what the caller
  // gets; the sums leave a launch that only reduces.
  template <bool kLeavesSums>
  __device__ __forceinline__ void finish(int64_t c, double2 total, double about, bool leads, A (&map)[3]) const {
    const double shift = total.x / count;
    Moments moments{about + shift, total.y - total.x * shift};
    if constexpr (std::is_same_v<T, double>)
      if (!isfinite(moments.scaled_m2))  // squares that leave the range of fp64, by one thread: they are rare
        moments = resum_moments(static_cast<int64_t>(count), kShrink,
                                [&](int64_t i) { return x[geometry.element_of(c, i)]; });
    if (moments.scaled_m2 < 0) moments.scaled_m2 = 0;
    if constexpr (kLeavesSums)
      if (leads && sums_out != nullptr) {
        write_sums(sums_out, geometry.cells(), c, count, moments.mean, moments.m2());
        if (c == 0) write_count(sums_out, geometry.cells(), count);
      }
    conclude(c, count, moments, leads, map);
  }

  // The same where the launch does not reduce, from what it is given.
  __device__ __forceinline__ void given(int64_t c, bool leads, A (&map)[3]) const {
    if (source == Source::kSums)
      return conclude(c, read_count(sums, geometry.cells()), read_sums(sums, geometry.cells(), c), leads, map);
    if (source == Source::kStats) {
      const int64_t s = stat_of(geometry, c);
      return set(c, count, centred ? stats[s] : 0, stats[stats_of(geometry) + s], map);
    }
    const double mean = running_mean.get(c), invstd = 1 / sqrt(running_var.get(c) + eps);
    if (leads) write_stats(c, mean, invstd);
    set(c, INFINITY, mean, invstd, map);
  }

  // From the moments over n elements.
  __device__ __forceinline__ void conclude(int64_t c, double n, const Moments& moments, bool leads, A (&map)[3]) const {
    const double mean = moments.mean, invstd = moments.invstd(n, eps);
    set(c, n, mean, invstd, map);  // first: what is read after a write may wait for it
    if (leads && running_mean && n > 0) track(c, n, moments);
    if (leads && stats != nullptr) write_stats(c, mean, invstd);
  }

  // Moves the running statistics. One element has no unbiased variance.
  __device__ __forceinline__ void track(int64_t c, double n, const Moments& moments) const {
    const double factor = cumulative ? 1.0 / static_cast<double>(*num_batches_tracked + 1) : momentum;
    const double mean = running_mean.get(c), var = running_var.get(c);
    running_mean.set(c, (1 - factor) * mean + factor * moments.mean);
    if (n > 1) running_var.set(c, (1 - factor) * var + factor * moments.m2_over(n - 1));
  }

  __device__ __forceinline__ void write_stats(int64_t c, double mean, double invstd) const {
    stats[c] = mean;
    stats[geometry.cells() + c] = invstd;
  }

  __device__ __forceinline__ void set(int64_t c, double n, double mean, double invstd, A (&map)[3]) const {
    const int64_t channel = channel_of(geometry, c);
    const Affine<A> affine = affine_about<A>(n, mean, invstd, weight.get(channel, 1), bias.get(channel, 0));
    map[0] = affine.centre;
    map[1] = affine.scale;
    map[2] = affine.shift;
  }

  // The counter that is to be raised once all leaders are done, if any.
  __device__ __forceinline__ int64_t* counter() const {
    return source == Source::kSums && !(read_count(sums, geometry.cells()) > 0) ? nullptr : num_batches_tracked;
  }

  // c(k, i): the k-th coefficient of element i
  template <typename Packs, typename Coefficients>
  __device__ __forceinline__ A normalized(const Packs& packs, const Coefficients& c, int i) const {
    return fused(packs.in[0].get(i) - c(0, i), c(1, i), c(2, i));
  }
  template <bool, typename Packs, typename Coefficients>
  __device__ __forceinline__ void map(const Packs& packs, const Coefficients& c, int64_t offset) const {
    store_pack(y + offset, make_pack<T, Packs::kWidth>([&](int i) { return normalized(packs, c, i); }));
  }
  __device__ __forceinline__ bool maps() const { return y != nullptr; }

  // The two launches of Policy::kSplit; what the first finds the second takes from `stats`.
  Forward reduction(double*) const {
    Forward op = *this;
    op.y = nullptr;
    return op;
  }
  Forward mapping(double*) const {
    Forward op = *this;
    op.source = Source::kStats;
    op.num_batches_tracked = nullptr;
    return op;
  }
};

}  // namespace batchnorm_ext::cuda
