// The scalar arithmetic of batch normalization, written once for host and device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define BATCHNORM_EXT_HD __host__ __device__ __forceinline__
#else
#define BATCHNORM_EXT_HD inline
#endif

namespace batchnorm_ext {

// Merges the moments of two disjoint sets of na and nb elements: (mean, M2) <- (mean, M2) + (mean_b, M2_b), where
// M2 is the sum of squared deviations from the mean. Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise
// algorithm for computing sample variances", eq. 2.1. `share` is nb / (na + nb).
BATCHNORM_EXT_HD void merge_moments(double na, double share, double& mean, double& m2, double mean_b, double m2_b) {
  const double delta = mean_b - mean;
  mean += delta * share;
  m2 += m2_b + delta * delta * (na * share);
}

// y = (x - mean) * scale + shift, with what `mean` lost in rounding to A folded into the shift: a plain
// x * scale + shift would cancel catastrophically where |mean| is much larger than the standard deviation.
template <typename A>
struct Affine {
  A mean, scale, shift;
};

template <typename A>
BATCHNORM_EXT_HD Affine<A> make_affine(double mean, double invstd, double weight, double bias) {
  const A rounded = static_cast<A>(mean);
  const double scale = weight * invstd;
  return {rounded, static_cast<A>(scale), static_cast<A>(bias - (mean - rounded) * scale)};
}

// The gradient of y = weight * xhat + bias, xhat = (x - mean) * invstd, where mean and invstd depend on x
// (Ioffe & Szegedy 2015, section 3, the three lines for dl/dsigma^2, dl/dmu, dl/dx put together):
//   dx = weight * invstd * (dy - avg(dy) - xhat * avg(dy * xhat))
//      = scale * (dy - (x - mean) * slope - offset)
// The factors are kept apart because invstd^2 may leave the range of fp32 where invstd does not.
template <typename A>
struct GradAffine {
  A mean, slope, offset, scale;
};

// What one channel's sums say: dot is sum(dy * (x - rounded mean)), sum is sum(dy).
struct GradSums {
  double dbias, dweight;
};

BATCHNORM_EXT_HD GradSums make_grad_sums(double sum, double dot, double mean, double rounded_mean, double invstd) {
  return {sum, (dot - (mean - rounded_mean) * sum) * invstd};
}

template <typename A>
BATCHNORM_EXT_HD GradAffine<A> make_grad_affine(GradSums sums, double count, double mean, double invstd,
                                                double weight) {
  const A rounded = static_cast<A>(mean);
  const double slope = invstd * (sums.dweight / count);
  const double offset = sums.dbias / count - (mean - rounded) * slope;
  return {rounded, static_cast<A>(slope), static_cast<A>(offset), static_cast<A>(weight * invstd)};
}

}  // namespace batchnorm_ext
