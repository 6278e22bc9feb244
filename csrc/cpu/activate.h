// Activations of vectors. The common ones are inlined, since a call empties the registers. Each multiplies the size and
// the compile time of every loop, so the others are called, once for each block.
#pragma once

#include <cmath>
#include <initializer_list>
#include <type_traits>

#include "../activation.h"
#include "vec.h"

namespace batchnorm_ext::cpu {

// The numbers of a formula: vectors that are compared by masks.
template <typename A>
struct Number {
  Vec<A> v;

  Number(const Vec<A>& vector) : v(vector) {}
  explicit Number(double value) : v(static_cast<A>(value)) {}

  friend Number operator+(const Number& a, const Number& b) { return a.v + b.v; }
  friend Number operator-(const Number& a, const Number& b) { return a.v - b.v; }
  friend Number operator*(const Number& a, const Number& b) { return a.v * b.v; }
  friend Number operator/(const Number& a, const Number& b) { return a.v / b.v; }
  friend auto operator>(const Number& a, const Number& b) { return comparable(a.v) > comparable(b.v); }
  friend auto operator<(const Number& a, const Number& b) { return comparable(a.v) < comparable(b.v); }
  friend auto operator>=(const Number& a, const Number& b) { return comparable(a.v) >= comparable(b.v); }
  friend auto operator<=(const Number& a, const Number& b) { return comparable(a.v) <= comparable(b.v); }
  friend auto operator==(const Number& a, const Number& b) { return comparable(a.v) == comparable(b.v); }
};

template <typename A>
struct Selecting {
  using V = Number<A>;
  static V select(const auto& which, const V& a, const V& b) { return cpu::select(which, a.v, b.v); }
};

template <typename A>
struct VectorMath : Selecting<A> {
  using V = Number<A>;
  static V exp(const V& z) { return z.v.exp(); }
  static V expm1(const V& z) { return z.v.expm1(); }
  static V tanh(const V& z) { return z.v.tanh(); }
  static V normal_cdf(const V& z, const V&) { return V(0.5) * V((z * V(-0.70710678118654752)).v.erfc()); }
};

// As the functions of at::vec, which are calls that empty all registers, for each vector; but inlined. All but
// normal_cdf are about as precise, within one to three units in the last place.
template <>
struct VectorMath<float> : Selecting<float> {
  static V exp(const V& z) {
    const auto [n, r] = split(z);
    return times_power_of_two(at::vec::fmadd(r, slope(r), Vec<float>(1)), n);
  }
  // For z <= 0, and of the sign of z.
  static V expm1(const V& z) {
    const auto [n, r] = split(z);
    const Vec<float> one(1), power = times_power_of_two(one, n), s = slope(r);
    return select(V(n) == V(0), z * s, at::vec::fmadd(power, r * s, power - one));
  }
  static V tanh(const V& z) {
    const V m = expm1(V(-2) * z.v.abs()), t = m / (V(2) + m);  // in [-1, 0]
    return select(z > V(0), V(0) - t, select(z < V(0), t, z));
  }
  // For z <= 0: e * t * p(t) with t = 1 / (1 + 0.35 |z|), the form of Hastings ("Approximations for digital computers",
  // 1955), with a minimax polynomial p of degree 8, within 5e-8 of the result. The rounding of z^2 in e adds z^2 / 2
  // roundings.
  static V normal_cdf(const V& z, const V& e) {
    const Vec<float> one(1), t = one / at::vec::fmadd(z.v.abs(), Vec<float>(0.35f), one);
    Vec<float> p(-0.0291639324f);
    for (float c : {0.144060833f, -0.255901926f, 0.15939298f, -0.0232638803f, 0.10557482f, 0.119815494f, 0.139864338f,
                    0.139621261f})
      p = at::vec::fmadd(p, t, Vec<float>(c));
    const V below = e * V(t * p);
    return select(z > V(0), V(one) - below, below);
  }

 private:
  struct Split {
    Vec<float> n, r;
  };

  // z = n * log(2) + r with whole n and |r| <= log(2) / 2. Of a z whose exponential is 0 or infinity, the nearest such;
  // NaN stays. The first part of log(2) has few digits, so that its product with n is exact.
  static Split split(const V& z) {
    using F = Vec<float>;
    const F round(12582912);  // 1.5 * 2^23: a sum with it has no digits after the point
    const F kept = at::vec::clamp(z.v, F(-104), F(89));
    const F n = at::vec::fmadd(kept, F(1.44269504f), round) - round;
    return {n, at::vec::fmadd(n, F(2.12194440e-4f), at::vec::fmadd(n, F(-0.693359375f), kept))};
  }
  // (exp(r) - 1) / r by a minimax polynomial.
  static Vec<float> slope(const Vec<float>& r) {
    Vec<float> p(0.0013950490392744541f);
    for (float c : {0.00836888886988163f, 0.04166620597243309f, 0.166665181517601f, 0.5f, 1.0f})
      p = at::vec::fmadd(p, r, Vec<float>(c));
    return p;
  }
};

// z, the argument of an activation, from the input x and its coefficients centre, scale and shift, c[i] to c[i + 2].
template <typename A>
struct OfInput {
  static constexpr int kCoefficients = 3;
  static Vec<A> z(const auto& c, int i, const Vec<A>& x) { return at::vec::fmadd(x - c[i], c[i + 1], c[i + 2]); }
};

// z from x and a residual.
template <typename A>
struct OfSum {
  static constexpr int kCoefficients = 3;
  static Vec<A> z(const auto& c, int i, const Vec<A>& x, const Vec<A>& residual) {
    return OfInput<A>::z(c, i, x) + residual;
  }
};

// The output of a piecewise linear activation in place of z: the derivative is the same at both.
template <typename A>
struct OfOutput {
  static constexpr int kCoefficients = 0;
  static Vec<A> z(const auto&, int, const Vec<A>&, const Vec<A>& y) { return y; }
};

// To the bits of Piecewise, in fewer instructions.
template <typename M>
struct Relu {
  using V = typename M::V;

