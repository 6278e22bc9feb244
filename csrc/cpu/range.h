// Cells whose sums left the range of the lanes, found by what is wrong with the sums, and summed once more.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../geometry.h"
#include "../resum.h"

namespace batchnorm_ext::cpu {

// Calls mend(i) for each i with lost(i). Usually there is none: the first loop only counts, so that it vectorizes.
template <typename Lost, typename Mend>
void mend_where(int64_t width, const Lost& lost, const Mend& mend) {
  int64_t found = 0;
  for (int64_t i = 0; i < width; ++i) found += lost(i);
  for (int64_t i = 0; found > 0; ++i) {
    if (!lost(i)) continue;
    mend(i);
    --found;
  }
}

// Out of line: inlined, they would keep the compiler from inlining what every cell needs.
template <typename T>
[[gnu::noinline, gnu::cold]] Moments resum_moments(const Geometry& g, const T* x, int64_t cell, int64_t cells = 1) {
  constexpr double unit = std::is_same_v<T, double> ? kShrink : 1;
  return batchnorm_ext::resum_moments(cells * g.cell_count(), unit,
                                      [&](int64_t i) { return static_cast<double>(x[g.element_of(cell, i)]); });
}

template <typename T, typename Grad, typename... More>
[[gnu::noinline, gnu::cold]] GradSums resum_grads(const Geometry& g, const Grad& grad, int64_t cell, double mean,
                                                  double invstd, const T* dy, const T* x, const More*... more) {
  const auto value = [&](const T* from, int64_t i) { return static_cast<double>(from[g.element_of(cell, i)]); };
  return batchnorm_ext::resum_grads(
      g.cell_count(), mean, invstd,
      [&](int64_t i) { return grad.at(cell, value(dy, i), value(x, i), value(more, i)...); },
      [&](int64_t i) { return value(x, i); });
}

// Squares of fp32 values overflow beyond 1e19 and underflow below 1e-19. Either leaves m2 infinite, NaN, negative or
// below n * 1e-30. A constant cell has m2 == 0 and is not affected. One that holds inf or nan is summed again for
// its mean.
template <typename T>
void mend_moments(const Geometry& g, const T* x, int64_t first, int64_t width, double* mean, double* m2) {
  const double least = std::is_same_v<T, double> ? -std::numeric_limits<double>::infinity()
                                                 : static_cast<double>(g.cell_count()) * 1e-30;
  const auto lost = [&](int64_t i) { return (!is_finite(m2[i])) | ((m2[i] != 0) & (m2[i] < least)); };
  mend_where(width, lost, [&](int64_t i) {
    const Moments again = resum_moments(g, x, first + i);
    mean[i] = again.mean;
    m2[i] = again.m2();
  });
  for (int64_t i = 0; i < width; ++i) m2[i] = m2[i] < 0 ? 0 : m2[i];
}

// What m2 cannot tell: the invstd of fp64 values whose squares overflow, and the variance of fp32 values whose squares
// all vanish, next to an eps that is as small. Statistics [first, first + width).
template <typename T>
void mend_spread(const Geometry& g, const T* x, int64_t first, int64_t width, double eps, double* mean, double* var,
                 double* invstd) {
  constexpr bool overflows = std::is_same_v<T, double>;
  if (!overflows && eps >= 1e-30) return;
  const auto lost = [&](int64_t i) { return overflows ? !is_finite(var[i]) : var[i] == 0; };
  mend_where(width, lost, [&](int64_t i) {
    const double n = static_cast<double>(g.count());
    const Moments again = resum_moments(g, x, (first + i) * g.per_stat, g.per_stat);
    mean[i] = again.mean;
    var[i] = again.m2_over(n);
    invstd[i] = again.invstd(n, eps);
  });
}

template <typename T, typename A, typename Grad, typename... More>
void mend_grads(const Geometry& g, const Grad& grad, int64_t first, int64_t width, const double* mean,
                const double* invstd, double* dbias, double* dweight, const T* dy, const T* x, const More*... more) {
  const double n = static_cast<double>(g.cell_count());
  const auto lost = [&](int64_t i) {
    return grads_lost<A>({dbias[i], dweight[i]}, n, mean[first + i], invstd[first + i]);
  };
  mend_where(width, lost, [&](int64_t i) {
    const GradSums again = resum_grads(g, grad, first + i, mean[first + i], invstd[first + i], dy, x, more...);
    dbias[i] = again.dbias;
    dweight[i] = again.dweight;
  });
}

}  // namespace batchnorm_ext::cpu
