// The backward of statistics whose elements lie along a row of memory, as their parameters do.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <tuple>

#include "../geometry.h"
#include "../math.h"
#include "maps.h"
#include "moments.h"
#include "passes.h"
#include "schedule.h"
#include "scratch.h"
#include "transform.h"

namespace batchnorm_ext::cpu {

// dx = invstd * (g - avg(g) - xhat * avg(g * xhat)) with g = weight * dy, and the sums over rows of dy * xhat and of
// dy. A chunk is some samples, by the shape alone; its threads' sums over rows are merged in the order of the chunks.
template <typename T>
class AlongBackward {
  using A = Acc<T>;
  static constexpr int64_t L = kLanes<A>;
  static constexpr int64_t kAhead = 3072 / sizeof(T);  // elements
  static constexpr int64_t kMinSamples = 16;           // of a chunk
  static constexpr int64_t kMostChunks = 64;           // about: each is summed up by one thread in the end
  static constexpr int64_t kMaxPartials = 524288;      // sums over rows of all chunks together: 8 MB

 public:
  AlongBackward(const Geometry& geometry, const double* weight) : g(geometry), parameters(g.channels) {
    std::transform(weight, weight + g.channels, parameters.row(0), [](double w) { return static_cast<A>(w); });
    samples_per_chunk = even_share(g.batch, std::max({kMinSamples, kGrainElements / g.channels, g.batch / kMostChunks,
                                                      g.batch * g.channels / kMaxPartials}));
    chunks = (g.batch + samples_per_chunk - 1) / samples_per_chunk;
  }

