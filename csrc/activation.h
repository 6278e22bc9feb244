// Activations: values y(z) and derivatives y'(z), for any kind of number. M has its type and the functions of it that
// the formulas need: cpu/activate.h for vectors.
//
// A new activation is a row of the tables in activation_table.h and batchnorm_ext/_activations.py and, unless it is
// piecewise linear, a struct of its two functions and a line of with_curve().
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "host_device.h"

namespace batchnorm_ext {

// The shape of an activation. kPiecewise: all that are linear between two bounds, with another slope below zero, such
// as relu and leaky_relu.
enum class Curve : int32_t {
  kNone,
  kPiecewise,
  kElu,
  kSilu,
  kGelu,
  kGeluTanh,
  kHardswish,
  kHardsigmoid,
  kMish,
  kSigmoid,
  kTanh
};

// kPiecewise: z, or slope * z below zero, kept between low and high; a bound of NaN is none. kElu: `slope` is alpha.
struct Activation {
  Curve curve = Curve::kNone;
  double slope = 1, low = std::numeric_limits<double>::quiet_NaN(), high = low;
};

// True without an activation, too.
BATCHNORM_EXT_HD bool is_piecewise_linear(const Activation& a) {
  return a.curve == Curve::kNone || a.curve == Curve::kPiecewise;
}

// NaN and zeros of both signs give what they give in PyTorch: the value of NaN is NaN, its derivative 0 if there is an
// upper bound and the slope otherwise.
template <typename M>
struct Piecewise {
  using V = typename M::V;
  V slope, low, high;

  BATCHNORM_EXT_HD V value(const V& z) const {
    const V line = M::select(z > V(0), z, slope * z);
    return M::select(z < low, low, M::select(z > high, high, line));
  }
  // dy * y'(z): exactly 0 where z is cut, whatever dy is.
  BATCHNORM_EXT_HD V grad(const V& dy, const V& z) const {
    const V kept = M::select(z <= low, V(0), M::select(z > V(0), dy, slope * dy));
    return M::select(z < high, kept, M::select(high == high, V(0), kept));
  }
};

template <typename M>
BATCHNORM_EXT_HD typename M::V sigmoid_of(const typename M::V& z) {
  using V = typename M::V;
  return V(1) / (V(1) + M::exp(V(0) - z));
}

// The other curves: value(z) is y(z), grad(dy, z) is dy * y'(z). The last argument of both is alpha, which Elu alone
// reads.
struct Elu {
  template <typename M, typename V = typename M::V>
  BATCHNORM_EXT_HD static V value(const V& z, const V& alpha) {
    return M::select(z > V(0), z, alpha * M::expm1(z));
  }
  template <typename M, typename V = typename M::V>
  BATCHNORM_EXT_HD static V grad(const V& dy, const V& z, const V& alpha) {
    return M::select(z > V(0), dy, dy * (alpha * M::exp(z)));
  }
};

struct Silu {
  template <typename M, typename V = typename M::V>
  BATCHNORM_EXT_HD static V value(const V& z, const V&) {
    return z / (V(1) + M::exp(V(0) - z));
  }
  template <typename M, typename V = typename M::V>
  BATCHNORM_EXT_HD static V grad(const V& dy, const V& z, const V&) {
    const V s = sigmoid_of<M>(z);
    return dy * (s * (V(1) + z * (V(1) - s)));
  }
};

// Hendrycks & Gimpel 2016, "Gaussian error linear units", eq. 1; its approximation is GeluTanh. M::normal_cdf(z, e) is
// the distribution function of the standard normal distribution. Vectors compute it from e = exp(-z^2 / 2), which the
// derivative needs as well.
struct Gelu {
  static constexpr double kDensity = 0.39894228040143268;  // 1 / sqrt(2 pi)

  template <typename M, typename V = typename M::V>
  BATCHNORM_EXT_HD static V value(const V& z, const V&) {
    return z * M::normal_cdf(z, M::exp(V(-0.5) * z * z));
  }
  template <typename M, typename V = typename M::V>
  BATCHNORM_EXT_HD static V grad(const V& dy, const V& z, const V&) {
    const V e = M::exp(V(-0.5) * z * z);
    return dy * (M::normal_cdf(z, e) + z * (V(kDensity) * e));
  }
};

// With (1 + tanh(u)) / 2 as the sigmoid of 2 * u.
struct GeluTanh {
  static constexpr double kScale = 0.79788456080286536, kCubic = 0.044715;  // sqrt(2 / pi)

