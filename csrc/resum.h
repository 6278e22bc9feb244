// Slow sums of one channel with extended range, for the rare channels whose fast sums overflow or underflow. Written
// once for host and device.
#pragma once

#include "geometry.h"
#include "math.h"

namespace batchnorm_ext {

// fp64 values are multiplied by this power of two before they are squared: the squares of the largest are 1e255 then,
// and those whose squares vanish are 1e160 times smaller than a deviation whose square overflows.
constexpr double kShrink = 0x1p-600;

// A sum that keeps what its additions round off (Ogita, Rump & Oishi 2005, "Accurate sum and dot product", Sum2).
class Sum {
 public:
  BATCHNORM_EXT_HD void add(double value) {
    const double sum = total_ + value, part = sum - total_;
    lost_ += (total_ - (sum - part)) + (value - part);
    total_ = sum;
  }
  BATCHNORM_EXT_HD double value() const { return is_finite(total_) ? total_ + lost_ : total_; }
  BATCHNORM_EXT_HD bool is_nan() const { return total_ != total_; }

 private:
  double total_ = 0, lost_ = 0;
};

// The moments of get(0) ... get(n - 1), scaled by `unit` before squaring.
template <typename Get>
BATCHNORM_EXT_HD Moments resum_moments(int64_t n, double unit, const Get& get) {
  Sum values, deviations, squares;
  for (int64_t i = 0; i < n && !values.is_nan(); ++i) values.add(unit * get(i));
  const double rough = values.value() / static_cast<double>(n);
  if (!is_finite(rough)) return {rough, NAN};
  for (int64_t i = 0; i < n; ++i) {
    const double d = unit * get(i) - rough;
    deviations.add(d);
    squares.add(d * d);
  }
  const double shift = deviations.value() / static_cast<double>(n);
  return {(rough + shift) / unit, squares.value() - deviations.value() * shift, unit};
}

// sum(dy) and sum(dy * xhat) of n elements; dy(i) and x(i) are their values. Terms are scaled by 2^-128 < 1 / n, so
// that neither x - mean nor a partial sum overflows unless the final sum does.
template <typename Dy, typename X>
BATCHNORM_EXT_HD GradSums resum_grads(int64_t n, double mean, double invstd, const Dy& dy, const X& x) {
  constexpr double down = 0x1p-128, up = 0x1p128;
  Sum dbias, dweight;
  for (int64_t i = 0; i < n && !(dbias.is_nan() && dweight.is_nan()); ++i) {
    dbias.add(down * dy(i));
    dweight.add(dy(i) * ((down * x(i) - down * mean) * invstd));
  }
  return {up * dbias.value(), up * dweight.value()};
}

}  // namespace batchnorm_ext
