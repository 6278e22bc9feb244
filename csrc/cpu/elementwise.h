// Statistics whose elements have parameters of their own: layer normalization, and group normalization of (N, C). In
// memory a statistic is a row, along which the parameters run (along.h); or, over the channels of NCHW, a column
// (across.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>

#include "../geometry.h"
#include "../layout.h"
#include "../math.h"
#include "across.h"
#include "along.h"
#include "column.h"
#include "maps.h"
#include "passes.h"
#include "row.h"
#include "scratch.h"

namespace batchnorm_ext::cpu {

inline bool is_rowwise(const Geometry& g) { return g.per_stat > 1 && g.cell_count() == 1; }

// The geometry of x. Where parameters run along a statistic in memory, the statistic is taken for a row of channels.
inline Geometry arranged(const at::Tensor& x, const Domain& domain) {
  const Geometry g = geometry_of(x, domain);
  return domain.parameter_dim == 2 && g.outer == 1 ? Geometry{1, g.inner, 1, g.cells(), g.inner} : g;
}

// Whether the elements of a statistic have parameters of their own.
inline bool has_parameters_within(const Geometry& g, const Domain& domain) {
  return domain.parameter_dim == 2 || is_rowwise(g);
}

// y = xhat * weight + bias, xhat = (x - centre) * scale + shift
template <typename A>
struct NormalizeRow {
  static constexpr int kCoefficients = 3, kParameters = 2;
  Vec<A> operator()(const auto& c, const auto& p, const Vec<A>& x) const {
    return at::vec::fmadd(at::vec::fmadd(x - c[0], c[1], c[2]), p[0], p[1]);
  }
};

// Without `centred` the mean counts as 0: root mean square normalization.
template <typename T>
class ElementwiseForward {
  using A = Acc<T>;

 public:
  ElementwiseForward(const Geometry& geometry, int64_t count, const double* weight, const double* bias)
      : g(geometry), parameters(count), rows(g.stats()) {
    for (int64_t i = 0; i < count; ++i) {
      parameters.row(0)[i] = static_cast<A>(weight[i]);
      parameters.row(1)[i] = static_cast<A>(bias[i]);
    }
  }

  // Also sets mean and invstd of each row.
  void run(const T* x, T* y, bool centred, double eps, double* mean, double* invstd) {
    const double n = static_cast<double>(g.count());
    const auto finish = [&](int64_t first, int64_t width, const double* means, const double* m2) {
      std::unique_ptr<double[]> var(new double[width]);
      for (int64_t i = 0; i < width; ++i) {
        mean[first + i] = centred ? means[i] : 0;
        var[i] = m2[i] / n + (centred ? 0 : means[i] * means[i]);
        invstd[first + i] = 1 / std::sqrt(var[i] + eps);
      }
      if (centred) mend_spread(g, x, first, width, eps, mean + first, var.get(), invstd + first);
      set_coefficients(first, width, mean, invstd, n);
    };
    const auto reduce_and_map = [&](const auto& pattern) {
      with_streaming<T>(g, [&](auto streaming) {
        const auto map = [&](int64_t block, int64_t chunk, Scratch&) {
          pattern.template map_along<streaming.value>(block, chunk, NormalizeRow<A>(), rows.view(), parameters.view(),
                                                      g.channels / g.per_stat, std::array{y}, x);
        };
        reduce_moments(pattern, x, finish, map);
      });
    };
    if (is_rowwise(g))
      reduce_and_map(Row<T>(g.merged()));
    else
      reduce_and_map(Column<T>(g, /*may_fold=*/false));
  }

 private:
  void set_coefficients(int64_t first, int64_t width, const double* mean, const double* invstd, double n) {
    for (int64_t r = first; r < first + width; ++r) {
      const double about = centre_of<A>(mean[r], invstd[r], n, invstd[r]);
      const Affine<A> affine = make_affine<A>(about, mean[r], invstd[r], 1, 0);
      rows.row(0)[r] = affine.centre;
      rows.row(1)[r] = affine.scale;
      rows.row(2)[r] = affine.shift;
    }
  }

  const Geometry g;
  CoefficientTable<A, 2> parameters;
  CoefficientTable<A, 3> rows;
};

// dx may be null. Sets the gradients of all parameters.
template <typename T>
void elementwise_backward(const Geometry& g, const double* weight, const T* dy, const T* x, T* dx, bool centred,
                          const double* mean, const double* invstd, double* dweight, double* dbias) {
  if (is_rowwise(g))
    AlongBackward<T>(g, weight).run(dy, x, dx, centred, mean, invstd, dweight, dbias);
  else
    AcrossBackward<T>(g, weight).run(dy, x, dx, centred, mean, invstd, dweight, dbias);
}

}  // namespace batchnorm_ext::cpu
