// Reductions kept per lane. A lane is one position of a Block: in the row pattern the lanes together see one channel,
// in the column pattern each lane is a channel of its own. Both patterns therefore share these accumulators and differ
// only in the distance between the blocks they feed.
#pragma once

#include <cstdint>

#include "vec.h"

namespace batchnorm_ext::cpu {

// Blocks between two clean-ups of an accumulator: fp32 sums stay this short, everything longer is summed in fp64.
constexpr int64_t kTile = 32;
// The first clean-up comes early, because the first centre is only the first element.
constexpr int64_t kFirstTile = 8;

// Moments of the values v seen by each lane, about a centre k that follows the mean:
//   s1 = sum(v - k),  m2 + s2 = sum((v - k)^2)
// Per element: d = v - k; s1 += d; s2 += d * d. Every tile, the centre moves to the current mean kn by the identity
//   sum((v - kn)^2) = sum((v - k)^2) - de * (2 * s1 - n * de),  de = kn - k
// which holds for any kn, so neither the division nor its rounding needs care. No cancellation, whatever mean / std is.
template <typename A>
struct LaneMoments {
  Block<A> k, s1, s2;
  double m2[kLanes<A>];
  int64_t n = 0, next_tile = kFirstTile;

  // Adds `blocks` blocks, `stride` elements apart, of which the first `lanes` lanes exist.
  template <bool kPartial, typename T>
  void add(const T* p, int64_t stride, int64_t blocks, int64_t lanes = 0) {
    const auto next = [&] {
      const T* at = p;
      p += stride;
      if constexpr (kPartial)
        return load_block(at, lanes);
      else
        return load_block(at);
    };
    if (blocks > 0 && n == 0) {
      k = next();
      for (int q = 0; q < kVecs; ++q) s1.v[q] = s2.v[q] = Vec<A>(0);
      for (double& m : m2) m = 0;
      n = 1;
      --blocks;
    }
    while (blocks > 0) {
      const int64_t tile = std::min(blocks, next_tile - n);
      const Block<A> centre = k;
      Block<A> sum = s1, squares = s2;
      for (int64_t i = 0; i < tile; ++i) {
        const Block<A> x = next();
        for (int q = 0; q < kVecs; ++q) {
          const Vec<A> d = x.v[q] - centre.v[q];
          sum.v[q] = sum.v[q] + d;
          squares.v[q] = at::vec::fmadd(d, d, squares.v[q]);
        }
      }
      s1 = sum;
      s2 = squares;
      n += tile;
      blocks -= tile;
      if (n == next_tile) recentre();
    }
  }

  void recentre() {
    const Vec<A> count(static_cast<A>(n)), inverse(A(1) / static_cast<A>(n)), two(2);
    for (int q = 0; q < kVecs; ++q) {
      const Vec<A> moved = at::vec::fmadd(s1.v[q], inverse, k.v[q]);
      const Vec<A> step = moved - k.v[q];
      s2.v[q] = s2.v[q] - step * (two * s1.v[q] - count * step);
      s1.v[q] = s1.v[q] - count * step;
      k.v[q] = moved;
    }
    flush(s2, m2);
    next_tile = n + kTile;
  }

  // Moves fp32 partial sums to the fp64 totals behind them.
  static void flush(Block<A>& partial, double* total) {
    alignas(64) A lanes[kLanes<A>];
    partial.store(lanes);
    for (int64_t l = 0; l < kLanes<A>; ++l) total[l] += lanes[l];
    for (int q = 0; q < kVecs; ++q) partial.v[q] = Vec<A>(0);
  }
};

// sum(dy) and sum(dy * (x - mean)) of each lane.
template <typename A>
struct LaneGradSums {
  Block<A> mean, s1, s2;
  double sum[kLanes<A>], dot[kLanes<A>];
  int64_t n = 0;

  void reset(const Block<A>& centre) {
    mean = centre;
    for (int q = 0; q < kVecs; ++q) s1.v[q] = s2.v[q] = Vec<A>(0);
    for (int64_t l = 0; l < kLanes<A>; ++l) sum[l] = dot[l] = 0;
    n = 0;
  }

  template <bool kPartial, typename T>
  void add(const T* dy, const T* x, int64_t stride, int64_t blocks, int64_t lanes = 0) {
    const auto get = [&](const T* at) {
      if constexpr (kPartial)
        return load_block(at, lanes);
      else
        return load_block(at);
    };
    while (blocks > 0) {
      const int64_t tile = std::min(blocks, kTile - n);
      const Block<A> centre = mean;
      Block<A> a = s1, b = s2;
      for (int64_t i = 0; i < tile; ++i, dy += stride, x += stride) {
        const Block<A> g = get(dy), v = get(x);
        for (int q = 0; q < kVecs; ++q) {
          a.v[q] = a.v[q] + g.v[q];
          b.v[q] = at::vec::fmadd(g.v[q], v.v[q] - centre.v[q], b.v[q]);
        }
      }
      s1 = a;
      s2 = b;
      n += tile;
      blocks -= tile;
      if (n == kTile) flush();
    }
  }

  void flush() {
    LaneMoments<A>::flush(s1, sum);
    LaneMoments<A>::flush(s2, dot);
    n = 0;
  }
};

}  // namespace batchnorm_ext::cpu
