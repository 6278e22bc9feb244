// Layer normalization over the channels of NCHW, where neighbouring pixels are neighbours in memory. A pixel has
// statistics of its own, a channel a weight and a bias. The lanes of a warp have the pixels of a strip, a pack of them
// each; the warps of a block share its channels. Both passes read the strip: the second finds it in the cache.
#pragma once

#include "../math.h"
#include "../resum.h"
#include "lanes.cuh"
#include "reduce.cuh"

namespace batchnorm_ext::cuda {

struct Image {
  int64_t batch, channels, pixels;

  BATCHNORM_EXT_HD int64_t stats() const { return batch * pixels; }
  BATCHNORM_EXT_HD int64_t strips_per_sample(int width) const { return (pixels + width - 1) / width; }
  BATCHNORM_EXT_HD int64_t strips(int width) const { return batch * strips_per_sample(width); }
};

template <typename T_>
struct AcrossForward {
  using T = T_;
  using A = Acc<T>;
  static constexpr int kCoefficients = 3;
  static constexpr bool kMoments = true;
  template <int kLanes>
  using Lanes = MomentLanes<A, kLanes>;
  template <int kWidth>
  using Packs = Pack<T, kWidth>;

  const T* x;
  T* y;
  Image shape;
  double eps;
  Channels<T> weight, bias;
  double* stats;  // [mean | invstd] of each pixel

  template <int kWidth>
  __device__ __forceinline__ Packs<kWidth> load(int64_t offset) const {
    return load_pack<kWidth>(x + offset, true);
  }

  template <int kWidth>
  __device__ __forceinline__ void start(Lanes<kWidth>& lanes, const Packs<kWidth>& packs, int64_t) const {
#pragma unroll
    for (int l = 0; l < kWidth; ++l) lanes.start(l, packs.get(l));
  }
  template <int kWidth>
  __device__ __forceinline__ void add(Lanes<kWidth>& lanes, const Packs<kWidth>& packs, int64_t) const {
#pragma unroll
    for (int l = 0; l < kWidth; ++l) lanes.add(l, packs.get(l));
  }

  // The map of a pixel, whose elements lie from `offset` on, from its sums about `origin`.
  __device__ __forceinline__ void finish(int64_t pixel, int64_t offset, double2 total, double origin,
                                         A (&map)[kCoefficients]) const {
    const double n = static_cast<double>(shape.channels), shift = total.x / n;
    Moments moments{origin + shift, total.y - total.x * shift};
    if (!isfinite(moments.scaled_m2))
      moments = resum_moments(shape.channels, std::is_same_v<T, double> ? kShrink : 1,
                              [&](int64_t c) { return double{widen(x[offset + c * shape.pixels])}; });
    if (moments.scaled_m2 < 0) moments.scaled_m2 = 0;
    const double mean = moments.mean, invstd = moments.invstd(n, eps);
    stats[pixel] = mean;
    stats[shape.stats() + pixel] = invstd;
    const Affine<A> affine = make_affine<A>(centre_of<A>(mean, invstd, n, invstd), mean, invstd, 1, 0);
    map[0] = affine.centre;
    map[1] = affine.scale;
    map[2] = affine.shift;
  }

  // y = ((x - centre) * scale + shift) * weight + bias
  template <int kWidth>
  __device__ __forceinline__ void map(int64_t channel, int64_t offset, bool active, const A (&c)[3][kWidth],
                                      bool) const {
    if (!active) return;
    const A w = weight.value(channel, 1), b = bias.value(channel, 0);
    const auto packs = load<kWidth>(offset);
    store_pack(y + offset, make_pack<T, kWidth>(
                               [&](int l) { return fused(fused(packs.get(l) - c[0][l], c[1][l], c[2][l]), w, b); }));
  }
};

template <typename T_>
struct AcrossBackward {
  using T = T_;
  using A = Acc<T>;
  static constexpr int kCoefficients = 5;
  static constexpr bool kMoments = false;
  template <int kLanes>
  using Lanes = GradLanes<A, kLanes>;
  template <int kWidth>
  struct Packs {
    Pack<T, kWidth> dy, x;
  };

