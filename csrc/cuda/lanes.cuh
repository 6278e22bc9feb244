// What a thread sums, and what becomes of it: pairs of sums in the accumulation type, then in fp64.
#pragma once

#include "pack.cuh"
#include "shape.h"

namespace batchnorm_ext::cuda {

__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }

template <typename A>
struct alignas(2 * sizeof(A)) Pair {
  A a, b;
};

// Moments of the values v seen by each lane, about a centre k that follows the mean:
//   s1 = sum(v - k),  s2 = sum((v - k)^2)
template <typename A, int kLanes>
struct MomentLanes {
  A k[kLanes], s1[kLanes], s2[kLanes];

  __device__ __forceinline__ void start(int lane, A centre) {
    k[lane] = centre;
    s1[lane] = s2[lane] = 0;
  }

  __device__ __forceinline__ void add(int lane, A v) {
    const A d = v - k[lane];
    s1[lane] += d;
    s2[lane] = fused(d, d, s2[lane]);
  }

  // Moves the centres to the mean of the `count` values so far, with what rounding leaves of s1.
  __device__ __forceinline__ void recentre(int count) {
    const A n = static_cast<A>(count), inverse = 1 / n;
#pragma unroll
    for (int l = 0; l < kLanes; ++l) {
      const A moved = fused(s1[l], inverse, k[l]), step = moved - k[l];
      s2[l] -= step * (2 * s1[l] - n * step);
      s1[l] -= n * step;
      k[l] = moved;
    }
  }

  // The sums of `count` values about another centre.
  __device__ __forceinline__ Pair<A> about(int lane, int count, A centre) const {
    if (count == 0) return {0, 0};
    const A n = static_cast<A>(count), e = k[lane] - centre;
    return {fused(n, e, s1[lane]), fused(e, fused(n, e, 2 * s1[lane]), s2[lane])};
  }

  // The sums of n values about the origin, of which the centre is e away. fp32 squares underflow below 1e-38 and
  // overflow beyond 1e38. If that may matter, the sum of squares is set to NaN, which triggers resum(). It does not
  // matter for a constant channel, whose sums are exactly 0, or where n * e^2 dominates. `most` is the largest n of
  // any entry.
  __device__ static __forceinline__ double2 about_origin(Pair<A> pair, double n, double most, double e) {
    const double s1 = pair.a, s2 = pair.b;
    if constexpr (std::is_same_v<A, float>)
      if (s2 < most * 1e-30 && (s1 != 0 || s2 != 0 || (e != 0 && e * e < 1e-30))) return {s1, NAN};
    return {s1 + n * e, s2 + e * (2 * s1 + n * e)};
  }
};

// sum(dy) and sum(dy * (x - mean)) of each lane, in the names above.
template <typename A, int kLanes>
struct GradLanes {
  A k[kLanes], s1[kLanes], s2[kLanes];

  __device__ __forceinline__ void start(int lane, A mean) {
    k[lane] = mean;
    s1[lane] = s2[lane] = 0;
  }

  __device__ __forceinline__ void add(int lane, A dy, A x) {
    s1[lane] += dy;
    s2[lane] = fused(dy, x - k[lane], s2[lane]);
  }

  __device__ __forceinline__ void recentre(int) {}
  __device__ __forceinline__ Pair<A> about(int lane, int, A) const { return {s1[lane], s2[lane]}; }
  __device__ static __forceinline__ double2 about_origin(Pair<A> pair, double, double, double) {
    return {pair.a, pair.b};
  }
};

}  // namespace batchnorm_ext::cuda