  // dx may be null. Sets dweight and dbias of each channel.
  void run(const T* dy, const T* x, T* dx, bool centred, const double* mean, const double* invstd, double* dweight,
           double* dbias) {
    const int64_t channels = g.channels;
    std::unique_ptr<double[]> parts(new double[2 * chunks * channels]);
    with_streaming<T>(g, [&](auto streaming) {
      parallel(chunks, 1, [&](int64_t begin, int64_t end) {
        Scratch scratch;
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          double* const sums = parts.get() + 2 * chunk * channels;
          run_chunk<streaming.value>(chunk, dy, x, dx, centred, mean, invstd, sums, sums + channels, scratch);
        }
      });
    });
    parallel(channels, 4096, [&](int64_t begin, int64_t end) {
      std::fill(dweight + begin, dweight + end, 0.0);
      std::fill(dbias + begin, dbias + end, 0.0);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const double *const dots = parts.get() + 2 * chunk * channels, *const sums = dots + channels;
        for (int64_t c = begin; c < end; ++c) dweight[c] += dots[c], dbias[c] += sums[c];
      }
    });
  }

 private:
  struct RowSums {
    double sum = 0, dot = 0;
  };

  template <bool kStream>
  void run_chunk(int64_t chunk, const T* dy, const T* x, T* dx, bool centred, const double* mean, const double* invstd,
                 double* dweight, double* dbias, Scratch& scratch) const {
    const int64_t padded = g.channels + L, groups = g.channels / g.per_stat;
    const auto [dots, sums] = scratch.template arrays<A, A>({padded, padded});
    std::fill_n(dweight, g.channels, 0.0);
    std::fill_n(dbias, g.channels, 0.0);
    const int64_t first = chunk * samples_per_chunk, last = std::min(g.batch, first + samples_per_chunk);
    for (int64_t tile = first; tile < last; tile += kTile) {
      std::fill_n(dots, padded, A(0));
      std::fill_n(sums, padded, A(0));
      for (int64_t row = tile * groups; row < std::min(last, tile + kTile) * groups; ++row) {
        const int64_t at = row * g.per_stat, channel = row % groups * g.per_stat;
        const A* const weight = parameters.view()[0] + channel;
        const Affine<A> affine = make_affine<A>(mean[row], mean[row], invstd[row], 1, 0);
        const RowSums found = reduce(dy + at, x + at, weight, affine, dots + channel, sums + channel);
        if (dx == nullptr) continue;
        GradSums grads = make_grad_sums(found.sum, found.dot, mean[row], affine.centre, invstd[row]);
        if (!centred) grads.dbias = 0;
        map<kStream>(dy + at, x + at, dx + at, weight, grads, mean[row], invstd[row]);
      }
      for (int64_t c = 0; c < g.channels; ++c) dweight[c] += dots[c], dbias[c] += sums[c];
    }
  }

  // Adds dy * xhat to dots and dy to sums, and gives sum(g) and sum(g * (x - centre)) of the row. Asks for what comes
  // kAhead elements later: the work at the end of a row keeps the processor from looking that far.
  RowSums reduce(const T* dy, const T* x, const A* weight, const Affine<A>& affine, A* dots, A* sums) const {
    constexpr int V = kParts<T>;
    constexpr int64_t width = Vec<T>::size();
    const Vec<A> centre(affine.centre), scale(affine.scale), shift(affine.shift), zero(0);
    Vec<A> sum[V], dot[V];
    const auto add = [&](int64_t j, const Block<A, V>& grad, const Block<A, V>& value,
                         int64_t lanes) __attribute__((always_inline)) {
      __builtin_prefetch(dy + j + kAhead);
      __builtin_prefetch(x + j + kAhead);
      for (int q = 0; q < V; ++q) {
        const int64_t at = j + q * Vec<A>::size();
        Vec<A> d = value.v[q] - centre, weighted = grad.v[q] * Vec<A>::loadu(weight + at);
        Vec<A> xhat = at::vec::fmadd(d, scale, shift);
        if (lanes < width) {  // beyond the row: 0 * inf would not be 0
          const int64_t inside = std::clamp<int64_t>(lanes - q * Vec<A>::size(), 0, Vec<A>::size());
          xhat = Vec<A>::set(zero, xhat, inside);
          d = Vec<A>::set(zero, d, inside);
          weighted = Vec<A>::set(zero, weighted, inside);
        }
        at::vec::fmadd(grad.v[q], xhat, Vec<A>::loadu(dots + at)).store(dots + at);
        (Vec<A>::loadu(sums + at) + grad.v[q]).store(sums + at);
        sum[q] = sum[q] + weighted;
        dot[q] = at::vec::fmadd(weighted, d, dot[q]);
      }
    };
    RowSums result;
    for (int64_t begin = 0; begin < g.per_stat; begin += kTile * width) {
      const int64_t end = std::min(g.per_stat, begin + kTile * width);
      for (int q = 0; q < V; ++q) sum[q] = dot[q] = zero;
      int64_t j = begin;
      for (; j + width <= end; j += width) add(j, load_block<V>(dy + j), load_block<V>(x + j), width);
      if (j < end) add(j, load_block<V>(dy + j, end - j), load_block<V>(x + j, end - j), end - j);
      result.sum += sum_of_vectors(sum);
      result.dot += sum_of_vectors(dot);
    }
    return result;
  }

  template <bool kStream>
  void map(const T* dy, const T* x, T* dx, const A* weight, GradSums grads, double mean, double invstd) const {
    const double n = static_cast<double>(g.count());
    const GradAffine<A> affine =
        make_grad_affine<A>(centre_of<A>(mean, invstd, n, slope_of(grads, n, invstd)), grads, n, mean, invstd, 1);
    const Vec<A> centre(affine.centre), slope(affine.slope), offset(affine.offset), scale(affine.scale);
    const auto f = [&](int64_t j, const Vec<A>& grad, const Vec<A>& value) {
      const Vec<A> along = at::vec::fmadd(value - centre, slope, offset);
      return scale * at::vec::fmsub(Vec<A>::loadu(weight + j), grad, along);
    };
    transform<kStream>(std::array{dx}, g.per_stat, f, LaneIndex(), dy, x);
  }

  const Geometry g;
  CoefficientTable<A, 1> parameters;
  int64_t samples_per_chunk, chunks;
};

}  // namespace batchnorm_ext::cpu
