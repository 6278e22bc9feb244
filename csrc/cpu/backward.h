// The backward of what has one weight and one bias per cell: sums and map at once, or one of the two alone.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>

#include "../geometry.h"
#include "activate.h"
#include "maps.h"
#include "passes.h"
#include "per_channel.h"

namespace batchnorm_ext::cpu {

// A backward: pointers, geometry, and what its steps hand on. One value per cell: mean, invstd, weight, bias, the sums
// that are the gradients of the parameters, the coefficients.
template <typename T>
struct Backward {
  using A = Acc<T>;

  const Geometry geometry;
  const T *const dy, *const x, *const residual;  // null: there is none
  T *const dx, *const dresidual;                 // null: not wanted
  const bool training, centred;
  const double count;  // of the elements that a statistic was computed from
  const Activation activation;
  const double *const mean, *const invstd;
  const Channels weight, bias;    // not read for the sums alone without an activation
  double *const dbias, *dweight;  // null: given, or not wanted
  // Of dx, as GroupGrad has them, and of z, as Normalize.
  static constexpr int kOfDx = GroupGrad<A>::kCoefficients, kOfZ = Normalize<A>::kCoefficients;
  CoefficientTable<A, kOfDx + kOfZ> table{geometry.cells()};
  Kept<T> kept = {};  // where the sums leave the gradient of z

  // dx in evaluation, or dresidual alone.
  void map_without_sums() {
    if (is_activated()) {
      set_activation();
      for (int i = 0; i < 3; ++i) std::fill_n(table.row(i), geometry.cells(), A(0));
    }
    for (int64_t c = 0; c < geometry.cells(); ++c) table.row(3)[c] = static_cast<A>(weight[c] * invstd[c]);
    map_all_cells();
  }

  // dx by given sums.
  void map_by(const double* sums, const double* dots) {
    set_activation();
    set_coefficients(0, geometry.cells(), sums, dots);
    map_all_cells();
  }

  // dbias and dweight alone.
  void reduce() {
    set_activation();
    with_pattern<T>(geometry, [&](const auto& pattern) {
      reduce_cells(pattern, [](int64_t, int64_t, const double*, const double*) {}, kNoMap);
    });
  }

  void reduce_and_map() {
    kept = place_of_grad();
    set_activation();
    const auto then = [&](int64_t first, int64_t width, const double* sums, const double* dots) {
      set_coefficients(first, width, sums, dots);
    };
    with_pattern<T>(geometry, [&](const auto& pattern) {
      stream_if(streams(), [&](auto streaming) {
        const auto map = [&](int64_t block, int64_t chunk, Scratch& scratch) {
          if (dx == nullptr) return;
          with_map([&](const auto& op, const A* const* coefficients, const auto& out, const auto*... in) {
            pattern.template map<streaming.value>(block, chunk, op, coefficients, scratch, out, in...);
          });
        };
        reduce_cells(pattern, then, map);
      });
    });
  }

 private:
  bool streams() const {
    const bool one_output = dresidual == nullptr || kept.to != nullptr;
    return pattern_streams<T>(geometry) && (one_output || share_alignment(std::array{dx, dresidual}));
  }

  bool is_activated() const { return activation.curve != Curve::kNone; }

  // Where the sums leave the gradient of z, so that the map need not compute it again: in dresidual, which it is, or in
  // dx, which the map overwrites. Nowhere if it would be rounded, if rows compute it faster than they read it, or if it
  // leaves the caches, unless columns write dresidual anyway.
  Kept<T> place_of_grad() const {
    const bool rows = has_long_runs(geometry), simple = activation.curve == Curve::kPiecewise;
    const bool exact = std::is_same_v<T, A> || (simple && activation.slope == 1);
    const bool storable = std::is_same_v<T, A> || !rows;  // see ActivatedGrad::keep
    if (!is_activated() || dx == nullptr || !exact || !storable || (rows && simple)) return {};
    if (pattern_streams<T>(geometry)) return {rows ? nullptr : dresidual, true};
    return {dresidual != nullptr ? dresidual : dx};
  }

