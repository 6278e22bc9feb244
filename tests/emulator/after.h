// A residual and an activation behind the norm, as the settings name them, and both in higher precision.
#pragma once

#include <cmath>
#include <cstdint>

#include "checks.h"
#include "cuda/activated.cuh"
#include "settings.h"

namespace batchnorm_ext::cuda {

struct ExactMath {
  using V = Exact;
  static Exact select(bool which, Exact a, Exact b) { return which ? a : b; }
  static Exact exp(Exact z) { return std::exp(z); }
};

template <typename T>
struct After {
  const std::string& name;
  const T* residual;  // none: nothing is added

  After(const Settings& settings, const T* values)
      : name(settings.text("activation")), residual(settings.number("residual") != 0 ? values : nullptr) {}

  bool exists() const { return !name.empty(); }
  PackActivation<T> activation() const {
    return PackActivation<T>(is_leaky() ? Activation{Curve::kPiecewise, kSlope} : Activation{Curve::kSilu});
  }

  Exact added(int64_t i) const { return residual == nullptr ? 0 : widen(residual[i]); }
  Exact value(Exact z) const {
    return !exists() ? z : is_leaky() ? leaky().value(z) : Silu::value<ExactMath>(z, Exact(0));
  }

  // Of element i, where z is without the residual. What backward is given as the residual of leaky_relu counts as its
  // output.
  Exact grad(Exact dy, Exact z, int64_t i) const {
    if (!exists()) return dy;
    return is_leaky() ? leaky().grad(dy, added(i)) : Silu::grad<ExactMath>(dy, Exact(z + added(i)), Exact(0));
  }

 private:
  static constexpr double kSlope = 0.25;
  bool is_leaky() const { return name == "leaky_relu"; }
  static Piecewise<ExactMath> leaky() { return {kSlope, NAN, NAN}; }
};

}  // namespace batchnorm_ext::cuda
