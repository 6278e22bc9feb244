// From lanes to statistics, in fp64. The order of every sum is fixed by the shape alone, so that results do not depend
// on the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "lanes.h"

namespace batchnorm_ext::cpu {

// Arrays of moments about the centres k: n values with s1 = sum(v - k) and s2 = sum((v - k)^2).
template <int64_t kCapacity>
struct MomentSets {
  double k[kCapacity], s1[kCapacity], s2[kCapacity], n[kCapacity];

  template <typename A>
  void take(int64_t at, const LaneMoments<A>& lanes, int64_t width) {
    alignas(64) A centre[kLanes<A>], first[kLanes<A>];
    double second[kLanes<A>];
    spill(lanes.k, centre);
    spill(lanes.s1, first);
    flush(lanes.s2, lanes.m2, lanes.first_tile(), second);
    for (int64_t l = 0; l < width; ++l) {
      k[at + l] = centre[l];
      s1[at + l] = first[l];
      s2[at + l] = second[l];
      n[at + l] = static_cast<double>(lanes.n);
    }
  }

  // Sets [into, into + width) take in sets [from, from + width), about their own centres.
  void join(int64_t into, int64_t from, int64_t width) {
#pragma GCC ivdep
    for (int64_t l = 0; l < width; ++l) {
      const int64_t i = into + l, j = from + l;
      const double e = k[j] - k[i];
      s2[i] += s2[j] + e * (2 * s1[j] + n[j] * e);
      s1[i] += s1[j] + n[j] * e;
      n[i] += n[j];
    }
  }

  // Folds sets [at, at + width) into the first of them, as a tree.
  void fold(int64_t at, int64_t width) {
    for (; width > 1; width -= width / 2) join(at, at + width - width / 2, width / 2);
  }

  void result(int64_t at, double& mean, double& m2) const {
    const double shift = s1[at] / n[at];
    mean = k[at] + shift;
    m2 = s2[at] - s1[at] * shift;
  }
};

inline double sum_of(const double* p, int64_t n) {
  constexpr int64_t width = Vec<double>::size();
  Vec<double> even(0), odd(0);
  for (; n >= 2 * width; n -= 2 * width, p += 2 * width) {
    even = even + Vec<double>::loadu(p);
    odd = odd + Vec<double>::loadu(p + width);
  }
  if (n > 0) even = even + Vec<double>::loadu(p, std::min(n, width));
  if (n > width) odd = odd + Vec<double>::loadu(p + width, n - width);
  alignas(64) double lanes[width];
  (even + odd).store(lanes);
  for (int64_t half = width / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

// Squares of fp32 values beyond 1e19 overflow and those below 1e-19 underflow. Both show in m2, which then is negative
// if less was lost between the lanes than in them, and are rare enough to be summed again in fp64. A constant channel
// has m2 == 0 and is not affected; nor is one that holds inf or nan.
template <typename T, typename ForEach>
void mend_range(double count, const ForEach& for_each, double mean, double& m2) {
  if constexpr (!std::is_same_v<T, double>) {
    const bool overflow = !std::isfinite(m2) && std::isfinite(mean);
    const bool underflow = m2 != 0 && m2 < count * 1e-30;
    if (overflow || underflow) {
      double s1 = 0, s2 = 0;
      for_each([&](double v) {
        s1 += v - mean;
        s2 += (v - mean) * (v - mean);
      });
      m2 = s2 - s1 * s1 / count;
    }
  }
  if (m2 < 0) m2 = 0;
}

}  // namespace batchnorm_ext::cpu
