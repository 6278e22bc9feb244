// The scalar arithmetic of batch normalization, written once for host and device.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "host_device.h"

namespace batchnorm_ext {

BATCHNORM_EXT_HD bool is_finite(double value) { return std::fabs(value) <= std::numeric_limits<double>::max(); }

// The mean of some values, and their m2 as that of the values times `unit`.
struct Moments {
  double mean, scaled_m2, unit = 1;

  BATCHNORM_EXT_HD double m2() const { return scaled_m2 / unit / unit; }
  BATCHNORM_EXT_HD double m2_over(double n) const { return scaled_m2 / n / unit / unit; }
  BATCHNORM_EXT_HD double invstd(double n, double eps) const {
    return unit / std::sqrt(scaled_m2 / n + eps * unit * unit);
  }
};

// Merges the moments of two disjoint sets of na and nb elements: (mean, M2) <- (mean, M2) + (mean_b, M2_b), where
// M2 is the sum of squared deviations from the mean. Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise
// algorithm for computing sample variances", eq. 2.1. `share` is nb / (na + nb).
BATCHNORM_EXT_HD void merge_moments(double na, double share, double& mean, double& m2, double mean_b, double m2_b) {
  const double delta = mean_b - mean;
  mean += delta * share;
  m2 += m2_b + delta * delta * (na * share);
}

// Whether x - mean may overflow A: not where |mean| is less than half the distance between the two largest numbers of
// A.
template <typename A>
BATCHNORM_EXT_HD bool may_overflow(double mean) {
  constexpr double largest = std::numeric_limits<A>::max();
  return std::fabs(mean) >= largest * std::numeric_limits<A>::epsilon() / 4;
}

// The centre for the map (x - mean) * factor, evaluated as (x - centre) * factor + shift. Normally the mean: with
// centre 0, x * factor - mean * factor cancels badly where |mean| >> std. It is 0 only where x - mean may overflow
// although the result is finite. |x - mean| <= std * sqrt(count - 1) for the `count` elements that the statistics were
// computed from (Samuelson 1968, "How deviant can you be?"); pass infinity if the statistics come from other data.
//
// About 0 the map loses u * |mean| * |factor|, with u the unit roundoff, as if each x were off by half a unit in the
// last place of the mean, which by Samuelson's bound is less than 2 * sqrt(count) standard deviations.
template <typename A>
BATCHNORM_EXT_HD double centre_of(double mean, double invstd, double count, double factor) {
  if (!may_overflow<A>(mean)) return mean;
  const double room =
      std::numeric_limits<A>::max() / 2 * invstd;  // half of what there is, for the rounding of the mean
  return room * room > count || (std::fabs(factor) >= 1 && is_finite(mean)) ? mean : 0;
}

// y = (x - centre) * scale + shift
template <typename A>
struct Affine {
  A centre, scale, shift;
};

template <typename A>
BATCHNORM_EXT_HD Affine<A> make_affine(double about, double mean, double invstd, double weight, double bias) {
  const A centre = static_cast<A>(about), scale = static_cast<A>(weight * invstd);
  // times the rounded scale: its rounding then costs in proportion to x - mean
  return {centre, scale, static_cast<A>(bias - (mean - centre) * scale)};
}

// The gradient of y = weight * xhat + bias, xhat = (x - mean) * invstd, where mean and invstd depend on x
// (Ioffe & Szegedy 2015, section 3, the three lines for dl/dsigma^2, dl/dmu, dl/dx put together):
//   dx = weight * invstd * (dy - avg(dy) - xhat * avg(dy * xhat))
//      = scale * (dy - (x - centre) * slope - offset)
// The factors are kept apart because invstd^2 may leave the range of fp32 where invstd does not.
template <typename A>
struct GradAffine {
  A centre, slope, offset, scale;
};

// What one channel's sums say: dot is sum(dy * (x - rounded mean)), sum is sum(dy).
struct GradSums {
  double dbias, dweight;
};

BATCHNORM_EXT_HD GradSums make_grad_sums(double sum, double dot, double mean, double rounded_mean, double invstd) {
  return {sum, (dot - (mean - rounded_mean) * sum) * invstd};
}

// Whether these sums over n elements, accumulated in fp32, may be wrong: a partial sum overflowed, or products
// underflowed that matter once multiplied by a large invstd. Inf or NaN in the input itself does not count.
template <typename A>
BATCHNORM_EXT_HD bool grads_lost(GradSums sums, double n, double mean, double invstd) {
  const bool any = (sums.dbias != 0) | (sums.dweight != 0), sees = (sizeof(A) == sizeof(float)) & (invstd > 1e10);
  const bool vanished = any & sees & (std::fabs(sums.dweight) < n * invstd * 1e-30);
  const bool overflown = !is_finite(sums.dweight) & is_finite(mean) & is_finite(invstd);
  return vanished | overflown | !is_finite(sums.dbias);
}

BATCHNORM_EXT_HD double slope_of(GradSums sums, double count, double invstd) { return invstd * (sums.dweight / count); }

template <typename A>
BATCHNORM_EXT_HD GradAffine<A> make_grad_affine(double about, GradSums sums, double count, double mean, double invstd,
                                                double weight) {
  const A centre = static_cast<A>(about), slope = static_cast<A>(slope_of(sums, count, invstd));
  return {centre, slope, static_cast<A>(sums.dbias / count - (mean - centre) * slope), static_cast<A>(weight * invstd)};
}

}  // namespace batchnorm_ext