  const T *dy, *x;
  T* dx;  // none: only the gradients of the parameters are wanted
  Image shape;
  Channels<T> weight;
  const double* stats;  // [mean | invstd] of each pixel
  double2* parts;       // [blocks, channels]: sum(dy * xhat) and sum(dy), of the strips of a block

  template <int kWidth>
  __device__ __forceinline__ Packs<kWidth> load(int64_t offset) const {
    return {load_pack<kWidth>(dy + offset, true), load_pack<kWidth>(x + offset, true)};
  }

  template <int kWidth>
  __device__ __forceinline__ void start(Lanes<kWidth>& lanes, const Packs<kWidth>&, int64_t pixel) const {
#pragma unroll
    for (int l = 0; l < kWidth; ++l) lanes.start(l, static_cast<A>(stats[pixel + l]));
  }
  template <int kWidth>
  __device__ __forceinline__ void add(Lanes<kWidth>& lanes, const Packs<kWidth>& packs, int64_t channel) const {
    const A w = weight.value(channel, 1);
#pragma unroll
    for (int l = 0; l < kWidth; ++l) lanes.add(l, w * packs.dy.get(l), packs.x.get(l));
  }

  __device__ __forceinline__ void finish(int64_t pixel, int64_t offset, double2 total, double origin,
                                         A (&map)[kCoefficients]) const {
    const double n = static_cast<double>(shape.channels), mean = stats[pixel], invstd = stats[shape.stats() + pixel];
    GradSums sums = make_grad_sums(total.x, total.y, mean, origin, invstd);
    if (grads_lost<A>(sums, n, mean, invstd))
      sums = resum_grads(
          shape.channels, mean, invstd,
          [&](int64_t c) { return weight.get(c, 1) * widen(dy[offset + c * shape.pixels]); },
          [&](int64_t c) { return double{widen(x[offset + c * shape.pixels])}; });
    const double about = centre_of<A>(mean, invstd, n, slope_of(sums, n, invstd));
    const GradAffine<A> affine = make_grad_affine<A>(about, sums, n, mean, invstd, 1);
    map[0] = affine.centre;
    map[1] = affine.slope;
    map[2] = affine.offset;
    map[3] = affine.scale;
    map[4] = make_affine<A>(about, mean, invstd, 1, 0).shift;
  }

