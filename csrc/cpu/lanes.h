// Reductions kept per lane. A lane is one position of a Block: in the row pattern the lanes together see one channel,
// in the column pattern each lane is a channel of its own. Both patterns therefore share these accumulators and differ
// only in the distance between the blocks they feed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "vec.h"

namespace batchnorm_ext::cpu {

// Blocks between two clean-ups of an accumulator: fp32 sums stay this short, everything longer is summed in fp64.
constexpr int64_t kTile = 32;
// Blocks whose mean is the first centre. They are read twice, the second time from the nearest cache.
constexpr int64_t kFirstTile = 8;

template <typename A>
inline void clear(LaneArray<A>& lanes) {
  for (int q = 0; q < kVecs; ++q) lanes.set(q, Vec<A>(0));
}

// total + partial of each lane; `totals` is not read before the first flush into it.
template <typename A>
inline void flush(const LaneArray<A>& partial, const double* totals, bool first, double* out) {
  for (int64_t l = 0; l < kLanes<A>; ++l) out[l] = first ? partial.values[l] : totals[l] + partial.values[l];
}

// All lanes of a block in memory. What was read in another order is not written: narrowing would leave it in that
// order. `streams`: past the caches, where a vector begins at a boundary, as not all rows do.
template <int V, Order order>
struct WholeBlock {
  template <typename T>
  Block<Acc<T>, V> load(const T* p) const {
    return load_block<V, order>(p);
  }
  template <typename T>
    requires(order == Order::kOfMemory || std::is_same_v<T, Acc<T>>)
  void store(T* p, const Block<Acc<T>, V>& block, bool streams) const {
    if (streams && reinterpret_cast<uintptr_t>(p) % (Vec<T>::size() * sizeof(T)) == 0)
      store_block<true>(p, block);
    else
      store_block<false>(p, block);
  }
};

// The first `count` lanes from `offset` on.
template <int V>
struct PartialBlock {
  int64_t offset, count;

  template <typename T>
  Block<Acc<T>, V> load(const T* p) const {
    return load_block<V>(p + offset, count);
  }
  template <typename T>
  void store(T* p, const Block<Acc<T>, V>& block, bool) const {
    narrow<T>(block,
              [&](const Vec<T>& part, int64_t) { part.store(p + offset, std::min<int64_t>(count, Vec<T>::size())); });
  }
};

// Bodies of inner loops are inlined on demand: what a compiler decides by itself depends on who else calls them.
//
// Calls body.operator()<V>(first vector, part), where `part` loads and stores the block of V vectors from there on:
// once for a full block (lanes == kLanes), else for each vector of T that holds any of the first `lanes` lanes.
// `order`: of a full block.
template <Order order, typename T, typename Body>
inline void for_each_part(int64_t lanes, const Body& body) {
  using A = Acc<T>;
  constexpr int V = kParts<T>;
  constexpr int64_t width = Vec<T>::size();
  if (lanes == kLanes<A>) return body.template operator()<kVecs>(0, WholeBlock<kVecs, order>());
  for (int64_t first = 0; first < lanes; first += width)
    body.template operator()<V>(first / Vec<A>::size(), PartialBlock<V>{first, lanes - first});
}

// take<R>(i) for items [i, i + R), which together cover [0, n): what is summed for one item is a chain of additions,
// whose latency those of the next ones fill.
template <int kTogether, typename Take>
inline void for_each_together(int64_t n, const Take& take) {
  int64_t i = 0;
  for (; i + kTogether <= n; i += kTogether) take.template operator()<kTogether>(i);
  for (; i < n; ++i) take.template operator()<1>(i);
}

// Moments of the values v seen by each lane, about a centre k that follows the mean:
//   s1 = sum(v - k),  m2 + s2 = sum((v - k)^2)
// Per element: d = v - k; s1 += d; s2 += d * d. Every tile, the centre moves to the current mean kn by the identity
//   sum((v - kn)^2) = sum((v - k)^2) - de * (2 * s1 - n * de),  de = kn - k
// which holds for any kn, so neither the division nor its rounding needs care. No cancellation, whatever mean / std is.
template <typename A, Order order>
struct LaneMoments {
  LaneArray<A> k, s1, s2;
  double m2[kLanes<A>];
  int64_t n = 0, next_tile = kTile;

