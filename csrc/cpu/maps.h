// What the maps of the norms do to an element, and the coefficients of each cell that they need.
#pragma once

#include <cassert>
#include <cstdint>
#include <limits>
#include <memory>

#include "../math.h"
#include "activate.h"
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
  Vec<A> operator()(const auto& c, const Vec<A>& x) const { return OfInput<A>::z(c, 0, x); }
};

// y = activation(z), with z from the same coefficients (activate.h)
template <typename Z, typename Act, typename A>
struct NormalizeActivate {
  static constexpr int kCoefficients = 3;
  static constexpr int kVectors = Act::kVectors;
  Act act;
  template <int V>
  std::array<Block<A, V>, 1> operator()(const auto& c, const Block<A, V>& x, const auto&... residual) const {
    return {act.value(make_block<A, V>(
        [&](int q) __attribute__((always_inline)) { return Z::z(c(q), 0, x.v[q], residual.v[q]...); }))};
  }
};

// dx = scale * (dy - (x - centre) * slope - offset)
template <typename A>
struct NormalizeGrad {
  static constexpr int kCoefficients = 4;
  Vec<A> operator()(const auto& c, const Vec<A>& dy, const Vec<A>& x) const {
    return c[3] * (dy - at::vec::fmadd(x - c[0], c[1], c[2]));
  }
};

// dx = scale * (weight * dy - (x - centre) * slope - offset), where a statistic covers channels of different weights
template <typename A>
struct GroupGrad {
  static constexpr int kCoefficients = 5;
  Vec<A> operator()(const auto& c, const Vec<A>& dy, const Vec<A>& x) const {
    return c[3] * at::vec::fmsub(c[4], dy, at::vec::fmadd(x - c[0], c[1], c[2]));
  }
};

// dx = scale * dy
template <typename A>
struct Scale {
  static constexpr int kCoefficients = 1;
  Vec<A> operator()(const auto& c, const Vec<A>& dy) const { return c[0] * dy; }
};

// Where the gradient of z is written to, for the map: nowhere if null. `streams`: past the caches.
template <typename T>
struct Kept {
  T* to = nullptr;
  bool streams = false;
};

// g = dy * activation'(z), for the sums. `more`: what z takes beside x.
template <typename Z, typename Act, typename T>
struct ActivatedGrad {
  using A = Acc<T>;
  static constexpr int kCoefficients = Z::kCoefficients;
  Act act;
  const A* const* rows;  // the coefficients of each cell
  const T* first_dy;
  Kept<T> kept;

  ActivatedGrad from(int64_t) const { return *this; }
  // Keeps the gradients of the block whose dy is at `from`. Blocks that were read in another order have no store().
  void keep(const auto& part, const T* from, const auto& g) const {
    if constexpr (requires { part.store(kept.to, g, kept.streams); }) {
      if (kept.to != nullptr) part.store(kept.to + (from - first_dy), g, kept.streams);
    } else {
      assert(kept.to == nullptr);
    }
  }
  template <int V>
  Block<A, V> operator()(const auto& c, int64_t, const Block<A, V>& dy, const Block<A, V>& x,
                         const auto&... more) const {
    return act.grad(dy, make_block<A, V>(
                            [&](int q) __attribute__((always_inline)) { return Z::z(c(q), 0, x.v[q], more.v[q]...); }));
  }
  double at(int64_t cell, double dy, double x, auto... more) const {
    const auto all = [](double v) { return Block<A, 1>{Vec<A>(static_cast<A>(v))}; };
    Coefficients<A, kCoefficients> c;
    for (int k = 0; k < kCoefficients; ++k) c[k] = Vec<A>(rows[k][cell]);
    A lanes[Vec<A>::size()];
    (*this)([&](int) -> const auto& { return c; }, 0, all(dy), all(x), all(more)...).v[0].store(lanes);
    return lanes[0];
  }
};

// dx = scale * (weight * g - (x - centre) * slope - offset), in evaluation dx = scale * weight * g; and, as a second
// output, g itself, the gradient of a residual. The last coefficients are those of z.
template <typename Z, typename Act, typename A, size_t kOutputs>
struct ActivatedNormalizeGrad {
  static constexpr int kOfDx = GroupGrad<A>::kCoefficients, kCoefficients = kOfDx + Z::kCoefficients;
  static constexpr int kVectors = Act::kVectors;
  Act act;
  Vec<A> training;  // a mask

  template <int V>
  std::array<Block<A, V>, kOutputs> operator()(const auto& of, const Block<A, V>& dy, const Block<A, V>& x,
                                               const auto&... more) const {
    const Block<A, V> g = act.grad(dy, make_block<A, V>([&](int q) __attribute__((always_inline)) {
                                     return Z::z(of(q), kOfDx, x.v[q], more.v[q]...);
                                   }));
    const Block<A, V> dx = make_block<A, V>([&](int q) __attribute__((always_inline)) {
      const auto& c = of(q);
      return c[3] * at::vec::fmsub(c[4], g.v[q], training & at::vec::fmadd(x.v[q] - c[0], c[1], c[2]));
    });
    if constexpr (kOutputs == 1)
      return {dx};
    else
      return {dx, g};
  }
};

// Sets the coefficients of cells [first, first + width). `count`: number of elements that mean and invstd were
// computed from, if the elements to be mapped are among them; otherwise infinity. The rows are separate, so that the
// compiler can vectorize over cells. `row`: the first of the three.
template <int row = 0, typename A, int kCount>
void set_normalize(CoefficientTable<A, kCount>& table, int64_t first, int64_t width, const double* mean,
                   const double* invstd, const double* weight, const double* bias,
                   double count = std::numeric_limits<double>::infinity()) {
  A *const centre = table.row(row), *const scale = table.row(row + 1), *const shift = table.row(row + 2);
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
template <typename A, int kCount>
void set_normalize_grad(CoefficientTable<A, kCount>& table, int64_t first, int64_t width, const double* dbias,
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
template <typename A, int kCount>
void set_group_grad(CoefficientTable<A, kCount>& table, int64_t per_stat, int64_t first, int64_t width,
                    const double* dbias, const double* dweight, double count, const double* mean, const double* invstd,
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
