// Forward and backward with a residual and an activation after the norm. They extend the ops of forward.cuh and
// backward.cuh.
#pragma once

#include "../activation.h"
#include "backward.cuh"

namespace batchnorm_ext::cuda {

template <typename A>
struct DeviceMath {
  using V = A;
  __device__ static __forceinline__ A select(bool which, A a, A b) { return which ? a : b; }
  __device__ static __forceinline__ A exp(A z) { return ::exp(z); }
  __device__ static __forceinline__ A expm1(A z) { return ::expm1(z); }
  __device__ static __forceinline__ A tanh(A z) { return ::tanh(z); }
  __device__ static __forceinline__ A normal_cdf(A z, A) { return A(0.5) * (A(1) + ::erf(z * A(0.70710678118654752))); }
};

// Activates the elements of a pack, for which it looks up the curve once. The bounds are rounded to T: backward
// compares outputs with them, which are rounded too.
template <typename T>
class PackActivation {
 public:
  using A = Acc<T>;
  using Math = DeviceMath<A>;

  explicit PackActivation(const Activation& a)
      : curve_(a.curve),
        piecewise_(is_piecewise_linear(a)),
        line_{static_cast<A>(a.slope), rounded(a.low), rounded(a.high)} {}

  __device__ __forceinline__ bool is_piecewise() const { return piecewise_; }

  template <int kWidth>
  __device__ __forceinline__ void replace_by_values(A (&z)[kWidth]) const {
    if (piecewise_) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) z[i] = line_.value(z[i]);
      return;
    }
    with_curve(curve_, [&](auto of) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) z[i] = decltype(of)::template value<Math>(z[i], line_.slope);
    });
  }

  template <int kWidth>
  __device__ __forceinline__ void multiply_by_derivatives(A (&dy)[kWidth], const A (&z)[kWidth]) const {
    if (piecewise_) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) dy[i] = line_.grad(dy[i], z[i]);
      return;
    }
    with_curve(curve_, [&](auto of) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) dy[i] = decltype(of)::template grad<Math>(dy[i], z[i], line_.slope);
    });
  }

 private:
  static A rounded(double bound) { return widen(narrow<T>(static_cast<A>(bound))); }

  Curve curve_;
  bool piecewise_;
  Piecewise<Math> line_;  // of another curve, its slope is alpha
};

// y = activation((x - centre) * scale + shift + residual)
template <typename T>
struct ActivatedForward : Forward<T> {
  using A = Acc<T>;
  static constexpr int kInputs = 2, kMostHeld = 16;  // the activation takes registers as well

  const T* residual;  // none: nothing is added
  PackActivation<T> activation;

  template <typename Packs>
  __device__ __forceinline__ void load_rest(Packs& packs, int64_t offset) const {
    if (residual != nullptr) packs.in[1] = load_pack<Packs::kWidth>(residual + offset, false);
  }

  template <bool, typename Packs, typename Coefficients>
  __device__ __forceinline__ void map(const Packs& packs, const Coefficients& c, int64_t offset) const {
    A z[Packs::kWidth];
#pragma unroll
    for (int i = 0; i < Packs::kWidth; ++i)
      z[i] = this->normalized(packs, c, i) + (residual != nullptr ? packs.in[1].get(i) : A(-0.0));
    activation.replace_by_values(z);
    store_pack(this->y + offset, make_pack<T, Packs::kWidth>([&](int i) { return z[i]; }));
  }

  Forward<T> reduction(double* between) const { return Forward<T>::reduction(between); }
  ActivatedForward mapping(double* between) const { return {Forward<T>::mapping(between), residual, activation}; }
};

// sum(g) and sum(g * d) of each lane, with the interface of GradLanes. The caller has subtracted the centre, which does
// not move: d = x - centre.
template <typename A, int kLanes>
struct ActivatedGradLanes {
  static constexpr int kCount = kLanes;
  A s1[kLanes], s2[kLanes];

  __device__ __forceinline__ void add(int lane, A g, A d) {
    s1[lane] += g;
    s2[lane] = fused(g, d, s2[lane]);
  }
  __device__ __forceinline__ void recentre(int) {}
  __device__ __forceinline__ Pair<A> about(int lane, int, A) const { return {s1[lane], s2[lane]}; }
  __device__ static __forceinline__ double2 about_origin(Pair<A> pair, double, double, double) {
    return {pair.a, pair.b};
  }
};

// Its backward: that of a norm with g = activation'(z) * dy in place of dy.
template <typename T>
struct ActivatedBackward : Backward<T> {
  using A = Acc<T>;
  static constexpr int kInputs = 3, kKnown = 4, kMostHeld = 9;
  static constexpr bool kSumsRest = true;
  template <int kLanes>
  using Lanes = ActivatedGradLanes<A, kLanes>;