  V value(const V& z) const { return M::select(z < V(0), V(0), z); }
  V grad(const V& dy, const V& z) const { return M::select(z <= V(0), V(0), dy); }
};

inline bool is_relu(const Activation& a) {
  return a.curve == Curve::kPiecewise && a.slope == 1 && a.low == 0 && std::isnan(a.high);
}

// An activation whose loops are compiled for it alone: `of` has value(z) and grad(dy, z).
template <typename A, typename Saved, typename Of>
struct InlinedActivation {
  using OfSaved = Saved;              // what backward has of a residual
  static constexpr int kVectors = 1;  // at once
  Of of;

  template <int V>
  Block<A, V> value(const Block<A, V>& z) const {
    return make_block<A, V>([&](int q) __attribute__((always_inline)) { return of.value(z.v[q]).v; });
  }
  template <int V>
  Block<A, V> grad(const Block<A, V>& dy, const Block<A, V>& z) const {
    return make_block<A, V>([&](int q) __attribute__((always_inline)) { return of.grad(dy.v[q], z.v[q]).v; });
  }
};

// One that is called, once for each block.
template <typename A>
class CalledActivation {
 public:
  using OfSaved = OfSum<A>;
  static constexpr int kVectors = kVecs;

  explicit CalledActivation(const Activation& a) : alpha_(static_cast<A>(a.slope)) {
    using V = Number<A>;
    with_curve(a.curve, [&]<typename Of>(Of) {
      value_ = [](Vec<A>* z, int n, A alpha) {
        for (int q = 0; q < n; ++q) z[q] = Of::template value<VectorMath<A>>(V(z[q]), V(alpha)).v;
      };
      grad_ = [](Vec<A>* dy, const Vec<A>* z, int n, A alpha) {
        for (int q = 0; q < n; ++q) dy[q] = Of::template grad<VectorMath<A>>(V(dy[q]), V(z[q]), V(alpha)).v;
      };
    });
  }
  template <int V>
  Block<A, V> value(const Block<A, V>& z) const {
    Block<A, V> y = z;
    value_(y.v, V, alpha_);
    return y;
  }
  template <int V>
  Block<A, V> grad(const Block<A, V>& dy, const Block<A, V>& z) const {
    Block<A, V> dz = dy;
    grad_(dz.v, z.v, V, alpha_);
    return dz;
  }

 private:
  void (*value_)(Vec<A>* z, int n, A alpha);
  void (*grad_)(Vec<A>* dy, const Vec<A>* z, int n, A alpha);
  A alpha_;
};

// A curve without alpha, for an inlined activation.
template <typename M, typename Of>
struct Curved {
  using V = typename M::V;
  V value(const V& z) const { return Of::template value<M>(z, V(1)); }
  V grad(const V& dy, const V& z) const { return Of::template grad<M>(dy, z, V(1)); }
};

// Where common curves are inlined: for the types of most models, which keeps compile times bearable.
template <typename T>
constexpr bool kInlinesCurves = kHasAvx && (std::is_same_v<T, float> || std::is_same_v<T, c10::BFloat16>);

// f(activation of vectors). The bounds of a piecewise linear one are rounded to T, as the outputs are that backward
// compares with them.
template <typename T, typename F>
void with_activation(const Activation& a, const F& f) {
  using A = Acc<T>;
  using M = VectorMath<A>;
  using V = Number<A>;
  if (is_relu(a)) return f(InlinedActivation<A, OfOutput<A>, Relu<M>>());
  if (is_piecewise_linear(a))
    return f(InlinedActivation<A, OfOutput<A>, Piecewise<M>>{
        {V(a.slope), V(static_cast<T>(a.low)), V(static_cast<T>(a.high))}});
  if constexpr (kInlinesCurves<T>) {
    if (a.curve == Curve::kSilu) return f(InlinedActivation<A, OfSum<A>, Curved<M, Silu>>());
    if (a.curve == Curve::kGelu) return f(InlinedActivation<A, OfSum<A>, Curved<M, Gelu>>());
    if (a.curve == Curve::kHardswish) return f(InlinedActivation<A, OfSum<A>, Curved<M, Hardswish>>());
  }
  f(CalledActivation<A>(a));
}

}  // namespace batchnorm_ext::cpu