  // Sets dbias and dweight of each cell, then(first, width, dbias, dweight) follows, then the map.
  template <typename Pattern, typename Then>
  void reduce_cells(const Pattern& pattern, const Then& then, Map map) {
    A* const centre = table.row(0);
    for (int64_t c = 0; c < geometry.cells(); ++c) centre[c] = static_cast<A>(mean[c]);
    const auto finish = [&](int64_t first, int64_t width, const double* sums, const double* dots) {
      std::copy_n(sums, width, dbias + first);
      std::copy_n(dots, width, dweight + first);
      then(first, width, sums, dots);
    };
    with_grad([&](const auto& grad, const auto*... in) {
      reduce_grads(pattern, grad, Centres<A>{centre, mean, invstd}, finish, map, in...);
    });
  }

  // f(grad, inputs...), where grad makes what enters the sums of the inputs.
  template <typename F>
  void with_grad(const F& f) const {
    const A* const* const rows = table.view() + kOfDx;
    if (!is_activated()) return f(PlainGrad(), dy, x);
    with_activation<T>(activation, [&]<typename Act>(const Act& act) {
      if (residual == nullptr)
        f(ActivatedGrad<OfInput<A>, Act, T>{act, rows, dy, kept}, dy, x);
      else
        f(ActivatedGrad<typename Act::OfSaved, Act, T>{act, rows, dy, kept}, dy, x, residual);
    });
  }

  void map_all_cells() const {
    with_map([&](const auto& op, const A* const* coefficients, const auto& out, const auto*... in) {
      map_tensor(geometry, op, coefficients, out, in...);
    });
  }

  // f(op, coefficients, outputs, inputs...) with the map's op: dx, and the gradient of a residual unless it was kept.
  template <typename F>
  void with_map(const F& f) const {
    const A* const* const c = table.view();
    const std::array<T*, 1> one{dx};
    const std::array<T*, 2> both{dx, dresidual};
    const T* const g = is_activated() ? kept.to : dy;
    if (g != nullptr) {
      if (!training) return f(Scale<A>(), c + 3, one, g);
      if (geometry.per_stat > 1) return f(GroupGrad<A>(), c, one, g, x);
      return f(NormalizeGrad<A>(), c, one, g, x);
    }
    const Vec<A> zero(0), mask = training ? zero == zero : zero;
    with_activation<T>(activation, [&]<typename Act>(const Act& act) {
      if (residual == nullptr)
        f(ActivatedNormalizeGrad<OfInput<A>, Act, A, 1>{act, mask}, c, one, dy, x);
      else
        f(ActivatedNormalizeGrad<typename Act::OfSaved, Act, A, 2>{act, mask}, c, both, dy, x, residual);
    });
  }

  // The coefficients of z. They are those of the forward, so that z has the same bits.
  void set_activation() {
    if (!is_activated()) return;
    const double own = training ? count : std::numeric_limits<double>::infinity();
    set_normalize<kOfDx>(table, 0, geometry.cells(), mean, invstd, weight.get(), bias.get(), own);
    std::fill_n(table.row(4), geometry.cells(), A(1));  // the weight of dy, where it is not in the scale
  }

  void set_coefficients(int64_t first, int64_t width, const double* sums, const double* dots) {
    const Channels none(centred ? nullptr : new double[width]());  // where the mean is no function of x
    if (!centred) sums = none.get();
    if (geometry.per_stat > 1)
      set_group_grad(table, geometry.per_stat, first, width, sums, dots, count, mean, invstd, weight.get());
    else
      set_normalize_grad(table, first, width, sums, dots, count, mean, invstd, weight.get());
  }
};

}  // namespace batchnorm_ext::cpu