  // Adds `blocks` blocks, `stride` elements apart, of which the first `lanes` lanes exist.
  template <typename T>
  void add(const T* p, int64_t stride, int64_t blocks, int64_t lanes = kLanes<A>) {
    if (n == 0 && blocks > 0) start(p, stride, std::min(blocks, kFirstTile), lanes);
    while (blocks > 0) {
      if (n == next_tile) recentre();
      const int64_t tile = std::min(blocks, next_tile - n);
      for_each_part<order, T>(lanes, [&]<int V>(int64_t first, const auto& part) __attribute__((always_inline)) {
        Vec<A> centre[V], sum[V], squares[V];
        for (int q = 0; q < V; ++q) {
          centre[q] = k[first + q];
          sum[q] = s1[first + q];
          squares[q] = s2[first + q];
        }
        for (int64_t i = 0; i < tile; ++i) {
          const Block<A, V> x = part.load(p + i * stride);
          for (int q = 0; q < V; ++q) {
            const Vec<A> d = x.v[q] - centre[q];
            sum[q] = sum[q] + d;
            squares[q] = at::vec::fmadd(d, d, squares[q]);
          }
        }
        for (int q = 0; q < V; ++q) {
          s1.set(first + q, sum[q]);
          s2.set(first + q, squares[q]);
        }
      });
      p += tile * stride;
      n += tile;
      blocks -= tile;
    }
  }

  bool first_tile() const { return next_tile == kTile; }

 private:
  // The first element alone is a poor centre where there are few elements.
  template <typename T>
  void start(const T* p, int64_t stride, int64_t blocks, int64_t lanes) {
    clear(k), clear(s1), clear(s2);
    const Vec<A> inverse(A(1) / static_cast<A>(blocks));
    for_each_part<order, T>(lanes, [&]<int V>(int64_t first, const auto& part) __attribute__((always_inline)) {
      const Block<A, V> x = part.load(p);
      Vec<A> sum[V];
      for (int q = 0; q < V; ++q) sum[q] = Vec<A>(0);
      for (int64_t i = 1; i < blocks; ++i) {
        const Block<A, V> v = part.load(p + i * stride);
        for (int q = 0; q < V; ++q) sum[q] = sum[q] + (v.v[q] - x.v[q]);
      }
      for (int q = 0; q < V; ++q) k.set(first + q, at::vec::fmadd(sum[q], inverse, x.v[q]));
    });
  }

  void recentre() {
    const Vec<A> count(static_cast<A>(n)), inverse(A(1) / static_cast<A>(n)), two(2);
    for (int q = 0; q < kVecs; ++q) {
      const Vec<A> centre = k[q], sum = s1[q];
      const Vec<A> moved = at::vec::fmadd(sum, inverse, centre);
      const Vec<A> step = moved - centre;
      s2.set(q, s2[q] - step * (two * sum - count * step));
      s1.set(q, sum - count * step);
      k.set(q, moved);
    }
    flush(s2, m2, first_tile(), m2);
    clear(s2);
    next_tile = n + kTile;
  }
};

// What enters the sums of a gradient is grad(coefficients of the q-th vector, row, dy, x...): dy, or dy times a weight
// for each row of blocks, or dy times the derivative of an activation (maps.h), which grad.keep() may write to memory
// for the map. A functor with coefficients has their values for every cell in `rows`.
struct PlainGrad {
  static constexpr int kCoefficients = 0;

  PlainGrad from(int64_t) const { return {}; }
  static void keep(const auto&...) {}
  double at(int64_t, double dy, double) const { return dy; }  // of one element of a cell
  template <typename A, int V>
  Block<A, V> operator()(const auto&, int64_t, const Block<A, V>& dy, const Block<A, V>&) const {
    return dy;
  }
};

template <typename A>
struct WeightedGrad {
  static constexpr int kCoefficients = 0;
  const A* weight;