  // dx = scale * (weight * dy - (x - centre) * slope - offset), xhat = (x - centre) * scale + shift. By whole warps:
  // the first lane adds what they have of a channel to the part of its block.
  template <int kWidth>
  __device__ __forceinline__ void map(int64_t channel, int64_t offset, bool active, const A (&c)[5][kWidth],
                                      bool first) const {
    A dot = 0, sum = 0;
    if (active) {
      const A w = weight.value(channel, 1);
      const auto packs = load<kWidth>(offset);
#pragma unroll
      for (int l = 0; l < kWidth; ++l) {
        dot = fused(packs.dy.get(l), fused(packs.x.get(l) - c[0][l], c[3][l], c[4][l]), dot);
        sum += packs.dy.get(l);
      }
      if (dx != nullptr)
        store_pack(dx + offset, make_pack<T, kWidth>([&](int l) {
                     return c[3][l] * fused(w, packs.dy.get(l), -fused(packs.x.get(l) - c[0][l], c[1][l], c[2][l]));
                   }));
    }
    dot = warp_sum(dot), sum = warp_sum(sum);
    if (threadIdx.x % kWarp != 0) return;
    double2& part = parts[blockIdx.x * shape.channels + channel];
    part = first ? double2{dot, sum} : double2{part.x + dot, part.y + sum};
  }
};

// The sums of this lane's pixels over the channels of its warp.
template <int kWidth, typename Op>
__device__ __forceinline__ auto reduce_across(const Op& op, int64_t pixel, int64_t offset) {
  typename Op::template Lanes<kWidth> lanes{};
  int64_t channel = threadIdx.x / kWarp;
#pragma unroll 1
  for (int count = 0, batch = 1; channel < op.shape.channels; ++batch) {
    typename Op::template Packs<kWidth> packs[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u)
      if (const int64_t c = channel + u * kWarps; c < op.shape.channels)
        packs[u] = op.template load<kWidth>(offset + c * op.shape.pixels);
    if (count == 0) op.template start<kWidth>(lanes, packs[0], pixel);
#pragma unroll
    for (int u = 0; u < kLoads; ++u, channel += kWarps)
      if (channel < op.shape.channels) op.template add<kWidth>(lanes, packs[u], channel), ++count;
    if ((batch & (batch - 1)) == 0) lanes.recentre(count);  // as reduce_chunk
  }
  return lanes;
}

// Dynamic shared memory, in values of the accumulation type: centres and pairs of each warp and pixel, the map of each
// pixel.
template <typename Op, int kWidth>
constexpr int kAcrossShared = kWarp * kWidth * (3 * kWarps + Op::kCoefficients);

template <typename Op, int kWidth>
__global__ void __launch_bounds__(kThreads, 2) across_kernel(const __grid_constant__ Op op) {
  using A = typename Op::A;
  constexpr int kStrip = kWarp * kWidth;
  A* const centres = dynamic_shared<A>();
  auto* const sums = reinterpret_cast<Pair<A>*>(centres + kWarps * kStrip);
  A* const table = centres + 3 * kWarps * kStrip;
  const Image& s = op.shape;
  const int warp = threadIdx.x / kWarp, own = threadIdx.x % kWarp * kWidth;
  const int64_t per_sample = s.strips_per_sample(kStrip), strips = s.strips(kStrip);
#pragma unroll 1
  for (int64_t strip = blockIdx.x; strip < strips; strip += gridDim.x) {
    const int64_t sample = strip / per_sample, begin = (strip - sample * per_sample) * kStrip;
    const int64_t first = sample * s.channels * s.pixels + begin, pixel = sample * s.pixels + begin;
    const int count = static_cast<int>(s.pixels - begin < kStrip ? s.pixels - begin : kStrip);
    const bool active = own < count;
    if (active) {
      const auto lanes = reduce_across<kWidth>(op, pixel + own, first + own);
#pragma unroll
      for (int l = 0; l < kWidth; ++l) {
        centres[warp * kStrip + own + l] = lanes.k[l];
        sums[warp * kStrip + own + l] = {lanes.s1[l], lanes.s2[l]};
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const double origin = centres[i];
      double2 total{0, 0};
      for (int w = 0; w < kWarps && w < s.channels; ++w) {
        const double n = static_cast<double>((s.channels - w + kWarps - 1) / kWarps);
        const double e = Op::kMoments ? static_cast<double>(centres[w * kStrip + i]) - origin : 0;
        const double2 part = Op::template Lanes<kWidth>::about_origin(sums[w * kStrip + i], n, n, e);
        total = {total.x + part.x, total.y + part.y};
      }
      A map[Op::kCoefficients];
      op.finish(pixel + i, first + i, total, origin, map);
#pragma unroll
      for (int k = 0; k < Op::kCoefficients; ++k) table[k * kStrip + i] = map[k];
    }
    __syncthreads();
    A c[Op::kCoefficients][kWidth];
#pragma unroll
    for (int k = 0; k < Op::kCoefficients; ++k)
#pragma unroll
      for (int l = 0; l < kWidth; ++l) c[k][l] = active ? table[k * kStrip + own + l] : A(0);
#pragma unroll 2
    for (int64_t channel = warp; channel < s.channels; channel += kWarps)
      op.template map<kWidth>(channel, first + own + channel * s.pixels, active, c, strip == blockIdx.x);
  }
}

// Calls f(kernel, blocks, shared bytes) and returns the number of blocks, as for launch_across().
template <typename Op, typename F>
int64_t with_across_kernel(bool aligned, const Image& shape, int64_t most, const F& f) {
  const auto call = [&]<int kWidth>(std::integral_constant<int, kWidth>) {
    const int64_t strips = shape.strips(kWarp * kWidth), blocks = most > 0 && most < strips ? most : strips;
    f(across_kernel<Op, kWidth>, blocks, kAcrossShared<Op, kWidth> * int64_t{sizeof(typename Op::A)});
    return blocks;
  };
  constexpr int kFull = 16 / sizeof(typename Op::T);
  if (aligned && shape.pixels % kFull == 0) return call(std::integral_constant<int, kFull>());
  return call(std::integral_constant<int, 1>());
}

}  // namespace batchnorm_ext::cuda