  template <typename M, typename V = typename M::V>
  BATCHNORM_EXT_HD static V gate(const V& z) {
    return sigmoid_of<M>(V(2 * kScale) * z + V(2 * kScale * kCubic) * z * z * z);
  }
  template <typename M, typename V = typename M::V>
  BATCHNORM_EXT_HD static V value(const V& z, const V&) {
    return z * gate<M>(z);
  }
  template <typename M, typename V = typename M::V>
  BATCHNORM_EXT_HD static V grad(const V& dy, const V& z, const V&) {
    const V s = gate<M>(z);
    return dy * (s + z * s * (V(1) - s) * (V(2 * kScale) + V(6 * kScale * kCubic) * z * z));
  }
};

struct Hardsigmoid {
  static constexpr double kSixth = 1. / 6;  // 6 times this is 1, rounded as fp32 or as fp64

  template <typename M, typename V = typename M::V>
  BATCHNORM_EXT_HD static V value(const V& z, const V&) {
    const V line = z + V(3);
    return M::select(line <= V(0), V(0), M::select(line >= V(6), V(6), line)) * V(kSixth);
  }
  template <typename M, typename V = typename M::V>
  BATCHNORM_EXT_HD static V grad(const V& dy, const V& z, const V&) {
    return M::select(z > V(-3), M::select(z < V(3), dy * V(kSixth), V(0)), V(0));
  }
};

struct Hardswish {
  template <typename M, typename V = typename M::V>
  BATCHNORM_EXT_HD static V value(const V& z, const V& none) {
    return z * Hardsigmoid::value<M>(z, none);
  }
  template <typename M, typename V = typename M::V>
  BATCHNORM_EXT_HD static V grad(const V& dy, const V& z, const V&) {
    return M::select(z <= V(-3), V(0), M::select(z >= V(3), dy, dy * (z * V(2 * Hardsigmoid::kSixth) + V(0.5))));
  }
};

// z * tanh(log(1 + e)) with e = exp(z) (Misra 2019, "Mish"), where tanh(log(1 + e)) = n / (n + 2), n = e * (e + 2):
// one exponential. From 20 on it is 1, with a slope of 0.
struct Mish {
  template <typename M, typename V = typename M::V>
  BATCHNORM_EXT_HD static V value(const V& z, const V&) {
    const V e = M::exp(M::select(z > V(20), V(20), z)), n = e * (e + V(2));
    return z * (n / (n + V(2)));
  }
  template <typename M, typename V = typename M::V>
  BATCHNORM_EXT_HD static V grad(const V& dy, const V& z, const V&) {
    const V e = M::exp(M::select(z > V(20), V(20), z)), n = e * (e + V(2)), r = V(1) / (n + V(2));
    return dy * (n * r + z * M::select(z > V(20), V(0), V(4) * e * (e + V(1)) * (r * r)));
  }
};

struct Sigmoid {
  template <typename M, typename V = typename M::V>
  BATCHNORM_EXT_HD static V value(const V& z, const V&) {
    return sigmoid_of<M>(z);
  }
  template <typename M, typename V = typename M::V>
  BATCHNORM_EXT_HD static V grad(const V& dy, const V& z, const V&) {
    const V s = sigmoid_of<M>(z);
    return dy * (s * (V(1) - s));
  }
};

struct Tanh {
  template <typename M, typename V = typename M::V>
  BATCHNORM_EXT_HD static V value(const V& z, const V&) {
    return M::tanh(z);
  }
  template <typename M, typename V = typename M::V>
  BATCHNORM_EXT_HD static V grad(const V& dy, const V& z, const V&) {
    const V t = M::tanh(z);
    return dy * (V(1) - t * t);
  }
};

// f(struct of the two functions) for a curve that is not piecewise linear.
template <typename F>
BATCHNORM_EXT_HD auto with_curve(Curve curve, const F& f) {
  switch (curve) {
    case Curve::kElu:
      return f(Elu());
    case Curve::kSilu:
      return f(Silu());
    case Curve::kGelu:
      return f(Gelu());
    case Curve::kGeluTanh:
      return f(GeluTanh());
    case Curve::kHardswish:
      return f(Hardswish());
    case Curve::kHardsigmoid:
      return f(Hardsigmoid());
    case Curve::kMish:
      return f(Mish());
    case Curve::kSigmoid:
      return f(Sigmoid());
    default:
      return f(Tanh());
  }
}

}  // namespace batchnorm_ext