  const T* residual;  // none: nothing was added; of a piecewise linear activation, the output (ops.cpp)
  T* dresidual;       // g; none: not wanted
  Channels<T> bias;
  PackActivation<T> activation;

  // The coefficients of z, bit for bit those of the forward, and the centre of the sums.
  __device__ __forceinline__ void known_before(int64_t c, A (&z)[kKnown]) const {
    const double all = this->total_count != nullptr ? *this->total_count : static_cast<double>(this->geometry.count());
    const double n = this->training ? all : INFINITY;
    const int64_t channel = channel_of(this->geometry, c);
    const Affine<A> affine =
        affine_about<A>(n, this->mean_of(c), this->invstd_of(c), this->weight.get(channel, 1), bias.get(channel, 0));
    z[0] = affine.centre;
    z[1] = affine.scale;
    z[2] = affine.shift;
    z[3] = static_cast<A>(this->origin(c));
  }

  template <typename Packs>
  __device__ __forceinline__ void load_rest(Packs& packs, int64_t offset) const {
    if (residual != nullptr) packs.in[2] = load_pack<Packs::kWidth>(residual + offset, true);
  }

  // The derivative is the same at z and at the output of a piecewise linear activation.
  __device__ __forceinline__ A argument(A x, A rest, A centre, A scale, A shift) const {
    const A z = fused(x - centre, scale, shift);
    if (residual == nullptr) return z;
    return activation.is_piecewise() ? rest : z + rest;
  }

  // g of the kCount elements of the packs from `begin` on. The coefficients of z are those from `first` on.
  template <int first, int kCount, typename Packs, typename Coefficients>
  __device__ __forceinline__ void differentiate(const Packs& packs, const Coefficients& c, int begin,
                                                A (&g)[kCount]) const {
    A z[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int i = begin + j;
      g[j] = packs.in[0].get(i);
      z[j] = argument(packs.in[1].get(i), packs.in[2].get(i), c(first, i), c(first + 1, i), c(first + 2, i));
    }
    activation.multiply_by_derivatives(g, z);
  }

  __device__ __forceinline__ void start(auto&, const auto&, const auto&, int) const {}

  // A quarter of a pack at a time: there are no registers for more.
  template <typename Lanes, typename Packs, typename Coefficients>
  __device__ __forceinline__ void add(Lanes& lanes, const Packs& packs, const Coefficients& c) const {
    constexpr int kPart = (Packs::kWidth + 3) / 4;
#pragma unroll
    for (int begin = 0; begin < Packs::kWidth; begin += kPart) {
      A g[kPart];
      differentiate<0>(packs, c, begin, g);
#pragma unroll
      for (int j = 0; j < kPart; ++j) {
        const int i = begin + j;
        lanes.add(i % Lanes::kCount, g[j], packs.in[1].get(i) - c(3, i));
      }
    }
  }

  __device__ __forceinline__ double2 terms(int64_t c, int64_t offset, double origin) const {
    A of_z[kKnown], g[1] = {widen(this->dy[offset])};
    known_before(c, of_z);
    const A x = widen(this->x[offset]), rest = residual != nullptr ? widen(residual[offset]) : A(0);
    const A z[1] = {argument(x, rest, of_z[0], of_z[1], of_z[2])};
    activation.multiply_by_derivatives(g, z);
    return {g[0], g[0] * (static_cast<double>(x) - origin)};
  }

  // In evaluation, and for dresidual alone, there may be no sums.
  template <int kCount>
  __device__ __forceinline__ void given(int64_t c, bool leads, A (&map)[kCount]) const {
    if (this->sums == nullptr) return this->set(c, {0, 0}, map);
    Backward<T>::given(c, leads, map);
  }

  template <bool kReduces, typename Packs, typename Coefficients>
  __device__ __forceinline__ void map(const Packs& packs, const Coefficients& c, int64_t offset) const {
    constexpr int kWidth = Packs::kWidth;
    A g[kWidth];
    differentiate<Backward<T>::kCoefficients>(packs, c, 0, g);
    if (dresidual != nullptr) store_pack(dresidual + offset, make_pack<T, kWidth>([&](int i) { return g[i]; }));
    store_pack(this->dx + offset, make_pack<T, kWidth>([&](int i) {
                 return this->template mapped<kReduces>(g[i], packs.in[1].get(i), c, i);
               }));
  }

  ActivatedBackward reduction(double* between) const { return with(Backward<T>::reduction(between)); }
  ActivatedBackward mapping(double* between) const { return with(Backward<T>::mapping(between)); }

 private:
  ActivatedBackward with(const Backward<T>& base) const {
    ActivatedBackward op = *this;
    static_cast<Backward<T>&>(op) = base;
    return op;
  }
};

}  // namespace batchnorm_ext::cuda
