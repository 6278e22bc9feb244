// The backward as the kernel sees it; see forward.cuh.
#pragma once

#include "forward.cuh"

namespace batchnorm_ext::cuda {

template <typename T_>
struct Backward {
  using T = T_;
  using A = Acc<T>;
  static constexpr int kInputs = 2, kKept = 2, kCoefficients = 5, kKnown = 0, kMostHeld = 40;
  static constexpr bool kMoments = false, kSumsRest = false;
  static constexpr bool kResums = std::is_same_v<A, float> && !std::is_same_v<T, __half>;
  template <int kLanes>
  using Lanes = GradLanes<A, kLanes>;

  const T *dy, *x;
  T* dx;  // none: nothing is mapped
  Geometry geometry;
  bool training;
  double count;                   // elements of a statistic; where this reduces, of a cell
  const double* total_count;      // instead of `count`, where it is known on the device only
  const double *means, *invstds;  // of each statistic
  Channels<T> weight, dweight, dbias;
  const double* sums;  // [sum(dy) | sum(dy * xhat)] of each statistic, of weight * dy where it has several channels
  double* sums_out;    // [sum(dy) | sum(dy * xhat)] of each cell, for the caller

  __device__ __forceinline__ double mean_of(int64_t cell) const { return means[stat_of(geometry, cell)]; }
  __device__ __forceinline__ double invstd_of(int64_t cell) const { return invstds[stat_of(geometry, cell)]; }

  // The sums are about the mean, rounded to the type that they are kept in.
  __device__ __forceinline__ double origin(int64_t cell) const { return static_cast<A>(mean_of(cell)); }

  // Whether fp32 sums over part of a channel may have lost something, and the terms of an element in fp64.
  __device__ __forceinline__ bool loses(int64_t cell, double2 sum, double n) const {
    if (isfinite(sum.x) && isfinite(sum.y) && !(fabs(sum.y) < n * 1e-30)) return false;
    const double invstd = invstd_of(cell);
    return grads_lost<A>({sum.x, sum.y * invstd}, n, mean_of(cell), invstd);
  }
  __device__ __forceinline__ double2 terms(int64_t, int64_t offset, double origin) const {
    const double g = widen(dy[offset]);
    return {g, g * (static_cast<double>(widen(x[offset])) - origin)};
  }

  __device__ __forceinline__ void known_before(int64_t, const auto&) const {}

  template <typename Packs>
  __device__ __forceinline__ void load(Packs& packs, int64_t offset, bool again) const {
    packs.in[0] = load_pack<Packs::kWidth>(dy + offset, again);
    packs.in[1] = load_pack<Packs::kWidth>(x + offset, again);
  }
  __device__ __forceinline__ void load_rest(const auto&, int64_t) const {}

  template <int kLanes, typename Chunk>
  __device__ __forceinline__ void start(GradLanes<A, kLanes>& lanes, const Chunk& chunk, const auto&, int) const {
#pragma unroll
    for (int l = 0; l < kLanes; ++l) lanes.start(l, static_cast<A>(origin(chunk.first + chunk.channel(l))));
  }

  template <int kLanes, typename Packs>
  __device__ __forceinline__ void add(GradLanes<A, kLanes>& lanes, const Packs& packs, const auto&) const {
#pragma unroll
    for (int i = 0; i < Packs::kWidth; ++i) lanes.add(i % kLanes, packs.in[0].get(i), packs.in[1].get(i));
  }

  // As in a forward; a launch that only reduces has no map.
  template <bool kLeavesSums>
  __device__ __forceinline__ void finish(int64_t c, double2 total, double, bool leads, A (&map)[5]) const {
    const double mean = mean_of(c), invstd = invstd_of(c);
    GradSums grads = make_grad_sums(total.x, total.y, mean, origin(c), invstd);
    if constexpr (std::is_same_v<T, double>)
      if (grads_lost<A>(grads, count, mean, invstd)) {
        const auto at = [&](int64_t i) { return geometry.element_of(c, i); };
        grads = resum_grads(
            static_cast<int64_t>(count), mean, invstd, [&](int64_t i) { return widen(dy[at(i)]); },
            [&](int64_t i) { return x[at(i)]; });
      }
    if (leads && sums_out != nullptr) {
      sums_out[c] = grads.dbias;
      sums_out[geometry.cells() + c] = grads.dweight;
    }
    if (leads && dweight) dweight.set(c, grads.dweight);
    if (leads && dbias) dbias.set(c, grads.dbias);
    if constexpr (!kLeavesSums) set(c, grads, map);
  }

  __device__ __forceinline__ void given(int64_t c, bool, A (&map)[5]) const {
    const int64_t s = stat_of(geometry, c);
    set(c, {sums[s], sums[stats_of(geometry) + s]}, map);
  }

  __device__ __forceinline__ void set(int64_t c, GradSums grads, A (&map)[5]) const {
    const double n = total_count != nullptr ? *total_count : count;
    const double mean = mean_of(c), invstd = invstd_of(c), w = weight.get(channel_of(geometry, c), 1);
    const bool shared = geometry.per_stat > 1;  // the sums are of weight * dy
    const double about = centre_of<A>(mean, invstd, n, slope_of(grads, n, invstd));
    const GradAffine<A> affine = make_grad_affine<A>(about, grads, n, mean, invstd, shared ? 1 : w);
    map[0] = affine.centre;
    map[1] = affine.slope;
    map[2] = affine.offset;
    map[3] = affine.scale;
    map[4] = static_cast<A>(shared ? w : 1);
  }

  __device__ __forceinline__ int64_t* counter() const { return nullptr; }

  // dx = scale * (weight * dy - (x - centre) * slope - offset); in evaluation scale * weight * dy, whatever x may be.
  // Where the weight is a factor of the scale, it is 1 here: always so in a launch that reduces, too.
  template <bool kReduces, typename Coefficients>
  __device__ __forceinline__ A mapped(A dy, A x, const Coefficients& c, int i) const {
    const A along = fused(x - c(0, i), c(1, i), c(2, i)), rest = training ? along : A(0);
    return c(3, i) * (kReduces ? dy - rest : fused(c(4, i), dy, -rest));
  }
  template <bool kReduces, typename Packs, typename Coefficients>
  __device__ __forceinline__ void map(const Packs& packs, const Coefficients& c, int64_t offset) const {
    store_pack(dx + offset, make_pack<T, Packs::kWidth>(
                                [&](int i) { return mapped<kReduces>(packs.in[0].get(i), packs.in[1].get(i), c, i); }));
  }
  __device__ __forceinline__ bool maps() const { return dx != nullptr; }

  // The two launches of Policy::kSplit; what the first finds the second takes from `between`, [2 * cells], or from what
  // the caller gets.
  Backward reduction(double* between) const {
    Backward op = *this;
    op.dx = nullptr;
    if (op.sums_out == nullptr) op.sums_out = between;
    return op;
  }
  Backward mapping(double* between) const {
    Backward op = *this;
    op.sums = sums_out != nullptr ? sums_out : between;
    return op;
  }
};

}  // namespace batchnorm_ext::cuda
