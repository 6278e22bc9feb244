// What the maps of the norms do to an element, and the coefficients of each cell that they need.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>

#include "../math.h"
#include "combine.h"
#include "range.h"
#include "vec.h"

namespace batchnorm_ext::cpu {

// kCount numbers per cell, each in a row of its own.
template <typename A, int kCount>
class CoefficientTable {
 public:
  explicit CoefficientTable(int64_t cells) : pitch_(cells + kLanes<A>), values_(new A[kCount * pitch_]) {
    for (int i = 0; i < kCount; ++i) view_[i] = values_.get() + i * pitch_;
  }
  A* row(int i) { return values_.get() + i * pitch_; }
  const A* const* view() const { return view_; }

 private:
  int64_t pitch_;  // padded: whole vectors are read from any cell on
  std::unique_ptr<A[]> values_;
  const A* view_[kCount];
};

// y = (x - centre) * scale + shift
template <typename A>
struct Normalize {
  static constexpr int kCoefficients = 3;
  Vec<A> operator()(const Vec<A> (&c)[3], const Vec<A>& x) const { return at::vec::fmadd(x - c[0], c[1], c[2]); }
};

// dx = scale * (dy - (x - centre) * slope - offset)
template <typename A>
struct NormalizeGrad {
  static constexpr int kCoefficients = 4;
  Vec<A> operator()(const Vec<A> (&c)[4], const Vec<A>& dy, const Vec<A>& x) const {
    return c[3] * (dy - at::vec::fmadd(x - c[0], c[1], c[2]));
  }
};

// dx = scale * (weight * dy - (x - centre) * slope - offset), where a statistic covers channels of different weights
template <typename A>
struct GroupGrad {
  static constexpr int kCoefficients = 5;
  Vec<A> operator()(const Vec<A> (&c)[5], const Vec<A>& dy, const Vec<A>& x) const {
    return c[3] * at::vec::fmsub(c[4], dy, at::vec::fmadd(x - c[0], c[1], c[2]));
  }
};

// dx = scale * dy
template <typename A>
struct Scale {
  static constexpr int kCoefficients = 1;
  Vec<A> operator()(const Vec<A> (&c)[1], const Vec<A>& dy) const { return c[0] * dy; }
};

// Sets the coefficients of cells [first, first + width). `count`: number of elements that mean and invstd were
// computed from, if the elements to be mapped are among them; otherwise infinity. The rows are separate, so that the
// compiler can vectorize over cells.
template <typename A>
void set_normalize(CoefficientTable<A, 3>& table, int64_t first, int64_t width, const double* mean,
                   const double* invstd, const double* weight, const double* bias,
                   double count = std::numeric_limits<double>::infinity()) {
  A *const centre = table.row(0), *const scale = table.row(1), *const shift = table.row(2);
  const auto set = [=](int64_t c, double about) __attribute__((always_inline)) {
    const Affine<A> affine = make_affine<A>(about, mean[c], invstd[c], weight[c], bias[c]);
    centre[c] = affine.centre;
    scale[c] = affine.scale;
    shift[c] = affine.shift;
  };
#pragma GCC ivdep
  for (int64_t c = first; c < first + width; ++c) set(c, mean[c]);
  const auto far = [=](int64_t i) { return may_overflow<A>(mean[first + i]); };
  mend_where(width, far, [=](int64_t i) {
    const int64_t c = first + i;
    set(c, centre_of<A>(mean[c], invstd[c], count, weight[c] * invstd[c]));
  });
}

// The same for NormalizeGrad. The sums begin at the first cell.
template <typename A>
void set_normalize_grad(CoefficientTable<A, 5>& table, int64_t first, int64_t width, const double* dbias,
                        const double* dweight, double count, const double* mean, const double* invstd,
                        const double* weight) {
  A *const centre = table.row(0), *const slope = table.row(1), *const offset = table.row(2),
           *const scale = table.row(3);
  const auto set = [=](int64_t i, double about) __attribute__((always_inline)) {
    const int64_t c = first + i;
    const GradAffine<A> affine =
        make_grad_affine<A>(about, {dbias[i], dweight[i]}, count, mean[c], invstd[c], weight[c]);
    centre[c] = affine.centre;
    slope[c] = affine.slope;
    offset[c] = affine.offset;
    scale[c] = affine.scale;
  };
#pragma GCC ivdep
  for (int64_t i = 0; i < width; ++i) set(i, mean[first + i]);
  const auto far = [=](int64_t i) { return may_overflow<A>(mean[first + i]); };
  mend_where(width, far, [=](int64_t i) {
    const int64_t c = first + i;
    set(i, centre_of<A>(mean[c], invstd[c], count, slope_of({dbias[i], dweight[i]}, count, invstd[c])));
  });
}

// The same for GroupGrad: cells [first, first + width) are those of whole statistics of `per_stat` cells each.
template <typename A>
void set_group_grad(CoefficientTable<A, 5>& table, int64_t per_stat, int64_t first, int64_t width, const double* dbias,
                    const double* dweight, double count, const double* mean, const double* invstd,
                    const double* weight) {
  for (int64_t begin = 0; begin < width; begin += per_stat) {
    const auto at = [](const double* of) { return [=](int64_t i) { return of[i]; }; };
    const GradSums sums =
        combine_grads(at(weight + first + begin), at(dbias + begin), at(dweight + begin), sum_of_cells(per_stat));
    const double about = mean[first + begin], inv = invstd[first + begin];
    const GradAffine<A> affine =
        make_grad_affine<A>(centre_of<A>(about, inv, count, slope_of(sums, count, inv)), sums, count, about, inv, 1);
    for (int64_t c = first + begin; c < first + begin + per_stat; ++c) {
      table.row(0)[c] = affine.centre;
      table.row(1)[c] = affine.slope;
      table.row(2)[c] = affine.offset;
      table.row(3)[c] = affine.scale;
      table.row(4)[c] = static_cast<A>(weight[c]);
    }
  }
}

}  // namespace batchnorm_ext::cpu
