// Activations of vectors. Piecewise linear ones take a few instructions, which are inlined. The others are called:
// inlined, they would multiply the size of every loop, and their arithmetic takes much longer than a call.
#pragma once

#include "../activation.h"
#include "vec.h"

namespace batchnorm_ext::cpu {

template <typename A>
struct VectorMath {
  using V = Vec<A>;
  static V select(const V& which, const V& a, const V& b) { return V::blendv(b, a, which); }
  static V exp(const V& z) { return z.exp(); }
  static V expm1(const V& z) { return z.expm1(); }
  static V tanh(const V& z) { return z.tanh(); }
  static V erf(const V& z) { return z.erf(); }
};

// kCalls: whether value and grad call a function.
template <typename A>
struct PiecewiseActivation : Piecewise<VectorMath<A>> {
  static constexpr bool kCalls = false;
};

// The bounds are rounded to T, as the outputs are that backward compares with them.
template <typename T, typename A = Acc<T>>
PiecewiseActivation<A> piecewise(const Activation& a) {
  const auto all = [](double v) { return Vec<A>(static_cast<A>(v)); };
  return {{all(a.slope), all(static_cast<T>(a.low)), all(static_cast<T>(a.high))}};
}

template <typename A>
class SmoothActivation {
 public:
  static constexpr bool kCalls = true;

  explicit SmoothActivation(const Activation& a) : alpha_(static_cast<A>(a.slope)) {
    with_curve(a.curve, [&]<typename Of>(Of) {
      value_ = [](Vec<A> z, A alpha) { return Of::template value<VectorMath<A>>(z, Vec<A>(alpha)); };
      grad_ = [](Vec<A> dy, Vec<A> z, A alpha) { return Of::template grad<VectorMath<A>>(dy, z, Vec<A>(alpha)); };
    });
  }
  Vec<A> value(const Vec<A>& z) const { return value_(z, alpha_); }
  Vec<A> grad(const Vec<A>& dy, const Vec<A>& z) const { return grad_(dy, z, alpha_); }

 private:
  Vec<A> (*value_)(Vec<A>, A);
  Vec<A> (*grad_)(Vec<A>, Vec<A>, A);
  A alpha_;
};

// z, the argument of an activation, from the input x and its coefficients centre, scale and shift.
template <typename A>
struct OfInput {
  static constexpr int kCoefficients = 3;
  Vec<A> operator()(const Vec<A>* c, const Vec<A>& x) const { return at::vec::fmadd(x - c[0], c[1], c[2]); }
};

// z from x and a residual. Without a residual the last argument is ignored, so that one loop serves both.
template <typename A>
struct OfSum {
  static constexpr int kCoefficients = 3;
  Vec<A> added;  // a mask

  explicit OfSum(bool has_residual) : added(has_residual ? Vec<A>(0) == Vec<A>(0) : Vec<A>(0)) {}
  Vec<A> operator()(const Vec<A>* c, const Vec<A>& x, const Vec<A>& residual) const {
    return OfInput<A>()(c, x) + Vec<A>::blendv(Vec<A>(A(-0.0)), residual, added);
  }
};

// The output of a piecewise linear activation in place of z: the derivative is the same at both.
template <typename A>
struct OfOutput {
  static constexpr int kCoefficients = 0;
  Vec<A> operator()(const Vec<A>*, const Vec<A>&, const Vec<A>& y) const { return y; }
};

}  // namespace batchnorm_ext::cpu
