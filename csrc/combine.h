// A statistic of several cells, from the sums of each of them. Written once for host and device: sum(f) adds up f(i)
// over the cells i, in an order that the shape alone decides.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "math.h"

namespace batchnorm_ext {

// The moments of `cells` cells of n elements each. They are about the first mean, so that a constant has a variance of
// exactly 0.
template <typename Mean, typename M2, typename Sum>
BATCHNORM_EXT_HD Moments combine_moments(int64_t cells, double n, const Mean& mean, const M2& m2, const Sum& sum) {
  const double first = mean(0);
  const double middle = first + sum([&](int64_t i) { return mean(i) - first; }) / static_cast<double>(cells);
  const double within = sum(m2);
  const double between = sum([&](int64_t i) {
    const double d = mean(i) - middle;
    return d * d;
  });
  return {middle, within + n * between};
}

// The sums of weight * dy and of weight * dy * xhat, where each cell has its own weight.
template <typename Weight, typename Dbias, typename Dweight, typename Sum>
BATCHNORM_EXT_HD GradSums combine_grads(const Weight& weight, const Dbias& dbias, const Dweight& dweight,
                                        const Sum& sum) {
  return {sum([&](int64_t i) { return weight(i) * dbias(i); }), sum([&](int64_t i) { return weight(i) * dweight(i); })};
}

}  // namespace batchnorm_ext
