// From lanes to statistics, in fp64. The order of every sum is fixed by the shape alone, so that results do not depend
// on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "lanes.h"

namespace batchnorm_ext::cpu {

__attribute__((always_inline)) inline double sum_of(const double* p, int64_t n) {
  constexpr int64_t width = Vec<double>::size();
  Vec<double> even(0), odd(0);
  for (; n >= 2 * width; n -= 2 * width, p += 2 * width) {
    even = even + Vec<double>::loadu(p);
    odd = odd + Vec<double>::loadu(p + width);
  }
  if (n > 0) even = even + Vec<double>::loadu(p, std::min(n, width));
  if (n > width) odd = odd + Vec<double>::loadu(p + width, n - width);
  return sum_of_lanes(even + odd);
}

template <typename A, int V>
__attribute__((always_inline)) inline double sum_of_vectors(const Vec<A> (&partial)[V]) {
  Vec<double> even(0), odd(0);
  for (int q = 0; q < V; ++q) {
    if constexpr (std::is_same_v<A, double>) {
      Vec<double>& sum = q % 2 == 0 ? even : odd;
      sum = sum + partial[q];
    } else {
      const auto [low, high] = widen_lanes(partial[q]);
      even = even + low;
      odd = odd + high;
    }
  }
  return sum_of_lanes(even + odd);
}

// Arrays of moments about the centres k: n values with s1 = sum(v - k) and s2 = sum((v - k)^2).
struct MomentSets {
  double *k, *s1, *s2, *n;

  template <typename A, Order order>
  void take(int64_t at, const LaneMoments<A, order>& lanes, int64_t width) const {
    double second[kLanes<A>];
    flush(lanes.s2, lanes.m2, lanes.first_tile(), second);
#pragma GCC ivdep
    for (int64_t l = 0; l < width; ++l) {
      k[at + l] = lanes.k.values[l];
      s1[at + l] = lanes.s1.values[l];
      s2[at + l] = second[l];
      n[at + l] = static_cast<double>(lanes.n);
    }
  }

  // Sets [into, into + width) take in sets [from, from + width), about their own centres.
  void join(int64_t into, int64_t from, int64_t width) const {
#pragma GCC ivdep
    for (int64_t l = 0; l < width; ++l) {
      const int64_t i = into + l, j = from + l;
      const double e = k[j] - k[i];
      s2[i] += s2[j] + e * (2 * s1[j] + n[j] * e);
      s1[i] += s1[j] + n[j] * e;
      n[i] += n[j];
    }
  }

  // Folds sets [at, at + width) into the first of them, about its centre. That centre is the mean of some of the
  // elements: were it far from the others, so would these elements be, and m2 as large.
  void fold(int64_t at, int64_t width) const {
    using V = Vec<double>;
    const V centre(k[at]);
    V sum(0), squares(0), count(0);
    const auto add = [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
      const V e = V::loadu(k + i, lanes) - centre, first = V::loadu(s1 + i, lanes), some = V::loadu(n + i, lanes);
      const V moved = at::vec::fmadd(some, e, first);
      sum = sum + moved;
      squares = squares + at::vec::fmadd(e, first + moved, V::loadu(s2 + i, lanes));
      count = count + some;
    };
    int64_t i = at;
    for (; i + V::size() <= at + width; i += V::size()) add(i, V::size());
    if (i < at + width) add(i, at + width - i);
    s1[at] = sum_of_lanes(sum);
    s2[at] = sum_of_lanes(squares);
    n[at] = sum_of_lanes(count);
  }

  // Mean and m2 of `count` sets, `step` apart.
  void results(int64_t step, int64_t count, double* mean, double* m2) const {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = i * step;
      const double shift = s1[at] / n[at];
      mean[i] = k[at] + shift;
      m2[i] = s2[at] - s1[at] * shift;
    }
  }
};

}  // namespace batchnorm_ext::cpu
