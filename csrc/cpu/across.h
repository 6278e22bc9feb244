// The backward of statistics across the channels of NCHW: a cell is a position of a sample, its elements lie one below
// the other, and each row has a weight.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <memory>

#include "../geometry.h"
#include "../math.h"
#include "column.h"
#include "maps.h"
#include "moments.h"
#include "passes.h"
#include "schedule.h"
#include "scratch.h"

namespace batchnorm_ext::cpu {

// dx = invstd * (g - avg(g) - xhat * avg(g * xhat)) with g = weight * dy, and of each row the sums of dy * xhat and dy.
template <typename T>
class AcrossBackward {
  using A = Acc<T>;
  static constexpr int64_t L = kLanes<A>;

 public:
  AcrossBackward(const Geometry& geometry, const double* weight)
      : g(geometry), pattern(g, /*may_fold=*/false), weights(g.outer), cells(g.cells()) {
    std::transform(weight, weight + g.outer, weights.row(0), [](double w) { return static_cast<A>(w); });
  }

  // dx may be null. Sets dweight and dbias of each row.
  void run(const T* dy, const T* x, T* dx, bool centred, const double* mean, const double* invstd, double* dweight,
           double* dbias) {
    const int64_t rows = g.outer, blocks = pattern.blocks();
    std::unique_ptr<double[]> parts(new double[2 * blocks * rows]);
    for (int64_t c = 0; c < g.cells(); ++c) cells.row(0)[c] = static_cast<A>(mean[c]);
    const auto reduce = [&](int64_t block, int64_t chunk, double* sum, double* dot, Scratch& scratch) {
      pattern.grad_sums(dy, x, cells.row(0), block, chunk, sum, dot, scratch, WeightedGrad<A>{weights.row(0)});
    };
    const auto finish = [&](int64_t first, int64_t width, double* sum, double* dot) {
      for (int64_t i = 0; i < width; ++i) {
        const int64_t c = first + i;
        GradSums sums = make_grad_sums(sum[i], dot[i], mean[c], cells.row(0)[c], invstd[c]);
        if (!centred) sums.dbias = 0;
        set_coefficients(c, sums, mean[c], invstd[c]);
      }
    };
    with_streaming<T>(g, [&](auto streaming) {
      const auto map = [&](int64_t block, int64_t chunk, Scratch&) {
        pattern.for_each_row(block, chunk, [&](int64_t at, int64_t columns, int64_t row) {
          double* const sums = parts.get() + 2 * (block * rows + row);
          map_row<streaming.value>(dy + at, x + at, dx == nullptr ? nullptr : dx + at, columns, pattern.first(block),
                                   weights.row(0)[row], sums);
        });
      };
      reduce_then_map(pattern, Schedule(pattern), reduce, add_sums, finish, map);
    });
    std::fill_n(dweight, rows, 0.0);
    std::fill_n(dbias, rows, 0.0);
    for (int64_t i = 0; i < blocks * rows; ++i) {
      dweight[i % rows] += parts[2 * i];
      dbias[i % rows] += parts[2 * i + 1];
    }
  }

 private:
  static void add_sums(double, double, int64_t width, double* a, double* b, const double* a2, const double* b2) {
    for (int64_t c = 0; c < width; ++c) a[c] += a2[c], b[c] += b2[c];
  }

  void set_coefficients(int64_t c, const GradSums& sums, double mean, double invstd) {
    const double n = static_cast<double>(g.count());
    const double about = centre_of<A>(mean, invstd, n, slope_of(sums, n, invstd));
    const GradAffine<A> grad = make_grad_affine<A>(about, sums, n, mean, invstd, 1);
    cells.row(0)[c] = grad.centre;
    cells.row(1)[c] = grad.slope;
    cells.row(2)[c] = grad.offset;
    cells.row(3)[c] = grad.scale;
    cells.row(4)[c] = make_affine<A>(about, mean, invstd, 1, 0).shift;
  }

  // One row of a block, whose first cell is `cell`: writes dx, and sum(dy * xhat) and sum(dy) to `sums`.
  template <bool kStream>
  void map_row(const T* dy, const T* x, T* dx, int64_t columns, int64_t cell, A weight, double* sums) const {
    const Vec<A> w(weight), zero(0);
    Vec<A> dots[kVecs], totals[kVecs];
    for (int q = 0; q < kVecs; ++q) dots[q] = totals[q] = zero;
    const auto step = [&]<int V>(int64_t j, const Block<A, V>& grad, const Block<A, V>& value,
                                 int64_t lanes) __attribute__((always_inline)) {
      return make_block<A, V>([&](int q) __attribute__((always_inline)) {
        const auto of_cell = [&](int i) { return Vec<A>::loadu(cells.view()[i] + cell + j + q * Vec<A>::size()); };
        const Vec<A> d = value.v[q] - of_cell(0), scale = of_cell(3);
        Vec<A> term = grad.v[q] * at::vec::fmadd(d, scale, of_cell(4));
        if (lanes < V * Vec<A>::size())  // beyond the row: 0 * inf would not be 0
          term = Vec<A>::set(zero, term, std::clamp<int64_t>(lanes - q * Vec<A>::size(), 0, Vec<A>::size()));
        dots[q] = dots[q] + term;
        totals[q] = totals[q] + grad.v[q];
        return scale * at::vec::fmsub(w, grad.v[q], at::vec::fmadd(d, of_cell(1), of_cell(2)));
      });
    };
    int64_t j = 0;
    const bool aligned = reinterpret_cast<intptr_t>(dx) % (Vec<T>::size() * sizeof(T)) == 0;
    for (; j + L <= columns; j += L) {
      const auto out = step(j, load_block<kVecs>(dy + j), load_block<kVecs>(x + j), L);
      if (dx == nullptr) continue;
      if (kStream && aligned)
        store_block<kStream>(dx + j, out);
      else
        store_block<false>(dx + j, out);
    }
    constexpr int V = kParts<T>;
    for (; j < columns; j += Vec<T>::size()) {
      const int64_t left = columns - j;
      const auto out = step(j, load_block<V>(dy + j, left), load_block<V>(x + j, left), left);
      if (dx != nullptr)
        narrow<T>(out,
                  [&](const Vec<T>& part, int64_t) { part.store(dx + j, std::min<int64_t>(left, Vec<T>::size())); });
    }
    sums[0] = sum_of_vectors(dots);
    sums[1] = sum_of_vectors(totals);
  }

  const Geometry g;
  const Column<T> pattern;
  CoefficientTable<A, 1> weights;
  CoefficientTable<A, 5> cells;
};

}  // namespace batchnorm_ext::cpu