  WeightedGrad from(int64_t row) const { return {weight + row}; }
  static void keep(const auto&...) {}
  template <int V>
  Block<A, V> operator()(const auto&, int64_t row, const Block<A, V>& dy, const Block<A, V>&) const {
    return make_block<A, V>([&](int q) __attribute__((always_inline)) { return Vec<A>(weight[row]) * dy.v[q]; });
  }
};

// What the sums of a gradient need of each cell: for k == 0 the mean, after that the coefficients of grad.
template <typename A, typename Grad>
const A* per_cell(const A* mean, const Grad& grad, int k) {
  if constexpr (Grad::kCoefficients > 0)
    if (k > 0) return grad.rows[k - 1];
  return mean;
}

// sum(g) and sum(g * (x - mean)) of each lane, with g = grad(...).
template <typename A, Order order, int kCoefficients>
struct LaneGradSums {
  LaneArray<A> mean, s1, s2;
  std::array<LaneArray<A>, kCoefficients> coefficients;
  double sum[kLanes<A>], dot[kLanes<A>];
  int64_t n;  // blocks in s1 and s2
  bool first_tile;

  // load(k): a block of what per_cell gives, for all lanes.
  template <typename Load>
  void reset(const Load& load) {
    const auto set = [](LaneArray<A>& to, const Block<A>& from) {
      for (int q = 0; q < kVecs; ++q) to.set(q, from.v[q]);
    };
    set(mean, load(0));
    for (int k = 0; k < kCoefficients; ++k) set(coefficients[k], load(1 + k));
    first_tile = true;
    restart();
  }

  // `more`: what grad takes beside dy and x.
  template <typename T, typename Grad, typename... More>
  void add(Grad grad, int64_t stride, int64_t blocks, int64_t lanes, const T* dy, const T* x, const More*... more) {
    int64_t at = 0;
    while (blocks > 0) {
      if (n == kTile) {
        finish(sum, dot);
        first_tile = false;
        restart();
      }
      const int64_t tile = std::min(blocks, kTile - n);
      for_each_part<order, T>(lanes, [&]<int V>(int64_t first, const auto& part) __attribute__((always_inline)) {
        Vec<A> centre[V], sums[V], dots[V];
        Coefficients<A, kCoefficients> c[V];
        for (int q = 0; q < V; ++q) {
          centre[q] = mean[first + q];
          sums[q] = s1[first + q];
          dots[q] = s2[first + q];
          for (int k = 0; k < kCoefficients; ++k) c[q][k] = coefficients[k][first + q];
        }
        const auto of = [&](int q) -> const auto& { return c[q]; };
        for (int64_t i = 0; i < tile; ++i) {
          const int64_t here = at + i * stride;
          if constexpr (kCoefficients > 0)
            if (stride == kLanes<A>) prefetch_ahead(dy + here, x + here, (more + here)...);
          const Block<A, V> value = part.load(x + here);
          const Block<A, V> entering = grad(of, i, part.load(dy + here), value, part.load(more + here)...);
          grad.keep(part, dy + here, entering);
          for (int q = 0; q < V; ++q) {
            sums[q] = sums[q] + entering.v[q];
            dots[q] = at::vec::fmadd(entering.v[q], value.v[q] - centre[q], dots[q]);
          }
        }
        for (int q = 0; q < V; ++q) {
          s1.set(first + q, sums[q]);
          s2.set(first + q, dots[q]);
        }
      });
      at += tile * stride;
      grad = grad.from(tile);
      n += tile;
      blocks -= tile;
    }
  }

  void finish(double* sums, double* dots) const {
    flush(s1, sum, first_tile, sums);
    flush(s2, dot, first_tile, dots);
  }

 private:
  void restart() {
    clear(s1), clear(s2);
    n = 0;
  }
};

}  // namespace batchnorm_ext::cpu
